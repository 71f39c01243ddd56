"""A space of vision transformers: width, depth, and for each layer heads and hidden units.

An architecture is `[2 + 2·L]` numbers for at most L layers: width, depth, the heads of every
layer, its hidden units; 0 for layers beyond the depth. Written as `192:3x672,4x768,…`, width and
then heads and hidden units layer by layer. Axis ``N``: architectures.

Reference: Chen et al., AutoFormer, arXiv 2107.00651, whose smallest space the default choices are.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from jaxsys.core.errors import UserError


@dataclass(frozen=True)
class VitConfig:
    """Say what there is to choose, and what surrounds it.

    Attributes:
      widths: of the tokens.
      depths: numbers of layers.
      heads: of a layer.
      ratios: hidden units over width.
      head_width: of one head.
      patch: rows of a patch.
      n_classes: outputs.
      image_channels: of the input.

    >>> VitConfig().slots
    58
    """

    widths: tuple[int, ...] = (192, 216, 240)
    depths: tuple[int, ...] = (12, 13, 14)
    heads: tuple[int, ...] = (3, 4)
    ratios: tuple[float, ...] = (3.5, 4.0)
    head_width: int = 64
    patch: int = 4
    n_classes: int = 10
    image_channels: int = 3

    def __post_init__(self) -> None:
        choices = (*self.widths, *self.depths, *self.heads, *self.ratios)
        sizes = (self.head_width, self.patch, self.n_classes, self.image_channels)
        lists = (self.widths, self.depths, self.heads, self.ratios)
        if min(map(len, lists)) < 1 or min(choices) <= 0 or min(sizes) < 1:
            raise UserError(
                f"{self} has a size below 1 or nothing to choose from; expected at least one "
                "choice of each and sizes of at least 1; correct it"
            )

    @property
    def layers(self) -> int:
        """Return the most layers."""
        return max(self.depths)

    @property
    def hidden(self) -> int:
        """Return the most hidden units."""
        return int(max(self.widths) * max(self.ratios))

    @property
    def slots(self) -> int:
        """Count the places for a linear layer: four in each layer, patches, classifier."""
        return 4 * self.layers + 2


def check(arch: Any, config: VitConfig) -> Integer[np.ndarray, "... A"]:
    """Check that an architecture is in the space.

    Raises:
      UserError: naming the first number that is no choice.

    >>> check(sample(2), VitConfig()).shape
    (2, 30)
    """
    a = np.asarray(arch)
    n = config.layers
    if a.shape[-1:] != (2 + 2 * n,) or not np.issubdtype(a.dtype, np.integer):
        raise UserError(
            f"an architecture has shape {a.shape}; expected {2 + 2 * n} whole numbers for up to "
            f"{n} layers; correct it"
        )
    for row in a.reshape(-1, a.shape[-1]).tolist():
        width, depth, heads, hidden = row[0], row[1], row[2 : 2 + n], row[2 + n :]
        units = [int(width * r) for r in config.ratios]
        tests = [("width", [width], config.widths), ("depth", [depth], config.depths)]
        tests += [("heads", heads[:depth], config.heads), ("hidden", hidden[:depth], units)]
        tests += [("layers beyond the depth", heads[depth:] + hidden[depth:], (0,))]
        for name, found, choices in tests:
            wrong = [v for v in found if v not in choices]
            if wrong:
                raise UserError(
                    f"{name} of {wrong[0]} is not in the space; expected one of "
                    f"{', '.join(map(str, choices))}; choose another or widen VitConfig"
                )
    return a.astype(np.int32)


def from_string(text: str, config: VitConfig | None = None) -> Integer[np.ndarray, "A"]:
    """Read `width:heads×hidden,…`.

    Raises:
      UserError: for another form, or a choice that the space does not have.

    >>> from_string("16:2x32", VitConfig((16,), (1,), (2,), (2.0,))).tolist()
    [16, 1, 2, 32]
    """
    config = config or VitConfig()
    if not re.fullmatch(r"\d{1,6}:\d{1,4}x\d{1,6}(,\d{1,4}x\d{1,6}){0,99}", text):
        raise UserError(
            f"{text[:60]!r} is no vision transformer; expected a width and heads×hidden units of "
            "each layer, such as 192:3x672,4x768; correct it"
        )
    width, rest = text.split(":")
    layers = [tuple(map(int, layer.split("x"))) for layer in rest.split(",")]
    if len(layers) > config.layers:
        raise UserError(
            f"{len(layers)} layers are given; expected at most {config.layers}; take some away"
        )
    empty = [(0, 0)] * (config.layers - len(layers))
    heads, hidden = zip(*layers, *empty, strict=True)
    return check(np.array([int(width), len(layers), *heads, *hidden]), config)


def to_string(arch: Any) -> str:
    """Write an architecture.

    >>> to_string(np.array([16, 1, 2, 0, 32, 0]))
    '16:2x32'
    """
    width, depth, *rest = np.asarray(arch).tolist()
    layers = zip(rest[:depth], rest[len(rest) // 2 :], strict=False)
    return f"{width}:" + ",".join(f"{heads}x{hidden}" for heads, hidden in layers)


def sample(n: int, seed: int = 0, config: VitConfig | None = None) -> Integer[np.ndarray, "N A"]:
    """Draw architectures, every choice uniformly.

    >>> sample(2, config=VitConfig((16,), (1,), (2,), (2.0,))).tolist()
    [[16, 1, 2, 32], [16, 1, 2, 32]]
    """
    config = config or VitConfig()
    rng, layers = np.random.default_rng(seed), config.layers
    width, depth = rng.choice(config.widths, n), rng.choice(config.depths, n)
    there = np.arange(layers)[None] < depth[:, None]
    heads = rng.choice(config.heads, (n, layers)) * there
    hidden = (rng.choice(config.ratios, (n, layers)) * width[:, None]).astype(int) * there
    return np.concatenate([width[:, None], depth[:, None], heads, hidden], 1).astype(np.int32)


def _matrices(archs: Any, config: VitConfig) -> tuple[Any, Any, Any, Any]:
    a = check(archs, config).astype(np.int64)
    inner = a[..., 2 : 2 + config.layers] * config.head_width
    return a[..., :1], a[..., 1], inner, a[..., 2 + config.layers :]


def params_m(archs: Any, config: VitConfig | None = None) -> Float[np.ndarray, "..."]:
    """Count parameters, in millions: weights, biases, normalisations.

    >>> float(params_m(np.array([16, 1, 2, 32]), VitConfig((16,), (1,), (2,), (2.0,), 8)))
    0.00321
    """
    config = config or VitConfig()
    width, depth, inner, hidden = _matrices(archs, config)
    layers = (4 * width * inner + 3 * inner + 2 * width * hidden + hidden).sum(-1)
    e, k = width[..., 0], config.n_classes
    patches = (config.patch**2 * config.image_channels + 1) * e
    return np.asarray((layers + depth * 6 * e + patches + 2 * e + e * k + k) / 1e6)


def mflops(
    archs: Any, config: VitConfig | None = None, *, rows: int = 32
) -> Float[np.ndarray, "..."]:
    """Count multiply-adds on one image, in millions, products of queries, keys, values included.

    >>> float(mflops(np.array([16, 1, 2, 32]), VitConfig((16,), (1,), (2,), (2.0,), 8), rows=8))
    0.011936
    """
    config = config or VitConfig()
    width, _, inner, hidden = _matrices(archs, config)
    tokens = (rows // config.patch) ** 2
    layers = tokens * (4 * width * inner + 2 * width * hidden) + 2 * tokens**2 * inner
    e = width[..., 0]
    ends = tokens * config.patch**2 * config.image_channels * e + e * config.n_classes
    return np.asarray((layers.sum(-1) + ends) / 1e6)
