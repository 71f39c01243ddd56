"""A catalogue of named objects: what a reference game is played with, and whom to credit."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError
from jaxsys.core.report import write_jsonl

# A key names files, so it is a plain name that no file system mistakes.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_MOST_FILE_BYTES = 1 << 26


class Object(NamedTuple):
    """Describe one object.

    Attributes:
        key: unique, of letters, digits, ``.``, ``_`` and ``-``; names its files.
        name: what people call it, as its author wrote it.
        tags: further words about it.
        category: objects of one category are each other's distractors.
        library: where it is from.
        creator: whom to credit.
        licence: as the library states it.
        size_cm: width, depth and height.

    >>> Object("a-1", "Round table", ("wood",), "Kitchen", "a", "Ann", "CC0", (90, 90, 75)).name
    'Round table'
    """

    key: str
    name: str
    tags: tuple[str, ...]
    category: str
    library: str
    creator: str
    licence: str
    size_cm: tuple[float | int, float | int, float | int]


class Catalogue(NamedTuple):
    """Hold objects; places in it are what a game's arrays name.

    Attributes:
        objects: N of them, their keys all different.

    >>> Catalogue(()).objects
    ()
    """

    objects: tuple[Object, ...]


def key_of(*parts: str) -> str:
    """Make a key of some words: other characters become ``-``.

    >>> key_of("Kator Legaz", "screen/door")
    'Kator-Legaz-screen-door'
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-._")
    return plain[:200] or "object"


def write_catalogue(path: str | os.PathLike[str], catalogue: Catalogue) -> None:
    """Write a catalogue as JSON lines, one object each, whole or not at all.

    Raises:
        UserError: for a key that is no plain name, or is there twice.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "catalogue.jsonl")
    >>> one = Object("a-1", "Round table", (), "Kitchen", "a", "Ann", "CC0", (90, 90, 75))
    >>> write_catalogue(file, Catalogue((one,)))
    >>> read_catalogue(file).objects[0] == one
    True
    """
    _check_keys(path, catalogue.objects)
    write_jsonl(path, (one._asdict() for one in catalogue.objects))


def read_catalogue(path: str | os.PathLike[str]) -> Catalogue:
    """Read what `write_catalogue` wrote.

    Raises:
        UserError: for a file that cannot be read, naming the line that is no object.

    >>> read_catalogue("nowhere.jsonl")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere.jsonl cannot be read ...
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MOST_FILE_BYTES:
            raise ValueError(f"more than {_MOST_FILE_BYTES} bytes")
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{file} cannot be read ({reason}); expected a catalogue in JSON lines; run `jaxsys "
            "ground prepare`"
        ) from None
    objects = tuple(_object(file, i, line) for i, line in enumerate(lines, 1) if line.strip())
    _check_keys(file, objects)
    return Catalogue(objects)


def _object(file: Path, number: int, line: str) -> Object:
    try:
        found = json.loads(line)
        text = {name: found.pop(name) for name in Object._fields if name not in ("tags", "size_cm")}
        tags = tuple(found.pop("tags"))
        width, depth, height = map(float, found.pop("size_cm"))
        sound = all(isinstance(x, str) for x in (*text.values(), *tags))
        if not sound or found:
            raise ValueError("other fields or types")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"line {number} of {file} is no object of a catalogue; expected JSON with the fields "
            f"{', '.join(Object._fields)}; mend the line or run `jaxsys ground prepare` again"
        ) from None
    return Object(tags=tags, size_cm=(width, depth, height), **text)


def _check_keys(file: Any, objects: Sequence[Object]) -> None:
    seen: set[str] = set()
    for one in objects:
        if not _KEY.fullmatch(one.key) or one.key in seen:
            wrong = "there twice" if one.key in seen else "no plain name"
            raise UserError(
                f"the key {one.key!r} in {file} is {wrong}; expected another name of letters, "
                "digits, '.', '_' and '-' for each object; correct it"
            )
        seen.add(one.key)
