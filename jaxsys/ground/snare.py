"""Read SNARE: rows of annotations and precomputed CLIP features.

SNARE (Thomason et al.) asks which of two ShapeNetSem models a sentence means. Its annotations are
lists of rows in ``amt/folds_adversarial/{train,val,test}.json`` of the public repository
snaredataset/snare; the two feature files ``shapenet-clipViT32-frames.json.gz`` and
``langfeat-512-clipViT32.json.gz`` are linked from its README, and the screenshots
(``models-screenshots.zip``) belong to ShapeNetSem, whose terms must be accepted. None of them
states a licence under which jaxsys could carry it, so all are read from where the user has them.

Axes: ``N`` rows or objects, ``V`` views, ``D`` width of a feature.

Reference: arXiv 2107.12514.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from jaxsys.core.errors import UserError

# Of a model's 14 screenshots the first six are seen from the top and the bottom.
VIEWS = tuple(range(6, 14))
_MOST_FILE_BYTES = 1 << 28
_MOST_ENTRY = 1 << 20  # characters of one vector in a feature file
_CHUNK = 1 << 18
_ENTRY = re.compile(r'[\s,{]*("(?:[^"\\]|\\.)*")\s*:\s*(\[[^\[\]"]*\])', re.DOTALL)


class Row(NamedTuple):
    """Hold one annotation.

    Attributes:
        annotation: the sentence.
        objects: the two objects' ids.
        answer: 0 or 1, the place of the object that is meant; None in the test fold.
        visual: the writer was asked for looks (True) or for shape and touch (False, "blind");
            None in the test fold.

    >>> Row("a red chair", ("a", "b"), 1, True).objects[1]
    'b'
    """

    annotation: str
    objects: tuple[str, str]
    answer: int | None = None
    visual: bool | None = None


class Fold(NamedTuple):
    """Hold the rows of a file.

    Attributes:
        rows: in the file's order.
        lone: how many rows named one object only; they are left out or were given a distractor.

    >>> Fold((), 6).lone
    6
    """

    rows: tuple[Row, ...]
    lone: int


class ViewFeatures(NamedTuple):
    """Hold one vector for every view of every object.

    Attributes:
        ids: N object ids.
        features: [N, V, D]; zero where a view is missing.
        mask: [N, V]; False where a view is missing.

    >>> ViewFeatures(("a",), np.zeros((1, 8, 4), np.float32), np.ones((1, 8), bool)).ids
    ('a',)
    """

    ids: tuple[str, ...]
    features: Float32[np.ndarray, "N V D"]
    mask: Bool[np.ndarray, "N V"]


class TextFeatures(NamedTuple):
    """Hold one vector for every text.

    Attributes:
        texts: N different texts.
        features: [N, D].

    >>> TextFeatures(("a chair",), np.zeros((1, 4), np.float32)).texts
    ('a chair',)
    """

    texts: tuple[str, ...]
    features: Float32[np.ndarray, "N D"]


class Indices(NamedTuple):
    """Hold rows as places in the tables of features.

    Attributes:
        objects: [N, 2].
        texts: [N].
        answer: [N]; −1 where the fold gives none.
        visual: [N]; False where the fold does not say.

    >>> zero = np.zeros(1, np.int32)
    >>> Indices(np.zeros((1, 2), np.int32), zero, zero, np.ones(1, bool)).answer.tolist()
    [0]
    """

    objects: Int32[np.ndarray, "N 2"]
    texts: Int32[np.ndarray, "N"]
    answer: Int32[np.ndarray, "N"]
    visual: Bool[np.ndarray, "N"]


def load_rows(
    path: str | os.PathLike[str],
    *,
    lone: Literal["drop", "seed"] = "drop",
    seed: int = 0,
    known: Collection[str] | None = None,
) -> Fold:
    """Read a fold of annotations.

    A few rows of the published files name one object. The reference loader draws a distractor for
    them anew at every visit; here they are left out, or given one that a seed decides.

    Args:
        path: ``train.json``, ``val.json`` or ``test.json``.
        lone: what to do with a row of one object: leave it out, or draw its distractor among
            `known` (by default: among the objects that the file names).
        seed: of that draw; a row's distractor depends on the seed and its place in the file only.
        known: the ids that have features; a row that names another one is refused.

    Raises:
        UserError: naming the row, for a file that is no such list, an object that is unknown or
            named twice, or an answer that is no place in the row.

    Reference: arXiv 2107.12514, section 3.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "val.json")
    >>> row = {"annotation": "a low desk", "objects": ["a", "b"], "ans": 1, "visual": False}
    >>> _ = file.write_text(json.dumps([row]))
    >>> load_rows(file).rows
    (Row(annotation='a low desk', objects=('a', 'b'), answer=1, visual=False),)
    """
    file = Path(path)
    found = [_row(raw, f"row {i} of {file}") for i, raw in enumerate(_list(file))]
    named = sorted({name for row in found for name in row.objects})
    if known is not None and (unknown := sorted(set(named) - set(known))):
        first = next(i for i, row in enumerate(found) if unknown[0] in row.objects)
        raise UserError(
            f"{file} names {len(unknown)} objects without features, {unknown[0]!r} first, in row "
            f"{first}; expected only objects of the feature file; use the files of one release"
        )
    pool = sorted(known) if known is not None else named
    rows = []
    for i, row in enumerate(found):
        if len(row.objects) == 2:
            rows.append(row)
        elif lone == "seed":
            rows.append(_with_distractor(row, pool, seed, i, file))
    return Fold(tuple(rows), sum(len(row.objects) == 1 for row in found))


def _list(file: Path) -> list[Any]:
    try:
        if (size := file.stat().st_size) > _MOST_FILE_BYTES:
            raise UserError(
                f"{file} has {size} bytes; a fold of annotations has at most {_MOST_FILE_BYTES}; "
                "name the right file"
            )
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} cannot be read as JSON ({error}); expected a list of annotations; name "
            "train.json, val.json or test.json of SNARE"
        ) from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} holds no list of annotations; expected one; name another file")
    return rows


def _row(raw: Any, where: str) -> Any:
    """Check a row; that of one object keeps one object here."""
    if not isinstance(raw, dict) or not isinstance(raw.get("annotation"), str):
        raise UserError(f"{where} has no 'annotation' text; expected one; mend the file")
    names = raw.get("objects")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where} has no list of 'objects'; expected two ids; mend the file")
    if not 1 <= len(names) <= 2:
        raise UserError(f"{where} names {len(names)} objects; expected two; mend the file")
    if len(set(names)) < len(names):
        raise UserError(
            f"{where} names object {names[0]!r} twice; expected two different ones, since no "
            "sentence tells an object from itself; leave the row out"
        )
    answer, visual = raw.get("ans"), raw.get("visual")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(names)):
        raise UserError(
            f"{where} has answer {answer!r}; expected a place among its {len(names)} objects, "
            "counted from 0; mend the file"
        )
    if visual is not None and type(visual) is not bool:
        raise UserError(f"{where} has visual {visual!r}; expected true or false; mend the file")
    return Row(raw["annotation"], tuple(names), answer, visual)


def _with_distractor(row: Any, pool: Sequence[str], seed: int, place: int, file: Path) -> Row:
    others = [name for name in pool if name != row.objects[0]]
    if not others:
        raise UserError(
            f"row {place} of {file} names one object and there is no other to set beside it; "
            "expected at least two known objects; leave such rows out with lone='drop'"
        )
    rng = np.random.default_rng([seed, place])
    return row._replace(objects=(row.objects[0], others[int(rng.integers(len(others)))]))


def read_view_features(
    path: str | os.PathLike[str],
    *,
    width: int | None = 512,
    views: Sequence[int] = VIEWS,
    ids: Collection[str] | None = None,
) -> ViewFeatures:
    """Read ``shapenet-clipViT32-frames.json.gz``: key ``<object id>-<view>``, value D numbers.

    The file is read in pieces (unpacked it has more than a gigabyte), and only what is asked for is
    kept.

    Args:
        path: the file, gzipped or plain.
        width: D that is expected (512 for CLIP ViT-B/32); None takes the first entry's.
        views: the views to keep, in this order; V of them.
        ids: keep these objects only; None keeps all.

    Raises:
        UserError: for an unreadable file, a vector of another width or with a number that is not
            finite, or an object none of whose views is there.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "frames.json")
    >>> _ = file.write_text('{"a-6": [1.0, 2.0], "a-7": [3.0, 4.0], "a-0": [0, 0]}')
    >>> read_view_features(file, width=2, views=(6, 7)).features.tolist()
    [[[1.0, 2.0], [3.0, 4.0]]]
    """
    file, places = Path(path), {view: i for i, view in enumerate(views)}
    if not places:
        raise UserError("zero views were asked for; expected at least one; name some of 0 to 13")
    wanted = None if ids is None else set(ids)
    found: dict[str, dict[int, np.ndarray]] = {}
    for key, vector in _entries(file, width):
        name, _, view = key.rpartition("-")
        if not name or not view.isdecimal():
            raise UserError(
                f"{file} has the key {key!r}; expected ID-VIEW; name the image features"
            )
        width = len(vector)
        if wanted is None or name in wanted:
            of_object = found.setdefault(name, {})
            if int(view) in places:
                of_object[places[int(view)]] = vector
    lacking = sorted(({*found} if wanted is None else wanted) - {n for n, v in found.items() if v})
    if lacking or not found:
        raise UserError(
            f"{file} has zero of the views {tuple(views)} for {len(lacking)} objects, "
            f"{lacking[:1]} first; expected at least one view of each; choose other views or ids"
        )
    names = tuple(found)
    features = np.zeros((len(names), len(places), width or 0), np.float32)
    mask = np.zeros((len(names), len(places)), bool)
    for i, name in enumerate(names):
        for place, vector in found[name].items():
            features[i, place], mask[i, place] = vector, True
    return ViewFeatures(names, features, mask)


def read_text_features(
    path: str | os.PathLike[str],
    *,
    width: int | None = 512,
    texts: Collection[str] | None = None,
) -> TextFeatures:
    """Read ``langfeat-512-clipViT32.json.gz``: key an annotation, value D numbers.

    Args:
        path: the file, gzipped or plain.
        width: D that is expected; None takes the first entry's.
        texts: keep these only, and expect each of them; None keeps all.

    Raises:
        UserError: for an unreadable file, a vector of another width, or a text without one.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "texts.json.gz")
    >>> _ = file.write_bytes(gzip.compress(b'{"a red chair": [1.0, 2.0]}'))
    >>> read_text_features(file, width=2).texts
    ('a red chair',)
    """
    file, wanted = Path(path), None if texts is None else set(texts)
    found: dict[str, np.ndarray] = {}
    for key, vector in _entries(file, width):
        width = len(vector)
        if wanted is None or key in wanted:
            found[key] = vector
    lacking = sorted((wanted or set()) - set(found))
    if lacking or not found:
        raise UserError(
            f"{file} has {len(found)} of the texts and lacks {len(lacking)}, {lacking[:1]} first; "
            "expected every annotation; use the files of one release"
        )
    return TextFeatures(tuple(found), np.stack(list(found.values())))


def _entries(file: Path, width: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the members of a JSON object of flat lists of numbers, holding one piece of it."""
    buffer, at, ended = "", 0, False
    try:
        with open(file, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        opened: Any = gzip.open if packed else open
        with opened(file, "rt", encoding="utf-8") as stream:
            while True:
                match = _ENTRY.match(buffer, at)
                if match is None and not ended:
                    if len(buffer) - at > _MOST_ENTRY:
                        break
                    piece = stream.read(_CHUNK)
                    buffer, at, ended = buffer[at:] + piece, 0, not piece
                    continue
                if match is None:
                    break
                at = match.end()
                key = json.loads(match[1])
                vector = np.asarray(json.loads(match[2]), np.float32)
                _check_vector(file, key, vector, width)
                width = len(vector)
                yield key, vector
    except UserError:
        raise
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read ({error}); expected a JSON object of vectors, gzipped or "
            "plain; name one of SNARE's feature files"
        ) from error
    if buffer[at:].strip() not in ("}", "{}"):
        raise UserError(
            f"{file} breaks off or is no JSON object of vectors near {buffer[at : at + 40]!r}; "
            "expected a list of numbers under each key; fetch it again"
        )


def _check_vector(file: Path, key: str, vector: np.ndarray, width: int | None) -> None:
    if not len(vector) or (width is not None and len(vector) != width):
        raise UserError(
            f"{file} has {len(vector)} numbers under {key!r}; expected {width or 'at least 1'}; "
            "use features of one encoder, or say its width"
        )
    if not np.isfinite(vector).all():
        raise UserError(
            f"{file} has a number under {key!r} that is not finite; expected plain numbers; "
            "extract the features again"
        )


def index_rows(rows: Sequence[Row], images: ViewFeatures, texts: TextFeatures) -> Indices:
    """Turn rows into places in the tables of features.

    Args:
        rows: from `load_rows`.
        images: every object's views.
        texts: every annotation's vector.

    Raises:
        UserError: naming the row whose object or annotation has no features.

    >>> images = ViewFeatures(("a", "b"), np.zeros((2, 1, 4), np.float32), np.ones((2, 1), bool))
    >>> texts = TextFeatures(("it",), np.zeros((1, 4), np.float32))
    >>> index_rows([Row("it", ("b", "a"), 0, True)], images, texts).objects.tolist()
    [[1, 0]]
    """
    of_object = {name: i for i, name in enumerate(images.ids)}
    of_text = {text: i for i, text in enumerate(texts.texts)}
    for i, row in enumerate(rows):
        lacking = [repr(name) for name in row.objects if name not in of_object]
        lacking += [repr(row.annotation)] * (row.annotation not in of_text)
        if lacking:
            raise UserError(
                f"row {i} names {lacking[0]}, which has no features; expected features of every "
                "object and annotation; use the files of one release"
            )
    return Indices(
        np.array([[of_object[n] for n in row.objects] for row in rows], np.int32).reshape(-1, 2),
        np.array([of_text[row.annotation] for row in rows], np.int32),
        np.array([-1 if row.answer is None else row.answer for row in rows], np.int32),
        np.array([bool(row.visual) for row in rows], bool),
    )


def annotations_of(rows: Sequence[Row]) -> Mapping[str, tuple[int, ...]]:
    """List, for each object, the rows that mean it.

    >>> dict(annotations_of([Row("x", ("a", "b"), 1), Row("y", ("b", "c"), 0)]))
    {'b': (0, 1)}
    """
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.answer is not None:
            found.setdefault(row.objects[row.answer], []).append(i)
    return {name: tuple(places) for name, places in found.items()}
