"""Metrics of edits, averaged over records."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxsys.core.measure import bootstrap_ci

_PARTS = ("efficacy", "paraphrase", "neighbourhood")  # of the score S


class Metric(NamedTuple):
    """Hold a metric over records.

    Attributes:
      value: mean over the records that have it (of S: the harmonic mean of three such means).
      low, high: 95 % bootstrap interval over records.
      n: records.

    >>> Metric(0.5, 0.25, 0.75, 8).n
    8
    """

    value: float
    low: float
    high: float
    n: int


def summarise(rows: Sequence[Mapping[str, float]]) -> dict[str, Metric]:
    """Average records, with bootstrap intervals, and add S = 3 / (1/ES + 1/PS + 1/NS) as `score`.

    Args:
      rows: from `evaluate_edits`, of one model or of many single edits.

    >>> summarise([{"efficacy": 1.0}, {"efficacy": 0.0}])["efficacy"].value
    0.5
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    found: dict[str, Metric] = {}
    for name in names:
        values = np.array([row[name] for row in rows if row.get(name) is not None], float)
        if values.size:
            low, high = bootstrap_ci(values, statistic=np.mean)
            found[name] = Metric(float(values.mean()), low, high, values.size)
    whole = [[row[part] for part in _PARTS] for row in rows if all(p in row for p in _PARTS)]
    if whole:
        table = np.array(whole, float)
        places = np.arange(len(table), dtype=float)
        low, high = bootstrap_ci(places, statistic=lambda at: _harmonic(table[at.astype(int)]))
        found["score"] = Metric(_harmonic(table), low, high, len(table))
    return found


def _harmonic(table: np.ndarray) -> float:
    means = table.mean(axis=0)
    return float(len(means) / np.sum(1 / means)) if (means > 0).all() else 0.0
