"""Verbs of `jaxsys bench`: serving."""

from typing import Any

COMMANDS: dict[str, tuple[Any, Any]] = {}
