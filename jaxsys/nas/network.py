"""The NAS-Bench-201 network with the architecture as data, so that one program serves all cells.

A 3×3 stem, three stages of N cells with C, 2C and 4C channels, a residual reduction between stages,
normalisation, ReLU, mean over the image, one linear layer. Each edge holds the weights of both
convolutions; `lax.switch` on the operation's number runs one of them under `lax.map`, and all of
them under `vmap`, where it becomes a selection.

Axes: ``B`` images, ``Y`` and ``X`` rows and columns, ``C`` channels, ``S`` slots: the places that
can hold a convolution or linear layer, in network order and within a cell in the order of `EDGES`
(stem; N·6 edges; 3 of a reduction; …; classifier: 98 for N = 5).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.nas.layers import conv3, mix, norm2d
from jaxsys.nas.output import Observe, Output, Site, gated, rescaled, stacked, watch
from jaxsys.nas.space import CONV1, CONV3, EDGES


@dataclass(frozen=True)
class NetworkConfig:
    """Describe what surrounds the cell.

    Attributes:
      channels: C of the first stage; the benchmark's is 16.
      cells: N in each stage; the benchmark's is 5.
      n_classes: outputs.
      image_channels: of the input.

    >>> NetworkConfig().slots
    98
    """

    channels: int = 16
    cells: int = 5
    n_classes: int = 10
    image_channels: int = 3

    def __post_init__(self) -> None:
        if min(self.channels, self.cells, self.n_classes, self.image_channels) < 1:
            raise UserError(f"{self} has a size below 1; every size is at least 1; raise it")

    @property
    def widths(self) -> tuple[int, int, int]:
        """Return the channels of the three stages."""
        return (self.channels, 2 * self.channels, 4 * self.channels)

    @property
    def slots(self) -> int:
        """Count the places for a convolution or linear layer."""
        return 3 * self.cells * 6 + 8


@partial(jax.jit, static_argnums=1)
def init(key: jax.Array, config: NetworkConfig) -> dict[str, Any]:
    """Draw weights uniformly within ±1/√fan_in, as PyTorch's layers do by default.

    Args:
      key: random key.
      config: sizes.

    Returns:
      Nested dict; a stage's leaves have leading axes `[cells, 6 edges]`.

    >>> shapes = jax.eval_shape(lambda key: init(key, NetworkConfig(4, 1)), jax.random.key(0))
    >>> shapes["stages"]["1"]["w3"].shape
    (1, 6, 3, 3, 8, 8)
    """
    keys = iter(jax.random.split(key, 20))

    def draw(shape: tuple[int, ...], fan_in: int) -> jax.Array:
        bound = fan_in**-0.5
        return jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)

    def norm(*shape: int) -> dict[str, jax.Array]:
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    c0, n, image = config.channels, config.cells, config.image_channels
    params: dict[str, Any] = {"stem": {"w": draw((3, 3, image, c0), 9 * image)} | norm(c0)}
    params["stages"], params["reductions"] = {}, {}
    for s, c in enumerate(config.widths):
        params["stages"][str(s)] = {
            "w3": draw((n, 6, 3, 3, c, c), 9 * c),
            "w1": draw((n, 6, c, c), c),
        } | norm(n, 6, c)
        if s < 2:
            params["reductions"][str(s)] = {
                "a": {"w": draw((3, 3, c, 2 * c), 9 * c)} | norm(2 * c),
                "b": {"w": draw((3, 3, 2 * c, 2 * c), 18 * c)} | norm(2 * c),
                "down": {"w": draw((c, 2 * c), c)},
            }
    last = config.widths[-1]
    params["last"] = norm(last)
    params["head"] = {
        "w": draw((last, config.n_classes), last),
        "bias": draw((config.n_classes,), last),
    }
    return params


def ones_gates(config: NetworkConfig, batch: int) -> dict[str, Any]:
    """Make the gates that multiply every layer's output channels, all 1.

    The derivative of a loss by a gate is Σ_yx a·∂L/∂a for one image and channel, which Fisher
    pruning and the Fisher proxy need, without keeping any activation.

    >>> ones_gates(NetworkConfig(4, 1), 2)["stages"]["0"].shape
    (1, 6, 2, 4)
    """
    n, widths = config.cells, config.widths
    return {
        "stem": jnp.ones((batch, widths[0])),
        "stages": {str(s): jnp.ones((n, 6, batch, c)) for s, c in enumerate(widths)},
        "reductions": {str(s): jnp.ones((3, batch, widths[s + 1])) for s in range(2)},
        "head": jnp.ones((batch, config.n_classes)),
    }


def cell(
    params: dict[str, Any],
    arch: Integer[Array, "6"],
    x: Float[Array, "B Y X C"],
    *,
    gates: Float[Array, "6 B C"] | None = None,
    observe: Observe | None = None,
    norm: bool = True,
) -> tuple[Float[Array, "B Y X C"], Any]:
    """Run one cell.

    Args:
      params: leaves with one leading axis of 6 edges.
      arch: operation numbers.
      x: features.
      gates: multipliers of each edge's channels.
      observe: called at each edge; its results are zero where the edge is no convolution.
      norm: False leaves normalisation out.

    Returns:
      Features of the same shape, and the observations stacked over edges.

    >>> shapes = jax.eval_shape(lambda key: init(key, NetworkConfig(4, 1)), jax.random.key(0))
    >>> p = jax.tree.map(lambda v: jnp.ones(v.shape[1:]), shapes["stages"]["0"])
    >>> cell(p, jnp.array([0, 1, 1, 1, 0, 1]), jnp.ones((1, 2, 2, 4)))[0].mean().item()
    1.0
    """
    nodes, seen = {1: x}, []
    for e, (source, target) in enumerate(EDGES):
        inputs, p = nodes[source], jax.tree.map(lambda v, e=e: v[e], params)
        is_conv = (arch[e] == CONV3) | (arch[e] == CONV1)
        y = mix(arch[e], inputs, p["w3"], p["w1"])
        if gates is not None:
            y = jnp.where(is_conv, gated(y, gates[e]), y)
        found = watch(observe, inputs, y, Site(relu=True, norm=True))
        seen.append(jax.tree.map(lambda v, c=is_conv: jnp.where(c, v, 0), found))
        z = jnp.where(is_conv, norm2d(p, y), y) if norm else y
        nodes[target] = nodes[target] + z if target in nodes else z
    return nodes[4], jax.tree.map(lambda *v: jnp.stack(v), *seen)


def _reduction(p: Any, x: Any, gates: Any, observe: Observe | None, norm: bool) -> Any:
    g = (None,) * 3 if gates is None else gates
    a = gated(conv3(jax.nn.relu(x), p["a"]["w"], 2), g[0])
    seen = [watch(observe, x, a, Site(relu=True, norm=True))]
    inner = norm2d(p["a"], a) if norm else a
    b = gated(conv3(jax.nn.relu(inner), p["b"]["w"]), g[1])
    seen.append(watch(observe, inner, b, Site(relu=True, norm=True)))
    pooled = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))
    down = gated(pooled @ p["down"]["w"], g[2])
    seen.append(watch(observe, pooled, down, Site(relu=False, norm=False)))
    out = down + (norm2d(p["b"], b) if norm else b)
    return out, jax.tree.map(lambda *v: jnp.stack(v), *seen)


def apply(
    params: dict[str, Any],
    arch: Integer[Array, "6"],
    images: Float[Array, "B Y X C"],
    *,
    gates: dict[str, Any] | None = None,
    observe: Observe | None = None,
    norm: bool = True,
) -> Output:
    """Run the network of one architecture.

    Args:
      params: from `init`.
      arch: operation numbers; may be traced.
      images: with rows and columns that 4 divides.
      gates: from `ones_gates`.
      observe: called at each layer with its input (before the ReLU), its output and its `Site`.
      norm: False leaves normalisation out and divides activations by constants on the way, summed
        up in `log_scale`: the network without norms is homogeneous, so nothing else changes.

    Returns:
      Logits and what was asked for.

    >>> params = jax.eval_shape(lambda key: init(key, NetworkConfig(4, 1)), jax.random.key(0))
    >>> cell, images = jnp.array([2, 0, 1, 3, 4, 2]), jnp.ones((2, 4, 4, 3))
    >>> jax.eval_shape(apply, params, cell, images).logits.shape
    (2, 10)
    """
    g: Any = gates or {"stem": None, "stages": {}, "reductions": {}, "head": None}
    stem = gated(conv3(images, params["stem"]["w"]), g["stem"])
    seen = [stacked(watch(observe, images, stem, Site(relu=False, norm=True)))]
    x, log_scale = rescaled(norm2d(params["stem"], stem) if norm else stem, norm)
    features = [x]
    run = partial(cell, observe=observe, norm=norm)

    def one(carry: Any, inputs: Any) -> Any:
        x, scale = carry
        p, own = inputs
        x, found = run(p, arch, x, gates=own)
        x, more = rescaled(x, norm)
        return (x, scale + more), (x, found)

    for s in range(3):
        stage = params["stages"][str(s)]
        (x, log_scale), (outs, found) = jax.lax.scan(
            one, (x, log_scale), (stage, g["stages"].get(str(s)))
        )
        features += list(outs)
        seen.append(jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), found))
        if s < 2:
            p = params["reductions"][str(s)]
            x, found = _reduction(p, x, g["reductions"].get(str(s)), observe, norm)
            x, more = rescaled(x, norm)
            log_scale = log_scale + more
            features.append(x)
            seen.append(found)
    before = norm2d(params["last"], x) if norm else x
    pooled = jnp.mean(jax.nn.relu(before), (1, 2))
    logits = pooled @ params["head"]["w"]
    logits = logits if g["head"] is None else logits * g["head"]
    found = watch(observe, before, logits[:, None, None, :], Site(relu=True, norm=False))
    seen.append(stacked(found))
    observed = jax.tree.map(lambda *v: jnp.concatenate(v), *seen)
    # Without norms a bias would break the homogeneity that synflow and the scale rest on.
    logits = logits + params["head"]["bias"][None] if norm else logits
    return Output(logits, log_scale, features, before, observed)


def pull_blocks(
    arch: Any, params: dict[str, Any], features: Any, cotangents: Any
) -> list[tuple[Any, Any]]:
    """Pull cotangents of each cell's and reduction's output back to its input.

    Args:
      arch: operation numbers.
      params: from `init`.
      features: `Output.features`.
      cotangents: one array for each of `features[1:]`.

    Returns:
      For each block, its output's cotangent and its input's.

    >>> config, arch = NetworkConfig(4, 1), jnp.array([2, 0, 1, 3, 4, 2])
    >>> params = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    >>> features = jax.eval_shape(apply, params, arch, jnp.ones((2, 4, 4, 3))).features
    >>> len(jax.eval_shape(pull_blocks, arch, params, features, features[1:]))
    5
    """
    cells, pulled, at = params["stages"]["0"]["w1"].shape[0], [], 0

    def one(inputs: Any) -> Any:
        p, x, g = inputs
        return jax.vjp(lambda x: cell(p, arch, x)[0], x)[1](g)[0]

    for s in range(3):
        x, g = (jnp.stack(v[at : at + cells]) for v in (features, cotangents))
        pulled += list(jax.lax.map(one, (params["stages"][str(s)], x, g)))
        at += cells
        if s < 2:
            p = params["reductions"][str(s)]
            back = jax.vjp(lambda x, p=p: _reduction(p, x, None, None, True)[0], features[at])[1]
            pulled += back(cotangents[at])
            at += 1
    return list(zip(cotangents, pulled, strict=True))
