"""The furniture game as a task, from a folder that `jaxsys ground prepare` wrote.

Axes: ``N`` objects, ``V`` views, ``R`` rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.ground.evaluation import Condition
from jaxsys.ground.features import (
    ImageEncoder,
    caption_tokens,
    image_encoder,
    text_vectors,
    vocabulary_of,
)
from jaxsys.ground.game import Prepared, Text, make_game, split_by_library, split_by_object
from jaxsys.ground.prepared import read_prepared, read_views
from jaxsys.ground.questions import Questions
from jaxsys.ground.robust import occlude
from jaxsys.ground.tables import Tables, from_games

_RESIDENT_BYTES = 1 << 32
_COVERED = 0.25


@dataclass(frozen=True, kw_only=True)
class Furniture:
    """Describe a game on a prepared folder.

    Attributes:
      folder: What `jaxsys ground prepare` wrote.
      encoder: Whose features of views: efficientnet-lite0, mean-colour or clip:PATH.
      text_encoder: minilm or clip:PATH.
      text: What a description is: name or name+tags.
      split: By object at random, or by library (train Scopia and default, test BlendSwap).
      split_seed: Of the split.
      validation: Share of the objects to stop by.
      candidates: Objects in a question.
      views: How many views of each object are used, evenly spaced; all by default.

    >>> Furniture(folder=Path("prepared")).split
    'object'
    """

    folder: Path
    encoder: str = "efficientnet-lite0"
    text_encoder: str = "minilm"
    text: Text = "name+tags"
    split: Literal["object", "library"] = "object"
    split_seed: int = 0
    validation: float = 0.1
    candidates: int = 2
    views: int | None = None


def open_furniture(
    game: Furniture, *, pixels: bool = False, shifted: Sequence[Path] = ()
) -> Questions:
    """Read a prepared folder and make its game.

    Args:
        game: what is asked.
        pixels: read the activations that an adapted encoder starts from, too.
        shifted: folders prepared from the same libraries in another way (another elevation,
            another light), each a condition to test under.

    Returns:
        Folds ``train``, ``valid`` (without a validation share, none) and ``test``; groups ``same
        noun`` and ``unseen name``.

    Raises:
        UserError: for a folder that is not prepared, or as the parts of the game say.

    >>> open_furniture(Furniture(folder=Path("nowhere")))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere/catalogue.jsonl cannot be read ...
    """
    prepared = _read(game, game.folder, pixels)
    encoder = image_encoder(game.encoder)
    if game.split == "library":
        split = split_by_library(
            prepared.catalogue, validation=game.validation, seed=game.split_seed
        )
    else:
        split = split_by_object(prepared.catalogue, game.split_seed, validation=game.validation)
    parts = {"train": split.train, "valid": split.validation, "test": split.test}
    games = {
        name: make_game(
            prepared.catalogue,
            part,
            text=game.text,
            n_candidates=game.candidates,
            seen=split.train,
            seed=game.split_seed,
        )
        for name, part in parts.items()
        if len(part)
    }
    known = vocabulary_of(games["train"].texts)
    said = []
    for one in games.values():
        tokens, real = caption_tokens(one.texts, known)
        found = text_vectors(one.texts, game.text_encoder)
        said.append(found._replace(tokens=tokens, token_mask=real))
    tables, rows = from_games(prepared, list(games.values()), said)
    keys = tuple(thing.key for thing in prepared.catalogue.objects)

    def pictures(i: int) -> list[Any]:
        return list(_chosen(game, read_views(game.folder, keys[i])))

    def harder(fold: str) -> list[Condition]:
        asked = np.unique(rows[list(games).index(fold)].objects)
        found = [_shifted(game, folder, tables, keys, pixels) for folder in shifted]
        return [*found, _occluded(encoder, tables, pictures, asked)]

    return Questions(
        tables,
        dict(zip(games, rows, strict=True)),
        {
            name: {"same noun": one.same_noun, "unseen name": one.unseen_name}
            for name, one in games.items()
        },
        names=tuple(thing.name for thing in prepared.catalogue.objects),
        texts=tuple(text for one in games.values() for text in one.texts),
        vision=encoder.params,
        encode=encoder.encode,
        patterns=encoder.patterns,
        pictures=pictures,
        harder=harder,
        resident=prepared.pixels is None or prepared.pixels.nbytes <= _RESIDENT_BYTES,
    )


def _chosen(game: Furniture, views: np.ndarray) -> np.ndarray:
    if game.views is None:
        return views
    if not 1 <= game.views <= len(views):
        raise UserError(
            f"{game.views} views are asked for and {len(views)} are prepared; expected 1 to "
            f"{len(views)}; change it"
        )
    return views[np.arange(game.views) * len(views) // game.views]


def _read(game: Furniture, folder: Path, pixels: bool) -> Prepared:
    found = read_prepared(folder, game.encoder, activations=pixels)
    pick = lambda x: np.swapaxes(_chosen(game, np.swapaxes(x, 0, 1)), 0, 1)  # noqa: E731
    return found._replace(
        features=pick(found.features),
        mask=pick(found.mask),
        pixels=None if found.pixels is None else pick(found.pixels),
    )


def _shifted(
    game: Furniture, folder: Path, tables: Tables, keys: Sequence[str], pixels: bool
) -> Condition:
    """See the same objects as another folder has them."""
    other = _read(game, folder, pixels)
    place = {thing.key: i for i, thing in enumerate(other.catalogue.objects)}
    lacking = [key for key in keys if key not in place]
    if lacking or other.features.shape[1:] != tables.views.shape[1:]:
        raise UserError(
            f"{folder} lacks {len(lacking)} of the objects, {lacking[:1]} first, or has features "
            f"of {other.features.shape[1:]}, not {tables.views.shape[1:]}; expected the same "
            "objects seen in another way; prepare the same libraries with the same views"
        )
    order = np.array([place[key] for key in keys])
    seen = tables._replace(views=other.features[order])
    if tables.pixels is not None:
        seen = seen._replace(pixels=other.pixels[order])
    return Condition(folder.name, seen)


def _occluded(encoder: ImageEncoder, tables: Tables, pictures: Any, asked: np.ndarray) -> Condition:
    """Cover a quarter of every view of the objects that are asked about."""
    views = np.array(tables.views)
    pixels = None if tables.pixels is None else np.array(tables.pixels)
    for i in asked.tolist():
        plain = jnp.asarray(np.stack(pictures(i)), jnp.float32) / 255
        covered = occlude(jax.random.key(i), plain, _COVERED)
        kept = encoder.keep(np.uint8(np.round(255 * np.asarray(covered))))
        views[i] = encoder.encode(encoder.params, kept)
        if pixels is not None:
            pixels[i] = kept
    return Condition("a quarter occluded", tables._replace(views=views, pixels=pixels))
