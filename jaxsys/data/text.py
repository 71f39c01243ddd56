"""Get text to train on: what every Python brings along, or a file."""

import os
from pathlib import Path

from jaxsys.core.errors import UserError


def python_docs() -> str:
    """Read the language reference that Python carries for its `help()`, about 0.7 million letters.

    It needs no network, and its order is that of the sorted topic names, so it is the same in every
    process. Another Python version has another edition of it.

    Returns:
      The topics, separated by a blank line.

    >>> python_docs().count("assignment") > 10
    True
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file.

    Args:
      path: the file.

    Raises:
      UserError: if it is missing, is no file, is empty or is not UTF-8.

    >>> read_text("no/such/file.txt")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: text file no/such/file.txt does not exist; check the path
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"text file {file} does not exist; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"text file {file} is not UTF-8 (byte {error.start}); convert it to UTF-8 first"
        ) from None
    except OSError as error:
        raise UserError(f"text file {file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"text file {file} holds no text; give one with something to learn from")
    return text
