"""Keys and values of past tokens, allocated once and written in place.

A token's slot is its position: slot s of row b holds token s of that row. Rows of unequal length
are padded on the RIGHT; each row's own length says where its next token goes, so the padding's
slots are overwritten as the row grows and never seen meanwhile (a token attends to slots up to
its own). A cache that is donated to a jitted call is updated without a copy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from jaxsys.models.lm.config import LMConfig


class Cache(NamedTuple):
    """Hold each layer's keys and values, [B, K, S, C], and how many slots each row has filled.

    >>> Cache((), (), jnp.zeros(2, jnp.int32)).length.shape
    (2,)
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Int[Array, "B"]


def init_cache(config: LMConfig, batch: int, length: int, dtype=jnp.float32) -> Cache:
    """Allocate an empty cache.

    Args:
        config: the model.
        batch: B.
        length: S, the most tokens a row may reach; writing beyond it is lost.
        dtype: of keys and values; the dtype of the parameters unless memory is short.

    Returns:
        A cache of 2 · L · B · K · S · C numbers.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> init_cache(config, batch=3, length=16).keys[0].shape
    (3, 2, 16, 8)
    """
    shape = (batch, config.kv_heads, length, config.head_width)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in range(2))
    return Cache(keys, values, jnp.zeros(batch, jnp.int32))


def write(
    store: Float[Array, "B K S C"], new: Float[Array, "B T K C"], start: Integer[Array, "B"]
) -> Float[Array, "B K S C"]:
    """Write new keys or values into each row from its own slot on.

    Args:
        store: one layer's keys or values.
        new: those of the T tokens of this call.
        start: first slot of each row; slots from S on are dropped when B > 1.

    Returns:
        The store after writing.

    >>> store = write(jnp.zeros((1, 1, 4, 2)), jnp.ones((1, 1, 1, 2)), jnp.array([2]))
    >>> store[0, 0, :, 0].tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    new = new.astype(store.dtype)
    if store.shape[0] == 1:  # a plain slice, which XLA writes in place
        zero = jnp.zeros_like(start[0])
        return jax.lax.dynamic_update_slice(
            store, jnp.swapaxes(new, 1, 2), (zero, zero, start[0], zero)
        )
    rows = jnp.arange(store.shape[0])[:, None]
    slots = start[:, None] + jnp.arange(new.shape[1])[None]
    return store.at[rows, :, slots].set(new, mode="drop")
