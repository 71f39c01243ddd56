"""Causal attention with shared key/value heads, sliding windows and a cache."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from jaxsys.models.lm.cache import write
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.layout import Layout, subtree
from jaxsys.models.lm.linear import linear, normalise
from jaxsys.models.lm.rope import angles, turn
from jaxsys.models.lm.taps import Probe


class Place(NamedTuple):
    """Say where the tokens of a call stand; computed once and shared by the layers.

    >>> place(LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), jnp.arange(3)[None]).keep.shape
    (1, 3, 3)
    """

    start: Int[Array, "B"]  # slot of the first token of this call
    keep: Bool[Array, "B T S"]  # which slots each token may attend to
    cos: Array | None
    sin: Array | None


class Fused(NamedTuple):
    """Say how attention is computed otherwise; causal, over whole sequences only.

    Attributes:
        implementation: one operation of JAX's, by ``xla`` or ``cudnn`` (on NVIDIA GPUs, float16 or
            bfloat16 only), or ``blocks``: `attend` by blocks of queries, see `attend_blocks`.
        window: sliding window in tokens, 0 for none.

    >>> Fused("xla").window
    0
    """

    implementation: Literal["xla", "cudnn", "blocks"]
    window: int = 0


def place(
    config: LMConfig,
    positions: Integer[Array, "B T"],
    *,
    window: int = 0,
    slots: int | None = None,
    start: Integer[Array, "B"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
) -> Place:
    """Work out who may attend to whom, and the rotary angles.

    A token attends to the slots up to its own and, under a sliding window w, to at most the last
    w of them.

    Args:
        config: the model.
        positions: for the rotary angles.
        window: w, or 0 for none.
        slots: S of a cache; None without one (S = T).
        start: filled slots of each row of the cache.
        mask: tokens that are not padding; without a cache padding is not attended to.

    Returns:
        The `Place` of the tokens.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> place(config, jnp.arange(3)[None], window=2).keep[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    batch, n_tokens = positions.shape
    if start is None:
        start = jnp.zeros(1, jnp.int32)
    queries = start[:, None] + jnp.arange(n_tokens)[None]
    keys = jnp.arange(n_tokens if slots is None else slots)
    with jax.named_scope("scores"):
        keep = keys[None, None] <= queries[:, :, None]
        if window:
            keep &= keys[None, None] > queries[:, :, None] - window
        if mask is not None and slots is None:
            keep = keep & mask[:, None]
    with jax.named_scope("rope"):
        cos, sin = angles(config.rope, positions) if config.rope else (None, None)
    start = jnp.broadcast_to(start, (batch,))
    return Place(start, jnp.broadcast_to(keep, (batch, *keep.shape[1:])), cos, sin)


def attention(
    params: Mapping[str, Any],
    config: LMConfig,
    layout: Layout,
    x: Float[Array, "B T D"],
    where: Place,
    store: Any,
    probe: Probe,
    fused: Fused | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """Run the attention of one block.

    Args:
        params: the block's subtree.
        config: the model.
        layout: names of its modules.
        x: normalised residual stream.
        where: from `place`.
        store: this layer's keys and values in the cache, [B, K, S, C] each, or None; one that is
            no pair (see `paged`) brings its own ``mix(q, k, v)``.
        probe: watches the points of the block.
        fused: instead of one `attend`; without a cache or padding.

    Returns:
        What is added to the residual stream, and the store after writing.

    >>> from jaxsys.models.lm.families import layout_of
    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> block = init(jax.random.key(0), config)["model"]["layers"]["0"]
    >>> where = place(config, jnp.arange(3)[None])
    >>> x = jnp.ones((1, 3, 32))
    >>> attention(block, config, layout_of(config), x, where, None, Probe((), ()))[0].shape
    (1, 3, 32)
    """
    x = probe(f"{layout.attention}:in", x)
    q, k, v = _project(params, config, layout, x, probe)
    if config.rope is not None:
        assert where.cos is not None
        assert where.sin is not None
        with jax.named_scope("rope"):
            q = turn(config.rope, q, where.cos, where.sin)
            k = turn(config.rope, k, where.cos, where.sin)
    if hasattr(store, "mix"):
        mixed, store = store.mix(q, k, v)
    elif fused is not None:
        mixed = attend_fused(q, k, v, where.keep, fused)
    else:
        if store is None:
            keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        else:
            store = write(store[0], k, where.start), write(store[1], v, where.start)
            keys, values = store
        mixed = attend(q, keys, values, where.keep)
    mixed = probe(f"{layout.out}:in", mixed.reshape(*x.shape[:2], -1))
    with jax.named_scope("output"):
        out = linear(subtree(params, layout.out), mixed, in_out=layout.in_out)
    out = probe(f"{layout.attention}:out", probe(f"{layout.out}:out", out))
    return out, store


def _project(
    params: Mapping[str, Any], config: LMConfig, layout: Layout, x: Array, probe: Probe
) -> tuple[Array, Array, Array]:
    def project(path: str) -> Array:
        with jax.named_scope("qkv"):
            y = linear(subtree(params, path), probe(f"{path}:in", x), in_out=layout.in_out)
        return probe(f"{path}:out", y)

    def split(y: Array, heads: int) -> Array:
        return y.reshape(*y.shape[:2], heads, config.head_width)

    if layout.qkv:
        fused = project(layout.qkv)
        h, c = config.heads, config.head_width
        shape = (h, 3, c) if layout.qkv_per_head else (3, h, c)
        axis = 3 if layout.qkv_per_head else 2
        with jax.named_scope("qkv"):
            q, k, v = jnp.moveaxis(fused.reshape(*x.shape[:2], *shape), axis, 0)
        return q, k, v
    q = split(project(layout.q), config.heads)
    k = split(project(layout.k), config.kv_heads)
    v = split(project(layout.v), config.kv_heads)
    if config.qk_norm:
        q, k = (
            normalise(subtree(params, path), y, config.norm, config.norm_eps)
            for path, y in ((layout.q_norm, q), (layout.k_norm, k))
        )
    return q, k, v


def attend(
    q: Float[Array, "B T H C"],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    keep: Bool[Array, "B T S"],
) -> Float[Array, "B T H C"]:
    """Mix values by softmax(q · k / √C) over the slots that may be seen, in float32.

    Args:
        q: queries; head h uses key/value head h // (H / K).
        keys: keys.
        values: values.
        keep: which slots each token may attend to; a row without any gets the plain mean.

    Returns:
        [B, T, H, C] in the dtype of q.

    >>> q, kv = jnp.ones((1, 2, 2, 4)), jnp.ones((1, 1, 2, 4))
    >>> attend(q, kv, kv, jnp.tril(jnp.ones((1, 2, 2), bool))).shape
    (1, 2, 2, 4)
    """
    b, t, h, c = q.shape
    k = keys.shape[1]
    group = h // k
    f32 = jnp.float32
    with jax.named_scope("scores"):
        # Heads that share keys become rows of one product per key head.
        q = q.reshape(b, t, k, group, c).transpose(0, 2, 3, 1, 4).reshape(b, k, group * t, c)
        q = q * jnp.asarray(c**-0.5, q.dtype)
        scores = jnp.einsum("bkrc,bksc->bkrs", q, keys.astype(q.dtype), preferred_element_type=f32)
        scores = scores.reshape(b, k, group, t, -1)
        scores = jnp.where(keep[:, None, None], scores, jnp.finfo(f32).min)
    with jax.named_scope("softmax"):
        weights = jax.nn.softmax(scores, axis=-1).reshape(b, k, group * t, -1)
    with jax.named_scope("values"):
        mixed = jnp.einsum("bkrs,bksc->bkrc", weights.astype(q.dtype), values.astype(q.dtype))
        return mixed.reshape(b, k, group, t, c).transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


def attend_blocks(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    keep: Bool[Array, "B T T"],
    window: int = 0,
) -> Float[Array, "B T H C"]:
    """Mix values as `attend` does, by at most 8 blocks of queries, each with the keys it may see.

    That is little more than half of the scores (5 of 8 for 4 blocks), for more to compile. Blocks
    have 32 queries at least.

    Args:
        q: queries.
        k: keys.
        v: values.
        keep: as for `attend`, causal and within the window.
        window: sliding window in tokens, 0 for none.

    Returns:
        As `attend` but for rounding.

    >>> x, keep = jnp.ones((1, 33, 2, 4)), jnp.tril(jnp.ones((1, 33, 33), bool))
    >>> attend_blocks(x, x, x, keep).shape
    (1, 33, 2, 4)
    """
    n = q.shape[1]
    size = max(32, -(-n // 8))
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    mixed = []
    for begin in range(0, n, size):
        end = min(begin + size, n)
        seen = slice(max(begin - window + 1, 0) if window else 0, end)
        rows = slice(begin, end)
        mixed.append(attend(q[:, rows], keys[:, :, seen], values[:, :, seen], keep[:, rows, seen]))
    return jnp.concatenate(mixed, axis=1)


def attend_fused(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    keep: Bool[Array, "B T T"],
    fused: Fused,
) -> Float[Array, "B T H C"]:
    """Mix values as `attend` does, causally over whole sequences, by blocks or one operation.

    Reference: Dao et al., "FlashAttention" (arXiv 2205.14135), which is what cuDNN runs.

    >>> x, keep = jnp.ones((1, 3, 2, 4)), jnp.tril(jnp.ones((1, 3, 3), bool))
    >>> attend_fused(x, x, x, keep, Fused("xla", window=2)).shape
    (1, 3, 2, 4)
    """
    kind = fused.implementation
    if kind == "blocks":
        return attend_blocks(q, k, v, keep, fused.window)
    window = (fused.window - 1, 0) if fused.window else None
    with jax.named_scope("scores"):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=window, implementation=kind
        )
