"""Every object and every text held once, and rows that point to them: what training draws from.

A batch is a gather from these tables. Where they fit on the device the gather is part of the
compiled program, and whole epochs run without the host; where they do not, the same function
gathers from NumPy arrays or memory maps.

Axes: ``N`` objects, ``M`` texts, ``R`` rows, ``K`` candidates, ``V`` views, ``D`` image width,
``L`` text width, ``T`` words.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.ground.contract import Batch, text_ids
from jaxsys.ground.game import Game, Prepared, TextVectors
from jaxsys.ground.snare import Indices, TextFeatures, ViewFeatures


class Tables(NamedTuple):
    """Hold what is known of N objects and M texts.

    Attributes:
        mask: [N, V] bool; False where a view is missing.
        text: f_l, [M, L].
        text_ids: [M] integers, equal where two texts are the same (`contract.text_ids`).
        views: f_v, [N, V, D].
        pixels: [N, V, ...], what an adapted vision encoder reads.
        words: [M, T, L], features of single words.
        word_mask: [M, T] bool.
        tokens: [M, T], for a captioner.
        token_mask: [M, T] bool.

    >>> Tables(np.ones((3, 8), bool), np.zeros((5, 4)), np.arange(5)).views is None
    True
    """

    mask: Any
    text: Any
    text_ids: Any
    views: Any = None
    pixels: Any = None
    words: Any = None
    word_mask: Any = None
    tokens: Any = None
    token_mask: Any = None


class Rows(NamedTuple):
    """Hold R questions as places in `Tables`.

    Attributes:
        objects: [R, K], the candidates.
        text: [R], the description.
        answer: [R], the place among the candidates of the one that is meant; −1 where unknown.

    >>> Rows(np.array([[0, 1]]), np.array([0]), np.array([1])).objects.shape
    (1, 2)
    """

    objects: Any
    text: Any
    answer: Any


def take_rows(rows: Rows, at: Any) -> Rows:
    """Take some of the rows.

    >>> take_rows(Rows(np.array([[0, 1], [2, 3]]), np.array([4, 5]), np.zeros(2)), [1]).text
    array([5])
    """
    return Rows(*(x[at] for x in rows))


def gather(tables: Tables, rows: Rows) -> Batch:
    """Make a batch of rows: every part that the tables hold, for each row's own objects and text.

    Args:
        tables: of NumPy or JAX arrays, traced or not.
        rows: R of them, which become the batch's B.

    >>> tables = Tables(np.ones((3, 1), bool), np.eye(2), np.arange(2), np.ones((3, 1, 4)))
    >>> batch = gather(tables, Rows(np.array([[2, 0]]), np.array([1]), np.array([0])))
    >>> batch.views.shape, batch.text.tolist(), batch.objects.tolist()
    ((1, 2, 1, 4), [[0.0, 1.0]], [[2, 0]])
    """
    seen = {name: getattr(tables, name) for name in ("mask", "views", "pixels")}
    names = ("text", "words", "word_mask", "tokens", "token_mask")
    said = {name: getattr(tables, name) for name in names}
    return Batch(
        **{name: x if x is None else x[rows.objects] for name, x in seen.items()},
        **{name: x if x is None else x[rows.text] for name, x in said.items()},
        answer=rows.answer,
        objects=rows.objects,
        texts=tables.text_ids[rows.text],
    )


def check(tables: Tables, rows: Rows, *, answers: bool = True) -> None:
    """Check tables and rows before any work starts.

    Args:
        tables: of concrete arrays.
        rows: of concrete arrays.
        answers: whether every row must say its answer.

    Raises:
        UserError: for arrays whose axes disagree, a row that names an unknown object or text, or
            one object twice, a candidate with zero views, or an answer outside of the candidates.

    >>> tables = Tables(np.ones((3, 1), bool), np.eye(2), np.arange(2))
    >>> check(tables, Rows(np.array([[2, 2]]), np.array([1]), np.array([0])))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the rows cannot be used: row 0 has object 2 twice; ...
    """
    n_objects, n_texts = len(tables.mask), len(tables.text)
    wrong = _axes(tables)
    objects, text, answer = (np.asarray(x) for x in rows)
    if objects.ndim != 2 or objects.shape[1] < 2 or not len(objects):
        raise UserError(
            f"rows have objects of shape {objects.shape}; expected [R, K] with at least one row "
            "and two candidates; make rows first"
        )
    if text.shape != objects.shape[:1] or answer.shape != objects.shape[:1]:
        raise UserError(
            f"{len(objects)} rows have texts of shape {text.shape} and answers of {answer.shape}; "
            "expected one each; make them together"
        )
    ordered = np.sort(objects, 1)
    views = np.asarray(tables.mask).any(1)
    inside = ((objects >= 0) & (objects < n_objects)).all(1)
    blank = ~views[np.clip(objects, 0, max(n_objects - 1, 0))].all(1) if n_objects else ~inside
    least = 0 if answers else -1
    for bad, what in (
        (~inside, f"names an object outside of 0 to {n_objects - 1}"),
        ((text < 0) | (text >= n_texts), f"names a text outside of 0 to {n_texts - 1}"),
        ((answer < least) | (answer >= objects.shape[1]), "has no answer among its candidates"),
        (inside & blank, "has a candidate with zero views"),
    ):
        wrong += [f"row {i} {what}" for i in np.flatnonzero(bad)[:1]]
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    wrong += [f"row {i} has object {ordered[i, j]} twice" for i, j in twice[:1]]
    if wrong:
        raise UserError(
            f"the rows cannot be used: {'; '.join(wrong)}; expected different objects that all "
            "have views, and one text and answer a row; leave such rows out"
        )


def _axes(tables: Tables) -> list[str]:
    n, v = np.shape(tables.mask)
    wrong = []
    for name, want in {
        "views": (n, v),
        "pixels": (n, v),
        "text_ids": (len(tables.text),),
        "words": (len(tables.text),),
        "word_mask": (len(tables.text),),
        "tokens": (len(tables.text),),
        "token_mask": (len(tables.text),),
    }.items():
        part = getattr(tables, name)
        if part is not None and np.shape(part)[: len(want)] != want:
            wrong.append(f"{name} has shape {np.shape(part)}, not {list(want)}")
    return wrong


def from_snare(images: ViewFeatures, texts: TextFeatures) -> Tables:
    """Make tables of SNARE's two feature files.

    Args:
        images: from `snare.read_view_features`.
        texts: from `snare.read_text_features`.

    >>> images = ViewFeatures(("a",), np.zeros((1, 8, 4), np.float32), np.ones((1, 8), bool))
    >>> from_snare(images, TextFeatures(("it",), np.zeros((1, 4), np.float32))).views.shape
    (1, 8, 4)
    """
    return Tables(images.mask, texts.features, text_ids(texts.texts), images.features)


def snare_rows(indices: Indices) -> Rows:
    """Make rows of SNARE's indices.

    >>> zero = np.zeros(1, np.int32)
    >>> snare_rows(Indices(np.array([[0, 1]], np.int32), zero, zero, np.ones(1, bool))).text
    array([0], dtype=int32)
    """
    return Rows(indices.objects, indices.texts, indices.answer)


def from_games(
    prepared: Prepared, games: Sequence[Game], texts: Sequence[TextVectors]
) -> tuple[Tables, list[Rows]]:
    """Join games over one catalogue, such as those of training, validation and testing.

    Args:
        prepared: features, and pixels where an encoder is adapted.
        games: over `prepared.catalogue`.
        texts: of each game's texts, with the same parts in each.

    Returns:
        One set of tables, and each game's rows in it.

    >>> import pathlib
    >>> from jaxsys.ground.catalogue import Catalogue
    >>> one = np.array([1])
    >>> game = Game(np.array([[0, 1]]), one, one - 1, one > 0, one > 0, ("a bed",))
    >>> seen = Prepared(Catalogue(()), pathlib.Path("."), np.zeros((2, 8, 4)), np.ones((2, 8)) > 0)
    >>> tables, rows = from_games(seen, [game, game], [TextVectors(np.zeros((1, 3)))] * 2)
    >>> tables.text.shape, [part.text.tolist() for part in rows], tables.text_ids.tolist()
    ((2, 3), [[0], [1]], [0, 0])
    """
    parts = {}
    for name in TextVectors._fields:
        held = [getattr(one, name) for one in texts]
        lacking = any(part is None for part in held)
        parts[name] = None if lacking else _together([np.asarray(part) for part in held])
    rows, before = [], 0
    for game in games:
        rows.append(Rows(game.candidates, np.asarray(game.text_of) + before, game.answer))
        before += len(game.texts)
    said = [text for game in games for text in game.texts]
    text = parts.pop("vectors")
    return Tables(prepared.mask, text, text_ids(said), prepared.features, prepared.pixels,
                  **parts), rows  # fmt: skip


def _together(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join arrays on the first axis; those of words are filled up to the longest text."""
    if len({part.shape[1] for part in parts}) > 1:
        longest = max(part.shape[1] for part in parts)
        fill = lambda x: [(0, 0), (0, longest - x.shape[1])] + [(0, 0)] * (x.ndim - 2)  # noqa: E731
        parts = [np.pad(part, fill(part)) for part in parts]
    return np.concatenate(parts)
