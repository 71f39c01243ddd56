"""The blocks of the decoder: one alone, half of one, and the jitted function behind both."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.models.lm.attention import Fused, Place, attention, place
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, subtree
from jaxsys.models.lm.linear import normalise
from jaxsys.models.lm.moe import feed_forward, mixture
from jaxsys.models.lm.taps import Intervention, Probe

Params = Mapping[str, Any]


def default_positions(
    tokens: Array, start: Array | None = None, mask: Array | None = None
) -> Array:
    """Count positions from a cache's filled slots, or over the tokens inside a mask.

    >>> default_positions(jnp.zeros((1, 3)), jnp.array([4])).tolist()
    [[4, 5, 6]]
    """
    if start is not None:
        return start[:, None] + jnp.arange(tokens.shape[1])[None]
    if mask is not None:
        return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)


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
    store: Any = None,
    start: Integer[Array, "B"] | None = None,
    taps: Sequence[str] = (),
    interventions: Sequence[Intervention] = (),
) -> tuple[Float[Array, "B T D"], Any, dict[str, Array]]:
    """Run block i alone, for programs that go layer by layer.

    Args:
        layer_params: from `layer`.
        config: the model.
        i: the block's index: it decides its window and whether it is a mixture.
        x: residual stream before the block.
        positions: for rotary positions; counted from ``start`` by default.
        mask: True for tokens, False for padding.
        store: this layer's keys and values in a cache, [B, K, S, C] each, or a `paged.PagedStore`.
        start: filled slots of each row, with a store.
        taps: points relative to the block: ``mlp.down_proj:in``, or ``:out`` for the block's own.
        interventions: vectors to add at points relative to the block.

    Returns:
        The residual stream after the block, the store after writing, the tapped activations.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = init(jax.random.key(0), config)
    >>> x = jnp.ones((2, 5, 32))
    >>> block(layer(params, config, 0), config, 0, x)[0].shape
    (2, 5, 32)
    """
    if positions is None:
        positions = default_positions(x[..., 0], start, mask)
    slots = store[0].shape[2] if isinstance(store, tuple) else None
    where = place(config, positions, window=config.window(i), slots=slots, start=start, mask=mask)
    return run_block(
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
@partial(jax.jit, static_argnames=("config", "sparse", "taps", "fused"))
def run_block(
    params: Params,
    x: Array,
    where: Place,
    store: Any = None,
    changes: tuple[Intervention, ...] = (),
    *,
    config: LMConfig,
    sparse: bool,
    taps: tuple[str, ...] = (),
    fused: Fused | None = None,
) -> tuple[Array, Any, dict[str, Array]]:
    """Run one block whose place is known, as `block`; blocks that are alike share one program.

    Args:
        params: from `layer`.
        x: residual stream before the block.
        where: from `attention.place`.
        store: this layer's keys and values in a cache.
        changes: vectors to add at points relative to the block.
        config: the model.
        sparse: its feed-forward part is a mixture.
        taps: points relative to the block.
        fused: another attention than the plain one, for whole sequences.

    Returns:
        As `block`.

    >>> from jaxsys.models.lm.init import init
    >>> config = LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> x, where = jnp.ones((2, 5, 32)), place(config, jnp.zeros((2, 5), jnp.int32))
    >>> own = layer(init(jax.random.key(0), config), config, 0)
    >>> run_block(own, x, where, config=config, sparse=False)[0].shape
    (2, 5, 32)
    """
    layout, probe = layout_of(config), Probe(taps, changes)

    def mix(y: Array) -> Array:
        if sparse:
            return mixture(params, config, layout, y, probe)
        names = (layout.gate, layout.up, layout.down)
        y = probe(f"{layout.mlp}:in", y) if layout.mlp else y
        y = feed_forward(params, config, names, y, probe, in_out=layout.in_out)
        return probe(f"{layout.mlp}:out", y) if layout.mlp else y

    x, h, store = _attended(params, config, x, where, store, probe, fused)
    with jax.named_scope("mlp"):
        x = x + mix(h)
    if not config.pre_norm:
        x = _normal(params, config, layout.mlp_norm, x, probe)
    return probe(":out", x), store, probe.found


def _normal(params: Params, config: LMConfig, path: str, x: Array, probe: Probe) -> Array:
    x = normalise(subtree(params, path), probe(f"{path}:in", x), config.norm, config.norm_eps)
    return probe(f"{path}:out", x)


def _attended(params, config: LMConfig, x, where: Place, store, probe: Probe, fused=None):
    """The half of a block before its feed-forward part: x, what that part reads, the store."""
    layout, x = layout_of(config), probe(":in", x)
    h = _normal(params, config, layout.attention_norm, x, probe) if config.pre_norm else x
    attended, store = attention(params, config, layout, h, where, store, probe, fused)
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
    >>> x = jnp.ones((2, 5, 32))
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
    positions = default_positions(x[..., 0], start, None)
    where = place(config, positions, window=config.window(i), slots=slots, start=start)
    return _attended(layer_params, config, x, where, store, Probe((), ()))
