"""One decoder for all families: embed, blocks, head; whole, or layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.models.lm.attention import place
from jaxsys.models.lm.blocks import default_positions, layer, layer_prefix, run_block
from jaxsys.models.lm.cache import Cache
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.execution import PLAIN, Execution, run_blocks
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, subtree
from jaxsys.models.lm.linear import linear, normalise, rows_of
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
    _check_length(config, tokens.shape[1], cache)
    probe = Probe(taps, interventions)
    start = None if cache is None else cache.length
    positions = (
        default_positions(tokens, start, mask) if positions is None else jnp.asarray(positions)
    )
    x = embed(params, config, tokens, positions, probe=probe)
    slots = cache.keys[0].shape[2] if cache else None
    places = {
        window: place(config, positions, window=window, slots=slots, start=start, mask=mask)
        for window in {config.window(i) for i in range(config.layers)}
    }
    stores = []
    for i in range(config.layers):
        prefix = layer_prefix(config, i)
        x, store, found = run_block(
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


def _check_length(config: LMConfig, n_tokens: int, cache: Cache | None) -> None:
    room = cache.keys[0].shape[2] if cache else config.max_positions
    if (cache or config.rope is None) and n_tokens > room:
        raise UserError(
            f"got {n_tokens} tokens a row; the {'cache' if cache else 'model'} has room for "
            f"{room}; shorten the rows or make more room"
        )


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
            positions = default_positions(tokens, None, None) if positions is None else positions
            table = subtree(base, layout.positions)["weight"]
            x = x + table[positions + layout.position_offset]
    return x


def _watched(base: Params, prefix: str, path: str, x: Array, probe: Probe) -> Array:
    name = join(prefix, path)
    return probe(f"{name}:out", linear(subtree(base, path), probe(f"{name}:in", x)))


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
    *,
    execution: Execution = PLAIN,
    prompt: Float[Array, "P D"] | None = None,
) -> Float[Array, ""]:
    """Average the cross-entropy of each next token, in nats per token.

    Args:
        params: the whole model; blocks that `execution.stack` has stacked are scanned.
        config: the model.
        tokens: [B, T]; all but the last of each row are read, all but the first predicted.
        mask: tokens whose prediction counts; those outside it are read all the same, so put
            padding on the right.
        execution: how the blocks are run; it changes no value.
        prompt: vectors that are read before the tokens of every row, in the place of embeddings
            (prompt tuning, arXiv 2104.08691); nothing is predicted there.

    Returns:
        Scalar mean over the predictions that count, in float32.

    Raises:
        UserError: for more tokens than the model has room for.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> tokens = jnp.ones((2, 6), jnp.int32)
    >>> bool(abs(loss(init(jax.random.key(0), config), config, tokens) - jnp.log(97)) < 0.5)
    True
    """
    tokens = jnp.asarray(tokens)
    n_before = 0 if prompt is None else prompt.shape[0]
    positions = default_positions(tokens[:, :-1]) + n_before
    _check_length(config, n_before + tokens.shape[1] - 1, None)
    x = embed(params, config, tokens[:, :-1], positions)
    if prompt is not None:
        rows = jnp.broadcast_to(prompt[None].astype(x.dtype), (x.shape[0], *prompt.shape))
        x = jnp.concatenate([rows, x], axis=1)
    x = run_blocks(params, config, x, execution)
    logits = head(params, config, x[:, n_before:])
    with jax.named_scope("loss"):
        logits = logits.astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - chosen
        if mask is None:
            return jnp.mean(nats)
        counts = mask[:, 1:].astype(jnp.float32)
        return jnp.sum(nats * counts) / jnp.maximum(jnp.sum(counts), 1.0)
