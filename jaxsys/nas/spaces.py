"""The search spaces by name: how an architecture is written, drawn, and built into a network."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.nas import darts, nb101, space, vit
from jaxsys.nas.darts_network import DartsConfig
from jaxsys.nas.darts_network import cell_model as darts_model
from jaxsys.nas.model import Model, cell_model
from jaxsys.nas.nb101_network import Nb101Config
from jaxsys.nas.nb101_network import cell_model as nb101_model
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.originals import archs_in
from jaxsys.nas.score import ScoreConfig, Scores, score_all, write_npz
from jaxsys.nas.vit import VitConfig
from jaxsys.nas.vit_network import transformer_model


class Space(NamedTuple):
    """A search space whose architectures are arrays of whole numbers.

    Proxies need `model` alone (and `any_model` makes one of any function); the rest is how people
    and files name architectures.

    Attributes:
      parse: text -> architecture.
      text: architecture -> text.
      sample: (how many, seed) -> `[N, ...]` architectures.
      make: architecture (traced) -> model.
      image_channels: that the network expects.

    >>> nb201 = open_space("nb201", channels=4, depth=1)
    >>> nb201.text(nb201.parse("7"))[:16]
    '|skip_connect~0|'
    """

    parse: Callable[[str], np.ndarray]
    text: Callable[[Any], str]
    sample: Callable[[int, int], np.ndarray]
    make: Callable[[Any], Model]
    image_channels: int


def open_space(
    name: str,
    *,
    channels: int | None = None,
    depth: int | None = None,
    image_channels: int = 3,
) -> Space:
    """Open a space with networks of a chosen size.

    Args:
      name: `nb201`, `nb101`, `darts` or `vit`.
      channels: of the first stage (16, 128, 16 by default); for `vit` the smallest width (192),
        whose others are 9/8 and 5/4 of it and whose heads are a third of it wide.
      depth: cells in each stage (5, 3), cells in all (8), the fewest layers (12).
      image_channels: of the images.

    Raises:
      UserError: for an unknown name, or a size below what the space needs.

    >>> open_space("vit", channels=24, depth=1).sample(1, 0).shape
    (1, 8)
    """
    if name == "nb201":
        config = NetworkConfig(_or(channels, 16), _or(depth, 5), image_channels=image_channels)
        return nas_bench_201(config)
    if name == "nb101":
        small = Nb101Config(_or(channels, 128), _or(depth, 3), image_channels=image_channels)
        parts = (nb101.from_string, nb101.to_string, nb101.sample)
        return Space(*parts, partial(nb101_model, config=small), image_channels)
    if name == "darts":
        cells = DartsConfig(_or(channels, 16), _or(depth, 8), image_channels=image_channels)
        parts = (darts.from_string, darts.to_string, darts.sample)
        return Space(*parts, partial(darts_model, config=cells), image_channels)
    if name != "vit":
        raise UserError(
            f"space {name!r} does not exist; expected nb201, nb101, darts or vit; choose one"
        )
    c, n = _or(channels, 192), _or(depth, 12)
    if c < 8 or n < 1:
        raise UserError(
            f"a transformer of width {c} and {n} layers is asked for; expected a width of at "
            "least 8 and a layer; raise them"
        )
    choices = VitConfig(
        widths=(c, c * 9 // 8, c * 5 // 4),
        depths=(n, n + 1, n + 2),
        head_width=c // 3,
        image_channels=image_channels,
    )
    parse, sample = partial(vit.from_string, config=choices), partial(vit.sample, config=choices)
    make = partial(transformer_model, config=choices)
    return Space(parse, vit.to_string, sample, make, image_channels)


def nas_bench_201(config: NetworkConfig) -> Space:
    """Open NAS-Bench-201 with networks as a config says.

    >>> nas_bench_201(NetworkConfig(4, 1)).parse("7").tolist()
    [0, 0, 0, 0, 1, 2]
    """
    make = partial(cell_model, config=config)
    return Space(_parse_nb201, space.to_string, _sample_nb201, make, config.image_channels)


def choose_archs(
    opened: Space,
    names: Sequence[str],
    table: Path | None,
    sample: int | None,
    *,
    space: str,
    dataset: str | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Collect architectures by name and from a table, and draw some of them.

    Args:
      opened: the space.
      names: texts that it parses.
      table: a file that names architectures, see `originals.archs_in`.
      sample: how many to draw; of the whole space if none are named; None keeps all.
      space: the space's name.
      dataset: rows to keep of the table.
      seed: of the draw.

    Raises:
      UserError: for a sample larger than the set.

    >>> vit = open_space("vit", channels=24, depth=1)
    >>> choose_archs(vit, (), None, 2, space="vit").shape
    (2, 8)
    """
    texts = [*names, *([] if table is None else archs_in(table, space, dataset))]
    if not texts:
        return np.zeros((0, 1), np.int32) if sample is None else opened.sample(sample, seed)
    found = np.stack([opened.parse(text) for text in texts])
    if sample is None:
        return found
    if not 1 <= sample <= len(found):
        raise UserError(
            f"a sample of {sample} is asked for; expected 1 to {len(found)} cells; change it"
        )
    return found[np.random.default_rng(seed).permutation(len(found))[:sample]]


def score_archs(
    opened: Space,
    archs: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    config: ScoreConfig,
    *,
    out: Path | None = None,
    block: int = 64,
) -> Scores:
    """Score architectures, and write `scores.npz`: names, and for each proxy totals and nodes.

    Values are means over seeds. The blocks of a run that was stopped are in `out/blocks`. Cells of
    NAS-Bench-201 are named by their numbers, `cells`, all others by text, `arch`.

    Args:
      opened: the space.
      archs: of the space.
      images: `[B, Y, X, C]`.
      labels: `[B]`.
      config: proxies and seeds.
      out: folder; nothing is written if left out.
      block: architectures at a time.

    Raises:
      UserError: if there are no architectures, or the images do not fit the network.

    >>> vit = open_space("vit", channels=24, depth=1)
    >>> images, labels = np.ones((1, 8, 8, 3), np.float32), np.zeros(1, int)
    >>> one = score_archs(vit, vit.sample(1, 0), images, labels, ScoreConfig(("params",)), block=8)
    >>> one.totals["params"].shape
    (1, 1)
    """
    if not len(archs):
        raise UserError(
            "no cells are named; expected arch strings or numbers, a table, or how many to draw; "
            "name some"
        )
    if images.shape[-1] != opened.image_channels or images.shape[1] % 4:
        raise UserError(
            f"images have shape {images.shape[1:]}; expected {opened.image_channels} channels and "
            "rows that 4 divides; choose other images"
        )
    folder = None if out is None else out / "blocks"
    found = score_all(opened.make, archs, images, labels, config, block=block, folder=folder)
    if found is None:
        raise UserError(
            "other processes have not finished their blocks yet; expected all in the folder; run "
            "the command once more"
        )
    if out is not None:
        is_nb201 = opened.text is space.to_string
        named = {"cells": archs} if is_nb201 else {"arch": np.array([*map(opened.text, archs)])}
        arrays = named | {k: v.mean(1) for k, v in found.totals.items()}
        arrays |= {f"{k}.nodes": v.mean(1) for k, v in found.nodes.items()}
        write_npz(out / "scores.npz", arrays)
    return found


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _parse_nb201(text: str) -> np.ndarray:
    return space.from_index(int(text)) if text.isdecimal() else space.from_string(text)


def _sample_nb201(n: int, seed: int) -> np.ndarray:
    if not 1 <= n <= space.N_CELLS:
        raise UserError(
            f"a sample of {n} is asked for; expected 1 to {space.N_CELLS} cells; change it"
        )
    return space.all_cells()[np.random.default_rng(seed).permutation(space.N_CELLS)[:n]]
