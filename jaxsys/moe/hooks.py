"""Hooks that make what is sent small: int8 codes, or the largest elements of each row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxsys.core.compress import Quantized, densify, dequantize, quantize, top_k
from jaxsys.core.errors import UserError
from jaxsys.moe.contract import Hooks


class Codes(NamedTuple):
    """Rows as integers; both leaves lead with [E, c], so that slots can be moved.

    >>> Codes._fields
    ('codes', 'scale')
    """

    codes: Int8[Array, "E c D"]
    scale: Float[Array, "E c 1"]


def _both_ways(encode: Callable[..., Any], decode: Callable[..., Array]) -> Hooks:
    return Hooks(
        before_dispatch=encode,
        after_dispatch=decode,
        before_combine=encode,
        after_combine=decode,
        straight_through=True,
    )


def int8_hooks(dtype: Any = jnp.float32) -> Hooks:
    """Send rows as int8 codes with one scale each: D + 4 bytes.

    scale = max|x| / 127, rounded to nearest. The gradient passes as if nothing had been rounded,
    and travels in full.

    Args:
        dtype: of the rows that experts read and that come back.

    Returns:
        Hooks.

    Reference: arXiv 2501.10714 §2 (compression as a hook).

    >>> hooks = int8_hooks()
    >>> sent = hooks.before_dispatch(jnp.ones((3, 5, 4)))
    >>> sent.codes.shape, hooks.after_dispatch(sent).shape
    ((3, 5, 4), (3, 5, 4))
    """

    def encode(rows: Float[Array, "E c D"]) -> Codes:
        lead, width = rows.shape[:-1], rows.shape[-1]
        codes, scale = jax.vmap(lambda row: quantize(row, block=width))(rows.reshape(-1, width))
        return Codes(codes.reshape(*lead, width), scale.reshape(*lead, 1))

    def decode(sent: Codes) -> Float[Array, "E c D"]:
        lead, width = sent.codes.shape[:-1], sent.codes.shape[-1]

        def one(codes: Array, scale: Array) -> Array:
            return dequantize(Quantized(codes[None], scale), (width,))

        rows = jax.vmap(one)(sent.codes.reshape(-1, width), sent.scale.reshape(-1, 1))
        return rows.reshape(*lead, width).astype(dtype)

    return _both_ways(encode, decode)


def top_k_hooks(k: int, width: int) -> Hooks:
    """Send the k elements of largest magnitude of each row, and where they stand: 8·k bytes.

    The gradient passes as if all had been sent, and travels in full.

    Args:
        k: how many.
        width: D.

    Returns:
        Hooks.

    Raises:
        UserError: unless 1 ≤ k ≤ D.

    >>> hooks = top_k_hooks(1, 3)
    >>> hooks.after_dispatch(hooks.before_dispatch(jnp.array([[[1.0, -5.0, 3.0]]]))).tolist()
    [[[0.0, -5.0, 0.0]]]
    """
    if not 1 <= k <= width:
        raise UserError(
            f"top-{k} of rows that are {width} wide; expected from 1 to all of them; change k"
        )

    def encode(rows: Float[Array, "E c D"]) -> Any:
        found = jax.vmap(lambda row: top_k(row, k))(rows.reshape(-1, width))
        return jax.tree.map(lambda leaf: leaf.reshape(*rows.shape[:-1], k), found)

    def decode(sent: Any) -> Float[Array, "E c D"]:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, k), sent)
        rows = jax.vmap(lambda own: densify(own, (width,)))(flat)
        return rows.reshape(*sent.values.shape[:-1], width)

    return _both_ways(encode, decode)
