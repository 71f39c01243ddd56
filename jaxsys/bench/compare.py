"""Two sets of results side by side: what became faster or slower, and whether that means anything.

Rows are matched by kind and flags. For every timed figure that both have, the ratio B / A of the
medians is given with a 95 % interval. The test: on the logarithms of the medians, whose errors are
taken from the widths of the two 95 % intervals; Student's t, two-sided, with as many degrees of
freedom as the smaller number of runs has blocks (`core.measure.block_of`), less one; Holm's
correction over all figures tested, at 5 %. A figure of fewer than three runs, or without an
interval, is compared and not tested. The test knows nothing of what changed between the two runs
besides the program: compare runs of one machine in one state.

Reference: Holm, "A simple sequentially rejective multiple test procedure" (1979).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsys.bench.records import OWN_FIELDS, label
from jaxsys.core.measure import block_of

LEVEL = 0.05
LEAST_RUNS = 3
# Figures without an interval that are compared all the same, by path.
_PLAIN = (
    "peak_memory_measured_bytes",
    "output_tokens_per_s",
    "requests_per_s",
    "goodput_per_s",
    "ttft_s.p50",
    "ttft_s.p99",
    "tpot_s.p50",
    "e2e_s.p50",
    "e2e_s.p99",
)


class Change(NamedTuple):
    """One figure in both sets.

    Attributes:
      kind: of the row.
      row: its flags, as text.
      figure: path of the field.
      a: median in A.
      b: median in B.
      ratio: b / a.
      low: lower end of the ratio's interval; None without one.
      high: upper end.
      p: of the test, corrected; None where not tested.

    >>> Change("train", "batch 2", "step", 1.0, 0.5, 0.5, 0.4, 0.6, 0.001).significant
    True
    """

    kind: str
    row: str
    figure: str
    a: float
    b: float
    ratio: float
    low: float | None
    high: float | None
    p: float | None

    @property
    def significant(self) -> bool | None:
        """Whether the corrected p is below 5 %; None where not tested."""
        return None if self.p is None else self.p < LEVEL


class Comparison(NamedTuple):
    """What became of the rows of two sets.

    Attributes:
      changes: figures in both, tested or not.
      statuses: (kind, row, status in A, status in B) where a row ran in one only.
      only_a: (kind, row) of rows without a match.
      only_b: likewise.
      repeated: rows with flags that a later row of the same set has too; the later one counts.

    >>> Comparison((), (), (), (), 0).repeated
    0
    """

    changes: tuple[Change, ...]
    statuses: tuple[tuple[str, str, str, str], ...]
    only_a: tuple[tuple[str, str], ...]
    only_b: tuple[tuple[str, str], ...]
    repeated: int


def compare(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> Comparison:
    """Match the rows of two sets and compare their figures.

    Args:
      a: rows, as `records.read` gives them.
      b: likewise.

    Returns:
      The comparison.

    >>> from jaxsys.bench.records import record
    >>> def row(seconds):
    ...     step = {"median_s": seconds, "low_s": 0.98 * seconds, "high_s": 1.02 * seconds,
    ...             "runs": 20}
    ...     return record("train", 0, {"batch": 2}, step=step)
    >>> found = compare([row(1.0)], [row(0.5)])
    >>> found.changes[0].ratio, found.changes[0].significant
    (0.5, True)
    """
    rows_a, rows_b = ({_key(row): row for row in rows} for rows in (a, b))
    both = [key for key in rows_a if key in rows_b]
    found, statuses = [], []
    for key in both:
        one, other = rows_a[key], rows_b[key]
        if one["status"] != other["status"]:
            statuses.append((one["kind"], label(one), one["status"], other["status"]))
        found += list(_changes(one, other))
    return Comparison(
        tuple(_corrected(found)),
        tuple(statuses),
        tuple((row["kind"], label(row)) for key, row in rows_a.items() if key not in rows_b),
        tuple((row["kind"], label(row)) for key, row in rows_b.items() if key not in rows_a),
        len(a) + len(b) - len(rows_a) - len(rows_b),
    )


def _key(row: Mapping[str, Any]) -> str:
    return row["kind"] + json.dumps(row["flags"], sort_keys=True)


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    timed_a, timed_b = dict(_timed(a)), dict(_timed(b))
    name = label(a)
    for path in (path for path in timed_a if path in timed_b):
        x, y = timed_a[path], timed_b[path]
        ratio = y["median_s"] / x["median_s"]
        ends = _test(x, y)
        low, high, p = ends if ends else (None, None, None)
        yield Change(a["kind"], name, path, x["median_s"], y["median_s"], ratio, low, high, p)
    for path in _PLAIN:
        x, y = number(a, path), number(b, path)
        if x and y:
            yield Change(a["kind"], name, path, x, y, y / x, None, None, None)


def number(row: Any, path: str) -> float | None:
    """Read a number of a row by its dotted path; None where there is none.

    >>> number({"ttft_s": {"p50": 0.5}}, "ttft_s.p50"), number({}, "ttft_s.p50")
    (0.5, None)
    """
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def _timed(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """All timed figures of a row by path, those whose numbers make sense."""
    for key, value in row.items():
        if not isinstance(value, Mapping) or key in OWN_FIELDS:
            continue
        names = ("median_s", "low_s", "high_s", "runs")
        figure = {name: number(value, name) for name in names}
        if all(x is not None and x > 0 for x in figure.values()):
            yield prefix + key, figure  # type: ignore[misc]
        elif "median_s" not in value:
            yield from _timed(value, f"{prefix}{key}.")


def _test(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[float, float, float] | None:
    """Interval of b / a and the uncorrected p."""
    from scipy.stats import t

    runs = min(a["runs"], b["runs"])
    widths = [math.log(x["high_s"] / x["low_s"]) for x in (a, b)]
    error = math.hypot(*widths) / (2 * 1.959964)
    if runs < LEAST_RUNS or error <= 0:
        return None
    log = math.log(b["median_s"] / a["median_s"])
    freedom = max(1.0, runs / block_of(int(runs)) - 1)
    margin = float(t.ppf(0.975, freedom)) * error
    p = 2 * float(t.sf(abs(log) / error, freedom))
    return math.exp(log - margin), math.exp(log + margin), p


def _corrected(changes: Sequence[Change]) -> list[Change]:
    """Multiply the p-values by Holm's factors."""
    tested = sorted((c.p, i) for i, c in enumerate(changes) if c.p is not None)
    found, largest = list(changes), 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        found[i] = changes[i]._replace(p=largest)
    return found
