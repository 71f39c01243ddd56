"""AdaMerging: learn the merging coefficients by the entropy of predictions, without labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.dtypes import canonicalize_dtype
from jaxtyping import Array, Bool, Float

from jaxsys.core.errors import UserError
from jaxsys.core.tree import unflatten
from jaxsys.merge.conflict import as_flat, check_family, in_order, layer_name, task_vectors


@dataclass(frozen=True)
class AdaConfig:
    """Say how coefficients are learned.

    Attributes:
      level: one coefficient for each ``task``, or for each task and ``layer``.
      start: λ to begin with; 0.3 in the paper.
      steps: of Adam.
      lr: its learning rate; 1e-3 in the paper, over 1,000 steps.
      clip: keep λ in [0, 1].

    Raises:
      UserError: for a negative number of steps.

    >>> AdaConfig().level
    'layer'
    """

    level: Literal["task", "layer"] = "layer"
    start: float = 0.3
    steps: int = 100
    lr: float = 1e-2
    clip: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"steps is {self.steps}; expected at least 0; raise it")


class Adapted(NamedTuple):
    """Hold what was learned.

    Attributes:
      params: the merged model.
      coefficients: layer (or ``*``) to λ [N].
      losses: entropy of each step, in nats.

    >>> Adapted({}, {"*": np.full(2, 0.3)}, ()).coefficients["*"].size
    2
    """

    params: dict[str, Any]
    coefficients: dict[str, Float[np.ndarray, "N"]]
    losses: tuple[float, ...]


def mean_entropy(logits: Float[Array, "... V"], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Average the entropy of predictions over the places that count, in nats.

    >>> round(float(mean_entropy(jnp.zeros((1, 2, 4)), jnp.ones((1, 2), bool))), 4)
    1.3863
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    each = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.sum(each * mask) / jnp.maximum(jnp.sum(mask), 1)


def adamerge(
    entropy_fn: Callable[[Any, Any], jax.Array],
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    batch_at: Callable[[int], Any],
    config: AdaConfig = AdaConfig(),
    *,
    layer_of: Callable[[str], str] = layer_name,
) -> Adapted:
    """Merge with AdaMerging: θ_l = θ_0,l + Σ_n λ_n,l τ_n,l, λ learned by Adam on the entropy.

    Args:
      entropy_fn: (params, batch) to the mean entropy of predictions, see `mean_entropy`.
      base: θ_0, a tree or a flat checkpoint.
      models: N experts.
      batch_at: step to unlabelled batches; of all tasks together, or of each in turn.
      config: how.
      layer_of: path to layer.

    Returns:
      The merged model and its coefficients.

    Raises:
      UserError: if the models are not of one form.

    Reference: Yang et al., arXiv 2310.02575.

    >>> fn = lambda p, x: jnp.sum((p["w"] - x) ** 2)
    >>> config = AdaConfig("task", steps=200, lr=0.05)
    >>> found = adamerge(fn, {"w": np.zeros(1)}, [{"w": np.ones(1)}], lambda i: 0.8, config)
    >>> round(float(found.coefficients["*"][0]), 2)
    0.8
    """
    flat, others = as_flat(base), [as_flat(model) for model in models]
    check_family(flat, others)
    origin, taus = {}, {}
    for path, start, stack in task_vectors(flat, others):
        origin[path], taus[path] = jnp.asarray(start), jnp.asarray(stack)

    def group_of(path: str) -> str:
        return layer_of(path) if config.level == "layer" else "*"

    groups = in_order(list(dict.fromkeys(group_of(path) for path in origin)))
    lam = {group: jnp.full(len(others), config.start, jnp.float32) for group in groups}
    optimizer = optax.adam(config.lr)

    def merged(lam: Any, origin: Any, taus: Any) -> dict[str, Any]:
        return unflatten(
            {p: x + jnp.tensordot(lam[group_of(p)], taus[p], 1) for p, x in origin.items()}
        )

    @jax.jit
    def step(lam: Any, memory: Any, origin: Any, taus: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda c: entropy_fn(merged(c, origin, taus), batch))(lam)
        updates, memory = optimizer.update(grads, memory, lam)
        lam = optax.apply_updates(lam, updates)
        if config.clip:
            lam = jax.tree.map(lambda c: jnp.clip(c, 0.0, 1.0), lam)
        return lam, memory, loss

    memory, losses = optimizer.init(lam), []
    for i in range(config.steps):
        lam, memory, loss = step(lam, memory, origin, taus, batch_at(i))
        losses.append(float(loss))
    cast = {
        p: x.astype(canonicalize_dtype(flat[p].dtype)) for p, x in _flat(merged, lam, origin, taus)
    }
    return Adapted(
        unflatten(cast), {group: np.asarray(c) for group, c in lam.items()}, tuple(losses)
    )


def _flat(merged: Callable, lam: Any, origin: Any, taus: Any) -> list[tuple[str, Array]]:
    found = as_flat(merged(lam, origin, taus))
    return [(path, found[path]) for path in origin]
