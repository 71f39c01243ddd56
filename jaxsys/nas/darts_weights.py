"""Weights of the DARTS network: which exist for a genotype, how they are drawn, their slots."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.nas.darts import DIL3, SEP3, SEP5, SKIP, plan
from jaxsys.nas.layers import draw_uniform

EDGES, PER_CELL = 8, 34
_MIDDLE = np.pad(np.ones((3, 3), bool), 1)


@dataclass(frozen=True)
class DartsConfig:
    """Describe what surrounds the cells.

    Attributes:
      channels: of the first cells' states.
      cells: in all.
      n_classes: outputs.
      image_channels: of the input.

    >>> DartsConfig().slots
    274
    """

    channels: int = 16
    cells: int = 8
    n_classes: int = 10
    image_channels: int = 3

    def __post_init__(self) -> None:
        if min(self.channels, self.n_classes, self.image_channels) < 1 or self.cells < 3:
            raise UserError(
                f"{self} has a size below 1 or fewer than 3 cells; expected at least one cell of "
                "each width; raise it"
            )
        if self.channels % 2:
            raise UserError(
                f"{self.channels} channels cannot be halved; expected an even number; change it"
            )

    @property
    def slots(self) -> int:
        """Count the places for a convolution or linear layer."""
        return PER_CELL * self.cells + 2


def groups(config: DartsConfig) -> list[tuple[bool, int, list[int]]]:
    """List runs of alike cells: whether they reduce, their width, their numbers.

    >>> groups(DartsConfig(2, 3))
    [(False, 2, [0]), (True, 4, [1]), (True, 8, [2])]
    """
    layers = plan(config.channels, config.cells)
    runs = groupby(range(config.cells), lambda i: (layers[i].reduces, layers[i].width))
    return [(reduces, width, list(places)) for (reduces, width), places in runs]


def _pre_masks(config: DartsConfig, cells: list[int]) -> np.ndarray:
    """Mark the input convolutions' weights that exist, `[cells, 2, inputs, C]`."""
    layers, found = plan(config.channels, config.cells), []
    for i in cells:
        layer, pair = layers[i], []
        total = (2 if layer.reduces else 4) * layer.width
        for k, real in enumerate(layer.inputs):
            mask = np.zeros((total, layer.width), np.float32)
            if k == 0 and layer.halved:  # even pixels feed one half of the channels, odd the other
                half, side = layer.width // 2, total // 2
                mask[:real, :half] = mask[side : side + real, half:] = 1
            else:
                mask[:real] = 1
            pair.append(mask)
        found.append(pair)
    return np.array(found)


def _edge_masks(arch: Any, reduces: bool) -> dict[str, Any]:
    """Tell for each of a cell's edges which weights exist."""
    ops, sources = arch[int(reduces), :, 0], arch[int(reduces), :, 1]
    conv, sep = ops >= SEP3, (ops == SEP3) | (ops == SEP5)
    small = (ops == SEP3) | (ops == DIL3)
    kernel = jnp.where(small[:, None, None], _MIDDLE[None], True) & conv[:, None, None]
    halves = (ops == SKIP) & (sources < 2) & reduces
    return {
        "dw1": kernel.astype(jnp.float32),
        "pw1": (conv | halves).astype(jnp.float32),
        "dw2": (kernel & sep[:, None, None]).astype(jnp.float32),
        "pw2": sep.astype(jnp.float32),
    }


def existing(params: dict[str, Any], config: DartsConfig) -> dict[str, Any]:
    """Put zeros into input convolutions where there is nothing to convolve.

    >>> config, arch = DartsConfig(2, 3), jnp.zeros((2, 8, 2), jnp.int32)
    >>> params = jax.eval_shape(lambda key: init(key, arch, config), jax.random.key(0))
    >>> sorted(jax.eval_shape(lambda params: existing(params, config), params))
    ['0', '1', '2']
    """
    runs = zip(groups(config), params["groups"].items(), strict=True)
    return {
        n: own | {"pre": own["pre"] * jnp.asarray(_pre_masks(config, cells))}
        for (_, _, cells), (n, own) in runs
    }


def kernel_mask(op: Integer[Array, ""]) -> Float[Array, "5 5 1"]:
    """Mark the taps of an operation's depthwise kernels.

    >>> int(kernel_mask(jnp.array(SEP3)).sum())
    9
    """
    small = (op == SEP3) | (op == DIL3)
    return jnp.where(small, _MIDDLE, True).astype(jnp.float32)[:, :, None]


def _weight_masks(config: DartsConfig, arch: Any, group: Any) -> dict[str, Any]:
    reduces, _, cells = group
    m = _edge_masks(arch, reduces)
    return {
        "pre": jnp.asarray(_pre_masks(config, cells)),
        "dw1": m["dw1"][None, :, :, :, None],
        "pw1": m["pw1"][None, :, None, None],
        "dw2": m["dw2"][None, :, :, :, None],
        "pw2": m["pw2"][None, :, None, None],
    }


def init(key: jax.Array, arch: Any, config: DartsConfig) -> dict[str, Any]:
    """Draw weights uniformly within ±1/√fan_in, as PyTorch's layers do by default.

    Args:
      key: random key.
      arch: `[2, 8, 2]`; may be traced.
      config: sizes.

    Returns:
      Nested dict; the leaves of a run of alike cells have the leading axis `[cells]`. Weights that
      the genotype does not use are 0.

    >>> config, arch = DartsConfig(2, 3), jnp.zeros((2, 8, 2), jnp.int32)
    >>> shapes = jax.eval_shape(lambda key: init(key, arch, config), jax.random.key(0))
    >>> shapes["groups"]["1"]["dw1"].shape
    (1, 8, 5, 5, 4)
    """
    c0, image = 3 * config.channels, config.image_channels
    runs = groups(config)
    shapes: list[Any] = [((3, 3, image, c0), (9 * image) ** -0.5)]
    names = ("pre", "dw1", "pw1", "dw2", "pw2")
    for group in runs:
        reduces, c, cells = group
        m, n = _weight_masks(config, arch, group), len(cells)
        inputs = (2 if reduces else 4) * c
        taps = [jnp.maximum(m[k].sum((2, 3), keepdims=True), 1) ** -0.5 for k in ("dw1", "dw2")]
        fan = jnp.maximum(m["pre"].sum(-2, keepdims=True), 1) ** -0.5
        shapes += [
            ((n, 2, inputs, c), m["pre"] * fan),
            ((n, EDGES, 5, 5, c), m["dw1"] * taps[0]),
            ((n, EDGES, c, c), m["pw1"] * c**-0.5),
            ((n, EDGES, 5, 5, c), m["dw2"] * taps[1]),
            ((n, EDGES, c, c), m["pw2"] * c**-0.5),
        ]
    last = 4 * runs[-1][1]
    shapes += [((last, config.n_classes), last**-0.5), ((config.n_classes,), last**-0.5)]
    stem, *inner, head, bias = draw_uniform(key, shapes)
    found = {}
    for g, (_, c, cells) in enumerate(runs):
        drawn = dict(zip(names, inner[5 * g : 5 * g + 5], strict=True))
        norms = {k: _unit(len(cells), size, c) for k, size in (("n0", 2), ("n1", 8), ("n2", 8))}
        found[str(g)] = drawn | norms
    stem = {"w": stem} | _unit(c0)
    return {"stem": stem, "groups": found, "head": {"w": head, "bias": bias}}


def _unit(*shape: int) -> dict[str, Any]:
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def ones_gates(config: DartsConfig, batch: int) -> dict[str, Any]:
    """Make the gates that multiply every layer's output channels, all 1.

    >>> ones_gates(DartsConfig(2, 3), 4)["groups"]["1"].shape
    (1, 34, 4, 4)
    """
    found = {
        str(n): jnp.ones((len(cells), PER_CELL, batch, width))
        for n, (_, width, cells) in enumerate(groups(config))
    }
    stem = jnp.ones((batch, 3 * config.channels))
    return {"stem": stem, "groups": found, "head": jnp.ones((batch, config.n_classes))}


def gate_nodes(tree: Any) -> Float[Array, "S"]:
    """Line up a tree shaped like the gates, less images and channels, in the order of slots.

    >>> gates = jax.tree.map(lambda v: v.mean((-2, -1)), ones_gates(DartsConfig(2, 3), 2))
    >>> gate_nodes(gates).shape
    (104,)
    """
    parts = [own.reshape(-1) for own in tree["groups"].values()]
    return jnp.concatenate([tree["stem"][None], *parts, tree["head"][None]])


def nodes(arch: Any, config: DartsConfig, tree: Any, reduce: Any = jnp.sum) -> Float[Array, "S"]:
    """Reduce a tree shaped like the parameters to one number for each slot.

    >>> config, arch = DartsConfig(2, 3), jnp.zeros((2, 8, 2), jnp.int32)
    >>> tree = jax.eval_shape(lambda key: init(key, arch, config), jax.random.key(0))
    >>> jax.eval_shape(lambda tree: nodes(arch, config, tree), tree).shape
    (104,)
    """
    parts, each = [reduce(tree["stem"]["w"])[None]], jax.vmap(jax.vmap(reduce))
    for group, own in zip(groups(config), tree["groups"].values(), strict=True):
        keep = _weight_masks(config, arch, group)
        found = {k: each(own[k] * keep[k]) for k in keep}
        there = _edge_masks(arch, group[0])
        there = {k: v.reshape(EDGES, -1).any(1)[None] for k, v in there.items()}
        rest = [jnp.where(there[k], found[k], 0) for k in ("dw1", "pw1", "dw2", "pw2")]
        rest = jnp.stack(rest, -1).reshape(len(group[2]), -1)
        parts.append(jnp.concatenate([found["pre"], rest], 1).reshape(-1))
    return jnp.concatenate([*parts, reduce(tree["head"]["w"])[None]])


def presence(arch: Any, config: DartsConfig) -> Bool[Array, "S"]:
    """Tell which slots hold a layer.

    >>> int(presence(jnp.zeros((2, 8, 2), jnp.int32), DartsConfig(2, 3)).sum())
    8
    """
    one, parts = jnp.ones(1, bool), []
    for reduces, _, cells in groups(config):
        there = [v.reshape(EDGES, -1).any(1) for v in _edge_masks(arch, reduces).values()]
        own = jnp.concatenate([jnp.ones(2, bool), jnp.stack(there, -1).reshape(-1)])
        parts.append(jnp.tile(own, len(cells)))
    return jnp.concatenate([one, *parts, one])
