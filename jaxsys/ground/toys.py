"""A task that needs no file: toy furniture, drawn here, told apart by its name.

It serves tests, notebooks and first steps. The encoders are fixed random features, so its figures
say nothing about any method; names of toys that are tested were never seen, their words were.

Axes: ``N`` toys, ``V`` views, ``Y`` and ``X`` pixels, ``D`` image width.
"""

import math
from functools import lru_cache
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.ground import scene
from jaxsys.ground.contract import text_ids
from jaxsys.ground.evaluation import Condition
from jaxsys.ground.features import caption_tokens, vocabulary_of
from jaxsys.ground.questions import Questions
from jaxsys.ground.robust import occlude
from jaxsys.ground.tables import Rows, Tables
from jaxsys.models.lm.linear import linear

_WORDS = ("low", "tall", *scene.COLOURS, *scene.NOUNS)
_CELLS = 4  # means of so many squares a side are what the encoder sees
_PATCH = _CELLS * _CELLS * 3


def encode(vision: Any, pixels: Float[Array, "B Y X 3"]) -> Float[Array, "B D"]:
    """Encode pictures: tanh of random mixtures of the means of 4 × 4 squares.

    Args:
        vision: from `random_vision`.
        pixels: in 0..1; Y and X multiples of 4.

    >>> encode(random_vision(8), jnp.ones((2, 16, 16, 3))).shape
    (2, 8)
    """
    b, y, x, _ = pixels.shape
    squares = pixels.reshape(b, _CELLS, y // _CELLS, _CELLS, x // _CELLS, 3).mean((2, 4))
    return jnp.tanh(linear(vision["q_proj"], 1 - squares.reshape(b, _PATCH)))


def random_vision(width: int, seed: int = 0) -> dict[str, Any]:
    """Draw the encoder's only matrix.

    >>> random_vision(8)["q_proj"]["weight"].shape
    (8, 48)
    """
    drawn = np.random.default_rng(seed).normal(size=(width, _PATCH)) * 2 / math.sqrt(_PATCH)
    return {"q_proj": {"weight": jnp.asarray(drawn, jnp.float32)}}


@lru_cache(maxsize=8)
def draw_toys(
    n_views: int = 4,
    size: int = 16,
    elevation_deg: int = 30,
    light: tuple[float, float, float] = (0.4, -0.5, 0.8),
) -> np.ndarray:
    """Draw all toys from all around; drawn once in a process.

    Args:
        n_views: V.
        size: Y = X, a multiple of 4.
        elevation_deg: of the camera.
        light: direction to the light.

    Returns:
        [N, V, Y, X, 3] in 0..1, not to be written to.

    >>> draw_toys(1, 8).shape
    (48, 1, 8, 8, 3)
    """
    scenes = scene.stack([scene.toy(name) for name in scene.TOYS])
    drawn = np.asarray(
        scene.render_views(
            scenes, n_views=n_views, elevation_deg=elevation_deg, size=size, light=light
        )
    )
    drawn.setflags(write=False)
    return drawn


def toy_questions(
    *,
    seed: int = 0,
    n_views: int = 4,
    size: int = 16,
    width: int = 32,
    pixels: bool = False,
    words: bool = False,
) -> Questions:
    """Make the toy task: 32 toys to learn from, 8 to stop by, 8 to test; every pair both ways.

    Args:
        seed: parts the toys.
        n_views: V.
        size: of pictures, a multiple of 4.
        width: D, also of texts.
        pixels: keep pictures in the tables, for an encoder that is adapted.
        words: make features of single words and tokens, too.

    Raises:
        UserError: for a size that is no multiple of 4.

    >>> task = toy_questions(n_views=1, size=8, width=8)
    >>> task.tables.views.shape, {name: len(rows.text) for name, rows in task.folds.items()}
    ((48, 1, 8), {'train': 992, 'valid': 56, 'test': 56})
    """
    if size % _CELLS or size < _CELLS or n_views < 1:
        raise UserError(
            f"pictures of {size} pixels from {n_views} views cannot be made; expected a multiple "
            f"of {_CELLS} and at least one view; change them"
        )
    vision, n = random_vision(width), len(scene.TOYS)

    def features(pictures: np.ndarray) -> np.ndarray:
        flat = jnp.asarray(pictures).reshape(-1, *pictures.shape[2:])
        return np.asarray(encode(vision, flat)).reshape(*pictures.shape[:2], -1)

    plain = draw_toys(n_views, size)
    vectors = np.random.default_rng(1).normal(size=(len(_WORDS), width)).astype(np.float32)
    places = np.array([[_WORDS.index(w) for w in name.split()[1:]] for name in scene.TOYS])
    tables = Tables(
        np.ones((n, n_views), bool), vectors[places].sum(1), text_ids(scene.TOYS), features(plain)
    )
    if pixels:
        tables = tables._replace(pixels=plain)
    if words:
        tokens, real = caption_tokens(scene.TOYS, vocabulary_of(scene.TOYS), 4)
        tables = tables._replace(
            words=vectors[places], word_mask=np.ones((n, 3), bool), tokens=tokens, token_mask=real
        )
    order = np.random.default_rng(seed).permutation(n)
    parts = {"train": order[:32], "valid": order[32:40], "test": order[40:]}
    folds = {name: _pairs(part) for name, part in parts.items()}
    return Questions(
        tables,
        folds,
        {name: _groups(rows) for name, rows in folds.items()},
        names=scene.TOYS,
        texts=scene.TOYS,
        vision=vision,
        encode=encode,
        patterns=("q_proj.weight",),
        pictures=lambda i: list(np.round(255 * plain[i]).astype(np.uint8)),
        harder=lambda fold: _harder(tables, features, n_views, size),
    )


def _pairs(toys: np.ndarray) -> Rows:
    """Ask for both toys of every pair, so that nothing but text and looks tells them apart."""
    pairs = np.repeat(np.array(list(combinations(sorted(toys.tolist()), 2)), np.int32), 2, 0)
    answer = np.arange(len(pairs), dtype=np.int32) % 2
    return Rows(pairs, np.take_along_axis(pairs, answer[:, None], 1)[:, 0], answer)


def _groups(rows: Rows) -> dict[str, np.ndarray]:
    parts = np.array([name.split()[1:] for name in scene.TOYS])[rows.objects]
    same = parts[:, 0] == parts[:, 1]
    return {"same noun": same[:, 2], "one word differs": same.sum(1) == 2}


def _harder(tables: Tables, features: Any, n_views: int, size: int) -> list[Condition]:
    def seen(name: str, pictures: np.ndarray) -> Condition:
        changed = tables._replace(views=features(pictures))
        if tables.pixels is not None:
            changed = changed._replace(pixels=pictures)
        return Condition(name, changed)

    plain = draw_toys(n_views, size)
    covered = np.asarray(occlude(jax.random.key(0), jnp.asarray(plain), 0.25))
    return [
        seen("a quarter occluded", covered),
        seen("elevation 60°", draw_toys(n_views, size, 60)),
        seen("light from the other side", draw_toys(n_views, size, 30, (-0.4, 0.5, 0.3))),
    ]
