"""What is reported of a set of answers: the rate, its interval, and what puts it in its place.

An accuracy alone says little. Beside it always stand the chance level, the best constant answer,
how often there was no answer, and how often the answer was the same one: a model that always says
the same can reach the best constant answer and has understood nothing.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.measure import bootstrap_ci


class Accuracy(NamedTuple):
    """Hold the share of right answers and what it must be compared with.

    Attributes:
      task: name of the task.
      metric: acc, acc_norm or exact_match.
      value: share of right answers, in [0, 1].
      low, high: 95 % bootstrap interval over questions.
      n: questions.
      chance: what guessing gives.
      majority: what the best constant answer gives.
      empty: share of questions without an answer; they count as wrong.
      constant: share of the most frequent answer among those given; 0 if none was.

    >>> accuracy("t", "acc", [0, 1, None, 1], [0, 0, 0, 1], chance=0.5)[2:]
    (0.5, 0.0, 1.0, 4, 0.5, 0.75, 0.25, 0.6666666666666666)
    """

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    chance: float
    majority: float
    empty: float
    constant: float

    def row(self) -> dict[str, Any]:
        """Lay the figures out as one row of a table.

        >>> accuracy("t", "acc", [0], [0], chance=0.5).row()["above chance"]
        True
        """
        return {**self._asdict(), "above chance": self.low > self.chance}


def accuracy(
    task: str,
    metric: str,
    answers: Sequence[Hashable | None],
    right: Sequence[Hashable],
    *,
    chance: float,
) -> Accuracy:
    """Compare answers with the right ones.

    Args:
      task: name of the task.
      metric: name of the way in which answers were found.
      answers: one for each question; None where there is none.
      right: the right answers.
      chance: what guessing gives.

    Raises:
      UserError: without questions, or with another number of answers.

    >>> accuracy("t", "acc", [0, 1], [0, 0], chance=0.5).value
    0.5
    """
    if len(answers) != len(right) or not right:
        raise UserError(
            f"{task}: {len(answers)} answers for {len(right)} questions; there must be one for each"
        )
    hits = np.array([a is not None and a == r for a, r in zip(answers, right, strict=True)], float)
    low, high = bootstrap_ci(hits, statistic=np.mean)
    given = Counter(a for a in answers if a is not None)
    return Accuracy(
        task,
        metric,
        float(hits.mean()),
        low,
        high,
        len(right),
        chance,
        Counter(right).most_common(1)[0][1] / len(right),
        1 - given.total() / len(answers),
        given.most_common(1)[0][1] / given.total() if given else 0.0,
    )
