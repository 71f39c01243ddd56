"""LoRA: train a product of two thin matrices beside each frozen weight.

    y = W x + (α / r) · B A x        (Hu et al. 2021, section 4.1)

with A [r, in] random and B [out, r] zero at the start, so that training begins at the frozen model.
The base W may be an array or a quantised weight (`jaxsys.models.quantise`), which is QLoRA's
arrangement (Dettmers et al. 2023, equation 5).

Adapters live in a flat dict from the path of the weight to an `Adapter`: a pytree that optax and
`RunStore` take as it is. ``apply`` hangs them into the tree of parameters, ``merge`` adds them in.

References: arXiv 2106.09685, arXiv 2305.14314.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.core.tree import path_key, unflatten
from jaxsys.models.lm.linear import linear, rows_of
from jaxsys.models.quantise import BLOCK_WEIGHTS, select, weights

Adapters = dict[str, "Adapter"]


@partial(jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=("scale",))
@dataclass(frozen=True)
class Adapter:
    """Hold the two thin matrices of one weight.

    Attributes:
        a: A, [r, in].
        b: B, [out, r].
        scale: α / r.

    >>> Adapter(jnp.ones((1, 3)), jnp.ones((2, 1)), 2.0).delta().tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """

    # Not typed as arrays: masks, shapes and shardings stand here too when trees are mapped.
    a: Any
    b: Any
    scale: float

    def delta(self) -> Array:
        """Multiply out (α / r) · B A, [out, in]."""
        return self.scale * jnp.einsum("or,ri->oi", self.b, self.a)


@partial(jax.tree_util.register_dataclass, data_fields=("base", "adapter"), meta_fields=("in_out",))
@dataclass(frozen=True)
class LoraWeight:
    """Stand where a weight stood: the frozen weight and its adapter.

    Attributes:
        base: W, an array or a quantised weight.
        adapter: A and B.
        in_out: an array W is [in, out] (GPT-2's Conv1D) instead of [out, in].

    >>> adapter = Adapter(jnp.ones((1, 2)), jnp.ones((2, 1)), 1.0)
    >>> LoraWeight(jnp.eye(2), adapter).matmul(jnp.array([[1.0, 2.0]])).tolist()
    [[4.0, 5.0]]
    """

    base: Any
    adapter: Any
    in_out: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of the weight that this stands for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Count its axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Give the type that `dense` returns."""
        return self.base.dtype

    def matmul(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """Multiply rows by the weight and by the adapter, never forming B A."""
        a, b = self.adapter.a.astype(x.dtype), self.adapter.b.astype(x.dtype)
        low = linear({"weight": b}, linear({"weight": a}, x))
        return linear({"weight": self.base}, x, in_out=self.in_out) + self.adapter.scale * low

    def rows(self, indices: Integer[Array, "..."]) -> Array:
        """Take rows of an embedding table [V, D] with its adapter (A [r, D], B [V, r])."""
        low = linear({"weight": self.adapter.a.T}, self.adapter.b[indices])
        taken = rows_of(self.base, indices)
        return taken + (self.adapter.scale * low).astype(taken.dtype)

    def dense(self) -> Array:
        """Add the adapter in: W + (α / r) · B A, in the dtype and orientation of W."""
        base = self.base.dense() if hasattr(self.base, "dense") else self.base
        delta = self.adapter.delta()
        delta = delta.T if self.in_out else delta
        return (base.astype(jnp.float32) + delta).astype(base.dtype)


def init(
    key: Array,
    params: Mapping[str, Any],
    patterns: Sequence[str] = BLOCK_WEIGHTS,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    in_out: bool = False,
) -> Adapters:
    """Make an adapter for every matrix whose path a pattern matches; B is zero.

    A is uniform on ±1/√in, as the authors' code has it.

    Args:
        key: random key; each path gets its own from it, whatever else is matched.
        params: the model; leaves may be quantised.
        patterns: globs over paths.
        rank: r; 8 is common, and never needs to exceed the smaller side of the matrix.
        alpha: α; the paper fixes it and tunes the learning rate.
        in_out: array weights are [in, out] (GPT-2's Conv1D).

    Returns:
        Path to `Adapter`.

    Raises:
        UserError: for a rank below 1 or above a side of a matrix, or a pattern without a match.

    Reference: arXiv 2106.09685, section 4.1.

    >>> adapters = init(jax.random.key(0), {"h": {"0": {"weight": jnp.ones((4, 6))}}}, rank=2)
    >>> {path: (x.a.shape, x.b.shape) for path, x in adapters.items()}
    {'h.0.weight': ((2, 6), (4, 2))}
    """
    found = weights(params)
    adapters = {}
    for path in select(found, patterns):
        shape = found[path].shape
        rows, columns = shape[::-1] if in_out else shape
        if not 1 <= rank <= min(shape):
            raise UserError(
                f"rank is {rank} and {path} has shape {tuple(shape)}; an adapter's rank lies "
                "between 1 and the smaller side; change rank or the patterns"
            )
        bound = columns**-0.5
        a = jax.random.uniform(path_key(key, path), (rank, columns), minval=-bound, maxval=bound)
        adapters[path] = Adapter(a, jnp.zeros((rows, rank)), float(alpha) / rank)
    return adapters


def apply(
    params: Mapping[str, Any], adapters: Mapping[str, Adapter], *, in_out: bool = False
) -> dict[str, Any]:
    """Hang adapters into a tree: the model computes with both, and nothing is copied.

    Args:
        params: the frozen model.
        adapters: as from `init`.
        in_out: array weights are [in, out] (GPT-2's Conv1D).

    Returns:
        The tree with a `LoraWeight` at every adapter's path.

    Raises:
        UserError: if an adapter's path is not in the tree, or its shape does not fit.

    >>> params = {"h": {"0": {"weight": jnp.eye(2)}}}
    >>> apply(params, init(jax.random.key(0), params, rank=1))["h"]["0"]["weight"].shape
    (2, 2)
    """
    flat = weights(params)
    for path, adapter in adapters.items():
        if path not in flat:
            raise UserError(
                f"adapter {path} has no weight of that path in the model; use it with the model "
                "that it was made for"
            )
        shape = (adapter.b.shape[0], adapter.a.shape[1])
        if tuple(flat[path].shape) != (shape[::-1] if in_out else shape):
            raise UserError(
                f"adapter {path} is for a matrix of {shape} and the model has "
                f"{tuple(flat[path].shape)}; use it with the model that it was made for"
            )
        flat[path] = LoraWeight(flat[path], adapter, in_out)
    return unflatten(flat)


def merge(
    params: Mapping[str, Any], adapters: Mapping[str, Adapter], *, in_out: bool = False
) -> dict[str, Any]:
    """Add adapters into the weights, so that the model runs as fast as before.

    W' = W + (α / r) · B A. Quantised weights that have an adapter come back as float32 arrays.

    Args:
        params: the frozen model.
        adapters: as from `init`.
        in_out: array weights are [in, out] (GPT-2's Conv1D).

    Returns:
        A tree of the same paths.

    Raises:
        UserError: as `apply` does.

    >>> params = {"h": {"0": {"weight": jnp.zeros((2, 2))}}}
    >>> ones = {"h.0.weight": Adapter(jnp.ones((1, 2)), jnp.ones((2, 1)), 3.0)}
    >>> merge(params, ones)["h"]["0"]["weight"].tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    flat = weights(apply(params, adapters, in_out=in_out))
    return unflatten(
        {path: x.dense() if isinstance(x, LoraWeight) else x for path, x in flat.items()}
    )
