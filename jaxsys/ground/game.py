"""The reference game: a description, several objects of its category, and which one is meant.

A prepared folder (`jaxsys ground prepare`) holds a catalogue and what was computed of its objects;
a split parts the catalogue; a game asks about the objects of one part; `jaxsys.ground.tables` turns
games into what training and evaluation read.

Axes: ``N`` objects of a catalogue, ``V`` views, ``D`` image width, ``R`` rows of a game, ``K``
candidates, ``T`` words, ``L`` text width, ``S`` different texts.
"""

import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Int32, Integer

from jaxsys.core.errors import UserError
from jaxsys.ground.catalogue import Catalogue, Object
from jaxsys.ground.contract import text_ids

Text = Literal["name", "name+tags"]

# What follows one of these does not name the thing: "chair with cushion" is a chair.
_AFTER = frozenset(("and", "at", "by", "for", "from", "in", "of", "on", "to", "under", "with"))
# These tags say who made a model or gave it, not what it is; they would give away its style.
_MARKS = frozenset(("blend swap", "scpts", "default"))
# Numbers and what they count name no thing either: "bed 140x190", "sofa 2 seats", "lamp 1".
_COUNTED = re.compile(r"(^|\s)[\d.x°]+(\s+(seats?|zones?|panes?|units?))?(?=\s|$)")


class Prepared(NamedTuple):
    """Hold what was computed of a catalogue, in its order.

    Attributes:
        catalogue: N objects.
        folder: where the pictures lie; see `jaxsys.ground.prepared`.
        features: f_v, [N, V, D] float32, of every view.
        mask: [N, V] bool; False where a view is missing.
        pixels: [N, V, ...], what an adapted encoder reads, or None.

    >>> empty = np.zeros((0, 8, 4), np.float32)
    >>> Prepared(Catalogue(()), Path("."), empty, np.ones((0, 8), bool)).pixels is None
    True
    """

    catalogue: Catalogue
    folder: Path
    features: Any
    mask: Any
    pixels: Any = None


class TextVectors(NamedTuple):
    """Hold the vectors of a game's texts, in its order.

    Attributes:
        vectors: f_l, [S, L] float32.
        words: [S, T, L] of single words, for grounders that read words.
        word_mask: [S, T] bool.
        tokens: [S, T'] int32, of a captioner.
        token_mask: [S, T'] bool.

    >>> TextVectors(np.zeros((3, 4), np.float32)).words is None
    True
    """

    vectors: Any
    words: Any = None
    word_mask: Any = None
    tokens: Any = None
    token_mask: Any = None


class Split(NamedTuple):
    """Part a catalogue; places of objects, each in one part at most.

    Attributes:
        train: to learn from.
        validation: to stop by; may be empty.
        test: to report on.

    >>> Split(np.array([0, 2]), np.array([], int), np.array([1])).test.tolist()
    [1]
    """

    train: Int32[np.ndarray, " n"]
    validation: Int32[np.ndarray, " m"]
    test: Int32[np.ndarray, " k"]


class Game(NamedTuple):
    """Hold R questions as arrays, which may be put on a device.

    Attributes:
        candidates: [R, K] int32, places in the catalogue.
        answer: [R] int32, which of the K is meant; evenly spread over the K places.
        text_of: [R] int32, which text is asked.
        same_noun: [R] bool: all candidates have one head noun ("round table", "glass table").
        unseen_name: [R] bool: no object of `seen` has the meant object's name.
        texts: S different texts (up to case and spaces).

    >>> zero = np.zeros((0,), np.int32)
    >>> Game(np.zeros((0, 2), np.int32), zero, zero, zero > 0, zero > 0, ()).texts
    ()
    """

    candidates: Integer[Any, "R K"]
    answer: Integer[Any, " R"]
    text_of: Integer[Any, " R"]
    same_noun: Bool[Any, " R"]
    unseen_name: Bool[Any, " R"]
    texts: tuple[str, ...]


def head_noun(name: str) -> str:
    """Find the word that says what kind of thing it is: the last one before a preposition.

    Numbers, measures and a plural s are left away.

    >>> [head_noun(x) for x in ("Round table", "Chair with cushion", "Sofa 2 seats", "Vases")]
    ['table', 'chair', 'sofa', 'vase']
    """
    plain = re.sub(r"\([^)]*\)|[^\w\s.°'-]", " ", name.lower())
    kept: list[str] = []
    for word in _COUNTED.sub(" ", plain).split():
        if word in _AFTER and kept:
            break
        kept.append(word)
    last = kept[-1].split("-")[-1] if kept else name.lower().strip()
    return last[:-1] if len(last) > 3 and last.endswith("s") and not last.endswith("ss") else last


def description(thing: Object, text: Text = "name+tags") -> str:
    """Write what is asked about an object: its name, or its name and its tags.

    Tags that only name a source ("Blend Swap", "SCPTS", "Default") are left out.

    >>> thing = Object("k", "Bed", ("Double", "Wood"), "Bedroom", "l", "c", "CC0", (1, 2, 3))
    >>> description(thing), description(thing, "name")
    ('Bed, double, wood', 'Bed')
    """
    if text not in get_args(Text):
        raise UserError(
            f"text is {text!r}; expected one of {', '.join(get_args(Text))}; correct the name"
        )
    plain = thing.name.strip()
    if text == "name":
        return plain
    said = [plain.lower()]
    for tag in (tag.strip().lower() for tag in thing.tags):
        if tag and tag not in said and tag not in _MARKS:
            said.append(tag)
    return ", ".join([plain, *said[1:]])


def split_by_object(
    catalogue: Catalogue, seed: int, *, test: float = 0.3, validation: float = 0.0
) -> Split:
    """Part the objects at random: none that is asked about has been seen.

    Args:
        catalogue: N objects.
        seed: draws the parts.
        test: share of N that is tested, rounded to the nearest.
        validation: share of N that is taken from the rest for validation.

    Raises:
        UserError: for shares that leave nothing to learn from, or a catalogue too small.

    >>> things = [Object(str(i), "n", (), "c", "l", "c", "CC0", (1, 2, 3)) for i in range(10)]
    >>> [len(part) for part in split_by_object(Catalogue(tuple(things)), 0, validation=0.1)]
    [6, 1, 3]
    """
    n = len(catalogue.objects)
    n_test, n_validation = round(n * test), round(n * validation)
    if min(test, validation) < 0 or n_test < 2 or n - n_test - n_validation < 2:
        raise UserError(
            f"shares of {test} for testing and {validation} for validation leave of {n} objects "
            f"{n_test} to test and {n - n_test - n_validation} to learn from; expected at least "
            "two of each; change the shares or prepare more libraries"
        )
    order = np.random.default_rng(seed).permutation(n).astype(np.int32)
    rest = order[n_test:]
    return Split(
        np.sort(rest[n_validation:]), np.sort(rest[:n_validation]), np.sort(order[:n_test])
    )


def split_by_library(
    catalogue: Catalogue,
    train: Sequence[str] = ("Scopia", "default"),
    test: Sequence[str] = ("BlendSwap-CC-0", "BlendSwap-CC-BY"),
    *,
    validation: float = 0.0,
    seed: int = 0,
) -> Split:
    """Part the objects by where they are from: a shift of style, of texture and of naming.

    Args:
        catalogue: N objects.
        train: libraries to learn from.
        test: libraries to be asked about.
        validation: share of the training libraries' objects that is taken out for validation.
        seed: draws them.

    Raises:
        UserError: for a library in both lists, one that the catalogue lacks, or shares that leave
            nothing.

    >>> things = [Object(str(i), "n", (), "c", "ab"[i % 2], "c", "CC0", (1, 2, 3)) for i in (0, 1)]
    >>> split_by_library(Catalogue(tuple(things)), ["a"], ["b"]).test.tolist()
    [1]
    """
    there = {one.library for one in catalogue.objects}
    lacking = [name for name in (*train, *test) if name not in there]
    if lacking or set(train) & set(test) or not train or not test:
        raise UserError(
            f"libraries {list(train)} are for training and {list(test)} for testing; expected "
            f"different ones out of {sorted(there)}; change the lists"
        )
    of = np.array([one.library for one in catalogue.objects])
    learn = np.flatnonzero(np.isin(of, list(train))).astype(np.int32)
    order = np.random.default_rng(seed).permutation(learn)
    n_validation = round(len(learn) * validation)
    if not 0 <= n_validation < len(learn):
        raise UserError(
            f"a validation share of {validation} takes {n_validation} of {len(learn)} objects; "
            "expected some to be left; change it"
        )
    return Split(
        np.sort(order[n_validation:]),
        np.sort(order[:n_validation]),
        np.flatnonzero(np.isin(of, list(test))).astype(np.int32),
    )


def make_game(
    catalogue: Catalogue,
    objects: Sequence[int] | np.ndarray,
    *,
    text: Text = "name+tags",
    n_candidates: int = 2,
    draws: int = 8,
    most_per_category: int | None = None,
    seen: Sequence[int] | np.ndarray = (),
    seed: int = 0,
) -> Game:
    """Ask about some objects: every pair of one category whose names differ, both ways round.

    Of a pair, each object is meant once, so that who does not look at the text, or not at the
    objects, is right half of the time. Where there are more than two candidates, each object is
    meant ``draws`` times, among others of its category drawn with different names, at a place that
    goes round.

    Args:
        catalogue: all objects.
        objects: places of those that are asked about.
        text: what the description is.
        n_candidates: K.
        draws: rows for each object where K > 2.
        most_per_category: rows of a category that are kept, drawn evenly; None keeps all. For two
            candidates both rows of a pair are kept or left.
        seen: places of the objects whose names count as seen, such as a split's `train`.
        seed: of what is drawn.

    Returns:
        A game whose rows are sorted by category.

    Raises:
        UserError: for places outside of the catalogue, or objects of which no question can be made.

    >>> names = ["Round table", "Glass table", "Lamp"]
    >>> things = (Object(name[0], name, (), "c", "l", "c", "CC0", (1, 2, 3)) for name in names)
    >>> game = make_game(Catalogue(tuple(things)), [0, 1, 2])
    >>> game.candidates.tolist()[:2], game.answer.tolist()[:2], game.same_noun.tolist()[:2]
    ([[0, 1], [0, 1]], [0, 1], [True, True])
    """
    n = len(catalogue.objects)
    places = np.unique(np.asarray(objects, np.int64))
    if len(places) != len(objects) or (len(places) and not 0 <= places[0] <= places[-1] < n):
        raise UserError(
            f"the game names places like {list(objects)[:3]} of a catalogue of {n} objects; "
            "expected each place once, from 0; take them from a split of this catalogue"
        )
    if n_candidates < 2 or draws < 1 or (most_per_category or 2) < 2:
        raise UserError(
            f"a game of {n_candidates} candidates, {draws} draws and at most {most_per_category} "
            "rows of a category cannot be made; expected at least 2, 1 and 2; raise them"
        )
    names = text_ids([one.name for one in catalogue.objects])
    groups: dict[str, list[int]] = {}
    for place in places.tolist():
        groups.setdefault(catalogue.objects[place].category, []).append(place)
    rng = np.random.default_rng(seed)
    rows: list[tuple[list[int], int]] = []
    for _, group in sorted(groups.items()):
        if n_candidates == 2:
            found = _pairs(group, names, most_per_category, rng)
        else:
            found = _draws(group, names, n_candidates, draws, most_per_category, rng)
        rows += found
    if not rows:
        raise UserError(
            f"of {len(places)} objects no {n_candidates} share a category under different names; "
            "expected at least one such group; prepare more libraries or ask for fewer candidates"
        )
    return _game(catalogue, rows, text, names, seen)


def _pairs(
    group: list[int], names: np.ndarray, most: int | None, rng: np.random.Generator
) -> list[tuple[list[int], int]]:
    pairs = [list(pair) for pair in combinations(group, 2) if names[pair[0]] != names[pair[1]]]
    if most is not None and 2 * len(pairs) > most:
        kept = np.sort(rng.choice(len(pairs), most // 2, replace=False))
        pairs = [pairs[i] for i in kept]
    return [(pair, answer) for pair in pairs for answer in (0, 1)]


def _draws(
    group: list[int],
    names: np.ndarray,
    n_candidates: int,
    draws: int,
    most: int | None,
    rng: np.random.Generator,
) -> list[tuple[list[int], int]]:
    rows: list[tuple[list[int], int]] = []
    for _ in range(draws):
        for meant in group:
            others: list[int] = []
            used = {names[meant]}
            for other in rng.permutation(group).tolist():
                if names[other] not in used and len(others) < n_candidates - 1:
                    others.append(other)
                    used.add(names[other])
            if len(others) == n_candidates - 1:
                answer = len(rows) % n_candidates
                rows.append(([*others[:answer], meant, *others[answer:]], answer))
    if most is not None and len(rows) > most:
        rows = [rows[i] for i in np.sort(rng.choice(len(rows), most, replace=False))]
    return rows


def _game(
    catalogue: Catalogue,
    rows: list[tuple[list[int], int]],
    text: Text,
    names: np.ndarray,
    seen: Sequence[int] | np.ndarray,
) -> Game:
    candidates = np.array([row for row, _ in rows], np.int32)
    answer = np.array([place for _, place in rows], np.int32)
    meant = np.take_along_axis(candidates, answer[:, None], 1)[:, 0]
    said = [description(catalogue.objects[place], text) for place in meant.tolist()]
    text_of = text_ids(said)
    nouns = text_ids([head_noun(one.name) for one in catalogue.objects])[candidates]
    known = names[np.asarray(seen, np.int64)]
    return Game(
        candidates,
        answer,
        text_of,
        (nouns == nouns[:, :1]).all(1),
        ~np.isin(names[meant], known),
        tuple(said[i] for i in np.unique(text_of, return_index=True)[1]),
    )
