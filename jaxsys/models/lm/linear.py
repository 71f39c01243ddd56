"""The one place where a weight meets activations, and the elementwise parts beside it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.models.rows import row_product

# XLA:CPU converts bfloat16 matrices slowly below this many rows; `row_product` does not.
FEW_ROWS = 4


def linear(weights: Mapping[str, Any], x: Float[Array, "... I"], *, in_out: bool = False) -> Array:
    """Apply a linear module: y = x · Wᵀ + b with W [out, in], or x · W + b with W [in, out].

    The contraction is over the last axis of W as it lies in memory: on a CPU a transposed
    product of one row is up to fifty times slower. A weight that is not an array (quantised, or
    with a low-rank addition) brings its own ``matmul(x)``.

    Args:
        weights: ``weight`` and, optionally, ``bias``.
        x: activations; the last axis is the module's input.
        in_out: W is [in, out] (GPT-2's Conv1D).

    Returns:
        Activations with the module's output as the last axis, in the dtype of x.

    >>> linear({"weight": jnp.ones((3, 2))}, jnp.ones((1, 4, 2))).shape
    (1, 4, 3)
    """
    weight = weights["weight"]
    # Two axes only: the gradient of W, a contraction over all rows, is then one plain product.
    rows = x.reshape(-1, x.shape[-1])
    if hasattr(weight, "matmul"):
        y = weight.matmul(rows)
    else:
        y = _dense(rows, weight, in_out)
    if "bias" in weights:
        y = y + weights["bias"].astype(y.dtype)[None]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _dense(rows: Array, weight: Array, in_out: bool) -> Array:
    contract = (((1,), (0 if in_out else 1,)), ((), ()))
    product = partial(jax.lax.dot_general, dimension_numbers=contract)
    if weight.dtype != jnp.bfloat16 or in_out or rows.shape[0] > FEW_ROWS:
        return product(rows, weight).astype(rows.dtype)
    return jax.lax.platform_dependent(rows, weight, cpu=_by_row, default=product).astype(rows.dtype)


def _by_row(rows: Array, weight: Array) -> Array:
    return jnp.stack([row_product(weight, row) for row in rows]).astype(rows.dtype)


def rows_of(weight: Any, indices: Array) -> Array:
    """Take rows of an embedding table, quantised or not.

    >>> rows_of(jnp.eye(3), jnp.array([[2, 0]])).shape
    (1, 2, 3)
    """
    if hasattr(weight, "rows"):
        return weight.rows(indices)
    return _take_bits(weight, indices) if weight.dtype == jnp.bfloat16 else weight[indices]


@jax.custom_jvp
def _take_bits(table: Array, indices: Array) -> Array:
    # XLA:CPU widens the whole table to float32 in order to take rows of it, integers excepted.
    bits = jax.lax.bitcast_convert_type(table, jnp.uint16)
    return jax.lax.bitcast_convert_type(bits[indices], table.dtype)


@_take_bits.defjvp
def _take_bits_jvp(primals, tangents):
    table, indices = primals
    return _take_bits(table, indices), tangents[0][indices]


def normalise(
    weights: Mapping[str, Any], x: Float[Array, "... D"], kind: str, eps: float
) -> Float[Array, "... D"]:
    """Normalise the last axis in float32: ``rms`` x/√(mean x² + ε)·g, ``layer`` also centred.

    Args:
        weights: ``weight`` g and, for ``layer``, ``bias`` (added last).
        x: activations.
        kind: ``rms`` or ``layer``.
        eps: ε.

    Returns:
        Normalised activations in the dtype of x.

    >>> weights = {"weight": jnp.ones(2)}
    >>> [round(float(v), 3) for v in normalise(weights, jnp.array([3.0, 4.0]), "rms", 0.0)]
    [0.849, 1.131]
    """
    with jax.named_scope("norm"):
        wide = x.astype(jnp.float32)
        if kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
        ones = (1,) * (x.ndim - 1)
        y = wide.astype(x.dtype) * weights["weight"].reshape(*ones, -1)
        if "bias" in weights:
            y = y + weights["bias"].reshape(*ones, -1)
        return y.astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
