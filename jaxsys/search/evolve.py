"""Genetic programming on arrays: tournament, subtree crossover, node mutation, elites.

A generation is one jitted step from state to state; the fitness function is the caller's, takes the
whole population and must not be compiled anew for each.

Axes: ``P`` population, ``L`` length of a program.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.search.programs import Grammar, random_programs, stack_heights
from jaxsys.search.simplify import simplify


@dataclass(frozen=True)
class EvolveConfig:
    """Describe the search.

    Reconstruction: Pruner-Zero does not give these numbers; they are those of its authors' sibling
    search and of a third-party rebuild, rounded.

    Attributes:
      population: P.
      tournament: share of the population that a tournament draws.
      crossover: probability that a child takes a subtree of a second parent.
      mutation: probability that a child mutates.
      node_rate: probability that a symbol of such a child is redrawn among those of its arity.
      elites: best individuals that stay.
      mode: generational (all children replace all but the elites) or steady (children replace the
        worst if they are better).
      oos: rules by which every program is simplified (see `search.simplify`); None for none.

    >>> EvolveConfig().population
    96
    """

    population: int = 96
    tournament: float = 0.1
    crossover: float = 0.5
    mutation: float = 0.5
    node_rate: float = 0.2
    elites: int = 2
    mode: str = "generational"
    oos: str | None = None

    def __post_init__(self) -> None:
        rates = (self.tournament, self.crossover, self.mutation, self.node_rate)
        if min(rates) < 0 or max(rates) > 1 or not 0 <= self.elites < self.population:
            raise UserError(f"{self}: rates lie in 0..1 and fewer elites than individuals; mend it")
        if self.mode not in ("generational", "steady"):
            raise UserError(f"mode is {self.mode!r}; expected generational or steady; choose one")
        if self.oos not in ("paper", "sound", None):
            raise UserError(f"oos is {self.oos!r}; expected paper, sound or None; choose one")


class State(NamedTuple):
    """The whole state of a search, a pytree.

    Attributes:
      programs: `[P, L]`.
      fitness: `[P]`, lower is better; infinite where it is not finite.
      key: random key.
      generation: steps done.

    >>> State._fields
    ('programs', 'fitness', 'key', 'generation')
    """

    programs: Int[Array, "P L"]
    fitness: Float[Array, "P"]
    key: Any
    generation: Int[Array, ""]


Fitness = Callable[[Any], Any]  # [P, L] -> [P]


def _finite(values: Any) -> Any:
    return jnp.where(jnp.isfinite(values), values, jnp.inf)


def first_programs(grammar: Grammar, config: EvolveConfig, seed: int = 0) -> Int[Array, "P L"]:
    """Draw the first population, simplified if the configuration says so.

    >>> first_programs(Grammar(("a",)), EvolveConfig(population=4)).shape
    (4, 31)
    """
    programs = jnp.asarray(random_programs(grammar, config.population, seed=seed))
    rules = config.oos
    return programs if rules is None else jax.vmap(lambda p: simplify(grammar, p, rules))(programs)


def init(grammar: Grammar, config: EvolveConfig, fitness: Fitness, seed: int = 0) -> State:
    """Draw and score the first population.

    >>> g = Grammar(("a",))
    >>> state = init(g, EvolveConfig(population=4), lambda p: jnp.sum(p > 0, 1) * 1.0)
    >>> state.programs.shape
    (4, 31)
    """
    programs = first_programs(grammar, config, seed)
    return State(programs, _finite(fitness(programs)), jax.random.key(seed), jnp.zeros((), int))


def step(grammar: Grammar, config: EvolveConfig, fitness: Fitness) -> Callable[[State], State]:
    """Make the jitted step of one generation.

    Args:
      grammar: the symbols.
      config: the rates.
      fitness: `[P, L] -> [P]`, lower is better; traced once.

    >>> g, config = Grammar(("a",)), EvolveConfig(population=8)
    >>> size = lambda p: jnp.sum(p > 0, 1) * 1.0
    >>> state = init(g, config, size)
    >>> bool(step(g, config, size)(state).fitness.min() <= state.fitness.min())
    True
    """

    def one(state: State) -> State:
        key, children = offspring(grammar, config, state)
        scores = _finite(fitness(children))
        keep = survivors(config, state.fitness, scores)
        programs = jnp.concatenate([state.programs, children])[keep]
        values = jnp.concatenate([state.fitness, scores])[keep]
        return State(programs, values, key, state.generation + 1)

    return jax.jit(one)


def offspring(grammar: Grammar, config: EvolveConfig, state: State) -> tuple[Any, Any]:
    """Make P children by tournament, crossover, mutation and simplification.

    Returns:
      The key for the next generation, and the children `[P, L]`.

    >>> g, config = Grammar(("a",)), EvolveConfig(population=4, oos="sound")
    >>> state = init(g, config, lambda p: jnp.sum(p > 0, 1) * 1.0)
    >>> offspring(g, config, state)[1].shape
    (4, 31)
    """
    key, own = jax.random.split(state.key)
    keys = jax.random.split(own, config.population)
    return key, jax.vmap(lambda k: _child(grammar, config, state, k))(keys)


def survivors(
    config: EvolveConfig, fitness: Float[Array, "P"], scores: Float[Array, "P"]
) -> Int[Array, "P"]:
    """Choose who lives on: see `EvolveConfig.mode`.

    Args:
      config: the rates.
      fitness: of the population.
      scores: of its children.

    Returns:
      Indices into the population followed by the children.

    >>> config, scores = EvolveConfig(population=2, elites=1), jnp.array([3.0, 0.0])
    >>> survivors(config, jnp.array([1.0, 2.0]), scores).tolist()
    [0, 3]
    """
    children = config.population + jnp.arange(config.population)
    if config.mode == "steady":
        return jnp.argsort(jnp.concatenate([fitness, scores]))[: config.population]
    elites = jnp.argsort(fitness)[: config.elites]
    # The elites take the places of the worst children.
    values = jnp.concatenate([jnp.full(config.elites, -jnp.inf, scores.dtype), scores])
    keep = jnp.argsort(values)[: config.population]
    return jnp.concatenate([elites, children])[keep]


def _child(grammar: Grammar, config: EvolveConfig, state: State, key: Any) -> Any:
    keys = jax.random.split(key, 6)
    size = max(1, round(config.tournament * config.population))

    def parent(k: Any) -> Any:
        drawn = jax.random.randint(k, (size,), 0, config.population)
        return state.programs[drawn[jnp.argmin(state.fitness[drawn])]]

    first, second = parent(keys[0]), parent(keys[1])
    crossed = jax.random.bernoulli(keys[2], config.crossover)
    child = jnp.where(crossed, crossover(grammar, keys[3], first, second), first)
    mutated = jax.random.bernoulli(keys[4], config.mutation)
    changed = mutate(grammar, keys[5], child, config.node_rate)
    child = jnp.where(mutated, changed, child)
    return child if config.oos is None else simplify(grammar, child, config.oos)


def _heights(grammar: Grammar, program: Any) -> Any:
    deltas = jnp.asarray(np.where(grammar.arities < 0, 0, 1 - grammar.arities))
    return jnp.cumsum(deltas[program])


def subtree_start(grammar: Grammar, program: Int[Array, "L"], end: Int[Array, ""]) -> Any:
    """Find where the subtree begins whose root is at a place of a program.

    In postfix order it is the place after the last one before it with a lower stack.

    >>> from jaxsys.search.programs import from_string
    >>> g = Grammar(("a", "b"))
    >>> int(subtree_start(g, jnp.asarray(from_string(g, "a + abs(b)")), jnp.array(2)))  # of abs
    1
    """
    heights, places = _heights(grammar, program), jnp.arange(program.shape[0])
    lower = (places < end) & (heights < heights[end])
    return jnp.max(jnp.where(lower, places, -1)) + 1


def crossover(
    grammar: Grammar, key: Any, a: Int[Array, "L"], b: Int[Array, "L"]
) -> Int[Array, "L"]:
    """Replace a random subtree of `a` by one of `b`; a child that does not fit stays `a`.

    >>> from jaxsys.search.programs import from_string, to_string
    >>> g = Grammar(("a", "b"))
    >>> p, q = (jnp.asarray(from_string(g, t)) for t in ("a", "b"))
    >>> to_string(g, crossover(g, jax.random.key(0), p, q))
    'b'
    """
    keys, places = jax.random.split(key), jnp.arange(a.shape[0])

    def pick(k: Any, program: Any) -> Any:
        n = jnp.sum(program > 0)
        end = jax.random.randint(k, (), 0, n)
        return n, subtree_start(grammar, program, end), end

    (n, a0, a1), (_, b0, b1) = pick(keys[0], a), pick(keys[1], b)
    inserted, removed = b1 - b0 + 1, a1 - a0 + 1
    length = n - removed + inserted
    from_a = jnp.where(places < a0, places, places - inserted + removed)
    inside = (places >= a0) & (places < a0 + inserted)
    last = a.shape[0] - 1
    child = jnp.where(inside, b[jnp.clip(b0 + places - a0, 0, last)], a[jnp.clip(from_a, 0, last)])
    child = jnp.where(places < length, child, 0)
    fits = (length <= a.shape[0]) & (jnp.max(_heights(grammar, child)) <= grammar.height)
    return jnp.where(fits, child, a)


def mutate(grammar: Grammar, key: Any, program: Int[Array, "L"], rate: float) -> Int[Array, "L"]:
    """Redraw each symbol with a probability among the symbols of its arity.

    >>> from jaxsys.search.programs import from_string, to_string
    >>> g = Grammar(("a",), operators=())
    >>> to_string(g, mutate(g, jax.random.key(0), jnp.asarray(from_string(g, "a")), 1.0))
    'a'
    """
    arities = grammar.arities
    width = max(int((arities == k).sum()) for k in (-1, 0, 1, 2))
    # Row k + 1 lists the opcodes of arity k, repeated to one width.
    table = np.stack(
        [
            np.resize(c, width)
            if (c := np.flatnonzero(arities == k)).size
            else np.zeros(width, int)
            for k in (-1, 0, 1, 2)
        ]
    )
    counts = np.array([max(1, (arities == k).sum()) for k in (-1, 0, 1, 2)])
    row = jnp.asarray(arities)[program] + 1
    k1, k2 = jax.random.split(key)
    drawn = jax.random.randint(k1, program.shape, 0, jnp.asarray(counts)[row])
    other = jnp.asarray(table)[row, drawn].astype(program.dtype)
    return jnp.where(jax.random.bernoulli(k2, rate, program.shape), other, program)


def valid(grammar: Grammar, programs: Any) -> Bool[np.ndarray, "..."]:
    """Tell which arrays are programs that fit the grammar.

    >>> g = Grammar(("a",), length=3)
    >>> valid(g, np.array([[1, 0, 0], [0, 0, 0]])).tolist()
    [True, False]
    """
    p = np.asarray(programs)
    heights = stack_heights(grammar, p)
    needed = np.where(p > 0, np.maximum(grammar.arities[p], 0), 0)
    before = np.concatenate([np.zeros_like(heights[..., :1]), heights[..., :-1]], -1)
    dense = np.diff((p > 0).astype(int), axis=-1).max(-1, initial=-1) <= 0
    return np.asarray(
        (before >= needed).all(-1)
        & (heights[..., -1] == 1)
        & (heights.max(-1) <= grammar.height)
        & dense
    )
