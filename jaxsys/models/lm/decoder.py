"""One decoder for all families: embed, blocks, head; whole, or layer by layer."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.models.lm.attention import Place, attention, place
from jaxsys.models.lm.cache import Cache
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, subtree
from jaxsys.models.lm.linear import linear, normalise, rows_of
from jaxsys.models.lm.moe import feed_forward, mixture
from jaxsys.models.lm.taps import Intervention, Probe, check_points, local, local_changes

Params = Mapping[str, Any]


class Output(NamedTuple):
    """Hold what `apply` computes.

    >>> Output(jnp.zeros((1, 2, 3)), None, {}).logits.shape
    (1, 2, 3)
    """

    logits: Float[Array, "B T V"]
    cache: Cache | None
    taps: dict[str, Array]


def apply(
    params: Params,
    config: LMConfig,
    tokens: Integer[Array | np.ndarray, "B T"],
    *,
    cache: Cache | None = None,
    positions: Integer[Array | np.ndarray, "B T"] | None = None,
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
    taps: Sequence[str] = (),
    interventions: Sequence[Intervention] = (),
    last: bool = False,
) -> Output:
    """Compute the logits of the token that follows each position.

    Padding: without a cache, tokens outside ``mask`` are not attended to and positions count the
    tokens inside it, so a row may be padded on either side. With a cache, rows are padded on the
    right, a token's position is its slot, and ``cache.length`` grows by each row's number of
    tokens inside ``mask`` (all of them without one).

    Args:
        params: nested dict of tensors, as from `load` or `init`.
        config: the model; static under jit.
        tokens: [B, T] indices below V.
        cache: keys and values of the tokens before these.
        positions: for rotary or learned positions, where they are not the default.
        mask: True for tokens, False for padding.
        taps: points (see `taps.modules`) whose activations are wanted; static under jit.
        interventions: vectors to add at points.
        last: only the logits of each row's last token inside ``mask``, [B, 1, V].

    Returns:
        Logits, the cache with these tokens written (None without one), and the tapped activations.

    Raises:
        UserError: for more tokens than the model or the cache has room for, or an unknown point.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = init(jax.random.key(0), config)
    >>> out = apply(params, config, jnp.ones((2, 5), jnp.int32), taps=("model.layers.0:out",))
    >>> out.logits.shape, out.taps["model.layers.0:out"].shape
    ((2, 5, 97), (2, 5, 32))
    """
    tokens, mask = jnp.asarray(tokens), None if mask is None else jnp.asarray(mask)
    check_points(config, [*taps, *(change.point for change in interventions)])
    _check_length(config, tokens, cache)
    probe = Probe(taps, interventions)
    start = None if cache is None else cache.length
    positions = _positions(tokens, start, mask) if positions is None else jnp.asarray(positions)
    x = embed(params, config, tokens, positions, probe=probe)
    slots = cache.keys[0].shape[2] if cache else None
    places = {
        window: place(config, positions, window=window, slots=slots, start=start, mask=mask)
        for window in {config.window(i) for i in range(config.layers)}
    }
    stores = []
    for i in range(config.layers):
        prefix = layer_prefix(config, i)
        x, store, found = _block(
            layer(params, config, i),
            x,
            places[config.window(i)],
            (cache.keys[i], cache.values[i]) if cache else None,
            local_changes(interventions, prefix),
            config=config,
            sparse=config.is_sparse(i),
            taps=local(taps, prefix),
        )
        stores.append(store)
        probe.found |= {join(prefix, p).replace(".:", ":"): found[p] for p in found}
    if last:
        x = _last(x, mask)
    logits = head(params, config, x, probe=probe)
    if cache is not None:
        n_new = tokens.shape[1] if mask is None else jnp.sum(mask, axis=1, dtype=jnp.int32)
        keys, values = zip(*stores, strict=True)
        cache = Cache(keys, values, cache.length + n_new)
    return Output(logits, cache, {name: probe.found[name] for name in taps})


def _check_length(config: LMConfig, tokens: Array, cache: Cache | None) -> None:
    n_tokens = tokens.shape[1]
    room = cache.keys[0].shape[2] if cache else config.max_positions
    if (cache or config.rope is None) and n_tokens > room:
        raise UserError(
            f"got {n_tokens} tokens a row; the {'cache' if cache else 'model'} has room for "
            f"{room}; shorten the rows or make more room"
        )


def _positions(tokens: Array, start: Array | None, mask: Array | None) -> Array:
    if start is not None:
        return start[:, None] + jnp.arange(tokens.shape[1])[None]
    if mask is not None:
        return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)


def _last(x: Array, mask: Array | None) -> Array:
    if mask is None:
        return x[:, -1:]
    order = jnp.arange(x.shape[1])[None]
    index = jnp.max(jnp.where(mask, order, 0), axis=1)
    return jnp.take_along_axis(x, index[:, None, None], axis=1)


def embed(
    params: Params,
    config: LMConfig,
    tokens: Integer[Array, "B T"],
    positions: Integer[Array, "B T"] | None = None,
    *,
    probe: Probe | None = None,
) -> Float[Array, "B T D"]:
    """Look tokens up and, in families with learned positions, add those.

    Args:
        params: the whole model.
        config: the model.
        tokens: [B, T].
        positions: [B, T]; counted from 0 by default.
        probe: watches the points.

    Returns:
        The residual stream before the first block.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> embed(init(jax.random.key(0), config), config, jnp.ones((2, 5), jnp.int32)).shape
    (2, 5, 32)
    """
    layout, probe = layout_of(config), probe or Probe((), ())
    base = subtree(params, config.prefix)
    name = join(config.prefix, layout.embed)
    with jax.named_scope("embedding"):
        x = probe(f"{name}:out", rows_of(subtree(base, layout.embed)["weight"], tokens))
        if config.embed_width:
            x = _watched(base, config.prefix, layout.project_in, x, probe)
        if config.rope is None:
            positions = _positions(tokens, None, None) if positions is None else positions
            table = subtree(base, layout.positions)["weight"]
            x = x + table[positions + layout.position_offset]
    return x


def _watched(base: Params, prefix: str, path: str, x: Array, probe: Probe) -> Array:
    name = join(prefix, path)
    return probe(f"{name}:out", linear(subtree(base, path), probe(f"{name}:in", x)))


def layer_prefix(config: LMConfig, i: int) -> str:
    """Give the path of block i, the first part of its tensors' names.

    >>> layer_prefix(LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), 1)
    'model.layers.1'
    """
    return join(config.prefix, layout_of(config).blocks, str(i))


def layer(params: Params, config: LMConfig, i: int) -> dict[str, Any]:
    """Give block i's subtree of parameters.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> sorted(layer(init(jax.random.key(0), config), config, 1))
    ['input_layernorm', 'mlp', 'post_attention_layernorm', 'self_attn']
    """
    return subtree(params, layer_prefix(config, i))


def block(
    layer_params: Params,
    config: LMConfig,
    i: int,
    x: Float[Array, "B T D"],
    positions: Integer[Array, "B T"] | None = None,
    *,
    mask: Bool[Array, "B T"] | None = None,
    store: tuple[Array, Array] | None = None,
    start: Integer[Array, "B"] | None = None,
    taps: Sequence[str] = (),
    interventions: Sequence[Intervention] = (),
) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None, dict[str, Array]]:
    """Run block i alone, for programs that go layer by layer.

    Args:
        layer_params: from `layer`.
        config: the model.
        i: the block's index: it decides its window and whether it is a mixture.
        x: residual stream before the block.
        positions: for rotary positions; counted from ``start`` by default.
        mask: True for tokens, False for padding.
        store: this layer's keys and values in a cache, [B, K, S, C] each.
        start: filled slots of each row, with a store.
        taps: points relative to the block: ``mlp.down_proj:in``, or ``:out`` for the block's own.
        interventions: vectors to add at points relative to the block.

    Returns:
        The residual stream after the block, the store after writing, the tapped activations.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = init(jax.random.key(0), config)
    >>> x = embed(params, config, jnp.ones((2, 5), jnp.int32))
    >>> block(layer(params, config, 0), config, 0, x)[0].shape
    (2, 5, 32)
    """
    if positions is None:
        positions = _positions(x[..., 0], start, mask)
    slots = store[0].shape[2] if store else None
    where = place(config, positions, window=config.window(i), slots=slots, start=start, mask=mask)
    return _block(
        layer_params,
        x,
        where,
        store,
        tuple(interventions),
        config=config,
        sparse=config.is_sparse(i),
        taps=tuple(taps),
    )


# Jitted by itself so that a model of thirty equal layers is traced and lowered as one.
@partial(jax.jit, static_argnames=("config", "sparse", "taps"))
def _block(
    params: Params,
    x: Array,
    where: Place,
    store: tuple[Array, Array] | None,
    changes: tuple[Intervention, ...],
    *,
    config: LMConfig,
    sparse: bool,
    taps: tuple[str, ...],
):
    layout, probe = layout_of(config), Probe(taps, changes)

    def mix(y: Array) -> Array:
        if sparse:
            return mixture(params, config, layout, y, probe)
        names = (layout.gate, layout.up, layout.down)
        y = probe(f"{layout.mlp}:in", y) if layout.mlp else y
        y = feed_forward(params, config, names, y, probe, in_out=layout.in_out)
        return probe(f"{layout.mlp}:out", y) if layout.mlp else y

    x, h, store = _attended(params, config, x, where, store, probe)
    with jax.named_scope("mlp"):
        x = x + mix(h)
    if not config.pre_norm:
        x = _normal(params, config, layout.mlp_norm, x, probe)
    return probe(":out", x), store, probe.found


def _normal(params: Params, config: LMConfig, path: str, x: Array, probe: Probe) -> Array:
    x = normalise(subtree(params, path), probe(f"{path}:in", x), config.norm, config.norm_eps)
    return probe(f"{path}:out", x)


def _attended(params, config: LMConfig, x, where: Place, store, probe: Probe):
    """The half of a block before its feed-forward part: x, what that part reads, the store."""
    layout, x = layout_of(config), probe(":in", x)
    h = _normal(params, config, layout.attention_norm, x, probe) if config.pre_norm else x
    attended, store = attention(params, config, layout, h, where, store, probe)
    if config.parallel:
        h = _normal(params, config, layout.mlp_norm, x, probe) if layout.mlp_norm else h
    with jax.named_scope("output"):
        x = x + attended
    if config.parallel:
        return x, h, store
    if config.pre_norm:
        return x, _normal(params, config, layout.mlp_norm, x, probe), store
    x = _normal(params, config, layout.attention_norm, x, probe)
    return x, x, store


def half_block(
    layer_params: Params, config: LMConfig, i: int, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Run block i up to its feed-forward part, for those who bring their own.

    Args:
        layer_params: from `layer`; the feed-forward part may be missing.
        config: the model.
        i: the block's index.
        x: residual stream before the block, of whole sequences.

    Returns:
        x and h: the block's output is ``x + feed_forward(h)``.

    Raises:
        UserError: for a family that normalises after that sum.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = init(jax.random.key(0), config)
    >>> x = embed(params, config, jnp.ones((2, 5), jnp.int32))
    >>> half_block(layer(params, config, 0), config, 0, x)[1].shape
    (2, 5, 32)
    """
    return half_step(layer_params, config, i, x)[:2]


def half_step(
    layer_params: Params,
    config: LMConfig,
    i: int,
    x: Float[Array, "B T D"],
    store: tuple[Array, Array] | None = None,
    start: Integer[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], tuple[Array, Array] | None]:
    """Run block i up to its feed-forward part, as `half_block`, with a cache.

    Args:
        layer_params: from `layer`; the feed-forward part may be missing.
        config: the model.
        i: the block's index.
        x: residual stream before the block.
        store: this layer's keys and values in a cache, [B, K, S, C] each.
        start: filled slots of each row, with a store.

    Returns:
        x and h, as from `half_block`, and the store after writing.

    Raises:
        UserError: as `half_block`.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> params, store = init(jax.random.key(0), config), (jnp.zeros((1, 2, 6, 8)),) * 2
    >>> x, own = jnp.ones((1, 1, 32)), layer(params, config, 0)
    >>> half_step(own, config, 0, x, store, jnp.array([3]))[2][0].shape
    (1, 2, 6, 8)
    """
    if not config.pre_norm:
        raise UserError(
            f"a {config.model_type} model normalises what its blocks have written; expected a "
            "family that normalises what they read; choose another model"
        )
    slots = store[0].shape[2] if store else None
    positions = _positions(x[..., 0], start, None)
    where = place(config, positions, window=config.window(i), slots=slots, start=start)
    return _attended(layer_params, config, x, where, store, Probe((), ()))


def head(
    params: Params, config: LMConfig, x: Float[Array, "B T D"], *, probe: Probe | None = None
) -> Float[Array, "B T V"]:
    """Normalise the residual stream and compute logits.

    Args:
        params: the whole model.
        config: the model.
        x: residual stream after the last block.
        probe: watches the points.

    Returns:
        Logits in the dtype of x.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> head(init(jax.random.key(0), config), config, jnp.ones((2, 5, 32))).shape
    (2, 5, 97)
    """
    layout, probe = layout_of(config), probe or Probe((), ())
    base = subtree(params, config.prefix)
    if config.final_norm:
        name = join(config.prefix, layout.final_norm)
        weights = subtree(base, layout.final_norm)
        x = normalise(weights, probe(f"{name}:in", x), config.norm, config.norm_eps)
        x = probe(f"{name}:out", x)
    if config.embed_width:
        with jax.named_scope("head"):
            x = _watched(base, config.prefix, layout.project_out, x, probe)
    x = probe(f"{layout.head}:in", x)
    weights = dict(params.get(layout.head, {}))
    if config.tied:
        weights["weight"] = subtree(base, layout.embed)["weight"]
    with jax.named_scope("head"):
        logits = linear(weights, x)
    return probe(f"{layout.head}:out", logits)


def loss(
    params: Params,
    config: LMConfig,
    tokens: Integer[Array | np.ndarray, "B T"],
    mask: Bool[Array | np.ndarray, "B T"] | None = None,
) -> Float[Array, ""]:
    """Average the cross-entropy of each next token, in nats per token.

    Args:
        params: the whole model.
        config: the model.
        tokens: [B, T]; all but the last of each row are read, all but the first predicted.
        mask: tokens whose prediction counts; those outside it are read all the same, so put
            padding on the right.

    Returns:
        Scalar mean over the predictions that count, in float32.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> tokens = jnp.ones((2, 6), jnp.int32)
    >>> bool(abs(loss(init(jax.random.key(0), config), config, tokens) - jnp.log(97)) < 0.5)
    True
    """
    tokens = jnp.asarray(tokens)
    logits = apply(params, config, tokens[:, :-1]).logits
    with jax.named_scope("loss"):
        logits = logits.astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - chosen
        if mask is None:
            return jnp.mean(nats)
        counts = mask[:, 1:].astype(jnp.float32)
        return jnp.sum(nats * counts) / jnp.maximum(jnp.sum(counts), 1.0)
