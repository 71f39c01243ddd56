"""Verbs of `jaxsys bench`: modules, operators, communication, report and compare."""

from typing import Any

COMMANDS: dict[str, tuple[Any, Any]] = {}
