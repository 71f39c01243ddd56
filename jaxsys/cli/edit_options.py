"""What the verbs of `jaxsys edit` share: the method, its settings, the facts, the statistics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Which facts.

    Attributes:
      records: CounterFact, ZsRE or relation file, or JSON lines with prompt, subject, target (and
        truth, paraphrases, neighbourhood, portability).
      layout: Of that file: auto, counterfact, counterfact_flat, zsre, relation or lines.
      limit: Take the first records only.
      stats: Folder of second moments that jaxsys edit stats wrote, for methods that need them.
    """

    records: Path | None = None
    layout: str = "auto"
    limit: int | None = None
    stats: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen(Facts):
    """Which method.

    Attributes:
      method: One of the editing methods; jaxsys edit evaluate --method help lists them.
      layers: Layers to edit; those of the method for a model of this size by default.
      settings: JSON file with fields of the method's configuration.
      batch: Facts of one edit, one batch after the other; 0 for all at once.
    """

    method: str | None = None
    layers: tuple[int, ...] = ()
    settings: Path | None = None
    batch: int = 0


def settings_of(config: Any, default: str = "rome") -> tuple[str, Any, Any]:
    """Find the method and make its configuration: (name, method, settings)."""
    from jaxsys.edit.contract import find_method
    from jaxsys.edit.methods import METHODS
    from jaxsys.edit.protocol import configure

    name = config.method or default
    method = find_method(METHODS, name)
    given = read_settings(config.settings)
    if config.layers:
        given["layers"] = config.layers
    return name, method, configure(name, method, given)


def read_settings(path: Path | None) -> dict[str, Any]:
    """Read a JSON object; nothing for no file."""
    import json

    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--settings {path} cannot be read ({error}); expected a file with one JSON object"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"--settings {path} holds a {type(found).__name__}; expected an object")
    return found


def read_requests(config: Facts) -> tuple[Any, ...]:
    """Read the records."""
    from jaxsys.edit.records import load_records

    if config.records is None:
        raise UserError("no facts are named; pass --records FILE")
    return load_records(config.records, config.layout, config.limit).records


def read_stats(config: Facts) -> Any:
    """Read the second moments, if they are named."""
    if config.stats is None:
        return None
    from jaxsys.edit import stats

    return stats.load(config.stats)
