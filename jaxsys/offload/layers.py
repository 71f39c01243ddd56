"""The compiled programs of the engine: a layer in parts that can run on different devices.

A layer is a half (attention, norms, router) that runs where its cache is, and feed-forward pieces:
an expert or a dense block, or some of its F columns. With gate and up rows ``j`` and down column
``j`` as one independent slice,

    down · (act(gate · h) * (up · h)) = Σ_pieces down_p · (act(gate_p · h) * (up_p · h)),

so that any cut is exact up to the order of summation. Every program takes its weights as arguments
and runs on the device on which they are committed.

Rows: N = B · T tokens, one after another.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import Layout, expert_roles, subtree
from jaxsys.models.lm.linear import linear, normalise
from jaxsys.models.lm.moe import feed_forward, route
from jaxsys.models.lm.taps import Probe

# Up to so many rows a product of all of them costs no more than picking an expert's own.
FEW_ROWS = 8
ROLES = ("gate", "up", "down")


class Programs(NamedTuple):
    """Hold a model's compiled programs; see `programs` for what each takes.

    Attributes:
        embed: tokens to the residual stream.
        half: a layer up to its feed-forward part, with its router.
        block: a whole layer, where all of it is on one device.
        piece: one feed-forward piece, added to what is there.
        early: the router of a layer that comes later, on the present residual stream.
        head: the residual stream of the last tokens to logits.
        model: tokens to logits, where the whole model is on one device.

    >>> Programs._fields[:3]
    ('embed', 'half', 'block')
    """

    embed: Callable[..., Any]
    half: Callable[..., Any]
    block: Callable[..., Any]
    piece: Callable[..., Any]
    early: Callable[..., Any]
    head: Callable[..., Any]
    model: Callable[..., Any]


@functools.lru_cache(maxsize=32)
def programs(config: lm.LMConfig) -> Programs:
    """Make a model's programs; the same objects for the same model.

    Args:
        config: the model.

    Returns:
        ``embed(params, tokens [B, T], start [B]) -> x [N, D]``,
        ``half(params, x, store, start, row, i) -> (x, h [N, D], routed, store)``, routed being
        (router's logits [N, E], weights [N, k], chosen [N, k]) or, in a dense layer, None,
        ``block(params, x, store, start, row, i) -> (x, store)``,
        ``piece(y [N, D], weights, h, index [n], share) -> y``,
        ``early(params, x [N, D]) -> chosen [N, k]``, with the later layer's norm and router,
        ``head(params, x, last [B]) -> logits [B, V]``,
        ``model(params, tokens, stores, start, last, row) -> (logits, stores)``.
        ``row`` is None, or the only row of the cache that is meant; stores are donated.

    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> params = lm.init(jax.random.key(0), config)
    >>> x = programs(config).embed(params, jnp.ones((1, 3), int), jnp.zeros(1, int))
    >>> programs(config).head(params, x, jnp.array([2])).shape
    (1, 97)
    """
    layout = layout_of(config)
    return Programs(
        jax.jit(functools.partial(_embed, config)),
        jax.jit(functools.partial(_half, config, layout), static_argnums=5, donate_argnums=2),
        jax.jit(functools.partial(_block, config), static_argnums=5, donate_argnums=2),
        jax.jit(functools.partial(_piece, config, layout)),
        jax.jit(functools.partial(_early, config, layout)),
        jax.jit(functools.partial(_head, config)),
        jax.jit(functools.partial(_model, config), donate_argnums=2),
    )


def alike(config: lm.LMConfig, i: int) -> int:
    """Give the first layer that the same programs serve: of equal window and kind.

    >>> config = lm.LMConfig("mistral", 97, 32, 4, 4, 2, 8, 48, 64, windows=(0, 16, 0, 16))
    >>> [alike(config, i) for i in range(4)]
    [0, 1, 0, 1]
    """
    kind = (config.window(i), config.is_sparse(i))
    kinds = ((config.window(j), config.is_sparse(j)) for j in range(i))
    return next((j for j, other in enumerate(kinds) if other == kind), i)


def ffn_names(config: lm.LMConfig, i: int, expert: int = -1) -> dict[str, str]:
    """Give the paths of a feed-forward part's modules inside its layer, by role.

    Args:
        config: the model.
        i: the layer.
        expert: its expert; -1 for the dense block.

    Returns:
        Role (gate, up, down) to path; without gate where the family has none.

    >>> ffn_names(lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64), 0)["down"]
    'mlp.down_proj'
    """
    layout = layout_of(config)
    if config.is_sparse(i):
        prefix = f"{layout.moe}.experts.{expert}."
        paths = [prefix + name for name in expert_roles(layout)]
    else:
        paths = [layout.gate, layout.up, layout.down]
    return {role: path for role, path in zip(ROLES, paths, strict=True) if path}


def cut(
    weights: Mapping[str, Mapping[str, Any]], start: int, stop: int, *, in_out: bool
) -> dict[str, dict[str, Any]]:
    """Take columns [start, stop) of a feed-forward part: rows of gate and up, columns of down.

    The bias of down belongs to the piece that begins at column 0. Slices of NumPy arrays are views.

    Args:
        weights: role to ``weight`` and ``bias``; arrays or `models.quantise.QuantisedInt8`.
        start: first column.
        stop: the one after the last.
        in_out: matrices are [in, out].

    Returns:
        The piece, of the same form.

    >>> part = {"up": {"weight": np.eye(3)}, "down": {"weight": np.ones((2, 3))}}
    >>> {role: m["weight"].shape for role, m in cut(part, 1, 3, in_out=False).items()}
    {'up': (2, 3), 'down': (2, 2)}
    """
    piece: dict[str, dict[str, Any]] = {}
    for role, module in weights.items():
        outputs = role != "down"
        piece[role] = {"weight": _slice(module["weight"], outputs, start, stop, in_out)}
        if "bias" in module and outputs:
            piece[role]["bias"] = module["bias"][start:stop]
        elif "bias" in module and start == 0:
            piece[role]["bias"] = module["bias"]
    return piece


def _slice(weight: Any, outputs: bool, start: int, stop: int, in_out: bool) -> Any:
    if hasattr(weight, "values"):  # int8, [out, in] whatever it came as: a scale for each output
        scale = weight.scale[start:stop] if outputs else weight.scale
        values = weight.values[start:stop] if outputs else weight.values[:, start:stop]
        return type(weight)(values, scale, weight.in_out)
    return weight[start:stop] if outputs != in_out else weight[:, start:stop]


def _own(store: Any, row: Array | None) -> Any:
    if row is None:
        return store
    return tuple(jax.lax.dynamic_slice_in_dim(part, row, 1, 0) for part in store)


def _back(store: Any, new: Any, row: Array | None) -> Any:
    if row is None:
        return new
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(part, own, row, 0)
        for part, own in zip(store, new, strict=True)
    )


def _embed(config, params, tokens, start) -> Array:
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None]
    return lm.embed(params, config, tokens, positions).reshape(-1, config.width)


def _rows(x: Array, start: Array) -> Array:
    return x.reshape(start.shape[0], -1, x.shape[-1])


def _half(config, layout: Layout, params, x, store, start, row, i: int):
    own = _own(store, row)
    x, h, own = lm.half_step(params, config, i, _rows(x, start), own, start)
    x, h = (y.reshape(-1, config.width) for y in (x, h))
    routed = None
    if config.is_sparse(i):
        logits = linear(subtree(params, f"{layout.moe}.gate"), h)
        routed = (logits, *route(config, logits))
    return x, h, routed, _back(store, own, row)


def _block(config, params, x, store, start, row, i: int):
    y, own, _ = lm.block(params, config, i, _rows(x, start), store=_own(store, row), start=start)
    return y.reshape(x.shape), _back(store, own, row)


def _piece(config, layout: Layout, y, weights, h, index, share):
    rows = h if index is None else h.at[index].get(mode="fill", fill_value=0)
    names = ("gate" if "gate" in weights else "", "up", "down")
    out = feed_forward(weights, config, names, rows, Probe((), ()), in_out=layout.in_out)
    if share is not None:
        out = out * share[:, None].astype(out.dtype)
    return y + out if index is None else y.at[index].add(out, mode="drop")


def _early(config, layout: Layout, params, x) -> Array:
    norm = subtree(params, layout.mlp_norm or layout.attention_norm)
    h = normalise(norm, x, config.norm, config.norm_eps)
    return route(config, linear(subtree(params, f"{layout.moe}.gate"), h))[1]


def _head(config, params, x, last) -> Array:
    x = jnp.take_along_axis(_rows(x, last), last[:, None, None], axis=1)
    return lm.head(params, config, x)[:, 0]


def _model(config, params, tokens, stores, start, last, row):
    keys, values = zip(*(_own(store, row) for store in stores), strict=True)
    mask = None if tokens.shape[1] == 1 else jnp.arange(tokens.shape[1])[None] <= last[:, None]
    cache = lm.Cache(keys, values, start)
    out = lm.apply(params, config, tokens, cache=cache, mask=mask, last=True)
    assert out.cache is not None
    new = zip(out.cache.keys, out.cache.values, strict=True)
    back = [_back(store, own, row) for store, own in zip(stores, new, strict=True)]
    return out.logits[:, 0], tuple(back)


def pick(
    chosen: np.ndarray, weights: np.ndarray, expert: int
) -> tuple[int, np.ndarray | None, np.ndarray]:
    """Find the rows of one expert and their weights, padded to a few sizes.

    Args:
        chosen: experts of the rows, -1 for rows that do not count, [N, k].
        weights: theirs, [N, k].
        expert: which one.

    Returns:
        How many rows it has, their indices (N where padded; None: take all rows), and their
        weights, 0 where padded.

    >>> count, index, share = pick(np.array([[0, 1], [2, 1]]), np.ones((2, 2)), 2)
    >>> count, index, share.tolist()
    (1, None, [0.0, 1.0])
    """
    here = chosen == expert
    rows, n_rows = np.flatnonzero(here.any(-1)), len(chosen)
    share = (weights * here).sum(-1).astype(weights.dtype)
    size = FEW_ROWS
    while size < rows.size:
        size *= 2
    if size >= n_rows:
        return rows.size, None, share
    index = np.full(size, n_rows, np.int32)
    index[: rows.size] = rows
    own = np.zeros(size, weights.dtype)
    own[: rows.size] = share[rows]
    return rows.size, index, own
