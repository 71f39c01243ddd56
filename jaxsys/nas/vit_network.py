"""The vision transformer with the architecture as data, so that one program serves the space.

Patches, sine-cosine positions, L layers of attention and two linear layers behind layer
normalisation, mean over the tokens, one linear layer. Everything is as wide as the widest
architecture; channels, heads and hidden units beyond an architecture's own are masked to 0, the
normalisation counts its own channels only, and a layer beyond its depth adds nothing.

Axes: ``B`` images, ``T`` tokens, ``D`` width, ``H`` heads, ``C`` head width, ``F`` hidden units,
``L`` layers, ``S`` slots: patches; for each layer queries-keys-values, projection, both linear
layers; classifier.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxsys.nas.layers import draw_uniform
from jaxsys.nas.model import Model
from jaxsys.nas.output import Observe, Output, Site, gated, rescaled, stacked, watch
from jaxsys.nas.vit import VitConfig

_EPS = 1e-5
_LAYERS = ("qkv", "project", "fc1", "fc2")


class _Masks(NamedTuple):
    width: Any  # [D]
    heads: Any  # [L, H]
    hidden: Any  # [L, F]
    on: Any  # [L]


def _masks(arch: Any, config: VitConfig) -> _Masks:
    n = config.layers

    def first(count: Any, size: int) -> Any:
        places = jnp.broadcast_to(jnp.arange(size), (*jnp.shape(count), size))
        return (places < count[..., None]).astype(jnp.float32)

    return _Masks(
        first(arch[0], max(config.widths)),
        first(arch[2 : 2 + n], max(config.heads)),
        first(arch[2 + n :], config.hidden),
        first(arch[1], n),
    )


def _sides(arch: Any, config: VitConfig) -> dict[str, tuple[Any, Any]]:
    """Mark for each kind of layer the inputs and outputs that exist, `[L, inputs]` and outputs."""
    m, n = _masks(arch, config), config.layers
    width = jnp.broadcast_to(m.width, (n, m.width.size)) * m.on[:, None]
    inner = jnp.repeat(m.heads, config.head_width, 1)
    return {
        "qkv": (width, jnp.tile(inner, (1, 3))),
        "project": (inner, width),
        "fc1": (width, m.hidden),
        "fc2": (m.hidden, width),
    }


def init(key: jax.Array, arch: Any, config: VitConfig) -> dict[str, Any]:
    """Draw weights uniformly within ±1/√fan_in of the architecture's own layer; biases are 0.

    Args:
      key: random key.
      arch: `[2 + 2·L]`; may be traced.
      config: the space.

    Returns:
      Nested dict; the leaves of `layers` have the leading axis L. Surplus weights are 0.

    >>> small = VitConfig((16,), (2,), (2,), (2.0,), 8)
    >>> arch = jnp.array([16, 2, 2, 2, 32, 32])
    >>> shapes = jax.eval_shape(lambda key: init(key, arch, small), jax.random.key(0))
    >>> shapes["layers"]["fc1"]["w"].shape
    (2, 16, 32)
    """
    m, sides, pixels = _masks(arch, config), _sides(arch, config), _pixels(config)

    def bound(inputs: Any, outputs: Any) -> Any:
        fan_in = jnp.maximum(jnp.sum(inputs, -1), 1.0)[..., None, None]
        return inputs[..., :, None] * outputs[..., None, :] / jnp.sqrt(fan_in)

    pairs = [(jnp.ones(pixels), m.width), *sides.values(), (m.width, jnp.ones(config.n_classes))]
    bounds = [bound(*pair) for pair in pairs]
    drawn = draw_uniform(key, [(b.shape, b) for b in bounds])
    patches, *inner, head = [{"w": w, "bias": jnp.zeros(w[..., 0, :].shape)} for w in drawn]
    layers = dict(zip(sides, inner, strict=True))
    d, n = max(config.widths), config.layers
    layers |= {k: {"scale": jnp.ones((n, d)), "bias": jnp.zeros((n, d))} for k in ("ln1", "ln2")}
    last = {"scale": jnp.ones(d), "bias": jnp.zeros(d)}
    return {"patches": patches, "layers": layers, "last": last, "head": head}


def _pixels(config: VitConfig) -> int:
    return config.patch**2 * config.image_channels


def _layer_norm(p: Any, x: Any, mask: Any, norm: bool) -> Any:
    if not norm:
        return x
    count, m = jnp.sum(mask), mask[None, None]
    centred = (x - jnp.sum(x, -1, keepdims=True) / count) * m
    variance = jnp.sum(jnp.square(centred), -1, keepdims=True) / count
    y = centred * jax.lax.rsqrt(variance + _EPS)
    return (y * p["scale"][None, None] + p["bias"][None, None]) * m


def _positions(tokens: int, width: int) -> np.ndarray:
    angle = np.arange(tokens)[:, None] / 10_000 ** (np.arange(width)[None] // 2 * 2 / width)
    return np.where(np.arange(width) % 2, np.cos(angle), np.sin(angle)).astype(np.float32)


def _linear(p: Any, x: Any, mask: Any, gate: Any, norm: bool) -> Any:
    """Apply a linear layer, gated before its bias, and mask its outputs."""
    y = x @ p["w"]
    y = y if gate is None else y * gate[:, None]
    return (y + p["bias"][None, None] if norm else y) * mask[None, None]


def _look(observe: Observe | None, x: Any, y: Any, mask: Any, relu: bool = False) -> Any:
    """Observe tokens as if they were an image of one column."""
    site = Site(relu=relu, norm=False, rectified=mask if relu else None, outputs=mask)
    return watch(observe, x[:, :, None], y[:, :, None], site)


def layer(
    p: dict[str, Any],
    masks: _Masks,
    x: Float[Array, "B T D"],
    *,
    gates: Any = None,
    observe: Observe | None = None,
    norm: bool = True,
) -> tuple[Float[Array, "B T D"], Any]:
    """Run one layer.

    Args:
      p: leaves without the axis of layers.
      masks: likewise.
      x: tokens.
      gates: multipliers of the outputs of each linear layer.
      observe: called at each of the four; its results are zero beyond the depth.
      norm: False leaves out normalisation and biases, rectifies in place of GELU, and lets every
        token attend to all alike, so that the layer is homogeneous.

    Returns:
      Tokens, and the observations stacked over the four slots.

    >>> config, arch = VitConfig((16,), (1,), (2,), (2.0,), 8), jnp.array([16, 1, 2, 32])
    >>> tree = jax.eval_shape(lambda key: init(key, arch, config), jax.random.key(0))["layers"]
    >>> one = jax.tree.map(lambda v: jnp.ones(v.shape[1:]), tree)
    >>> m = _masks(arch, config)
    >>> m = m._replace(heads=m.heads[0], hidden=m.hidden[0], on=m.on[0])
    >>> jax.eval_shape(lambda x: layer(one, m, x)[0], jnp.ones((1, 4, 16))).shape
    (1, 4, 16)
    """
    g = dict.fromkeys(_LAYERS) if gates is None else gates
    size = p["qkv"]["w"].shape[-1] // 3 // masks.heads.size
    inner = jnp.repeat(masks.heads, size)
    h = _layer_norm(p["ln1"], x, masks.width, norm)
    triple = jnp.tile(inner, 3)
    y = _linear(p["qkv"], h, triple, g["qkv"], norm)
    seen = [_look(observe, h, y, triple)]
    q, k, v = jnp.moveaxis(y.reshape(*y.shape[:2], 3, masks.heads.size, size), 2, 0)
    if norm:
        weights = jax.nn.softmax(jnp.einsum("bthc,bshc->bhts", q, k) * size**-0.5, -1)
        mixed = jnp.einsum("bhts,bshc->bthc", weights, v)
    else:
        mixed = jnp.broadcast_to(jnp.mean(v, 1, keepdims=True), v.shape)
    mixed = mixed.reshape(*y.shape[:2], -1)
    a = _linear(p["project"], mixed, masks.width, g["project"], norm)
    seen.append(_look(observe, mixed, a, masks.width))
    x = x + masks.on * a
    h = _layer_norm(p["ln2"], x, masks.width, norm)
    u = _linear(p["fc1"], h, masks.hidden, g["fc1"], norm)
    seen.append(_look(observe, u, u, masks.hidden, relu=True))
    active = jax.nn.gelu(u, approximate=False) if norm else jax.nn.relu(u)
    y = _linear(p["fc2"], active, masks.width, g["fc2"], norm)
    seen.append(_look(observe, active, y, masks.width))
    found = jax.tree.map(lambda *v: jnp.stack(v), *seen)
    return x + masks.on * y, jax.tree.map(lambda v: jnp.where(masks.on > 0, v, 0), found)


def _patches(images: Any, patch: int) -> Any:
    b, y, x, c = images.shape
    cut = images.reshape(b, y // patch, patch, x // patch, patch, c).swapaxes(2, 3)
    return cut.reshape(b, (y // patch) * (x // patch), patch * patch * c)


def apply(
    params: dict[str, Any],
    arch: Integer[Array, "A"],
    images: Float[Array, "B Y X C"],
    config: VitConfig,
    *,
    gates: dict[str, Any] | None = None,
    observe: Observe | None = None,
    norm: bool = True,
) -> Output:
    """Run the network of one architecture.

    Args:
      params: from `init`.
      arch: from `vit`; may be traced.
      images: with rows and columns that the patch divides.
      config: the space.
      gates: from `ones_gates`.
      observe: called at each layer with its input, its output and its `Site`; the first linear
        layer of each pair shows what goes into GELU, which counts as a ReLU.
      norm: False leaves normalisation, biases and positions out; see `layer`.

    Returns:
      Logits and what was asked for; features are the tokens `[B, T, 1, D]` behind each layer.

    >>> config, arch = VitConfig((16,), (1,), (2,), (2.0,), 8), jnp.array([16, 1, 2, 32])
    >>> params = jax.eval_shape(lambda key: init(key, arch, config), jax.random.key(0))
    >>> run = lambda params, images: apply(params, arch, images, config).logits
    >>> jax.eval_shape(run, params, jnp.ones((2, 8, 8, 3))).shape
    (2, 10)
    """
    m = _masks(arch, config)
    g: Any = gates or {"patches": None, "layers": None, "head": None}
    cut = _patches(images, config.patch)
    x = _linear(params["patches"], cut, m.width, g["patches"], norm)
    seen = [stacked(_look(observe, cut, x, m.width))]
    if norm:
        x = x + _positions(x.shape[1], x.shape[2])[None] * m.width[None, None]
    x, log_scale = rescaled(x, norm)
    first = x

    def one(carry: Any, inputs: Any) -> Any:
        x, scale = carry
        p, heads, hidden, on, own = inputs
        masks = _Masks(m.width, heads, hidden, on)
        x, found = layer(p, masks, x, gates=own, observe=observe, norm=norm)
        x, more = rescaled(x, norm)
        return (x, scale + more), (x, found)

    xs = (params["layers"], m.heads, m.hidden, m.on, g["layers"])
    (x, log_scale), (outs, found) = jax.lax.scan(one, (x, log_scale), xs)
    seen.append(jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), found))
    x = _layer_norm(params["last"], x, m.width, norm)
    pooled = jnp.mean(x, 1)[:, None, None]
    logits = gated(pooled @ params["head"]["w"], g["head"])
    seen.append(stacked(watch(observe, pooled, logits, Site(relu=False, norm=False))))
    logits = logits[:, 0, 0] + params["head"]["bias"][None] if norm else logits[:, 0, 0]
    observed = jax.tree.map(lambda *v: jnp.concatenate(v), *seen)
    features = [first[:, :, None], *outs[:, :, :, None]]
    rows = images.shape[1] // config.patch
    return Output(
        logits, log_scale, features, x.reshape(x.shape[0], rows, -1, x.shape[-1]), observed
    )


def ones_gates(config: VitConfig, batch: int) -> dict[str, Any]:
    """Make the gates that multiply every layer's outputs, all 1.

    >>> ones_gates(VitConfig((16,), (1,), (2,), (2.0,), 8), 3)["layers"]["qkv"].shape
    (1, 3, 48)
    """
    width, inner = max(config.widths), max(config.heads) * config.head_width
    sizes = {"qkv": 3 * inner, "project": width, "fc1": config.hidden, "fc2": width}
    return {
        "patches": jnp.ones((batch, width)),
        "layers": {k: jnp.ones((config.layers, batch, size)) for k, size in sizes.items()},
        "head": jnp.ones((batch, config.n_classes)),
    }


def _line_up(first: Any, layers: dict[str, Any], last: Any) -> Any:
    inner = jnp.stack([layers[k] for k in _LAYERS], -1).reshape(-1)
    return jnp.concatenate([first[None], inner, last[None]])


def _gate_nodes(arch: Any, config: VitConfig, tree: Any) -> Any:
    share = {
        k: out.shape[1] / jnp.maximum(out.sum(1), 1) for k, (_, out) in _sides(arch, config).items()
    }
    layers = {k: tree["layers"][k] * share[k] for k in _LAYERS}
    width = _masks(arch, config).width
    return _line_up(tree["patches"] * width.size / width.sum(), layers, tree["head"])


def _nodes(arch: Any, config: VitConfig, tree: Any, reduce: Any = jnp.sum) -> Any:
    width = _masks(arch, config).width
    layers = {
        k: jax.vmap(reduce)(tree["layers"][k]["w"] * a[:, :, None] * b[:, None, :])
        for k, (a, b) in _sides(arch, config).items()
    }
    first = reduce(tree["patches"]["w"] * width[None])
    return _line_up(first, layers, reduce(tree["head"]["w"] * width[:, None]))


def _pull(arch: Any, config: VitConfig, params: Any, features: Any, cotangents: Any) -> Any:
    """Pull cotangents of each layer's output back to its input, at channels that exist."""
    m, found = _masks(arch, config), []
    for n, g in enumerate(cotangents):
        p = jax.tree.map(lambda v, n=n: v[n], params["layers"])
        own = _Masks(m.width, m.heads[n], m.hidden[n], m.on[n])
        g = g * m.width[None, None, None]
        back = jax.vjp(partial(_layer_alone, p, own), features[n][:, :, 0])[1](g[:, :, 0])[0]
        found.append((g, back[:, :, None]))
    return found


def _layer_alone(p: Any, masks: _Masks, x: Any) -> Any:
    return layer(p, masks, x)[0]


def transformer_model(arch: Any, config: VitConfig) -> Model:
    """Make the model of an architecture, which may be traced.

    >>> config = VitConfig((16,), (1,), (2,), (2.0,), 8)
    >>> transformer_model(jnp.array([16, 1, 2, 32]), config).present.shape
    (6,)
    """
    arch = jnp.asarray(arch)
    on = jnp.arange(config.layers) < arch[1]
    one = jnp.ones(1, bool)
    return Model(
        init=partial(init, arch=arch, config=config),
        logits=lambda params, images: apply(params, arch, images, config).logits,
        nodes=partial(_nodes, arch, config),
        present=jnp.concatenate([one, jnp.repeat(on, 4), one]),
        forward=lambda params, images, **kw: apply(params, arch, images, config, **kw),
        gates=partial(ones_gates, config),
        gate_nodes=partial(_gate_nodes, arch, config),
        pull=partial(_pull, arch, config),
        blocks=jnp.concatenate([one, on]),
    )
