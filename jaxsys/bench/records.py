"""Rows of results: what was measured, with all that a reader needs to judge and repeat it.

A results file holds one JSON object a line. Every row carries the format's number, its kind, the
machine, versions, flags, seed and the state of the source, so that files can be joined and compared
without knowing where they came from.
"""

import functools
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jaxsys
from jaxsys.core.errors import UserError
from jaxsys.core.measure import Timing, machine

FORMAT = 1
KINDS = ("train", "finetune", "serve", "modules", "ops", "comm", "static")
STATUSES = ("ok", "out of memory", "not here")
OWN_FIELDS = ("format", "kind", "machine", "versions", "git", "environment", "flags", "seed")
_VARIABLES = ("XLA_FLAGS", "GLIBC_TUNABLES", "MALLOC_", "OMP_NUM_THREADS")


def record(kind: str, seed: int | None, flags: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Make a row of results.

    Args:
      kind: one of `KINDS`.
      seed: of everything random; None where nothing is.
      flags: what was asked for, the row's identity: two files are compared where kind and flags
        agree.
      **fields: what was found. `status` is "ok" if left out; a row that could not run has "out of
        memory" or "not here", and `why`.

    Returns:
      The row, ready for `jaxsys.core.report.append_jsonl`.

    Raises:
      UserError: an unknown kind or status, a row without its `why`, or a field that the row has
        itself.

    >>> row = record("train", 0, {"model": "tiny", "batch": 2}, tokens_per_s=100.0)
    >>> row["format"], row["kind"], row["status"], row["tokens_per_s"]
    (1, 'train', 'ok', 100.0)
    """
    status = fields.get("status", "ok")
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}; pass one of them")
    if status not in STATUSES:
        raise UserError(
            f"status is {status!r}; it must be one of {', '.join(STATUSES)}; pass one of them"
        )
    if status != "ok" and not fields.get("why"):
        raise UserError(f"a row with status {status!r} has no why; say in a sentence why; pass why")
    if taken := [name for name in fields if name in OWN_FIELDS]:
        raise UserError(
            f"{', '.join(taken)} cannot be a field; each row has its own; give it another name"
        )
    return {
        "format": FORMAT,
        "kind": kind,
        "status": status,
        "machine": _machine(),
        "versions": dict(_versions()),
        "git": _git(),
        "environment": _environment(),
        "flags": dict(flags),
        "seed": seed,
        **fields,
    }


def figure_of(timing: Timing) -> dict[str, float | int]:
    """Turn a timing into what a row holds: median, ends of its 95 % interval, number of runs.

    Args:
      timing: of `jaxsys.core.measure`.

    Returns:
      `median_s`, `low_s`, `high_s` and `runs`.

    >>> from jaxsys.core.measure import timing
    >>> figure_of(timing("step", [1.0, 1.0, 1.0]))
    {'median_s': 1.0, 'low_s': 1.0, 'high_s': 1.0, 'runs': 3}
    """
    low, high = timing.ci_s
    return {"median_s": timing.median_s, "low_s": low, "high_s": high, "runs": len(timing.seconds)}


def label(row: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """Write a row's flags in one line.

    Args:
      row: as `record` makes it.
      without: flags to leave out.

    Returns:
      ``name value`` pairs; flags that are None are left out, flags in flags written likewise.

    >>> label(record("train", 0, {"model": "tiny", "technique": {"zero": 2}, "why": None}))
    'model tiny, zero 2'
    """

    def pairs(flags: Mapping[str, Any]) -> list[str]:
        found = []
        for key, value in flags.items():
            if isinstance(value, Mapping):
                found += pairs(value)
            elif value is not None and key not in without:
                found.append(f"{key} {value}")
        return found

    return ", ".join(pairs(row["flags"]))


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a results file.

    Args:
      path: of a .jsonl file.

    Returns:
      Its rows in order.

    Raises:
      UserError: no such file, a line that is no row of results (told by its number), or rows of
        another format.

    >>> import tempfile
    >>> from jaxsys.core.report import write_jsonl
    >>> file = tempfile.mkdtemp() + "/train.jsonl"
    >>> write_jsonl(file, [{"format": 9, "kind": "train", "flags": {}}])
    >>> read(file)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...line 1 ... has format 9; this version reads format 1; ...
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{os.fspath(path)} cannot be read ({error}); expected a results file of jaxsys bench; "
            "pass a .jsonl file that it wrote"
        ) from None
    return [_row(line, f"line {n} of {path}") for n, line in enumerate(lines, 1) if line.strip()]


def read_all(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a results file, or all .jsonl files of a folder by name.

    Args:
      path: a file or a folder.

    Returns:
      The rows, one at least.

    Raises:
      UserError: as `read`; or there are no rows.

    >>> import tempfile
    >>> read_all(tempfile.mkdtemp())
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ... holds no results; expected .jsonl files of jaxsys bench; ...
    """
    folder = Path(path)
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else [folder]
    rows = [row for file in files for row in read(file)]
    if not rows:
        raise UserError(
            f"{folder} holds no results; expected .jsonl files of jaxsys bench; run one with "
            f"--out {folder} first"
        )
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({error}); expected a row of results; mend or remove the line"
        ) from None
    if not isinstance(row, dict) or "format" not in row:
        raise UserError(
            f"{where} is no row of results; expected an object with a format; remove the line"
        )
    if row["format"] != FORMAT or isinstance(row["format"], bool):
        raise UserError(
            f"{where} has format {row['format']!r}; this version reads format {FORMAT}; measure "
            "again, or read it with the version that wrote it"
        )
    known = row.get("kind") in KINDS and row.get("status") in STATUSES
    if not known or not isinstance(row.get("flags"), dict):
        raise UserError(
            f"{where} has kind {row.get('kind')!r}, status {row.get('status')!r} and flags of type "
            f"{type(row.get('flags')).__name__}; expected a known kind and status, and an object; "
            "remove the line"
        )
    return row


def _environment() -> dict[str, str]:
    """Variables that decide how fast a program runs."""
    return {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
    }


@functools.cache
def _machine() -> dict[str, Any]:
    return asdict(machine(devices=True))


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    packages = ("jax", "jaxlib", "numpy", "optax", "flax")
    return (("jaxsys", jaxsys.__version__), *((name, metadata.version(name)) for name in packages))


@functools.cache
def _git() -> dict[str, Any] | None:
    """The state of the checkout that this package lies in, None where it lies in none."""
    root = Path(jaxsys.__file__).parent.parent
    found = []
    for what in (("rev-parse", "--show-toplevel", "HEAD"), ("status", "--porcelain", "-uno")):
        try:
            ran = subprocess.run(
                ["git", "-C", str(root), *what], capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if ran.returncode:
            return None
        found.append(ran.stdout.splitlines())
    (top, commit), changed = found
    # An installed copy may lie in a checkout of something else.
    return {"commit": commit, "clean": not changed} if Path(top) == root.resolve() else None
