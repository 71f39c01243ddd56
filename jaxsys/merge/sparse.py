"""Task parts as they are stored: a bit mask with values, indices with values, or one shared vector.

All N experts of a leaf stand in one part, with the same number k of entries each, so shapes are
static and decoding runs under `jax.jit` and `jax.vmap`. Values are floats, or integer codes with
one scale per block of 256: those of `core.compress`, or of two bits.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxsys.core import compress
from jaxsys.core.errors import UserError

Bits = Literal[32, 16, 8, 4, 2]
Layout = Literal["auto", "mask", "index"]
Values = Any  # an array [N, k], or compress.Quantized with a leading N


class Masked(NamedTuple):
    """Hold k entries of each of N experts: which, one bit for each place, and their values.

    Attributes:
      mask: [N, ⌈n/8⌉] bits of the n places, the first in the lowest bit.
      values: [N, k] floats, or `compress.Quantized` with a leading N, in the order of the places.

    >>> encode(np.array([[0.0, 3.0, -1.0, 0.0]]), 0.5, bits=32, layout="mask").mask.tolist()
    [[6]]
    """

    mask: UInt8[Array, "N m"]
    values: Values


class Indexed(NamedTuple):
    """Hold k entries of each of N experts: where and what.

    Attributes:
      indices: [N, k] int32, growing.
      values: as in `Masked`.

    >>> encode(np.array([[0.0, 3.0, -1.0, 0.0]]), 0.5, bits=32, layout="index").indices.tolist()
    [[1, 2]]
    """

    indices: Int[Array, "N k"]
    values: Values


class Unified(NamedTuple):
    """Hold one vector for all experts, a mask of it for each, and a scale for each.

    Attributes:
      vector: the shape of the leaf.
      mask: [N, ⌈n/8⌉] bits.
      scale: [N].

    >>> part = Unified(jnp.array([2.0, 5.0]), pack_mask(np.array([[True, False]])), jnp.ones(1))
    >>> decode(part, (2,)).tolist()
    [[2.0, 0.0]]
    """

    vector: Float[Array, "..."]
    mask: UInt8[Array, "N m"]
    scale: Float[Array, "N"]


class Dense(NamedTuple):
    """Hold the task vectors of all experts as they are.

    >>> decode(Dense(jnp.ones((2, 3))), (3,)).shape
    (2, 3)
    """

    values: Float[Array, "N ..."]


Part = Masked | Indexed | Unified | Dense


def pack_mask(mask: Bool[np.ndarray, "N n"]) -> UInt8[Array, "N m"]:
    """Put eight truth values into each byte, the first in the lowest bit.

    >>> pack_mask(np.array([[True, False, True]])).tolist()
    [[5]]
    """
    return jnp.asarray(np.packbits(mask, axis=1, bitorder="little"))


def unpack_mask(bits: UInt8[Array, "N m"], n: int) -> Bool[Array, "N n"]:
    """Undo `pack_mask`.

    Args:
      bits: packed.
      n: number of places.

    >>> unpack_mask(jnp.array([[5]], jnp.uint8), 3).tolist()
    [[True, False, True]]
    """
    return jnp.unpackbits(bits, axis=1, count=n, bitorder="little").astype(bool)


def largest(x: np.ndarray, k: int) -> Bool[np.ndarray, "n"]:
    """Mark the k entries of largest magnitude; among equal ones the first.

    Args:
      x: any shape; laid flat.
      k: from 0 to the number of entries.

    >>> largest(np.array([1.0, -3.0, 1.0]), 2).tolist()
    [True, True, False]
    """
    size = np.abs(np.asarray(x, np.float32)).reshape(-1)
    if k >= size.size:
        return np.ones(size.size, bool)
    if k <= 0:
        return np.zeros(size.size, bool)
    bound = np.partition(size, size.size - k)[size.size - k]
    keep = size > bound
    ties = np.flatnonzero(size == bound)[: k - int(keep.sum())]
    keep[ties] = True
    return keep


def count_kept(n: int, density: float) -> int:
    """Say how many of n entries a density keeps: the nearest whole number, at least one.

    Raises:
      UserError: for a density outside (0, 1].

    >>> count_kept(10, 0.25), count_kept(10, 0.01)
    (2, 1)
    """
    if not 0 < density <= 1:
        raise UserError(f"density is {density}; expected a share in (0, 1]; change it")
    return min(max(round(n * density), 1), n)


def encode(
    stack: np.ndarray,
    density: float | int = 1.0,
    *,
    layout: Layout = "auto",
    bits: Bits = 16,
    keys: Sequence[jax.Array] | None = None,
) -> Masked | Indexed:
    """Keep a share of every expert's entries.

    By magnitude; or, given keys, DARE's way: k places drawn at random, their values divided by the
    density (arXiv 2311.03099; there each place is drawn by itself, here their number is fixed, so
    that shapes are).

    Args:
      stack: [N, ...] one task vector for each expert.
      density: share kept, in (0, 1].
      layout: ``mask`` (one bit for each place), ``index`` (four bytes for each entry), ``auto`` the
        smaller.
      bits: of a value: 32 float32, 16 bfloat16, 8, 4 and 2 integer codes with a scale to 256
        values.
      keys: a random key for each expert.

    Returns:
      The part, entries in the order of their places.

    Raises:
      UserError: for a density outside (0, 1].

    >>> part = encode(np.array([[1.0, -4.0, 0.5, 2.0]]), 0.5, bits=32)
    >>> decode(part, (4,)).tolist()
    [[0.0, -4.0, 0.0, 2.0]]
    """
    rows = np.asarray(stack, np.float32).reshape(len(stack), -1)
    n = rows.shape[1]
    k = count_kept(n, density)
    if keys is None:
        keep = np.stack([largest(row, k) for row in rows])
    else:
        draws = [np.asarray(jax.random.uniform(key, (n,))) for key in keys]
        keep = np.stack([largest(draw + 1.0, k) for draw in draws])
        rows = rows * np.float32(n / k)
    places = np.nonzero(keep)[1].reshape(len(rows), k).astype(np.int32)
    values = encode_values(np.take_along_axis(rows, places, axis=1), bits)
    if layout == "auto":
        layout = "mask" if -(-n // 8) <= 4 * k else "index"
    if layout == "mask":
        return Masked(pack_mask(keep), values)
    return Indexed(jnp.asarray(places), values)


def encode_values(values: np.ndarray, bits: Bits) -> Values:
    """Store values [N, k] in so many bits each.

    >>> encode_values(np.ones((1, 2), np.float32), 16).dtype
    dtype(bfloat16)
    """
    if bits not in (32, 16, 8, 4, 2):
        raise UserError(f"bits is {bits}; values have 32, 16, 8, 4 or 2 bits; choose one of them")
    if bits > 8:
        return jnp.asarray(values, jnp.float32 if bits == 32 else jnp.bfloat16)
    if bits == 2:
        return _two_bits(values)
    width: Literal[8, 4] = 8 if bits == 8 else 4
    rows = [compress.quantize(jnp.asarray(row), width) for row in values]
    return compress.Quantized(*(jnp.stack(parts) for parts in zip(*rows, strict=True)))


def _two_bits(values: np.ndarray) -> compress.Quantized:
    """Code values as −1.5, −0.5, 0.5 or 1.5 times their block's scale, four codes to a byte.

    The scale is the one of least squared error among multiples of the block's mean magnitude: with
    so few levels the largest value, which scales codes of more bits, would be a bad measure.
    """
    n, k = values.shape
    filled = np.pad(np.asarray(values, np.float32), ((0, 0), (0, -k % compress.BLOCK)))
    blocks = filled.reshape(n, -1, compress.BLOCK)
    real = (np.arange(filled.shape[1]) < k).reshape(1, -1, compress.BLOCK)
    size = np.abs(blocks).sum(-1) / real.sum(-1)
    best, scale = np.full(size.shape, np.inf), np.zeros_like(size)
    for factor in np.linspace(0.5, 1.5, 11, dtype=np.float32):
        trial = factor * size
        error = (np.square(blocks - _levels(blocks, trial)) * real).sum(-1)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, trial, scale)
    step = np.where(scale == 0, 1.0, scale)[..., None]
    codes = np.clip(np.floor(blocks / step) + 2, 0, 3).astype(np.uint8)
    packed = codes[..., 0::4] | codes[..., 1::4] << 2 | codes[..., 2::4] << 4
    packed |= codes[..., 3::4] << 6
    return compress.Quantized(jnp.asarray(packed), jnp.asarray(scale, jnp.float32))


def _levels(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    step = np.where(scale == 0, 1.0, scale)[..., None]
    return (np.clip(np.floor(blocks / step), -2, 1) + 0.5) * scale[..., None]


def decode_values(values: Values, k: int | None = None) -> Float[Array, "N k"]:
    """Undo `encode_values`; codes come with the zeros that fill their last block unless cut to k.

    >>> decode_values(encode_values(np.ones((1, 2), np.float32), 8), 2).tolist()
    [[1.0, 1.0]]
    """
    if isinstance(values, compress.Quantized):
        codes, scale = values
        if codes.dtype != jnp.uint8:
            steps = codes.astype(jnp.float32)
        elif codes.shape[-1] == compress.BLOCK // 2:
            steps = compress.unpack_int4(codes).astype(jnp.float32)
        else:
            quarters = jnp.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
            steps = quarters.reshape(*codes.shape[:-1], -1).astype(jnp.float32) - 1.5
        values = (steps * scale[..., None]).reshape(codes.shape[0], -1)
    return values.astype(jnp.float32)[:, :k]


def experts_of(part: Part) -> int:
    """Count a part's experts.

    >>> experts_of(Dense(jnp.ones((2, 3))))
    2
    """
    if isinstance(part, Masked | Unified):
        return part.mask.shape[0]
    return (part.indices if isinstance(part, Indexed) else part.values).shape[0]


def choose(part: Part, experts: Int[Array, "m"]) -> Part:
    """Take some experts of a part.

    >>> choose(Dense(jnp.eye(3)), jnp.array([2])).values.tolist()
    [[0.0, 0.0, 1.0]]
    """
    if isinstance(part, Unified):
        return Unified(part.vector, part.mask[experts], part.scale[experts])
    return jax.tree.map(lambda x: x[experts], part)


def decode(part: Part, shape: tuple[int, ...]) -> Float[Array, "N ..."]:
    """Write parts out as dense float32 arrays.

    Args:
      part: of one leaf.
      shape: of the leaf; static.

    Returns:
      [N, *shape].

    >>> decode(encode(np.array([[0.0, 2.0]]), 0.5, bits=32), (2,)).tolist()
    [[0.0, 2.0]]
    """
    n = math.prod(shape)
    if isinstance(part, Dense):
        rows = part.values.astype(jnp.float32)
    elif isinstance(part, Unified):
        kept = unpack_mask(part.mask, n)
        vector = part.vector.astype(jnp.float32).reshape(1, n)
        rows = jnp.where(kept, vector * part.scale.astype(jnp.float32)[:, None], 0.0)
    elif isinstance(part, Masked):
        rows = jax.vmap(lambda mask, values: _spread(mask, values, n))(
            part.mask, decode_values(part.values)
        )
    else:
        k = part.indices.shape[1]
        rows = jax.vmap(lambda at, values: jnp.zeros(n).at[at].set(values))(
            part.indices, decode_values(part.values, k)
        )
    return rows.reshape(-1, *shape)


def _spread(mask: Array, values: Array, n: int) -> Array:
    """Put values where bits are set: the place of a bit's value is the number of bits before it."""
    bits = jnp.unpackbits(mask, bitorder="little").reshape(-1, 8)
    # Counted by bytes first: a running sum over eight times fewer numbers.
    set_in = jnp.sum(bits, axis=1, dtype=jnp.int32)
    before = jnp.cumsum(set_in) - set_in
    place = before[:, None] + jnp.cumsum(bits, axis=1, dtype=jnp.int32) - bits
    flat = jnp.where(bits > 0, values[jnp.minimum(place, values.shape[0] - 1)], 0.0)
    return flat.reshape(-1)[:n]


def stored_bytes(stored: Any) -> int:
    """Count the bytes of stored parts, or of any tree of arrays.

    >>> stored_bytes(encode(np.ones((2, 80), np.float32), 0.1, bits=16))
    52
    """
    return compress.wire_bytes(stored)


def predicted_bytes(n: int, experts: int, density: float, bits: Bits = 16) -> int:
    """Say what `encode` will take for a leaf of n entries, to the byte.

    N (min(⌈n/8⌉, 4k) + k b/8) with k = ρ n; codes of 8, 4 and 2 bits come in blocks of 256, and
    each block adds a scale of 4 bytes.

    >>> predicted_bytes(80, 2, 0.1)
    52
    """
    k = count_kept(n, density)
    blocks = -(-k // compress.BLOCK)
    values = k * bits // 8 if bits > 8 else blocks * (compress.BLOCK * bits // 8 + 4)
    return experts * (min(-(-n // 8), 4 * k) + values)
