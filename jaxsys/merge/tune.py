"""Search over merge weights, densities and other options, by CMA-ES on one jitted objective.

The objective merges inside the program, so all candidates share one compilation and a generation
is one `jax.lax.map`. The strategy is that of the package cmaes (extra ``merge``): NumPy alone, box
bounds, asked and told. A search that was stopped goes on: what it had been told is told again, from
its record.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsys.core import report
from jaxsys.core.errors import UserError
from jaxsys.merge.contract import Method, find_method
from jaxsys.merge.in_memory import merge_tree
from jaxsys.merge.methods import METHODS
from jaxsys.merge.space import Coordinate, Space, settings

RECORD = "tune.jsonl"


@dataclass(frozen=True)
class TuneConfig:
    """Describe the search.

    Attributes:
      generations: most generations; fewer if the strategy has converged.
      population: candidates in each; None: 4 + 3 ln n (Hansen's default).
      sigma: first step as a share of each coordinate's range.
      at_once: candidates that are merged and scored side by side; each needs a model's memory.
      seed: of the strategy.

    >>> TuneConfig().sigma
    0.2
    """

    generations: int = 30
    population: int | None = None
    sigma: float = 0.2
    at_once: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        small = min(self.generations, self.at_once) < 1 or self.sigma <= 0
        if small or (self.population is not None and self.population < 2):
            raise UserError(
                f"{self}: expected at least one generation, one candidate at once, two in a "
                "population and a first step above 0; correct the numbers"
            )


class Tuned(NamedTuple):
    """Say what the search found.

    Attributes:
      best: the best vector.
      value: its objective.
      start_value: the objective where the search began.
      named: the best vector by coordinate.
      history: best value of each generation, `[G]`.
      evaluations: how many candidates were scored, the start included.

    >>> Tuned._fields[:2]
    ('best', 'value')
    """

    best: np.ndarray
    value: float
    start_value: float
    named: dict[str, float]
    history: np.ndarray
    evaluations: int


def merge_objective(
    method: str | Method,
    space: Space,
    score: Callable[..., Any],
    *,
    config: Any = None,
    weights: Any = None,
    key: jax.Array | None = None,
) -> Callable[..., Any]:
    """Make the objective: merge as a vector says, and score the result.

    Args:
      method: name or method; it must work inside a program (global thresholds do not).
      space: from `parameter_space`.
      score: ``score(params, *data) -> number``, lower is better.
      config: the method's options, for what is not searched; or a function from the path to them.
      weights: w, where they are not searched, `[N]` or a function from the path; ones by default.
      key: random key of the merge, the same for all candidates.

    Returns:
      ``objective(vector, models, base, *data)``, to be given to `tune`.

    Raises:
      UserError: for a searched parameter that the method does not have.

    >>> from jaxsys.merge.space import Range, parameter_space
    >>> space = parameter_space(["w"], 2, {"weight": Range(0.0, 1.0, 0.5)})
    >>> objective = merge_objective("linear", space, lambda p: jnp.sum(p["w"]))
    >>> models = [{"w": jnp.zeros(1)}, {"w": jnp.ones(1)}]
    >>> float(jax.jit(objective)(jnp.array([0.25, 0.75]), models, None))
    0.75
    """
    found = find_method(METHODS, method) if isinstance(method, str) else method
    usual = found.config() if config is None else config
    config_of = usual if callable(usual) else lambda path: usual
    ones = np.ones(space.models, np.float32) if weights is None else weights
    weights_of = ones if callable(ones) else lambda path: ones
    known = {"weight", *(field.name for field in fields(found.config))}
    for parameter, _, _ in space.slots:
        if parameter not in known:
            raise UserError(
                f"{parameter!r} is no parameter of {method}; expected some of "
                f"{', '.join(sorted(known))}; correct the name"
            )

    def objective(vector: Any, models: Any, base: Any, *data: Any) -> Any:
        own = settings(space, vector, config_of, weights_of)
        merged = merge_tree(found, models, base=base, weights=own[0], config=own[1], key=key)
        return score(merged, *data)

    return objective


def tune(
    objective: Callable[..., Any],
    coordinates: Sequence[Coordinate],
    operands: Sequence[Any] = (),
    config: TuneConfig = TuneConfig(),
    *,
    out: str | Path | None = None,
    identity: str = "",
    progress: Callable[[int, float], None] | None = None,
) -> Tuned:
    """Search for the vector with the least objective.

    Args:
      objective: ``objective(vector, *operands) -> number``, jit-able; what is not finite counts as
        worse than everything.
      coordinates: names, bounds and start.
      operands: what the objective works on: models, data.
      config: the search.
      out: folder of the record; a search that was stopped goes on from it.
      identity: what else the record belongs to, such as a hash of models and data.
      progress: called with generation and best value.

    Returns:
      What was found; the start counts, so it is never worse.

    Raises:
      UserError: if the package cmaes is missing, or the folder holds the record of another search.

    Reference: arXiv 1604.00772 (the strategy); arXiv 2403.13187 (on merges).

    >>> found = tune(lambda v: (v[0] - 0.3) ** 2, [Coordinate("x", 0.0, 1.0, 0.9)])
    >>> round(float(found.best[0]), 2)
    0.3
    """
    low, high, start = (np.array([c[i] for c in coordinates]) for i in (1, 2, 3))
    strategy = _strategy((start - low) / (high - low), config)
    batch = config.at_once if config.at_once > 1 else None

    @jax.jit
    def score(points: Float[Array, "P n"], used: Bool[Array, "P"], operands: Any) -> Array:
        def found(point: Any) -> Any:
            return jnp.asarray(objective(point, *operands), jnp.float32)

        def one(row: Any) -> Any:
            # Rows that fill the start up to a population cost nothing, and one program does.
            return jax.lax.cond(row[1], found, lambda _: jnp.float32(jnp.inf), row[0])

        return jax.lax.map(one, (points, used), batch_size=batch)

    def values_of(unit: np.ndarray) -> np.ndarray:
        count = len(unit)
        points = np.zeros((strategy.population_size, len(low)), np.float32)
        points[:count] = low + unit * (high - low)
        used = jnp.arange(len(points)) < count
        values = np.asarray(score(jnp.asarray(points), used, tuple(operands)), np.float64)[:count]
        return np.where(np.isfinite(values), values, np.inf)

    record = _Record(out, coordinates, config, identity)
    begin = record.next()
    if begin is None:
        begin = record.add(((start - low) / (high - low))[None], values_of)
    start_value = best_value = float(begin[0])
    best, history = start, []
    while strategy.generation < config.generations and not strategy.should_stop():
        asked = np.stack([strategy.ask() for _ in range(strategy.population_size)])
        values = record.next(asked)
        values = record.add(asked, values_of) if values is None else values
        strategy.tell(list(zip(asked, values.tolist(), strict=True)))
        i = int(np.argmin(values))
        if values[i] < best_value:
            best, best_value = low + asked[i] * (high - low), float(values[i])
        history.append(float(values[i]))
        if progress:
            progress(strategy.generation, best_value)
    named = {c.name: float(x) for c, x in zip(coordinates, best, strict=True)}
    count = 1 + len(history) * strategy.population_size
    return Tuned(best, best_value, start_value, named, np.array(history), count)


def _strategy(mean: np.ndarray, config: TuneConfig) -> Any:
    try:
        import cmaes
    except ImportError:
        raise UserError(
            "the search needs the package cmaes, which is missing; run pip install 'jaxsys[merge]'"
        ) from None
    bounds = np.tile([0.0, 1.0], (len(mean), 1))
    size = config.population or 4 + math.floor(3 * math.log(len(mean)))
    return cmaes.CMA(mean, config.sigma, bounds, seed=config.seed, population_size=size)


class _Record:
    """Keep candidates and values, one JSON line a generation; give back those of a stopped run."""

    def __init__(
        self,
        out: str | Path | None,
        coordinates: Sequence[Coordinate],
        config: TuneConfig,
        identity: str,
    ):
        self._file = None if out is None else Path(out) / RECORD
        # More generations may be asked for than when the record was begun.
        options = {k: v for k, v in asdict(config).items() if k not in ("generations", "at_once")}
        header = {"coordinates": [list(c) for c in coordinates], "identity": identity} | options
        found: list[Any] = []
        if self._file and self._file.is_file():
            try:
                found = [json.loads(line) for line in self._file.read_text("utf-8").splitlines()]
            except ValueError:
                found = [None]
            if found[:1] != [json.loads(json.dumps(header))]:
                raise UserError(
                    f"{self._file} is the record of another search; expected the same models, "
                    "data, parameters, ranges, population, step and seed; name another folder or "
                    "remove it"
                )
        self._told = [json.dumps(header)]
        self._lines: list[dict[str, Any]] = found[1:]

    def next(self, asked: np.ndarray | None = None) -> np.ndarray | None:
        """Give the values of the next recorded generation, None after the last one."""
        if not self._lines:
            return None
        line = self._lines.pop(0)
        if asked is not None and not np.allclose(asked, line["points"], atol=1e-9):
            raise UserError(
                f"{self._file} cannot be continued here: another version of cmaes or numpy draws "
                "other candidates; remove it or take the versions it was made with"
            )
        self._told.append(json.dumps(line))
        return np.array([math.inf if v is None else v for v in line["values"]])

    def add(self, asked: np.ndarray, values_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Score a generation and write it down."""
        values = values_of(asked)
        told = [v if math.isfinite(v) else None for v in values.tolist()]
        self._told.append(json.dumps({"points": asked.tolist(), "values": told}))
        if self._file:
            report.atomic_write(self._file, "\n".join(self._told) + "\n")
        return values
