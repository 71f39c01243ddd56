"""Keys and values in pages that rows share: a decoder over tokens of many requests at once.

A pool holds pages of a few tokens' keys and values for each layer; a table says which pages, in
order, hold a request's tokens. Tokens of one call lie side by side, whatever request they belong
to, so that every matrix is read once; only attention tells them apart. It goes over the pages in
blocks with a running maximum and sum, as many blocks as the longest request of the call has.

Reference: PagedAttention (arXiv 2309.06180, section 4); the running softmax is that of
FlashAttention (arXiv 2205.14135, algorithm 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsys.models.lm.attention import place
from jaxsys.models.lm.blocks import layer, run_block
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.decoder import embed

BLOCK_TOKENS = 128  # keys that attention looks at in one round


class Pool(NamedTuple):
    """Hold each layer's pages of keys and values, [K, pages, page tokens, C].

    >>> Pool((), ()).keys
    ()
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


class Rows(NamedTuple):
    """Say where some tokens of a call stand: B rows of T tokens that follow each other.

    >>> Rows(jnp.zeros((2, 4), jnp.int32), jnp.array([5, 0]), jnp.array([1, 0]), 1).tokens
    1
    """

    tables: Int[Array, "B pages"]  # pages of each row's request, in order
    start: Int[Array, "B"]  # position of a row's first token
    count: Int[Array, "B"]  # tokens of a row that count; the rest is padding
    tokens: int  # T


def init_pool(config: LMConfig, pages: int, page_tokens: int, dtype: Any = jnp.float32) -> Pool:
    """Allocate the pages of all layers.

    Args:
        config: the model.
        pages: how many a layer has.
        page_tokens: tokens of a page.
        dtype: of keys and values.

    Returns:
        A pool of 2 · L · K · pages · page_tokens · C numbers.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> init_pool(config, pages=6, page_tokens=4).keys[0].shape
    (2, 6, 4, 8)
    """
    shape = (config.kv_heads, pages, page_tokens, config.head_width)
    keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in range(2))
    return Pool(keys, values)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "rows"),
    meta_fields=("sizes", "window"),
)
@dataclass(frozen=True)
class PagedStore:
    """Be one layer's store: write the new keys and values, and attend over the pages.

    Args:
        keys: pages of one layer.
        values: pages of one layer.
        rows: (tables, start, count) of each group of rows.
        sizes: T of each group; B · T tokens of each lie in turn in the call.
        window: the layer's sliding window in tokens, 0 for none.

    >>> PagedStore(jnp.zeros((2, 6, 4, 8)), None, (), (), 0).page_tokens
    4
    """

    keys: Any
    values: Any
    rows: Any
    sizes: tuple[int, ...]
    window: int

    @property
    def page_tokens(self) -> int:
        """Give the tokens of a page."""
        return self.keys.shape[2]

    def mix(
        self, q: Float[Array, "1 M H C"], k: Float[Array, "1 M K C"], v: Float[Array, "1 M K C"]
    ) -> tuple[Float[Array, "1 M H C"], "PagedStore"]:
        """Write k and v of the call's M tokens to their pages, then attend.

        Args:
            q: queries, turned.
            k: keys, turned.
            v: values.

        Returns:
            The mixed values, and the store after writing.
        """
        pages, offsets = self._places()
        keys = _written(self.keys, k[0], pages, offsets)
        values = _written(self.values, v[0], pages, offsets)
        mixed, done = [], 0
        for (tables, start, _), size in zip(self.rows, self.sizes, strict=True):
            count = tables.shape[0] * size
            if count:
                own = q[0, done : done + count].reshape(-1, size, *q.shape[2:])
                found = paged_attend(own, keys, values, tables, start, self.window)
                mixed.append(found.reshape(1, count, *q.shape[2:]))
            done += count
        return jnp.concatenate(mixed, axis=1), PagedStore(
            keys, values, self.rows, self.sizes, self.window
        )

    def _places(self) -> tuple[Array, Array]:
        """Page and place within it of every token; a page that does not exist for padding."""
        pages, offsets = [], []
        for (tables, start, count), size in zip(self.rows, self.sizes, strict=True):
            order = jnp.arange(size)[None]
            at = start[:, None] + order
            page = jnp.take_along_axis(tables, at // self.page_tokens, axis=1, mode="clip")
            pages.append(jnp.where(order < count[:, None], page, self.keys.shape[1]).reshape(-1))
            offsets.append((at % self.page_tokens).reshape(-1))
        return jnp.concatenate(pages), jnp.concatenate(offsets)


def _written(store: Array, new: Array, pages: Array, offsets: Array) -> Array:
    new = jnp.swapaxes(new, 0, 1).astype(store.dtype)
    return store.at[:, pages, offsets].set(new, mode="drop")


def paged_attend(
    q: Float[Array, "B T H C"],
    keys: Float[Array, "K pages size C"],
    values: Float[Array, "K pages size C"],
    tables: Int[Array, "B P"],
    start: Int[Array, "B"],
    window: int = 0,
) -> Float[Array, "B T H C"]:
    """Mix values by softmax(q · k / √C) over a request's pages up to each token's own position.

    Args:
        q: queries of B rows of T tokens that follow each other.
        keys: pages of one layer, this call's keys written.
        values: pages of one layer.
        tables: pages of each row's request, in order.
        start: position of a row's first token.
        window: sliding window in tokens, 0 for none.

    Returns:
        [B, T, H, C] in the dtype of q.

    >>> pages, table = jnp.ones((1, 3, 4, 8)), jnp.array([[2, 0]])
    >>> paged_attend(jnp.ones((1, 1, 2, 8)), pages, pages, table, jnp.array([4])).shape
    (1, 1, 2, 8)
    """
    b, t, h, c = q.shape
    k, _, size, _ = keys.shape
    group, f32 = h // k, jnp.float32
    per_block = max(1, min(BLOCK_TOKENS // size, tables.shape[1]))
    short = -tables.shape[1] % per_block
    tables = jnp.pad(tables, ((0, 0), (0, short)))
    with jax.named_scope("scores"):
        # Heads that share keys become rows of one product per key head.
        q = q.reshape(b, t, k, group, c).transpose(2, 0, 3, 1, 4).reshape(k, b, group * t, c)
        q = q * jnp.asarray(c**-0.5, q.dtype)
    positions = start[:, None] + jnp.arange(t)[None]

    def step(i: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        most, total, mixed = found
        own = jax.lax.dynamic_slice_in_dim(tables, i * per_block, per_block, axis=1)
        with jax.named_scope("scores"):
            seen = keys[:, own].reshape(k, b, per_block * size, c).astype(q.dtype)
            scores = jnp.einsum("kbrc,kbsc->kbrs", q, seen, preferred_element_type=f32)
            keep = _keep(positions, i * per_block * size, per_block * size, window)
            scores = scores.reshape(k, b, group, t, -1)
            scores = jnp.where(keep[None, :, None], scores, jnp.finfo(f32).min)
            scores = scores.reshape(k, b, group * t, -1)
        with jax.named_scope("softmax"):
            top = jnp.maximum(most, scores.max(axis=-1))
            weights = jnp.exp(scores - top[..., None])
            fade = jnp.exp(most - top)
            total = total * fade + weights.sum(axis=-1)
        with jax.named_scope("values"):
            held = values[:, own].reshape(k, b, per_block * size, c).astype(q.dtype)
            new = jnp.einsum(
                "kbrs,kbsc->kbrc", weights.astype(q.dtype), held, preferred_element_type=f32
            )
            return top, total, mixed * fade[..., None] + new

    shape = (k, b, group * t)
    begin = jnp.full(shape, jnp.finfo(f32).min), jnp.zeros(shape), jnp.zeros((*shape, c), f32)
    blocks = jnp.max(positions) // (per_block * size) + 1
    blocks = jnp.minimum(blocks, tables.shape[1] // per_block)
    _, total, mixed = jax.lax.fori_loop(0, blocks, step, begin)
    with jax.named_scope("values"):
        mixed = (mixed / total[..., None]).astype(q.dtype).reshape(k, b, group, t, c)
        return mixed.transpose(1, 3, 0, 2, 4).reshape(b, t, h, c)


def _keep(positions: Array, first: Array, count: int, window: int) -> Bool[Array, "B T S"]:
    at = (first + jnp.arange(count))[None, None]
    keep = at <= positions[:, :, None]
    return keep & (at > positions[:, :, None] - window) if window else keep


def apply_paged(
    params: Mapping[str, Any],
    config: LMConfig,
    tokens: Int[Array, "M"],
    pool: Pool,
    rows: tuple[Rows, ...],
) -> tuple[Float[Array, "M D"], Pool]:
    """Run all blocks over tokens of many requests, which lie side by side.

    Every token is written to its page before any attends, so several rows of one call may follow
    each other in one request.

    Args:
        params: the whole model.
        config: the model; any family.
        tokens: of all rows, group by group, padding included.
        pool: pages of all layers.
        rows: groups of rows; each group's rows are equally long.

    Returns:
        The residual stream after the last block, for `head`, and the pool after writing.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> rows = Rows(jnp.array([[1, 3]]), jnp.array([0]), jnp.array([5]), 5)
    >>> pool = init_pool(config, pages=4, page_tokens=4)
    >>> params = init(jax.random.key(0), config)
    >>> apply_paged(params, config, jnp.arange(5), pool, (rows,))[0].shape
    (5, 32)
    """
    places = [r.start[:, None] + jnp.arange(r.tokens)[None] for r in rows]
    positions = jnp.concatenate([p.reshape(-1) for p in places])[None]
    x = embed(params, config, tokens[None], positions)
    where = place(config, positions)  # for its angles; who attends to whom is the store's matter
    keys, values = [], []
    for i in range(config.layers):
        store = PagedStore(
            pool.keys[i],
            pool.values[i],
            tuple((r.tables, r.start, r.count) for r in rows),
            tuple(r.tokens for r in rows),
            config.window(i),
        )
        own, sparse = layer(params, config, i), config.is_sparse(i)
        x, store, _ = run_block(own, x, where, store, config=config, sparse=sparse)
        keys.append(store.keys)
        values.append(store.values)
    return x[0], Pool(tuple(keys), tuple(values))
