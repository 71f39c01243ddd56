"""One row of activations times a matrix of bfloat16 numbers or int8 codes, fast on a CPU.

XLA:CPU has no good product of one row with such a matrix: its library sums about four thousand
million weights a second on a core, whatever their width. A loop over [out, G] that adds up the
planes of a row, G neighbours each, is vectorised along G and reads every weight once, two to five
times as fast. It must not be fused with the sum over G that follows, so that sum is a product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

# Most planes of a row: with more of 16 bits each, the loop runs out of registers.
_PLANES = {1: 16, 2: 8}
_LANES = 32  # G is a multiple of this


def row_product(weight: Num[Array, "O I"], x: Float[Array, "I"]) -> Float[Array, "O"]:
    """Multiply a matrix with one row of activations, y[o] = Σ_i W[o, i] · x[i].

    Args:
        weight: W, bfloat16 or int8.
        x: the row.

    Returns:
        y in float32, summed in float32.

    >>> codes = jnp.ones((3, 256), jnp.int8)
    >>> row_product(codes, jnp.ones(256)).tolist()
    [256.0, 256.0, 256.0]
    """
    x = x.astype(jnp.float32)
    if planes_of(weight.shape[1], weight.dtype.itemsize) == 1:
        return _plain(weight, x)
    by_planes = _by_planes if weight.dtype == jnp.int8 else _half_planes
    return jax.lax.platform_dependent(weight, x, cpu=by_planes, default=_plain)


def planes_of(inputs: int, n_bytes: int) -> int:
    """Choose in how many planes a row is cut; 1 where its length has no fitting divisor.

    >>> planes_of(1792, 1), planes_of(512, 2), planes_of(100, 1)
    (14, 8, 1)
    """
    sizes = range(_PLANES[n_bytes], 3, -1)
    return next((n for n in sizes if inputs % (_LANES * n) == 0), 1)


def _plain(weight: Array, x: Array) -> Array:
    return (weight.astype(jnp.float32) * x[None]).sum(-1)


def _by_planes(weight: Array, x: Array) -> Array:
    n = planes_of(weight.shape[1], weight.dtype.itemsize)
    # What made the row must not be computed again for each output.
    x = jax.lax.optimization_barrier(x)
    total = jnp.zeros((), jnp.float32)
    for plane, part in zip(jnp.split(weight, n, axis=1), jnp.split(x, n), strict=True):
        total = total + _widen(plane) * part[None]
    ones = jnp.ones(total.shape[1], jnp.float32)
    return jax.lax.dot_general(total, ones, (((1,), (0,)), ((), ())))


def _widen(plane: Array) -> Array:
    """Turn codes into float32 by operations that XLA does not hand to its library."""
    if plane.dtype == jnp.int8:
        return plane.astype(jnp.int32).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(plane, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)


# Numbers taken by their bits have no derivative of their own.
_half_planes = jax.custom_jvp(_by_planes)


@_half_planes.defjvp
def _half_planes_jvp(primals, tangents):
    (weight, x), (d_weight, d_x) = primals, tangents
    return _half_planes(weight, x), _plain(weight, d_x) + _plain(d_weight, x)
