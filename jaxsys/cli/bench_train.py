"""Verbs of `jaxsys bench`: training, fine-tuning and the static report."""

from typing import Any

COMMANDS: dict[str, tuple[Any, Any]] = {}
