"""Search for good cells: at random, by regularised evolution, guided by a predictor.

What is searched is a function from cells to values, so a table and a live space look the same. A
`Trace` lists what was asked, in order; its best by value is what a user would keep.

Axes: ``Q`` queries, ``K`` seeds.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.nas import space
from jaxsys.nas.fit import FitConfig, fit, predict
from jaxsys.nas.predictor import Predictor
from jaxsys.nas.tables import Table

Evaluate = Callable[[Any], Any]  # cells [n, 6] -> values [n], higher is better


class Trace(NamedTuple):
    """What a search asked and was told.

    Attributes:
      cells: `[Q, 6]`, in the order of the queries.
      values: `[Q]`.

    >>> Trace(np.zeros((2, 6), int), np.array([1.0, 3.0])).values.tolist()
    [1.0, 3.0]
    """

    cells: np.ndarray
    values: np.ndarray


def from_table(table: Table, column: str) -> Evaluate:
    """Make the function that looks values up in a table.

    A cell that the table does not hold has the value of the cell that computes the same
    (`space.canonical`), if that is there.

    Raises:
      UserError: if the table has no cells, or later for a cell that it does not hold.

    >>> table = Table(np.zeros((1, 6), np.int32), {"acc": np.array([90.0])})
    >>> from_table(table, "acc")(np.zeros((1, 6), int)).tolist()
    [90.0]
    """
    if table.cells is None:
        raise UserError("the table names no cells; expected cells to look up; load it with cells")
    values = np.full(space.N_CELLS, np.nan)
    values[space.to_index(table.cells)] = table.column(column)

    def evaluate(cells: Any) -> Any:
        found = values[space.to_index(cells)]
        same = values[space.to_index(space.canonical(cells))]
        found = np.where(np.isnan(found), same, found)
        absent = np.flatnonzero(np.isnan(found))
        if absent.size:
            text = space.to_string(np.asarray(cells)[absent[0]])
            raise UserError(
                f"the table does not hold {text}; expected every cell of the space; search among "
                "the table's own cells, or complete it"
            )
        return found

    return evaluate


def _check_queries(queries: int, first: int, most: int) -> None:
    if not first <= queries <= most:
        raise UserError(
            f"{queries} queries are asked for; expected at least {first} for the start and at most "
            f"{most} different cells; change the number"
        )


def random_search(
    evaluate: Evaluate, queries: int, *, pool: Integer[np.ndarray, "N 6"] | None = None, seed: int
) -> Trace:
    """Ask for different cells at random.

    Args:
      evaluate: cells -> values.
      queries: Q.
      pool: cells to choose from; all by default.
      seed: of the draws.

    >>> random_search(lambda cells: cells.sum(1) * 1.0, 5, seed=0).cells.shape
    (5, 6)
    """
    pool = space.all_cells() if pool is None else pool
    _check_queries(queries, 1, len(pool))
    cells = pool[np.random.default_rng(seed).permutation(len(pool))[:queries]]
    return Trace(cells, np.asarray(evaluate(cells), np.float64))


def evolution(
    evaluate: Evaluate, queries: int, *, population: int = 50, sample: int = 10, seed: int
) -> Trace:
    """Search by regularised evolution: the best of a sample gets a child, the oldest dies.

    A child differs from its parent in one operation; a cell may be asked for again, which counts.

    Args:
      evaluate: cells -> values.
      queries: Q.
      population: cells alive.
      sample: cells among which the parent is the best.
      seed: of the draws.

    Reference: Real et al., arXiv 1802.01548.

    >>> bool(evolution(lambda cells: cells.sum(1) * 1.0, 300, seed=0).values.max() > 20)
    True
    """
    rng = np.random.default_rng(seed)
    _check_queries(queries, population, 10**9)
    if not 1 <= sample <= population:
        raise UserError(f"sample is {sample}; expected 1 to the population, {population}; lower it")
    cells = list(space.from_index(rng.integers(space.N_CELLS, size=population)))
    values = [float(v) for v in evaluate(np.stack(cells))]
    alive = deque(range(population))
    while len(cells) < queries:
        drawn = rng.choice(len(alive), sample, replace=False)
        parent = cells[max((alive[i] for i in drawn), key=values.__getitem__)]
        child, edge = parent.copy(), rng.integers(6)
        child[edge] = (child[edge] + rng.integers(1, 5)) % 5
        alive.append(len(cells))
        alive.popleft()
        cells.append(child)
        values.append(float(np.asarray(evaluate(child[None]))[0]))
    return Trace(np.stack(cells), np.array(values))


def guided_search(
    evaluate: Evaluate,
    pool: Integer[np.ndarray, "N 6"],
    predictor: Predictor,
    inputs: dict[str, Any],
    config: FitConfig,
    *,
    queries: int,
    start: int = 40,
    step: int = 40,
    draws: int = 0,
    seeds: Sequence[int] = (0,),
) -> list[Trace]:
    """Search with a predictor, trained anew on all that is known before every step.

    All seeds' predictors are trained in one program.

    Args:
      evaluate: cells -> values.
      pool: cells to choose from.
      predictor: from `predictor.make`.
      inputs: of the predictor, for the pool.
      config: of its training.
      queries: Q; at most N.
      start: random cells asked first.
      step: cells asked after each training, those of highest prediction.
      draws: of the Bayesian weights, averaged; see `fit.predict`.
      seeds: one search for each.

    Returns:
      One trace for each seed.

    Raises:
      UserError: for more queries than cells.

    >>> import jax.numpy as jnp
    >>> line = Predictor(lambda key: jnp.zeros(6), lambda p, x, key: (x["ops"] - 2.0) @ p)
    >>> pool, config = space.all_cells(), FitConfig(("mse",), epochs=40, lr=0.1)
    >>> [found] = guided_search(lambda cells: cells.sum(1) * 1.0, pool, line, {"ops": pool},
    ...                         config, queries=60, start=40, step=20)
    >>> float(found.values.max())
    24.0
    """
    _check_queries(queries, start, len(pool))
    firsts = [np.random.default_rng(s).permutation(len(pool))[:start] for s in seeds]
    rows = np.stack(firsts)
    values = np.stack([np.asarray(evaluate(pool[r]), np.float64) for r in rows])
    known = np.zeros(len(pool))  # only rows of the training sets are ever read
    while rows.shape[1] < queries:
        known[rows] = values
        fitted = fit(predictor, inputs, known, rows, config, seed=int(seeds[0]))
        scores, _ = predict(predictor, fitted, inputs, draws=draws)
        np.put_along_axis(scores, rows, -np.inf, 1)
        more = min(step, queries - rows.shape[1])
        best = np.argsort(-scores, 1, kind="stable")[:, :more]
        told = np.stack([np.asarray(evaluate(pool[b]), np.float64) for b in best])
        rows, values = np.concatenate([rows, best], 1), np.concatenate([values, told], 1)
    return [Trace(pool[r], v) for r, v in zip(rows, values, strict=True)]


def kept_so_far(trace: Trace, final: Evaluate) -> Float[np.ndarray, "Q"]:
    """Evaluate, after each query, the cell with the best value so far by another measure.

    Args:
      trace: what was asked, such as validation accuracies.
      final: what counts in the end, such as test accuracy.

    >>> trace = Trace(space.from_index(np.array([5, 9, 7])), np.array([1.0, 3.0, 2.0]))
    >>> kept_so_far(trace, lambda cells: space.to_index(cells) * 1.0).tolist()
    [5.0, 9.0, 9.0]
    """
    values = trace.values
    running = np.maximum.accumulate(values)
    new = values >= np.concatenate([[-np.inf], running[:-1]])
    place = np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))
    return np.asarray(final(trace.cells), np.float64)[place]
