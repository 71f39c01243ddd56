"""Find a formula over proxy columns that ranks architectures, by genetic programming.

Axes: ``N`` architectures, ``P`` population.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.nas.rank import kendall_tau
from jaxsys.search import evolve, interpret
from jaxsys.search.operators import SETS
from jaxsys.search.programs import Grammar, from_string, to_string


class Formula(NamedTuple):
    """A formula over columns that were standardised.

    Attributes:
      text: readable by `search.programs.from_string`.
      mean: column -> what was subtracted.
      std: column -> what it was then divided by.
      tau: Kendall's τ-b on the architectures it was found with.

    >>> Formula("a", {"a": 0.0}, {"a": 1.0}, 1.0).text
    'a'
    """

    text: str
    mean: dict[str, float]
    std: dict[str, float]
    tau: float


def _standardised(
    columns: Mapping[str, Any], mean: Mapping[str, float], std: Mapping[str, float]
) -> dict[str, Array]:
    return {
        name: jnp.asarray((np.asarray(columns[name], np.float64) - mean[name]) / std[name], "f4")
        for name in mean
    }


def _grammar(names: Any) -> Grammar:
    return Grammar(tuple(names), operators=SETS["protected"], length=15, height=5)


def apply_formula(formula: Formula, columns: Mapping[str, Any]) -> Float[np.ndarray, "N"]:
    """Score architectures by a formula.

    Raises:
      UserError: if a column is missing.

    >>> apply_formula(Formula("neg(a)", {"a": 0.0}, {"a": 2.0}, 0.0), {"a": [4.0]}).tolist()
    [-2.0]
    """
    missing = [name for name in formula.mean if name not in columns]
    if missing:
        raise UserError(f"column {missing[0]!r} is missing; got {', '.join(columns)}; add it")
    grammar = _grammar(formula.mean)
    program = jnp.asarray(from_string(grammar, formula.text))
    values = _standardised(columns, formula.mean, formula.std)
    return np.asarray(interpret.run(grammar, program, values), np.float64)


def find_formula(
    columns: Mapping[str, Float[np.ndarray, "N"]],
    targets: Float[np.ndarray, "N"],
    *,
    generations: int = 30,
    population: int = 200,
    pairs: int = 4096,
    seed: int = 0,
) -> Formula:
    """Evolve a formula by the share of pairs of architectures that it orders rightly.

    Fitness is −τ over pairs drawn once (all, if there are fewer), plus 0.0005 for each symbol, so
    that of equal formulas the shorter wins.

    Args:
      columns: names to values, at least one.
      targets: such as validation accuracy.
      generations: how many.
      population: P.
      pairs: compared; bounds memory.
      seed: of draws and of evolution.

    Raises:
      UserError: for columns or targets that are not finite or all equal.

    >>> x = np.arange(1.0, 33.0)
    >>> find_formula({"a": x}, -x, generations=5, population=50).tau > 0.9
    True
    """
    y = np.asarray(targets, np.float64)
    mean, std = {}, {}
    for name, column in columns.items():
        if not name.isidentifier():
            raise UserError(
                f"column {name!r} cannot stand in a formula; expected letters, digits and "
                "underscores; rename it"
            )
        v = np.asarray(column, np.float64)
        kendall_tau(v, y)  # for its checks
        mean[name], std[name] = float(v.mean()), float(v.std()) or 1.0
    grammar = _grammar(columns)
    inputs = _standardised(columns, mean, std)
    i, j = np.triu_indices(len(y), 1)
    drawn = np.random.default_rng(seed).permutation(len(i))[:pairs]
    i, j = i[drawn], j[drawn]
    wanted = jnp.asarray(np.sign(y[i] - y[j]), "f4")

    def fitness(programs: Any) -> Any:
        scores = interpret.run_many(grammar, programs, inputs, batching="vmap")
        found = jnp.sign(scores[:, i] - scores[:, j])
        tau = jnp.mean(found * wanted[None], 1)
        tau = jnp.where(jnp.isfinite(scores).all(1), tau, -jnp.inf)
        return -tau + 0.0005 * jnp.sum(programs > 0, 1)

    config = evolve.EvolveConfig(population=population)
    state = evolve.init(grammar, config, jax.jit(fitness), seed)
    step = evolve.step(grammar, config, fitness)
    for _ in range(generations):
        state = step(state)
    best = to_string(grammar, state.programs[int(jnp.argmin(state.fitness))])
    formula = Formula(best, mean, std, 0.0)
    return formula._replace(tau=round(kendall_tau(apply_formula(formula, columns), y), 12))
