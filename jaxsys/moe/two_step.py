"""The paper's own gradient partition, in two steps, the second by differential evolution.

It stands here to be compared with: `partition.solve` finds the optimum of the same problem.
"""

import warnings
from typing import NamedTuple

import numpy as np

from jaxsys.moe.partition import Backward, Partition


class First(NamedTuple):
    """Hold what step 1 placed, backward order.

    Attributes:
        moe: elements reduced inside the MoE layers, [L].
        dense: elements reduced behind the dense parts, [L].
        left: elements of each layer's ``ready`` that found no room, [L].

    >>> First._fields
    ('moe', 'dense', 'left')
    """

    moe: np.ndarray
    dense: np.ndarray
    left: np.ndarray


def step_one(problem: Backward) -> First:
    """Fill the gaps that the degrees without gradients leave, most recent leftovers first.

    Each MoE layer takes the degree that is best for y = 0 and leaves ``t_olp = t(r) − 2r·a``
    (the paper's three cases of it are one formula), each dense part its own time. A gap takes
    ``g⁻¹(t)`` elements from the top of a stack onto which every layer's gradient is laid, as the
    released code does.

    Args:
        problem: see `Backward`.

    Returns:
        What was placed, and what is left of each layer's gradient.

    Reference: arXiv 2501.10714, adaptive gradient partitioning, step 1.

    >>> one = np.ones((2, 1))
    >>> step_one(Backward(3 * one, one, np.zeros(2), np.array([0.0, 5.0]), 0.0, 1.0)).left.tolist()
    [0.0, 3.0]
    """
    least_s, busy_s, dense_s, ready, alpha_s, beta_s = (np.asarray(x, float) for x in problem)
    rows = np.arange(len(ready))
    best = least_s.argmin(axis=1)
    gaps = np.stack([(least_s - busy_s)[rows, best], dense_s], axis=1)
    caps = np.where(gaps > alpha_s, (gaps - alpha_s) / max(float(beta_s), 1e-30), 0.0)
    placed, left = np.zeros_like(caps), np.zeros(len(ready))
    stack: list[int] = []
    for i in range(len(ready)):
        left[i] = ready[i]
        stack.append(i)
        for slot, cap in enumerate(caps[i]):
            while stack and cap > 0:
                taken = min(cap, left[stack[-1]])
                left[stack[-1]] -= taken
                placed[i, slot] += taken
                cap -= taken
                if left[stack[-1]] <= 0:
                    stack.pop()
    return First(placed[:, 0], placed[:, 1], left)


def two_step(problem: Backward, *, seed: int = 0, most_generations: int = 1000) -> Partition:
    """Place the gradients in the paper's two steps.

    Step 2 gives MoE layer i further x_i ≥ 0 elements of what step 1 left over, minimising

        Σ_i f_i(t_ar(first_i + x_i)) + β·(Σ left − Σ x),   Σ_{j≤n} x_j ≤ Σ_{j≤n} left_j,

    where ``f_i(y) = min_r max(t_i(r), busy_i(r) + y)``: SciPy's differential evolution with its
    defaults, a generation at a time. A result no better than step 1's is thrown away. Then every
    layer's degree is chosen anew with its share.

    Args:
        problem: see `Backward`.
        seed: of the evolution.
        most_generations: its bound.

    Returns:
        The partition; ``exact`` is False.

    Reference: arXiv 2501.10714, adaptive gradient partitioning; the prefix sums are those of the
    released code, where the printed constraint has a slip in its subscripts.

    >>> one = np.ones((2, 1))
    >>> gaps = Backward(3 * one, one, np.zeros(2), np.array([0.0, 5.0]), 0.0, 1.0)
    >>> float(two_step(gaps, most_generations=5).seconds)
    9.0
    """
    least_s, busy_s, _, _, alpha_s, beta_s = (np.asarray(x, float) for x in problem)
    first = step_one(problem)

    def layer_s(elements):  # [..., L] -> every degree's seconds, [..., L, R]
        y = np.where(elements > 0, alpha_s + beta_s * elements, 0.0)
        return np.maximum(least_s, busy_s + y[..., None])

    def seconds(extra):  # [..., L]
        inside = layer_s(first.moe + extra).min(axis=-1).sum(axis=-1)
        return inside + beta_s * (first.left.sum() - extra.sum(axis=-1))

    extra = np.zeros_like(first.left)
    if first.left.sum() > 0:
        found = _evolve(seconds, np.cumsum(first.left), seed, most_generations)
        if seconds(found) < seconds(extra):
            extra = found
    moe = first.moe + extra
    choice = layer_s(moe).argmin(axis=-1)
    pending = max(0.0, float(first.left.sum() - extra.sum()))
    return Partition(choice, moe, first.dense, np.asarray(pending), seconds(extra), False)


def _evolve(seconds, most: np.ndarray, seed: int, generations: int) -> np.ndarray:
    """Minimise over x ≥ 0 whose prefix sums stay within ``most`` [L]."""
    from scipy.optimize import LinearConstraint, differential_evolution

    scale, n = float(most[-1]), len(most)
    bound = most / scale
    with warnings.catch_warnings():
        # The objective is piecewise linear, at which the final polish grumbles.
        warnings.simplefilter("ignore")
        found = differential_evolution(
            lambda x: seconds(scale * x.T),
            [(0.0, max(float(b), 1e-12)) for b in bound],
            constraints=LinearConstraint(np.tril(np.ones((n, n))), ub=bound),  # pyright: ignore[reportArgumentType]
            maxiter=generations,
            vectorized=True,
            updating="deferred",
            rng=seed,
        )
    extra = np.maximum(found.x, 0.0)
    over = np.cumsum(extra) > bound  # within the constraint's tolerance only
    if over.any():
        extra *= float(np.min(bound[over] / np.cumsum(extra)[over]))
    return scale * extra
