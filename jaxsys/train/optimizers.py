"""Optimisers under names: plain functions that return optax transformations."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxsys.core.errors import UserError


def adamw(
    lr: float = 1e-3,
    *,
    warmup_steps: int = 0,
    total_steps: int | None = None,
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip_norm: float | None = None,
    decays: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Make AdamW as language models use it: decay on matrices only, optional warm-up and cosine.

    Args:
      lr: peak learning rate.
      warmup_steps: steps of linear growth from 0 to `lr`.
      total_steps: where a cosine decay to a tenth of `lr` ends; constant after warm-up if left out.
      b1: decay of the first moment.
      b2: decay of the second moment; 0.95 is the custom for language models.
      weight_decay: of leaves with two or more dimensions.
      clip_norm: bound on the global norm of the gradient; none if left out.
      decays: parameters to a tree of which of them decay, where it is not as `weight_decay` says.

    Returns:
      The transformation.

    Raises:
      UserError: if the warm-up does not end before `total_steps`.

    Reference: Loshchilov and Hutter, arXiv 1711.05101.

    >>> import jax.numpy as jnp
    >>> state = adamw(0.1).init({"w": jnp.ones((2, 2))})
    >>> updates, _ = adamw(0.1).update({"w": jnp.ones((2, 2))}, state, {"w": jnp.zeros((2, 2))})
    >>> updates["w"].round(3).tolist()
    [[-0.10000000149011612, -0.10000000149011612], [-0.10000000149011612, -0.10000000149011612]]
    """
    step = optax.adamw(
        _schedule(lr, warmup_steps, total_steps),
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        mask=decays or (lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)),
    )
    return step if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), step)


def sgd(
    lr: float = 0.1, momentum: float | None = None, *, warmup_steps: int = 0
) -> optax.GradientTransformation:
    """Make stochastic gradient descent, with heavy-ball momentum if asked for.

    Args:
      lr: learning rate.
      momentum: decay of the velocity; no velocity is kept if left out.
      warmup_steps: steps of linear growth from 0 to `lr`.

    Returns:
      The transformation.

    >>> import jax.numpy as jnp
    >>> sgd(0.5).update(jnp.array([2.0]), sgd(0.5).init(jnp.zeros(1)))[0].tolist()
    [-1.0]
    """
    return optax.sgd(_schedule(lr, warmup_steps, None), momentum)


def nesterov_outer(lr: float = 0.7, momentum: float = 0.9) -> optax.GradientTransformation:
    """Make the outer optimiser of DiLoCo: SGD with Nesterov momentum on pseudo-gradients.

    Args:
      lr: outer learning rate; the paper's best is 0.7.
      momentum: the paper's best is 0.9.

    Returns:
      The transformation.

    Reference: Douillard et al., arXiv 2311.08105, section 3.

    >>> import jax.numpy as jnp
    >>> outer = nesterov_outer(1.0, 0.5)
    >>> outer.update(jnp.array([1.0]), outer.init(jnp.zeros(1)))[0].tolist()
    [-1.5]
    """
    return optax.sgd(lr, momentum, nesterov=True)


PRESETS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "sgd": sgd,
    "nesterov_outer": nesterov_outer,
}


def _schedule(lr: float, warmup_steps: int, total_steps: int | None) -> Any:
    if warmup_steps < 0 or (total_steps is not None and total_steps <= warmup_steps):
        raise UserError(
            f"warmup_steps is {warmup_steps} and total_steps {total_steps}; "
            "the warm-up must be at least 0 and end before the total"
        )
    if total_steps is not None:
        start = 0.0 if warmup_steps else lr
        return optax.warmup_cosine_decay_schedule(start, lr, warmup_steps, total_steps, lr / 10)
    return optax.linear_schedule(0.0, lr, warmup_steps) if warmup_steps else lr
