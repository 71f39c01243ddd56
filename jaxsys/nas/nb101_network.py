"""The NAS-Bench-101 network with the architecture as data, so that one program serves all cells.

A 3×3 stem, three stacks of cells with C, 2C and 4C channels, 2×2 max-pooling between stacks, mean
over the image, one linear layer; every convolution is followed by normalisation and ReLU. How many
channels a vertex has depends on the cell. Here every vertex holds as many as the cell's output, and
those beyond its own are masked to 0 behind every layer: dropping channels is masking them, joining
vertices is a shift by the channels before, and a layer's surplus weights meet zeros on one side, so
that values and gradients are those of the network without surplus. The first cell of a stack sees
half the channels; it too gets zeros for the others.

Axes: ``B`` images, ``Y`` and ``X`` rows and columns, ``C`` channels, ``V`` the five vertices
between input and output, ``S`` slots: stem; for each cell the operations of five vertices, the five
projections of its input to them and that to its output; classifier.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.nas.layers import conv3, draw_uniform, lean_switch, max_pool, norm2d
from jaxsys.nas.model import Model
from jaxsys.nas.nb101 import CONV1, CONV3, POOL, vertex_channels
from jaxsys.nas.output import Observe, Output, Site, gated, rescaled, stacked, watch


@dataclass(frozen=True)
class Nb101Config:
    """Describe what surrounds the cell.

    Attributes:
      channels: of the stem and the first stack; the benchmark's is 128.
      cells: in each stack; the benchmark's is 3.
      n_classes: outputs.
      image_channels: of the input.

    >>> Nb101Config().slots
    101
    """

    channels: int = 128
    cells: int = 3
    n_classes: int = 10
    image_channels: int = 3

    def __post_init__(self) -> None:
        if min(self.channels, self.cells, self.n_classes, self.image_channels) < 1:
            raise UserError(f"{self} has a size below 1; every size is at least 1; raise it")

    @property
    def slots(self) -> int:
        """Count the places for a convolution or linear layer."""
        return 33 * self.cells + 2


class _Masks(NamedTuple):
    """What a cell's matrix says about one stack; all may be traced."""

    own: Any  # [V, C] channels of each vertex
    into: Any  # [6, V] edges between vertices, to the output last
    fed: Any  # [6] whether the input goes there, to the output last
    shift: Any  # [V] channels of the output before this vertex's
    ops: Any  # [V] 0 convolution 3×3, 1 convolution 1×1, 2 pooling, 3 none


def _masks(arch: Any, channels: int) -> _Masks:
    m, ops = jnp.asarray(arch)[:49].reshape(7, 7), jnp.asarray(arch)[50:55]
    own = vertex_channels(m, channels)[1:6]
    feeds = own * m[1:6, 6]
    kind = jnp.select([ops == CONV3, ops == CONV1, ops == POOL], [0, 1, 2], 3)
    return _Masks(
        (jnp.arange(channels)[None] < own[:, None]).astype(jnp.float32),
        m[1:6, 1:].T.astype(jnp.float32),
        m[0, 1:].astype(jnp.float32),
        jnp.cumsum(feeds) - feeds,
        kind,
    )


def _inputs(config: Nb101Config, stack: int) -> Any:
    """Tell which input channels each of a stack's cells has, `[cells, C]`."""
    wide = config.channels << stack
    first = jnp.arange(wide) < (wide // 2 if stack else wide)
    others = jnp.ones((config.cells - 1, wide), bool)
    return jnp.concatenate([first[None], others]).astype(jnp.float32)


def _weight_masks(config: Nb101Config, arch: Any, stack: int) -> dict[str, Any]:
    """Mark the weights of a stack that exist, shaped so that they broadcast to them."""
    m, cells = _masks(arch, config.channels << stack), config.cells
    square = m.own[:, :, None] * m.own[:, None, :]
    three, one = (square * (m.ops == kind)[:, None, None] for kind in (0, 1))
    three = three[None, :, None, None]
    targets = jnp.concatenate([m.own, jnp.ones_like(m.own[:1])]) * m.fed[:, None]
    return {
        "w3": jnp.broadcast_to(three, (cells, 5, 3, 3, *square.shape[1:])),
        "w1": jnp.broadcast_to(one[None], (cells, *square.shape)),
        "wp": _inputs(config, stack)[:, None, :, None] * targets[None, :, None, :],
    }


def init(key: jax.Array, arch: Any, config: Nb101Config) -> dict[str, Any]:
    """Draw weights uniformly within ±1/√fan_in, the fan-in being that of the cell's own layer.

    Args:
      key: random key.
      arch: 56 numbers; may be traced.
      config: sizes.

    Returns:
      Nested dict; a stack's leaves have leading axes `[cells, 5 or 6]`. Surplus weights are 0.

    >>> shapes = jax.eval_shape(partial(init, config=Nb101Config(2, 1)), jax.random.key(0),
    ...                         jnp.zeros(56, jnp.int32))
    >>> shapes["stacks"]["1"]["w3"].shape
    (1, 5, 3, 3, 4, 4)
    """
    c0, cells, image = config.channels, config.cells, config.image_channels
    shapes: list[Any] = [((3, 3, image, c0), (9 * image) ** -0.5)]
    for s in range(3):
        c, keep = c0 << s, _weight_masks(config, arch, s)
        own = jnp.maximum(jnp.sum(_masks(arch, c).own, 1), 1)[None, :, None, None]
        into = jnp.sum(_inputs(config, s), 1)[:, None, None, None]
        shapes += [
            ((cells, 5, 3, 3, c, c), keep["w3"] / (9 * own[..., None, None]) ** 0.5),
            ((cells, 5, c, c), keep["w1"] / own**0.5),
            ((cells, 6, c, c), keep["wp"] / into**0.5),
        ]
    bound = (4 * c0) ** -0.5
    shapes += [((4 * c0, config.n_classes), bound), ((config.n_classes,), bound)]
    stem, *inner, head, bias = draw_uniform(key, shapes)
    stacks = {}
    for s in range(3):
        drawn = dict(zip(("w3", "w1", "wp"), inner[3 * s : 3 * s + 3], strict=True))
        norms = {"op": _unit(cells, 5, c0 << s), "project": _unit(cells, 6, c0 << s)}
        stacks[str(s)] = drawn | norms
    stem = {"w": stem} | _unit(c0)
    return {"stem": stem, "stacks": stacks, "head": {"w": head, "bias": bias}}


def _unit(*shape: int) -> dict[str, Any]:
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def _layer(p: Any, y: Any, mask: Any, gate: Any, observe: Observe | None, norm: bool) -> Any:
    """Finish a convolution: mask, gate, normalise, rectify."""
    y = gated(y * mask[None, None, None], gate)
    z = norm2d(p, y) * mask[None, None, None] if norm else y
    site = Site(relu=True, norm=True, rectified=mask, outputs=mask)
    return jax.nn.relu(z), y, watch(observe, z, y, site)


_operate = lean_switch(
    (
        lambda h, w3, w1: conv3(h, w3),
        lambda h, w3, w1: h @ w1,
        lambda h, w3, w1: max_pool(h, 3, 1),
        lambda h, w3, w1: jnp.zeros_like(h),
    )
)


def cell(
    params: dict[str, Any],
    masks: _Masks,
    x: Float[Array, "B Y X C"],
    *,
    gates: Float[Array, "11 B C"] | None = None,
    observe: Observe | None = None,
    norm: bool = True,
) -> tuple[Float[Array, "B Y X C"], Any]:
    """Run one cell.

    Args:
      params: leaves with one leading axis of 5 vertices, or 6 projections.
      masks: of the cell, for as many channels as x has.
      x: features.
      gates: multipliers of the channels of each slot's layer.
      observe: called at each layer; its results are zero where there is none.
      norm: False leaves normalisation out.

    Returns:
      Features of the same shape, and the observations stacked over the 11 slots.

    >>> config, arch = Nb101Config(2, 1), jnp.zeros(56, jnp.int32).at[6].set(1)
    >>> params = jax.eval_shape(lambda key: init(key, arch, config), jax.random.key(0))
    >>> p = jax.tree.map(lambda v: jnp.ones(v.shape[1:]), params["stacks"]["0"])
    >>> run = lambda x: cell(p, _masks(arch, 2), x)[0]
    >>> jax.eval_shape(run, jnp.ones((1, 2, 2, 2))).shape
    (1, 2, 2, 2)
    """

    def vertex(carry: Any, inputs: Any) -> Any:
        held, out = carry
        place, p, own, into, fed, shift, op, gate, gate_in = inputs
        projected, _, seen_in = _layer(p["project"], x @ p["wp"], own, gate_in, observe, norm)
        h = jnp.tensordot(into, held, 1) * own[None, None, None] + fed * projected
        y = _operate(op, h, p["w3"], p["w1"])
        is_conv = op < 2
        z, _, seen = _layer(p["op"], y, own, gate, observe, norm)
        z = jnp.where(is_conv, z, y * own[None, None, None])
        held = jax.lax.dynamic_update_index_in_dim(held, z, place, 0)
        joined = jnp.concatenate([jnp.zeros_like(z), z], -1)
        moved = jax.lax.dynamic_slice_in_dim(joined, z.shape[-1] - shift, z.shape[-1], 3)
        seen, seen_in = _where(is_conv, seen), _where(fed > 0, seen_in)
        return (held, out + masks.into[5, place] * moved), (seen, seen_in)

    five = {k: jax.tree.map(lambda v: v[:5], params[k]) for k in params}
    g = (None, None, None) if gates is None else (gates[:5], gates[5:10], gates[10])
    held = jnp.zeros((5, *x.shape))
    rows = (jnp.arange(5), five, masks.own, masks.into[:5], masks.fed[:5], masks.shift, masks.ops)
    (_, out), (seen, seen_in) = jax.lax.scan(vertex, (held, jnp.zeros_like(x)), (*rows, *g[:2]))
    direct = {k: jax.tree.map(lambda v: v[5], params[k]) for k in ("project", "wp")}
    whole = jnp.ones_like(masks.own[0])
    y, _, last = _layer(direct["project"], x @ direct["wp"], whole, g[2], observe, norm)
    last = stacked(_where(masks.fed[5] > 0, last))
    seen = jax.tree.map(lambda *v: jnp.concatenate(v), seen, seen_in, last)
    return out + masks.fed[5] * y, seen


def _where(there: Any, tree: Any) -> Any:
    return jax.tree.map(lambda v: jnp.where(there, v, 0), tree)


def _enter(x: Any, stack: int) -> Any:
    """Go from one stack to the next: halve the image, add as many channels of zeros."""
    if not stack:
        return x
    x = max_pool(x, 2, 2)
    return jnp.concatenate([x, jnp.zeros_like(x)], -1)


def apply(
    params: dict[str, Any],
    arch: Integer[Array, "56"],
    images: Float[Array, "B Y X C"],
    *,
    gates: dict[str, Any] | None = None,
    observe: Observe | None = None,
    norm: bool = True,
) -> Output:
    """Run the network of one architecture.

    Args:
      params: from `init`.
      arch: 56 numbers; may be traced.
      images: with rows and columns that 4 divides.
      gates: from `ones_gates`.
      observe: called at each layer with what goes into the ReLU behind it, its output and its
        `Site`.
      norm: as in `network.apply`.

    Returns:
      Logits and what was asked for; features are those of the stem and of every cell.

    >>> config, arch = Nb101Config(2, 1), jnp.zeros(56, jnp.int32).at[6].set(1)
    >>> params = jax.eval_shape(lambda key: init(key, arch, config), jax.random.key(0))
    >>> jax.eval_shape(apply, params, arch, jnp.ones((2, 4, 4, 3))).logits.shape
    (2, 10)
    """
    g: Any = gates or {"stem": None, "stacks": {}, "head": None}
    p = params["stem"]
    mask = jnp.ones(p["w"].shape[-1])
    stem, _, found = _layer(p, conv3(images, p["w"]), mask, g["stem"], observe, norm)
    seen = [stacked(found)]
    x, log_scale = rescaled(stem, norm)
    features = [x]
    for s in range(3):
        x = _enter(x, s)
        masks = _masks(arch, x.shape[-1])

        def one(carry: Any, inputs: Any, masks: _Masks = masks) -> Any:
            x, scale = carry
            x, found = cell(inputs[0], masks, x, gates=inputs[1], observe=observe, norm=norm)
            x, more = rescaled(x, norm)
            return (x, scale + more), (x, found)

        xs = (params["stacks"][str(s)], g["stacks"].get(str(s)))
        (x, log_scale), (outs, found) = jax.lax.scan(one, (x, log_scale), xs)
        features += list(outs)
        seen.append(jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), found))
    pooled = jnp.mean(x, (1, 2))
    logits = pooled @ params["head"]["w"]
    logits = logits if g["head"] is None else logits * g["head"]
    site = Site(relu=False, norm=False)
    seen.append(stacked(watch(observe, x, logits[:, None, None, :], site)))
    observed = jax.tree.map(lambda *v: jnp.concatenate(v), *seen)
    logits = logits + params["head"]["bias"][None] if norm else logits
    return Output(logits, log_scale, features, x, observed)


def ones_gates(config: Nb101Config, batch: int) -> dict[str, Any]:
    """Make the gates that multiply every layer's output channels, all 1.

    >>> ones_gates(Nb101Config(2, 1), 4)["stacks"]["1"].shape
    (1, 11, 4, 4)
    """
    c = config.channels
    return {
        "stem": jnp.ones((batch, c)),
        "stacks": {str(s): jnp.ones((config.cells, 11, batch, c << s)) for s in range(3)},
        "head": jnp.ones((batch, config.n_classes)),
    }


def _gate_nodes(arch: Any, config: Nb101Config, tree: Any) -> Any:
    stacks = []
    for s in range(3):
        c = config.channels << s
        own = jnp.sum(_masks(arch, c).own, 1)
        share = c / jnp.maximum(jnp.concatenate([own, own, jnp.full(1, c)]), 1)
        stacks.append((tree["stacks"][str(s)] * share[None]).reshape(-1))
    return jnp.concatenate([tree["stem"][None], *stacks, tree["head"][None]])


def _nodes(arch: Any, config: Nb101Config, tree: Any, reduce: Any = jnp.sum) -> Any:
    parts = [reduce(tree["stem"]["w"])[None]]
    each = jax.vmap(jax.vmap(reduce))
    for s in range(3):
        keep, own = _weight_masks(config, arch, s), tree["stacks"][str(s)]
        w3, w1, wp = (each(own[k] * keep[k]) for k in ("w3", "w1", "wp"))
        kind = _masks(arch, config.channels << s).ops[None]
        op = jnp.where(kind == 0, w3, jnp.where(kind == 1, w1, 0))
        parts.append(jnp.concatenate([op, wp], 1).reshape(-1))
    return jnp.concatenate([*parts, reduce(tree["head"]["w"])[None]])


def _present(arch: Any, config: Nb101Config) -> Any:
    m = _masks(arch, 7)  # enough channels for every vertex to have one
    one = jnp.concatenate([m.ops < 2, m.fed > 0])
    edge = jnp.ones(1, bool)
    return jnp.concatenate([edge, jnp.tile(one, 3 * config.cells), edge])


def _pull(arch: Any, params: Any, features: Any, cotangents: Any) -> list[tuple[Any, Any]]:
    """Pull cotangents of each cell's output back to its input, before the pooling if there is."""
    cells, found = params["stacks"]["0"]["w1"].shape[0], []
    for i, g in enumerate(cotangents):
        stack, place = divmod(i, cells)
        p = jax.tree.map(lambda v, n=place: v[n], params["stacks"][str(stack)])

        def block(x: Any, p: Any = p, first: int = 0 if place else stack) -> Any:
            x = _enter(x, first)
            return cell(p, _masks(arch, x.shape[-1]), x)[0]

        found.append((g, jax.vjp(block, features[i])[1](g)[0]))
    return found


def cell_model(arch: Any, config: Nb101Config) -> Model:
    """Make the model of a NAS-Bench-101 cell; the cell may be traced.

    >>> cell_model(jnp.zeros(56, jnp.int32).at[6].set(1), Nb101Config(2, 1)).present.shape
    (35,)
    """
    arch = jnp.asarray(arch)
    return Model(
        init=partial(init, arch=arch, config=config),
        logits=lambda params, images: apply(params, arch, images).logits,
        nodes=partial(_nodes, arch, config),
        present=_present(arch, config),
        forward=lambda params, images, **options: apply(params, arch, images, **options),
        gates=partial(ones_gates, config),
        gate_nodes=partial(_gate_nodes, arch, config),
        pull=partial(_pull, arch),
    )
