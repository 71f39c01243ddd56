"""Laws of the evolution: children are programs, the best never gets worse, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.search import evolve, interpret, programs
from jaxsys.search.evolve import EvolveConfig
from jaxsys.search.operators import SETS
from jaxsys.search.programs import Grammar

GRAMMAR = Grammar(("a", "b"), operators=SETS["protected"], length=15, height=5)
KEYS = jax.random.split(jax.random.key(0), 200)


def test_subtrees_are_those_of_the_tree():
    """The span of every symbol, found on the array, holds exactly one complete expression."""
    for program in programs.random_programs(GRAMMAR, 20, depth=(1, 3), seed=1):
        for end in range(int((program > 0).sum())):
            start = int(evolve.subtree_start(GRAMMAR, jnp.asarray(program), jnp.array(end)))
            tree = programs.decode(GRAMMAR, program[start : end + 1])  # refuses anything else
            assert tree[0] == GRAMMAR.symbols[program[end]]


@pytest.mark.parametrize("seed", range(3))
def test_children_are_programs_made_of_their_parents(seed):
    a, b = (jnp.asarray(p) for p in programs.random_programs(GRAMMAR, 2, depth=(2, 3), seed=seed))
    crossed = np.asarray(jax.vmap(lambda k: evolve.crossover(GRAMMAR, k, a, b))(KEYS))
    assert evolve.valid(GRAMMAR, crossed).all()
    assert len(np.unique(crossed, axis=0)) > 5
    assert set(np.unique(crossed)) <= {0, *np.asarray(a).tolist(), *np.asarray(b).tolist()}
    mutated = np.asarray(jax.vmap(lambda k: evolve.mutate(GRAMMAR, k, a, 0.5))(KEYS))
    assert evolve.valid(GRAMMAR, mutated).all()
    arities = GRAMMAR.arities
    assert (arities[mutated] == arities[np.asarray(a)]).all()  # the shape of the tree is kept


@pytest.mark.parametrize("mode", ["generational", "steady"])
def test_search_finds_a_formula_without_compiling_again(mode):
    rng = np.random.default_rng(0)
    inputs = {k: jnp.asarray(rng.uniform(1, 2, 32), jnp.float32) for k in "ab"}
    target = jnp.square(inputs["a"]) - inputs["b"]
    traced = []

    def error(population):
        traced.append(1)
        found = interpret.run_many(GRAMMAR, population, inputs)
        return jnp.mean(jnp.square(found - target[None]), 1)

    config = EvolveConfig(population=200, mode=mode)
    state, step = (f(GRAMMAR, config, error) for f in (evolve.init, evolve.step))
    best = [float(state.fitness.min())]
    for _ in range(25):
        state = step(state)
        best.append(float(state.fitness.min()))
    assert (np.diff(best) <= 1e-7).all()
    assert best[-1] < 1e-6
    assert len(traced) == 2  # once eagerly for the first population, once for all generations
    assert evolve.valid(GRAMMAR, state.programs).all()
    assert int(state.generation) == 25


def test_the_same_seed_gives_the_same_search_and_nan_never_wins():
    def fitness(population):
        values = jnp.sum(population > 0, 1) * 1.0
        return jnp.where(values == 7, jnp.nan, -values)

    config = EvolveConfig(population=16)
    step = evolve.step(GRAMMAR, config, fitness)

    def run(seed):
        state = evolve.init(GRAMMAR, config, fitness, seed)
        for _ in range(3):
            state = step(state)
        return state

    first, again, other = run(0), run(0), run(1)
    assert (first.programs == again.programs).all()
    assert (first.programs != other.programs).any()
    assert not np.isnan(first.fitness).any()
    assert int((np.asarray(first.programs[jnp.argmin(first.fitness)]) > 0).sum()) != 7


@pytest.mark.parametrize(
    "wrong", [{"mutation": 1.5}, {"elites": 96}, {"mode": "both"}, {"tournament": -0.1}]
)
def test_mistakes_are_told(wrong):
    with pytest.raises(UserError):
        EvolveConfig(**wrong)
