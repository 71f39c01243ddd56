"""The DARTS network with the genotype as data, so that one program serves all architectures.

A 3×3 stem, cells of which two halve the image and double the width, mean over the image, one linear
layer; no auxiliary head. An edge holds the weights of a separable convolution with two kernels of
5×5; operations with 3×3 kernels use the middle of them, the dilated ones the first half, and a skip
connection that halves the image the first matrix. `lax.switch` runs one operation under `lax.map`
and all under `vmap`. A cell reads the two cells before it, of which the first may stand at twice
the resolution; its pixels at even and at odd places are then laid side by side as channels, which
makes the factorised reduction a 1×1 convolution with zeros in its matrix, and lets a scan run over
all cells of one width.

Axes: ``B`` images, ``Y`` and ``X`` rows and columns, ``C`` channels of a state, ``S`` slots: stem;
for each cell its two input convolutions and for each of eight edges the depthwise and pointwise
convolutions of both halves (a halving skip stands in the first pointwise place); classifier.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer

from jaxsys.nas.darts import plan
from jaxsys.nas.darts_weights import (
    EDGES,
    DartsConfig,
    existing,
    gate_nodes,
    groups,
    init,
    kernel_mask,
    nodes,
    ones_gates,
    presence,
)
from jaxsys.nas.layers import conv3, depthwise, lean_switch, max_pool, norm2d, pool3
from jaxsys.nas.model import Model
from jaxsys.nas.output import Observe, Output, Site, gated, rescaled, stacked, watch

_BRANCH = (0, 1, 2, 3, 4, 4, 5, 5)  # the two kernel sizes share a branch


def _edge_function(stride: int, observe: Observe | None, norm: bool) -> Any:
    """Make `(branch, x, parameters, gates) -> (y, four observations)` of one edge."""

    def padded(seen: dict[int, Any], x: Any, y: Any) -> Any:
        """Put observations where they belong among the edge's four, zeros elsewhere."""
        look = partial(watch, observe, site=Site(relu=True, norm=True))
        shapes = jax.eval_shape(look, x, y)
        zero = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
        return y, jax.tree.map(lambda *v: jnp.stack(v), *[seen.get(i, zero) for i in range(4)])

    def of(gates: Any, at: int) -> Any:
        return None if gates is None else gates[at]

    def half(x: Any, p: Any, gates: Any, at: int, stride: int, dilation: int) -> Any:
        """Rectify, convolve by channel and by pixel, normalise; observe both."""
        k = str(at // 2 + 1)
        a = depthwise(jax.nn.relu(x), p["dw" + k], stride, dilation)
        a = gated(a, of(gates, at))
        b = gated(a @ p["pw" + k], of(gates, at + 1))
        y = norm2d(p["n" + k], b) if norm else b
        first = watch(observe, x, a, Site(relu=True, norm=False))
        return y, {at: first, at + 1: watch(observe, a, b, Site(relu=False, norm=True))}

    def simple(operate: Any) -> Any:
        def run(x: Any, p: Any, gates: Any) -> Any:
            return padded({}, x, operate(x))

        return run

    def skip(x: Any, p: Any, gates: Any) -> Any:
        if stride == 1:
            return padded({}, x, x)
        middle, r = p["pw1"].shape[-1] // 2, jax.nn.relu(x)
        parts = r[:, ::2, ::2] @ p["pw1"][:, :middle], r[:, 1::2, 1::2] @ p["pw1"][:, middle:]
        b = gated(jnp.concatenate(parts, -1), of(gates, 1))
        y = norm2d(p["n1"], b) if norm else b
        return padded({1: watch(observe, x, b, Site(relu=True, norm=True))}, x, y)

    def separable(x: Any, p: Any, gates: Any) -> Any:
        y, first = half(x, p, gates, 0, stride, 1)
        y, second = half(y, p, gates, 2, 1, 1)
        return padded(first | second, x, y)

    def dilated(x: Any, p: Any, gates: Any) -> Any:
        y, first = half(x, p, gates, 0, stride, 2)
        return padded(first, x, y)

    return lean_switch(
        (
            simple(lambda x: jnp.zeros_like(x[:, ::stride, ::stride])),
            simple(lambda x: max_pool(x, 3, stride)),
            simple(lambda x: pool3(x)[:, ::stride, ::stride]),
            skip,
            separable,
            dilated,
        )
    )


def cell(
    params: Any,
    edges: Integer[Array, "8 2"],
    pair: tuple[Any, Any],
    reduces: bool,
    *,
    gates: Any = None,
    observe: Observe | None = None,
    norm: bool = True,
) -> tuple[Any, Any]:
    """Run one cell.

    Args:
      params: leaves without the axis of cells.
      edges: operation and source of each edge.
      pair: the outputs of the two cells before, at one resolution.
      reduces: whether it halves the image.
      gates: multipliers of the 34 slots' channels, `[34, B, C]`.
      observe: called at each layer; its results are zero where there is none.
      norm: False leaves normalisation out.

    Returns:
      `[B, Y, X, 4·C]`, and the observations stacked over the slots.

    >>> config, arch = DartsConfig(2, 3), jnp.zeros((2, 8, 2), jnp.int32)
    >>> tree = jax.eval_shape(lambda key: init(key, arch, config), jax.random.key(0))["groups"]
    >>> p, x = jax.tree.map(lambda v: jnp.ones(v.shape[1:]), tree["0"]), jnp.ones((1, 4, 4, 8))
    >>> jax.eval_shape(lambda x: cell(p, arch[0], (x, x), False)[0], x).shape
    (1, 4, 4, 8)
    """
    states, seen = [], []
    for k in range(2):
        y = gated(jax.nn.relu(pair[k]) @ params["pre"][k], None if gates is None else gates[k])
        seen.append(watch(observe, pair[k], y, Site(relu=True, norm=True)))
        p = jax.tree.map(lambda v, k=k: v[k], params["n0"])
        states.append(norm2d(p, y) if norm else y)
    own = {k: params[k] for k in ("dw1", "pw1", "n1", "dw2", "pw2", "n2")}
    g = None if gates is None else gates[2:].reshape(EDGES, 4, *gates.shape[1:])
    full = jnp.stack(states)
    inner = jnp.zeros((4, *(full[0, :, ::2, ::2] if reduces else full[0]).shape))
    near = _edge_function(1, observe, norm)
    far = _edge_function(2, observe, norm)

    def edge(inner: Any, inputs: Any) -> Any:
        number, (op, source), p, own_gates = inputs
        branch, taps = jnp.asarray(_BRANCH)[op], kernel_mask(op)
        p = p | {k: p[k] * taps for k in ("dw1", "dw2")}
        if reduces:
            y, found = jax.lax.cond(
                source < 2,
                lambda: far(branch, full[jnp.minimum(source, 1)], p, own_gates),
                lambda: near(branch, inner[jnp.maximum(source - 2, 0)], p, own_gates),
            )
        else:
            y, found = near(branch, jnp.concatenate([full, inner])[source], p, own_gates)
        target = number // 2
        added = inner[target] + y
        return jax.lax.dynamic_update_index_in_dim(inner, added, target, 0), found

    inner, found = jax.lax.scan(edge, inner, (jnp.arange(EDGES), edges, own, g))
    out = jnp.moveaxis(inner, 0, -2)
    pre = jax.tree.map(lambda *v: jnp.stack(v), *seen)
    found = jax.tree.map(lambda a, b: jnp.concatenate([a, b.reshape(-1, *b.shape[2:])]), pre, found)
    return out.reshape(*out.shape[:-2], -1), found


def _side_by_side(x: Any) -> Any:
    """Lay pixels at even and at odd places side by side, as channels."""
    return jnp.concatenate([x[:, ::2, ::2], x[:, 1::2, 1::2]], -1)


def apply(
    params: dict[str, Any],
    arch: Integer[Array, "2 8 2"],
    images: Any,
    *,
    gates: dict[str, Any] | None = None,
    observe: Observe | None = None,
    norm: bool = True,
) -> Output:
    """Run the network of one architecture.

    Args:
      params: from `init`.
      arch: from `darts`; may be traced.
      images: `[B, Y, X, C]` with rows and columns that 4 divides.
      gates: from `ones_gates`.
      observe: called at each layer with its input (before the ReLU), its output and its `Site`.
      norm: as in `network.apply`.

    Returns:
      Logits and what was asked for; features are those of the stem and of every cell.

    >>> config, arch = DartsConfig(2, 3), jnp.zeros((2, 8, 2), jnp.int32)
    >>> params = jax.eval_shape(lambda key: init(key, arch, config), jax.random.key(0))
    >>> jax.eval_shape(apply, params, arch, jnp.ones((2, 8, 8, 3))).logits.shape
    (2, 10)
    """
    g: Any = gates or {"stem": None, "groups": {}, "head": None}
    stem = gated(conv3(images, params["stem"]["w"]), g["stem"])
    seen = [stacked(watch(observe, images, stem, Site(relu=False, norm=True)))]
    x, log_scale = rescaled(norm2d(params["stem"], stem) if norm else stem, norm)
    features = [x]
    x = jnp.pad(x, ((0, 0),) * 3 + ((0, x.shape[-1] // 3),))
    # Both carried arrays are divided by the same constants, so that their sum stays homogeneous.
    pair = (x, x)
    count = sum(own["pre"].shape[0] for own in params["groups"].values())
    config = DartsConfig(params["stem"]["w"].shape[-1] // 3, count)
    real = existing(params, config)
    for (reduces, _, _), (n, own) in zip(groups(config), real.items(), strict=True):

        def one(carry: Any, inputs: Any, reduces: bool = reduces) -> Any:
            (before, last), scale = carry
            p, gate = inputs
            options: Any = {"gates": gate, "observe": observe, "norm": norm}
            out, found = cell(p, arch[int(reduces)], (before, last), reduces, **options)
            size, more = _common(last, out, norm)
            before = _side_by_side(last) if reduces else last
            return ((before / size, out / size), scale + more), (out / size, found)

        xs = (own, g["groups"].get(n))
        if reduces:  # one cell, whose output has another shape than its input
            xs = jax.tree.map(lambda v: v[0], xs)
            (pair, log_scale), (out, found) = one((pair, log_scale), xs)
            outs, found = out[None], found
        else:
            (pair, log_scale), (outs, found) = jax.lax.scan(one, (pair, log_scale), xs)
            found = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), found)
        features += list(outs)
        seen.append(found)
    x = pair[1]
    logits = jnp.mean(x, (1, 2)) @ params["head"]["w"]
    logits = logits if g["head"] is None else logits * g["head"]
    site = Site(relu=False, norm=False)
    seen.append(stacked(watch(observe, x, logits[:, None, None, :], site)))
    observed = jax.tree.map(lambda *v: jnp.concatenate(v), *seen)
    logits = logits + params["head"]["bias"][None] if norm else logits
    return Output(logits, log_scale, features, x, observed)


def _common(last: Any, out: Any, norm: bool) -> tuple[Any, Any]:
    """Choose the constant that both carried arrays are divided by."""
    if norm:
        return 1.0, jnp.zeros(())
    size = jax.lax.stop_gradient(jnp.maximum(jnp.mean(jnp.abs(out)), jnp.mean(jnp.abs(last))))
    size = jnp.where(size > 0, size, 1.0)
    return size, jnp.log(size)


def _pull(arch: Any, config: DartsConfig, params: Any, features: Any, cotangents: Any) -> Any:
    """Pull cotangents of each cell's output back to the output of the cell before it."""
    padded = [jnp.pad(features[0], ((0, 0),) * 3 + ((0, features[0].shape[-1] // 3),))]
    padded += features[1:]
    reduced = [layer.reduces for layer in plan(config.channels, config.cells)]
    found, real = [], existing(params, config)
    for n, (reduces, _, cells) in enumerate(groups(config)):
        for place, i in enumerate(cells):
            p = jax.tree.map(lambda v, k=place: v[k], real[str(n)])
            before = padded[max(i - 1, 0)]
            before = _side_by_side(before) if i and reduced[i - 1] else before

            def block(x: Any, p: Any = p, before: Any = before, reduces: bool = reduces) -> Any:
                return cell(p, arch[int(reduces)], (before, x), reduces)[0]

            back = jax.vjp(block, padded[i])[1](cotangents[i])[0]
            found.append((cotangents[i], back[..., : features[i].shape[-1]]))
    return found


def cell_model(arch: Any, config: DartsConfig) -> Model:
    """Make the model of a genotype, which may be traced.

    >>> cell_model(jnp.zeros((2, 8, 2), jnp.int32), DartsConfig(2, 3)).present.shape
    (104,)
    """
    arch = jnp.asarray(arch)
    return Model(
        init=partial(init, arch=arch, config=config),
        logits=lambda params, images: apply(params, arch, images).logits,
        nodes=partial(nodes, arch, config),
        present=presence(arch, config),
        forward=lambda params, images, **options: apply(params, arch, images, **options),
        gates=partial(ones_gates, config),
        gate_nodes=gate_nodes,
        pull=partial(_pull, arch, config),
    )
