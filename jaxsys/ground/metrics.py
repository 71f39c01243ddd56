"""Score answers as SNARE does: strict wins, counts pooled over passes, seeds, tests, leaderboard.

Axes: ``B`` rows, ``K`` candidates.

Reference: arXiv 2107.12514, section 5, and the evaluation code that came with it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.report import atomic_write, to_json
from jaxsys.ground.snare import Row

PASSES = 8  # SNARE runs each validation batch this often, once per view


class Counts(NamedTuple):
    """Hold how many rows were asked and answered rightly, by kind.

    Attributes:
        visual: rows about looks.
        visual_right: of these, right.
        blind: rows about shape and touch.
        blind_right: of these, right.

    >>> (Counts(4, 3, 4, 1) + Counts(4, 3, 4, 1)).all
    0.5
    """

    visual: int
    visual_right: int
    blind: int
    blind_right: int

    def __add__(self, other: "Counts") -> "Counts":  # type: ignore[override]
        """Pool two counts: a tuple's sum would append."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def all(self) -> float:
        """Give the share of right answers."""
        return _share(self.visual_right + self.blind_right, self.visual + self.blind)

    @property
    def visual_accuracy(self) -> float:
        """Give the share of right answers among visual rows; NaN without any."""
        return _share(self.visual_right, self.visual)

    @property
    def blind_accuracy(self) -> float:
        """Give the share of right answers among blind rows; NaN without any."""
        return _share(self.blind_right, self.blind)


class Spread(NamedTuple):
    """Hold the mean and the standard deviation (n − 1) over seeds.

    Attributes:
        mean: of the values.
        deviation: NaN for one value.
        n: number of seeds.

    >>> Spread(0.5, 0.1, 10).n
    10
    """

    mean: float
    deviation: float
    n: int


class Comparison(NamedTuple):
    """Hold Welch's test of two models over their seeds.

    Attributes:
        first: a model's name.
        second: another's.
        difference: mean of the first minus mean of the second.
        t: Welch's statistic.
        p: two-sided, times the number of comparisons, at most 1 (Bonferroni).

    >>> Comparison("da4lg", "match", 0.05, 8.0, 0.001).p
    0.001
    """

    first: str
    second: str
    difference: float
    t: float
    p: float


def _share(right: int, total: int) -> float:
    return right / total if total else math.nan


def strictly_best(scores: Any, answer: Any) -> np.ndarray:
    """Say which rows are right: the meant candidate's score is greater than every other's.

    A tie is wrong. A score that is not a number makes its row wrong.

    Args:
        scores: [B, K].
        answer: [B], the place of the candidate that is meant.

    Raises:
        UserError: for shapes that do not fit, or an answer outside of the candidates.

    >>> strictly_best([[2.0, 1.0], [1.0, 1.0]], [0, 0]).tolist()
    [True, False]
    """
    scores, answer = np.asarray(scores), np.asarray(answer)
    if scores.ndim != 2 or answer.shape != scores.shape[:1] or scores.shape[1] < 2:
        raise UserError(
            f"scores have shape {scores.shape} and answers {answer.shape}; expected [B, K] with K "
            "at least 2, and [B]; pass one row of scores for each answer"
        )
    if answer.size and not (answer.min() >= 0 and answer.max() < scores.shape[1]):
        raise UserError(
            f"answers reach from {answer.min()} to {answer.max()} and there are {scores.shape[1]} "
            "candidates; expected places from 0; use a fold with answers"
        )
    meant = np.take_along_axis(scores, answer[:, None], 1)
    others = np.arange(scores.shape[1])[None] != answer[:, None]
    return ((meant > scores) | ~others).all(1)


def count(scores: Any, answer: Any, visual: Any) -> Counts:
    """Count one pass over rows.

    Args:
        scores: [B, K].
        answer: [B].
        visual: [B] bool.

    Returns:
        Counts, which add up over batches and passes.

    Raises:
        UserError: for shapes that do not fit.

    >>> count([[2.0, 1.0], [1.0, 1.0]], [0, 0], [True, False])
    Counts(visual=1, visual_right=1, blind=1, blind_right=0)
    """
    right, visual = strictly_best(scores, answer), np.asarray(visual, bool)
    if visual.shape != right.shape:
        raise UserError(
            f"visual has shape {visual.shape} and there are {len(right)} rows; expected one each; "
            "pass the rows' own marks"
        )
    return Counts(
        int(visual.sum()),
        int((right & visual).sum()),
        int((~visual).sum()),
        int((right & ~visual).sum()),
    )


def pooled(passes: Sequence[Counts]) -> Counts:
    """Add up passes: SNARE's figure divides all right answers by all questions of `PASSES` passes.

    Raises:
        UserError: without a pass.

    >>> pooled([Counts(1, 1, 1, 0), Counts(1, 1, 1, 1)]).all
    0.75
    """
    if not passes:
        raise UserError("there are zero passes to pool; expected at least one; evaluate first")
    total = passes[0]
    for one in passes[1:]:
        total = total + one
    return total


def spread(values: Sequence[float]) -> Spread:
    """Summarise a figure over seeds (SNARE uses ten, 0 to 9).

    Raises:
        UserError: without a value.

    >>> spread([0.5, 0.7]).mean
    0.6
    """
    if not len(values):
        raise UserError("there are zero seeds to summarise; expected at least one; run some")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Spread(float(np.mean(values)), deviation, len(values))


def compare(
    accuracies: Mapping[str, Sequence[float]],
    pairs: Sequence[tuple[str, str]] | None = None,
) -> list[Comparison]:
    """Test whether models differ over seeds: Welch's t, corrected by Bonferroni.

        t = (m₁ − m₂) / √(s₁²/n₁ + s₂²/n₂),    p′ = min(1, c·p) for c comparisons

    Args:
        accuracies: model to its figure for each seed.
        pairs: which to compare; None compares all.

    Raises:
        UserError: for a model with fewer than two seeds, or one that is unknown.

    >>> [row] = compare({"a": [0.8, 0.82, 0.81], "b": [0.7, 0.72, 0.71]})
    >>> round(row.difference, 6), row.p < 0.001
    (0.1, True)
    """
    from scipy import stats

    pairs = list(combinations(accuracies, 2)) if pairs is None else list(pairs)
    for name in sorted({name for pair in pairs for name in pair}):
        if len(accuracies.get(name, ())) < 2:
            raise UserError(
                f"model {name!r} has {len(accuracies.get(name, ()))} seeds; a test needs at least "
                "two; run more seeds"
            )
    rows = []
    for first, second in pairs:
        a, b = np.asarray(accuracies[first], float), np.asarray(accuracies[second], float)
        difference = float(a.mean() - b.mean())
        if a.var() == b.var() == 0:  # t is undefined: equal means agree, others differ for certain
            t = 0.0 if difference == 0 else math.copysign(math.inf, difference)
            p = 1.0 if difference == 0 else 0.0
        else:
            test: Any = stats.ttest_ind(a, b, equal_var=False)
            t, p = float(test.statistic), float(test.pvalue)
        rows.append(Comparison(first, second, difference, t, min(1.0, p * len(pairs))))
    return rows


def write_leaderboard(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    passes: Sequence[Any],
    *,
    views_seen: int,
) -> None:
    """Write the predictions of the test fold in the form that SNARE's authors take.

    One JSON object: pass number to a list of rows with ``annotation``, ``objects``, ``pred_ans``
    (the first of the highest scores) and ``num_steps``.

    Args:
        path: the file, written whole or not at all.
        rows: N rows of the test fold.
        passes: for each pass the scores [N, 2]; the leaderboard expects `PASSES` of them.
        views_seen: views of an object that the model looked at (8, 2 or 1): ``num_steps``.

    Raises:
        UserError: for scores that do not fit the rows.

    >>> import tempfile
    >>> from pathlib import Path
    >>> file = Path(tempfile.mkdtemp(), "test.json")
    >>> write_leaderboard(file, [Row("it", ("a", "b"))], [[[0.0, 1.0]]], views_seen=8)
    >>> file.read_text()
    '{"0": [{"annotation": "it", "objects": ["a", "b"], "pred_ans": 1, "num_steps": 8}]}\\n'
    """
    predictions = {}
    for number, one in enumerate(passes):
        scores = np.asarray(one)
        if scores.shape != (len(rows), 2) or np.isnan(scores).any():
            raise UserError(
                f"pass {number} has scores of shape {scores.shape} for {len(rows)} rows, or a "
                "score that is not a number; expected [N, 2] numbers; evaluate the whole fold"
            )
        predictions[str(number)] = [
            {
                "annotation": row.annotation,
                "objects": list(row.objects),
                "pred_ans": int(choice),
                "num_steps": views_seen,
            }
            for row, choice in zip(rows, scores.argmax(1), strict=True)
        ]
    atomic_write(path, to_json(predictions) + "\n")
