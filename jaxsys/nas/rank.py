"""How well scores rank architectures: τ-b, Spearman's ρ, regret, N@K, each with an interval."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError


def _checked(scores: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size < 2:
        raise UserError(
            f"scores have shape {x.shape} and targets {y.shape}; expected two flat lists of the "
            "same length, at least 2; give one score for each architecture"
        )
    for name, v in (("score", x), ("target", y)):
        wrong = np.flatnonzero(~np.isfinite(v))
        if wrong.size:
            raise UserError(
                f"{name} {int(wrong[0])} is {v[wrong[0]]} and {wrong.size - 1} others are not "
                "finite either; expected numbers; drop these architectures or mend the proxy"
            )
    if len(np.unique(y)) < 2:
        raise UserError(
            f"all {y.size} targets are {y[0]:g}; a ranking needs at least two distinct ones; "
            "choose other architectures"
        )
    return x, y


def kendall_tau(scores: Any, targets: Any) -> float:
    """Compute Kendall's τ-b, (concordant − discordant)/√((n₀ − n₁)(n₀ − n₂)).

    n₀ counts pairs, n₁ and n₂ those tied in one list. Constant scores give 0. Runs in
    O(N log N).

    Args:
      scores: `[N]`, higher is better.
      targets: `[N]`.

    Returns:
      τ in −1..1.

    Raises:
      UserError: for other shapes, a number that is not finite, or targets that are all equal.

    >>> round(kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]), 4)
    0.6667
    """
    from scipy.stats import kendalltau

    x, y = _checked(scores, targets)
    if np.ptp(x) == 0:
        return 0.0
    found: Any = kendalltau(x, y)
    return float(found.statistic)


def spearman_rho(scores: Any, targets: Any) -> float:
    """Compute Spearman's ρ, the correlation of the ranks; tied values share their mean rank.

    >>> round(spearman_rho([1, 2, 3, 4], [10, 20, 40, 30]), 6)
    0.8
    """
    from scipy.stats import rankdata

    x, y = _checked(scores, targets)
    if np.ptp(x) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def _top(x: np.ndarray, k: int) -> np.ndarray:
    if not 1 <= k <= x.size:
        raise UserError(f"k is {k} of {x.size} architectures; expected 1 to {x.size}; correct it")
    return np.argsort(-x, kind="stable")[:k]


def top_k_regret(scores: Any, targets: Any, k: int = 10) -> float:
    """Compute max(targets) minus the best target among the k highest scores.

    >>> top_k_regret([3, 2, 1], [70.0, 90.0, 94.0], k=2)
    4.0
    """
    x, y = _checked(scores, targets)
    return float(y.max() - y[_top(x, k)].max())


def best_rank(scores: Any, targets: Any, k: int = 10) -> int:
    """Compute N@K: the true rank, from 1, of the best among the k highest scores.

    >>> best_rank([3, 2, 1], [70.0, 90.0, 94.0], k=2)
    2
    """
    x, y = _checked(scores, targets)
    return int(np.sum(y > y[_top(x, k)].max())) + 1


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "kendall": kendall_tau,
    "spearman": spearman_rho,
    "regret@10": top_k_regret,
    "n@10": best_rank,
}


def with_interval(
    metric: Callable[[Any, Any], float],
    scores: Any,
    targets: Any,
    *,
    level: float = 0.95,
    n: int = 200,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Compute a metric and its percentile bootstrap interval over architectures.

    Resampled ties (an architecture drawn twice) are tied in both lists, which τ-b leaves out.

    Args:
      metric: `(scores, targets) -> number`.
      scores: `[N]`.
      targets: `[N]`.
      level: coverage aimed at.
      n: number of resamples.
      seed: of the resampling.

    Returns:
      The metric of the whole, and the interval's ends.

    >>> tau, (low, high) = with_interval(kendall_tau, range(50), range(50))
    >>> round(tau, 6), round(low, 6), round(high, 6)
    (1.0, 1.0, 1.0)
    """
    x, y = _checked(scores, targets)
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < n:
        rows = rng.integers(x.size, size=x.size)
        if len(np.unique(y[rows])) > 1:
            found.append(metric(x[rows], y[rows]))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(metric(x, y)), (float(low), float(high))


def table_row(scores: Any, targets: Any) -> dict[str, Float[np.ndarray, ""] | float]:
    """Compute every metric of `METRICS`.

    >>> table_row(range(20), range(20))["kendall"]
    1.0
    """
    return {name: metric(scores, targets) for name, metric in METRICS.items()}
