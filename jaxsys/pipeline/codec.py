"""Activations and cotangents on the wire: dense, top-k with packed indices, int8, int4.

Both ends of a link know the shape, the ratio and the codec beforehand, so a message holds nothing
but payload and its size is known exactly before the first step (`encoded_bytes`). Between processes
the sender calls `encode` and the receiver `decode`; within one program `lossy` gives the same
numbers, with compressors of their own for the two directions.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, UInt8, UInt32

from jaxsys.core import compress
from jaxsys.core.errors import UserError

CODECS = ("dense", "topk", "int8", "int4")
_SCALE_BYTES = 4


class Form(NamedTuple):
    """How an array of a known shape and type travels.

    Attributes:
        kind: ``dense``; ``indices`` or ``bitmap`` for top-k, by how places are written; ``int8``,
            ``int4``.
        kept: elements whose values travel.
        index_bits: bits of one packed index (kind ``indices``), or elements that share a scale
            (``int8``, ``int4``); 0 otherwise.
        n_bytes: bytes of the payload.

    >>> form((1024,), jnp.float32, 8.0, "topk")
    Form(kind='bitmap', kept=128, index_bits=0, n_bytes=640)
    """

    kind: str
    kept: int
    index_bits: int
    n_bytes: int


def encoded_bytes(shape: tuple[int, ...], dtype: Any, ratio: float | int, codec: str) -> int:
    """Count the payload bytes of an array, exactly.

    With n elements of v bytes and k = ⌈n / ratio⌉: dense n·v; top-k k·v + min(⌈k·b / 8⌉, ⌈n / 8⌉),
    the places as indices of b = ⌈log2 n⌉ bits or as a bitmap; int8 and int4 one or half a byte per
    element in whole blocks and 4 bytes of scale per block. Whatever is not smaller than dense goes
    dense: a ratio of 1 always, and values that are no real floats.

    Reconstruction: FusionLLM's wire format was not to be had; 64-bit indices (12 bytes per kept
    element) are recalled of it, packed ones are ours.

    Args:
        shape: of the array.
        dtype: of the array.
        ratio: elements per kept element, at least 1. For int8 and int4 only whether it is above 1
            matters: 1 leaves the link dense.
        codec: one of ``CODECS``.

    Returns:
        Bytes.

    Raises:
        UserError: for an unknown codec or a ratio below 1.

    Reference: arXiv 2410.12707.

    >>> encoded_bytes((1000,), jnp.float32, 1.0, "topk"), encoded_bytes((4096,), "f4", 64, "topk")
    (4000, 352)
    """
    return form(tuple(shape), dtype, ratio, codec).n_bytes


def form(shape: tuple[int, ...], dtype: Any, ratio: float | int, codec: str) -> Form:
    """Choose how an array travels; see `encoded_bytes`.

    >>> form((3, 4), jnp.int32, 9.0, "int8").kind
    'dense'
    """
    return _form(tuple(shape), jnp.dtype(dtype), float(ratio), codec)


@functools.cache
def _form(shape: tuple[int, ...], dtype: Any, ratio: float, codec: str) -> Form:
    if codec not in CODECS:
        raise UserError(f"codec is {codec!r}; expected one of {', '.join(CODECS)}; choose one")
    if not 1.0 <= ratio < math.inf:
        raise UserError(
            f"the compression ratio is {ratio}; expected a finite number of at least 1 (1 is "
            "dense); mend the plan"
        )
    n = math.prod(shape)
    dense = Form("dense", n, 0, n * dtype.itemsize)
    if ratio == 1.0 or n == 0 or codec == "dense" or not jnp.issubdtype(dtype, jnp.floating):
        return dense
    if codec == "topk":
        kept = min(n, max(1, math.ceil(n / ratio)))
        bits = max(1, (n - 1).bit_length())
        indices, bitmap = -(-kept * bits // 8), -(-n // 8)
        smaller = min(indices, bitmap) + kept * dtype.itemsize
        found = Form("indices" if indices <= bitmap else "bitmap", kept, bits, smaller)
        if found.kind == "bitmap":
            found = found._replace(index_bits=0)
    else:
        block = min(compress.BLOCK, n + n % 2)
        blocks = -(-n // block)
        codes = block if codec == "int8" else block // 2
        found = Form(codec, n, block, blocks * (codes + _SCALE_BYTES))
    return found if found.n_bytes < dense.n_bytes else dense


def encode(x: Array, ratio: float | int, codec: str) -> tuple[Array, ...]:
    """Write an array in its form on the wire.

    Args:
        x: array of any shape.
        ratio: as in `encoded_bytes`.
        codec: one of ``CODECS``.

    Returns:
        The arrays that travel; their bytes add up to `encoded_bytes`.

    >>> [part.tolist() for part in encode(jnp.array([[0.0, 7.0, 0.1, -9.0] * 8]), 16.0, "topk")]
    [[-9.0, -9.0], [227, 0]]
    """
    return _encode(x, form(x.shape, x.dtype, ratio, codec))


def decode(
    parts: tuple[Any, ...], shape: tuple[int, ...], dtype: Any, ratio: float | int, codec: str
) -> Array:
    """Read what `encode` wrote: an array of the same shape and type.

    Args:
        parts: the arrays that travelled.
        shape: of the array that was encoded.
        dtype: of that array.
        ratio: as given to `encode`.
        codec: as given to `encode`.

    Returns:
        The array; elements that were not kept are 0.

    >>> x = jnp.arange(64.0)
    >>> decode(encode(x, 32, "topk"), (64,), x.dtype, 32, "topk")[-3:].tolist()
    [0.0, 62.0, 63.0]
    """
    return _decode(tuple(parts), tuple(shape), jnp.dtype(dtype), form(shape, dtype, ratio, codec))


def part_specs(
    shape: tuple[int, ...], dtype: Any, ratio: float | int, codec: str
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Give shapes and types of the arrays that `encode` makes, for the receiver.

    >>> [(s.shape, s.dtype.name) for s in part_specs((64,), jnp.float32, 32, "topk")]
    [((2,), 'float32'), ((2,), 'uint8')]
    """
    return _part_specs(tuple(shape), jnp.dtype(dtype), form(shape, dtype, ratio, codec))


@functools.cache
def _part_specs(shape: tuple[int, ...], dtype: Any, how: Form) -> tuple[Any, ...]:
    found = jax.eval_shape(lambda x: _encode(x, how), jax.ShapeDtypeStruct(shape, dtype))
    return tuple(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in found)


def round_trip(x: Array, ratio: float | int, codec: str) -> Array:
    """Encode and decode: what the receiver gets.

    >>> round_trip(jnp.array([1.0, -4.0, 2.0, 0.5] * 8), 16, "topk")[:4].tolist()
    [0.0, -4.0, 0.0, 0.0]
    """
    return decode(encode(x, ratio, codec), x.shape, x.dtype, ratio, codec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def lossy(x: Array, ratio_forward: float, ratio_backward: float, codec: str) -> Array:
    """Send a value over a simulated link: compressed forward, and its cotangent backward.

    y = C_f(x), x̄ = C_b(ȳ). The backward compressor chooses its own elements: the derivative of
    top-k alone would mask ȳ with those that were kept of x.

    Reconstruction: that the two are independent is ours.

    Args:
        x: the value that crosses from one stage to the next.
        ratio_forward: elements per kept element of x.
        ratio_backward: elements per kept element of the cotangent.
        codec: one of ``CODECS``.

    Returns:
        What the receiver gets.

    Reference: arXiv 2410.12707.

    >>> f = lambda x: jnp.vdot(jnp.arange(32.0), lossy(x, 32.0, 16.0, "topk"))
    >>> jax.grad(f)(jnp.ones(32))[-3:].tolist()
    [0.0, 30.0, 31.0]
    """
    return round_trip(x, ratio_forward, codec)


def _lossy_forward(
    x: Array, ratio_forward: float, ratio_backward: float, codec: str
) -> tuple[Array, None]:
    return round_trip(x, ratio_forward, codec), None


def _lossy_backward(
    ratio_forward: float, ratio_backward: float, codec: str, _: None, cotangent: Array
) -> tuple[Array]:
    return (round_trip(cotangent, ratio_backward, codec),)


lossy.defvjp(_lossy_forward, _lossy_backward)


@functools.partial(jax.jit, static_argnums=1)
def _encode(x: Array, how: Form) -> tuple[Array, ...]:
    if how.kind == "dense":
        return (x,)
    if how.kind in ("int8", "int4"):
        return tuple(compress.quantize(x, 8 if how.kind == "int8" else 4, block=how.index_bits))
    flat = x.reshape(-1)
    places = jnp.sort(compress.top_k(flat, how.kept).indices)
    if how.kind == "bitmap":
        mask = jnp.zeros(flat.size, jnp.uint8).at[places].set(1, unique_indices=True)
        return flat[places], jnp.packbits(mask, bitorder="little")
    return flat[places], pack_indices(places.astype(jnp.uint32), how.index_bits)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _decode(parts: tuple[Array, ...], shape: tuple[int, ...], dtype: Any, how: Form) -> Array:
    if how.kind == "dense":
        return parts[0]
    if how.kind in ("int8", "int4"):
        return compress.dequantize(compress.Quantized(*parts), shape).astype(dtype)
    values, places = parts
    n = math.prod(shape)
    if how.kind == "bitmap":
        mask = jnp.unpackbits(places, count=n, bitorder="little").astype(jnp.int32)
        rank = jnp.cumsum(mask) - 1
        return jnp.where(mask == 1, values[rank], jnp.zeros((), dtype)).reshape(shape)
    indices = unpack_indices(places, how.kept, how.index_bits)
    return compress.densify(compress.Sparse(values, indices.astype(jnp.int32)), shape)


def pack_indices(indices: UInt32[Array, "k"], bits: int) -> UInt8[Array, "n_bytes"]:
    """Lay whole numbers end to end with a fixed number of bits each, lowest bit first.

    Args:
        indices: [k] numbers below 2^bits.
        bits: 1 to 32.

    Returns:
        ⌈k · bits / 8⌉ bytes.

    >>> pack_indices(jnp.array([1, 2, 3], jnp.uint32), 4).tolist()
    [33, 3]
    """
    shifts = jnp.arange(bits, dtype=jnp.uint32)
    ones = (indices[:, None] >> shifts[None, :]) & 1
    return jnp.packbits(ones.astype(jnp.uint8).reshape(-1), bitorder="little")


def unpack_indices(packed: UInt8[Array, "n_bytes"], k: int, bits: int) -> UInt32[Array, "k"]:
    """Undo `pack_indices`.

    >>> unpack_indices(jnp.array([33, 3], jnp.uint8), 3, 4).tolist()
    [1, 2, 3]
    """
    ones = jnp.unpackbits(packed, count=k * bits, bitorder="little").reshape(k, bits)
    shifts = jnp.arange(bits, dtype=jnp.uint32)
    return (ones.astype(jnp.uint32) << shifts[None, :]).sum(axis=1, dtype=jnp.uint32)


def feedback(
    x: Inexact[Array, "*shape"], residual: Inexact[Array, "*shape"], ratio: float | int, codec: str
) -> tuple[tuple[Array, ...], Inexact[Array, "*shape"]]:
    """Encode a gradient together with what earlier messages of its kind lost.

    p = x + e; send C(p); e' = p - C(p) (`jaxsys.core.compress.with_feedback`).

    Args:
        x: gradient to send.
        residual: e of the same link and value; zeros at the start.
        ratio: as in `encoded_bytes`.
        codec: one of ``CODECS``.

    Returns:
        The arrays that travel, and e'.

    Reference: arXiv 1901.09847.

    >>> parts, e = feedback(jnp.array([3.0, 1.0] * 16), jnp.zeros(32), 2.0, "topk")
    >>> e[:4].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    return _feedback(x, residual, form(x.shape, x.dtype, ratio, codec))


@functools.partial(jax.jit, static_argnums=2)
def _feedback(x: Array, residual: Array, how: Form) -> tuple[tuple[Array, ...], Array]:
    return compress.with_feedback(
        x, residual, lambda p: _encode(p, how), lambda parts: _decode(parts, x.shape, x.dtype, how)
    )
