"""Read dataclasses from JSON that another program, or a hand, may have written."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any

from jaxsys.core.errors import UserError


def read_object(text: str, what: str) -> dict[str, Any]:
    """Parse text that must be a JSON object written by a ``to_json``.

    Args:
        text: what was written.
        what: such as ``plan``, for the messages.

    Returns:
        The object.

    Raises:
        UserError: no JSON, or no object.

    >>> read_object("[]", "plan")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the plan is a list; it must be a JSON object; ...
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"the {what} is not JSON ({error}); it must be what `to_json` wrote; write it again"
        ) from error
    return _object(found, what)


def check_fields(found: Any, cls: type, what: str, *, complete: bool = False) -> dict[str, Any]:
    """Refuse what has not the fields of a dataclass; those with a default may be missing.

    Args:
        found: should be a dict.
        cls: the dataclass.
        what: for the messages.
        complete: those with a default may not be missing either.

    Returns:
        A copy of what was found.

    Raises:
        UserError: no dict, or a field missing or unknown.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Point:
    ...     x: float
    ...     y: float = 0.0
    >>> check_fields({"x": 1.0}, Point, "point")
    {'x': 1.0}
    >>> check_fields({"z": 1.0}, Point, "point")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the point lacks x and has the unknown field z; expected ...
    """
    found = _object(found, what)
    known = [f.name for f in fields(cls)]
    required = [
        f.name for f in fields(cls) if complete or f.default is f.default_factory is MISSING
    ]
    missing = ", ".join(name for name in required if name not in found)
    unknown = ", ".join(str(name) for name in found if name not in known)
    if missing or unknown:
        wrong = [f"lacks {missing}"] if missing else []
        wrong += [f"has the unknown field {unknown}"] if unknown else []
        raise UserError(
            f"the {what} {' and '.join(wrong)}; expected the fields {', '.join(known)}; pass what "
            "`to_json` wrote"
        )
    return dict(found)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Tell of values of the wrong kind, inside the block, in one sentence.

    Args:
        what: such as ``plan``.

    Raises:
        UserError: in the place of TypeError, ValueError and AttributeError.

    >>> with reading("plan"):
    ...     int("three")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: a field of the plan has the wrong kind (invalid literal ...
    """
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"a field of the {what} has the wrong kind ({error}); pass what `to_json` wrote"
        ) from error


def _object(found: Any, what: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(
            f"the {what} is a {type(found).__name__}; it must be a JSON object; pass what "
            "`to_json` wrote"
        )
    return found
