"""Merges that are one linear combination with given coefficients."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxsys.merge.contract import Blocks, Method
from jaxsys.merge.views import TracedView, View


@dataclass(frozen=True)
class Linear:
    """Options of the weighted mean.

    Attributes:
      normalize: divide by the sum of the weights.

    >>> Linear().normalize
    True
    """

    normalize: bool = True


@dataclass(frozen=True)
class TaskArithmetic:
    """Options of task arithmetic.

    Attributes:
      normalize: divide by the sum of the weights.
      lambda_: λ, times the sum of differences (1 in mergekit, 0.3 in FusionBench).

    >>> TaskArithmetic().lambda_
    1.0
    """

    normalize: bool = False
    lambda_: float = 1.0


@dataclass(frozen=True)
class Passthrough:
    """Options of taking a tensor over as it is.

    Attributes:
      scale: a factor, or None.

    >>> Passthrough().scale is None
    True
    """

    scale: float | None = None


def linear(
    config: Linear, base: None, stack: Float[Array, "N ..."], weights: Any, key: Any = None
) -> Float[Array, "..."]:
    """Average models: Σ w_n θ_n / Σ w_n.

    Args:
      config: options.
      base: unused, None.
      stack: the models' leaves, [N, ...] float32.
      weights: w, [N].
      key: unused.

    Returns:
      The merged leaf, float32.

    Reference: arXiv 2203.05482 (model soups).

    >>> import jax.numpy as jnp
    >>> linear(Linear(), None, jnp.array([[1.0], [4.0]]), np.array([2.0, 1.0])).tolist()
    [2.0]
    """
    return whole(BLOCKS["linear"], config, base, stack, weights, key)


def task_arithmetic(
    config: TaskArithmetic,
    base: Float[Array, "..."],
    stack: Float[Array, "N ..."],
    weights: Any,
    key: Any = None,
) -> Float[Array, "..."]:
    """Add weighted differences to the base: θ_0 + λ Σ w_n (θ_n − θ_0).

    Args:
      config: options.
      base: θ_0, [...].
      stack: θ, [N, ...].
      weights: w, [N].
      key: unused.

    Returns:
      The merged leaf, float32.

    Reference: arXiv 2212.04089, equation 1.

    >>> import jax.numpy as jnp
    >>> stack = jnp.array([[2.0], [4.0]])
    >>> task_arithmetic(TaskArithmetic(), jnp.array([1.0]), stack, np.ones(2)).tolist()
    [5.0]
    """
    return whole(BLOCKS["task_arithmetic"], config, base, stack, weights, key)


def passthrough(
    config: Passthrough, base: None, stack: Float[Array, "N ..."], weights: Any, key: Any = None
) -> Float[Array, "..."]:
    """Take the one model's leaf over, scaled if asked for.

    Args:
      config: options.
      base: unused, None.
      stack: [1, ...].
      weights: unused.
      key: unused.

    Returns:
      The leaf, float32.

    >>> import jax.numpy as jnp
    >>> passthrough(Passthrough(2.0), None, jnp.array([[1.0, 3.0]]), np.ones(1)).tolist()
    [2.0, 6.0]
    """
    return whole(BLOCKS["passthrough"], config, base, stack, weights, key)


def whole(blocks: Blocks, config: Any, base: Any, stack: Any, weights: Any, key: Any) -> Any:
    """Run a method that is written for slices over a whole leaf, inside or outside a JAX program.

    >>> import jax.numpy as jnp
    >>> whole(BLOCKS["linear"], Linear(), None, jnp.ones((2, 3)), np.ones(2), None).tolist()
    [1.0, 1.0, 1.0]
    """
    view = TracedView(base, stack)
    numbers = blocks.numbers(config, view, weights, key)
    return blocks.block(blocks.flags(config), numbers, base, stack, np.zeros(2, np.uint32))


def combine(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> Any:
    """Add up: θ_0 + Σ c_n (θ_n − θ_0), or c_0 θ_0 + Σ c_n θ_n with the flag ``points``.

    With the first form copies of the base give the base to the last bit.

    >>> import jax.numpy as jnp
    >>> numbers = {"coefficients": np.array([0.5], np.float32)}
    >>> combine((), numbers, jnp.zeros(1), jnp.ones((1, 1)), None).tolist()
    [0.5]
    """
    c = numbers["coefficients"]
    if base is None or "points" in flags:
        points = [*stack] if base is None else [base, *stack]
        return sum(c[i] * x for i, x in enumerate(points))
    return base + sum(c[i] * (x - base) for i, x in enumerate(stack))


def divide_by_sum(xp: Any, weights: Any) -> Any:
    """Make weights add up to one, unless their sum is too near zero.

    >>> divide_by_sum(np, np.array([1.0, 3.0])).tolist()
    [0.25, 0.75]
    """
    total = xp.sum(weights)
    return weights / xp.where(xp.abs(total) < 1e-8, 1.0, total)


def _mean(config: Linear, view: View, weights: Any, key: Any) -> dict[str, Any]:
    xp = view.xp
    return {"coefficients": f32(xp, divide_by_sum(xp, weights) if config.normalize else weights)}


def _sum(config: TaskArithmetic, view: View, weights: Any, key: Any) -> dict[str, Any]:
    xp = view.xp
    weights = divide_by_sum(xp, weights) if config.normalize else weights
    return {"coefficients": f32(xp, config.lambda_ * weights)}


def _take(config: Passthrough, view: View, weights: Any, key: Any) -> dict[str, Any]:
    return {"coefficients": f32(view.xp, [1.0 if config.scale is None else config.scale])}


def f32(xp: Any, values: Any) -> Any:
    """Make a float32 array with the library of a view.

    >>> f32(np, [1.0]).dtype
    dtype('float32')
    """
    return xp.asarray(values, dtype=xp.float32)


BLOCKS = {
    "linear": Blocks(_mean, combine),
    "task_arithmetic": Blocks(_sum, combine),
    "passthrough": Blocks(_take, combine),
}
METHODS = {
    "linear": Method(linear, Linear, "unused", (1, None), blocks=BLOCKS["linear"]),
    "task_arithmetic": Method(
        task_arithmetic, TaskArithmetic, "needed", (1, None), blocks=BLOCKS["task_arithmetic"]
    ),
    "passthrough": Method(passthrough, Passthrough, "unused", (1, 1), blocks=BLOCKS["passthrough"]),
}
