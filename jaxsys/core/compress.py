"""Compression of arrays: int8 and int4 with one scale per block, top-k, error feedback.

Everything here is pure and may run inside `jax.jit`, `jax.vmap` and `jax.shard_map`: shapes depend
on shapes only. What a receiver needs besides the arrays (the shape, the number of bits) both sides
know beforehand.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Key, UInt8, UInt32

from jaxsys.core.errors import UserError

Encoded = TypeVar("Encoded")
BLOCK = 256  # elements that share a scale: 4 bytes of scale to 256 or 128 bytes of codes
_TOP_CODE = {8: 127, 4: 7}
_UINT_OF_SIZE = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class Quantized(NamedTuple):
    """Integer codes in blocks and the value of one step of each block.

    Attributes:
        codes: [n_blocks, block] int8, or for 4 bits [n_blocks, block / 2] uint8, two to a byte.
        scale: [n_blocks] float32; an element is its code times its block's scale.

    >>> quantize(jnp.ones(3), block=4).codes.tolist()
    [[127, 127, 127, 0]]
    """

    codes: Int8[Array, "blocks block"] | UInt8[Array, "blocks half_block"]
    scale: Float[Array, "blocks"]


class Sparse(NamedTuple):
    """Some elements of an array and where they stand when it is laid flat.

    >>> top_k(jnp.array([1.0, -3.0]), 1).indices.tolist()
    [1]
    """

    values: Float[Array, "k"]
    indices: Int[Array, "k"]


def quantize(
    x: Float[Array, "..."],
    bits: Literal[8, 4] = 8,
    key: Key[Array, ""] | UInt32[Array, "2"] | None = None,
    block: int = BLOCK,
) -> Quantized:
    """Round an array to integers between -q and q, with one scale per block.

    scale = max|x| / q over the block, code = ⌊x / scale + u⌋ with q = 127 for 8 bits and 7 for 4.
    With a key u is uniform on [0, 1): stochastic rounding, E[code · scale] = x, error below one
    scale. Without one u = 1/2: rounding to nearest, error at most half a scale. A block that holds
    an infinity or a NaN comes back as NaNs and infinities, so that divergence stays visible.

    Args:
        x: array of any shape; it is laid flat and filled up with zeros to whole blocks.
        bits: 8 or 4.
        key: random key for stochastic rounding.
        block: number of elements that share a scale; even for 4 bits.

    Returns:
        The `Quantized` form; ``dequantize`` needs the shape to undo it.

    Raises:
        UserError: for another number of bits, or an odd block with 4 bits.

    >>> quantize(jnp.array([0.0, 0.5, -1.0, 0.1]), block=4).codes.tolist()
    [[0, 64, -127, 13]]
    """
    if bits not in _TOP_CODE:
        raise UserError(f"bits is {bits}; codes have 8 or 4 bits; choose one of them")
    if block < 1 or (bits == 4 and block % 2):
        raise UserError(
            f"block is {block} with {bits} bits; it must be positive, and even where two codes "
            "share a byte; change it"
        )
    flat = x.astype(jnp.float32).reshape(-1)
    rows = jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    top = _TOP_CODE[bits]
    scale = jnp.max(jnp.abs(rows), axis=1) / top
    # XLA flushes subnormal numbers to zero, and a zero scale must not divide.
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0.0, scale)
    steps = rows / jnp.where(scale == 0, 1.0, scale)[:, None]
    shift = 0.5 if key is None else _uniform16(key, rows.shape)
    codes = jnp.clip(jnp.floor(steps + shift), -top, top).astype(jnp.int8)
    return Quantized(pack_int4(codes) if bits == 4 else codes, scale)


def _uniform16(key: Array, shape: tuple[int, ...]) -> Array:
    # Drawing 32-bit words dominates the cost of quantising on CPU, and rounding needs few bits: two
    # draws to a word shift the expectation by at most 2^-17 of a step.
    n_elements = math.prod(shape)
    words = jax.random.bits(key, ((n_elements + 1) // 2,), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:n_elements]
    return ((halves.astype(jnp.float32) + 0.5) / 65536).reshape(shape)


def dequantize(quantized: Quantized, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Multiply codes by their scales and cut the result to a shape.

    Args:
        quantized: as from `quantize`.
        shape: shape of the array that was quantised.

    Returns:
        float32 array of that shape.

    >>> dequantize(quantize(jnp.full((2, 3), 4.0)), (2, 3)).tolist()
    [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """
    codes, scale = quantized
    signed = unpack_int4(codes) if codes.dtype == jnp.uint8 else codes
    rows = signed.astype(jnp.float32) * scale[:, None]
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)


def pack_int4(codes: Int8[Array, "... n"]) -> UInt8[Array, "... n_half"]:
    """Put two 4-bit codes into each byte, the first in the low half.

    Args:
        codes: [..., n] int8 between -8 and 7, n even.

    Returns:
        [..., n / 2] uint8.

    >>> pack_int4(jnp.array([1, -1], jnp.int8)).tolist()
    [241]
    """
    nibbles = codes.astype(jnp.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: UInt8[Array, "... n_half"]) -> Int8[Array, "... n"]:
    """Undo `pack_int4`.

    >>> unpack_int4(jnp.array([241], jnp.uint8)).tolist()
    [1, -1]
    """
    nibbles = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    # (n ^ 8) - 8 extends the sign of a 4-bit number.
    signed = (nibbles ^ 8).astype(jnp.int8) - 8
    return signed.reshape(*packed.shape[:-1], -1)


def to_bytes(quantized: Quantized) -> UInt8[Array, "blocks bytes"]:
    """Lay each block's codes and scale side by side, so that one collective carries both.

    Args:
        quantized: as from `quantize`.

    Returns:
        [n_blocks, code bytes + 4] uint8.

    >>> to_bytes(quantize(jnp.ones(8), bits=4, block=8)).shape
    (1, 8)
    """
    codes = jax.lax.bitcast_convert_type(quantized.codes, jnp.uint8)
    scale = jax.lax.bitcast_convert_type(quantized.scale, jnp.uint8)
    return jnp.concatenate([codes, scale], axis=1)


def from_bytes(rows: UInt8[Array, "blocks bytes"], bits: Literal[8, 4]) -> Quantized:
    """Undo `to_bytes`.

    >>> q = quantize(jnp.ones(3), block=4)
    >>> from_bytes(to_bytes(q), bits=8).codes.tolist() == q.codes.tolist()
    True
    """
    codes = jax.lax.bitcast_convert_type(rows[:, :-4], jnp.int8 if bits == 8 else jnp.uint8)
    return Quantized(codes, jax.lax.bitcast_convert_type(rows[:, -4:], jnp.float32))


def wire_bytes(encoded: Any) -> int:
    """Count the bytes of an encoded form: those of all its arrays.

    Args:
        encoded: `Quantized`, `Sparse` or any tree of arrays (or of shapes).

    Returns:
        Bytes.

    >>> wire_bytes(quantize(jnp.ones(512), bits=4))
    264
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(encoded))


def top_k(x: Float[Array, "..."], k: int) -> Sparse:
    """Keep the k elements of largest magnitude.

    Args:
        x: array of any shape.
        k: how many to keep, from 1 to the number of elements.

    Returns:
        Their values, largest magnitude first, and flat indices (int32).

    Raises:
        UserError: when the array does not have k elements.

    >>> top_k(jnp.array([[1.0, -5.0], [3.0, 0.0]]), 2).values.tolist()
    [-5.0, 3.0]
    """
    if not 1 <= k <= x.size:
        raise UserError(f"k is {k} for {x.size} elements; keep from 1 to all of them; change k")
    flat = x.reshape(-1)
    _, indices = jax.lax.top_k(jnp.abs(flat), k)
    return Sparse(flat[indices], indices)


def densify(sparse: Sparse, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Put the kept elements back into an array of zeros.

    Args:
        sparse: as from `top_k`.
        shape: shape of the array that was compressed.

    Returns:
        Array of that shape.

    >>> densify(top_k(jnp.array([1.0, -5.0, 3.0]), 1), (3,)).tolist()
    [0.0, -5.0, 0.0]
    """
    flat = jnp.zeros(math.prod(shape), sparse.values.dtype)
    return flat.at[sparse.indices].set(sparse.values).reshape(shape)


def with_feedback(
    x: Float[Array, "*shape"],
    residual: Float[Array, "*shape"],
    encode: Callable[[Array], Encoded],
    decode: Callable[[Encoded], Array],
) -> tuple[Encoded, Float[Array, "*shape"]]:
    """Compress an array together with what earlier compressions of its kind lost.

    p = x + e; c = encode(p); e' = p - decode(c) (Karimireddy et al. 2019, algorithm 2). What has
    been decoded up to any time equals the sum of all x up to then, less the present residual.

    Args:
        x: array to send.
        residual: e, same shape; zeros at the start.
        encode: compressor.
        decode: its inverse, to the shape of x.

    Returns:
        The encoded form and e'.

    Reference: arXiv 1901.09847.

    >>> keep = lambda p: top_k(p, 1)
    >>> _, e = with_feedback(jnp.array([3.0, 1.0]), jnp.zeros(2), keep, lambda s: densify(s, (2,)))
    >>> e.tolist()
    [0.0, 1.0]
    """
    corrected = x + residual
    encoded = encode(corrected)
    return encoded, corrected - decode(encoded)


def to_wire_uint(x: Float[Array, "*shape"]) -> Array:
    """Reinterpret floats as unsigned integers of the same width, bit for bit.

    On CPU a bfloat16 collective sends four bytes per element and a uint16 one sends two, so moves
    (not sums) of narrow floats should travel as integers.

    Args:
        x: floats of 8, 16 or 32 bits.

    Returns:
        uint8, uint16 or uint32 array of the same shape.

    >>> to_wire_uint(jnp.ones(2, jnp.bfloat16)).tolist()
    [16256, 16256]
    """
    return jax.lax.bitcast_convert_type(x, _UINT_OF_SIZE[x.dtype.itemsize])


def from_wire_uint(x: Array, dtype: Any) -> Array:
    """Undo `to_wire_uint`.

    Args:
        x: unsigned integers.
        dtype: float type of the same width.

    Returns:
        The floats.

    >>> from_wire_uint(to_wire_uint(jnp.full(2, 1.5, jnp.bfloat16)), jnp.bfloat16).tolist()
    [1.5, 1.5]
    """
    return jax.lax.bitcast_convert_type(x, dtype)
