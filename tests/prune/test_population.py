"""A population scored in one program, against one expression after another in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import replica_mesh
from jaxsys.prune import genetic, population
from jaxsys.prune.expression import parse
from jaxsys.prune.genetic import GeneticConfig
from jaxsys.prune.masks import row_mask
from jaxsys.prune.patterns import Pattern
from jaxsys.prune.population import Scoring, mask_fingerprint, none_known, population_fitness
from jaxsys.prune.stats import Stats
from jaxsys.search.evolve import EvolveConfig, valid
from jaxsys.search.operators import PAPER
from jaxsys.search.programs import Grammar, from_string, to_string

RNG = np.random.default_rng(0)
NAMES = ("first", "second", "third")
# Few operators, since each is compiled for every shape.
KEPT = ("sqr", "sqrt", "exp", "mms", "skp", "neg", "mul", "add")
GRAMMAR = Grammar(
    ("W", "G", "X"), tuple(op for op in PAPER if op.name in KEPT), length=15, height=4
)
PARAMS = {n: {"weight": jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32)} for n in NAMES}
STATS = {
    n: Stats(
        X=jnp.asarray(RNG.uniform(0.2, 4, 8), jnp.float32),
        G=jnp.asarray(RNG.uniform(0, 3, (8, 8)), jnp.float32),
    )
    for n in NAMES
}
INPUTS = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)


def forward(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["weight"].T)
    return x


TARGET = forward(PARAMS, INPUTS)


def loss_fn(params, x):
    return jnp.mean(jnp.square(forward(params, x) - TARGET))


SCORING = Scoring(loss_fn, GRAMMAR, Pattern(0.5))
TEXTS = (
    "W",
    "W*sqrt(X)",
    "W*W*X",
    "W*G",
    "sqr(W)*mms(G)",
    "exp(exp(W)*exp(sqr(X)*exp(G)))",  # overflows
    "W*sqrt(X) + W*G",
    "G",
    "neg(neg(W))",
    "X",
)
PROGRAMS = jnp.asarray(np.stack([from_string(GRAMMAR, t) for t in TEXTS]))
LAYERS = population.stack_layers(PARAMS, STATS, SCORING)


@pytest.fixture(scope="module")
def found():
    return population.evaluate(PROGRAMS, LAYERS, PARAMS, INPUTS, none_known(), SCORING)


def by_hand(text, nm=None):
    """Sort every row, remove the first half (or n of m), run the model."""
    x = np.asarray(INPUTS, np.float64)
    for name in NAMES:
        weight = PARAMS[name]["weight"]
        scores = np.asarray(parse(text)(weight, STATS[name]))
        if not np.isfinite(scores).all():
            return np.inf
        mask = np.ones_like(scores)
        for row, kept in zip(scores, mask, strict=True):
            width = 8 if nm is None else nm[1]
            for start in range(0, 8, width):
                order = np.argsort(row[start : start + width], kind="stable")
                kept[start + order[: width // 2]] = 0
        x = np.tanh(x @ (np.asarray(weight) * mask).T)
    return np.mean(np.square(x - np.asarray(TARGET)))


def test_fitness_is_that_of_one_expression_after_another(found):
    expected = [by_hand(text) for text in TEXTS]
    assert np.isinf(expected).sum() == 1
    np.testing.assert_allclose(found.fitness, expected, rtol=1e-4)


def test_equal_masks_are_run_once(found):
    prints = [tuple(p) for p in np.asarray(found.fingerprints)]
    assert prints[1] == prints[2]  # W·sqrt(X) and W²·X
    assert prints[0] == prints[8]
    finite = [i for i in range(10) if i != 5]
    assert len({prints[i] for i in finite}) == 7
    assert np.asarray(found.fresh).tolist() == [i not in (2, 5, 8) for i in range(10)]
    again = population.Known(found.fingerprints, found.fitness + 1.0)
    second = population.evaluate(PROGRAMS, LAYERS, PARAMS, INPUTS, again, SCORING)
    assert not second.fresh.any()
    np.testing.assert_array_equal(second.fitness, found.fitness + 1.0)


def test_eight_devices_give_the_same_to_the_bit(found):
    mesh = replica_mesh(jax.devices())
    assert mesh.size == 8
    many = population.evaluate(PROGRAMS, LAYERS, PARAMS, INPUTS, none_known(), SCORING, mesh)
    np.testing.assert_array_equal(many.fitness, found.fitness)
    np.testing.assert_array_equal(many.fingerprints, found.fingerprints)


def test_another_population_compiles_nothing(found):
    before = population.evaluate._cache_size()
    other = jnp.roll(PROGRAMS, 3, axis=0)
    turned = population.evaluate(other, LAYERS, PARAMS, INPUTS, none_known(), SCORING)
    np.testing.assert_array_equal(turned.fitness, jnp.roll(found.fitness, 3))
    assert population.evaluate._cache_size() == before


def test_only_the_promoted_are_run(found):
    scoring = Scoring(loss_fn, GRAMMAR, Pattern(0.5), promote=0.3)
    two = population.evaluate(PROGRAMS, LAYERS, PARAMS, INPUTS, none_known(), scoring)
    promoted = np.asarray(two.fitness) < population.NOT_PROMOTED
    assert promoted.sum() == 3
    np.testing.assert_array_equal(two.fitness[promoted], found.fitness[promoted])
    errors = np.asarray(two.errors)
    assert errors[promoted].max() <= errors[~promoted].min()
    # By this error Wanda's mask is the best of all.
    assert promoted[1]
    assert errors[1] == errors.min()
    np.testing.assert_allclose(two.fitness[~promoted], 1e4 + errors[~promoted], rtol=1e-6)


def test_patterns_and_orientation():
    turned = {n: {"weight": leaf["weight"].T} for n, leaf in PARAMS.items()}

    def loss(params, x):
        back = {n: {"weight": leaf["weight"].T} for n, leaf in params.items()}
        return loss_fn(back, x)

    scoring = Scoring(loss, GRAMMAR, Pattern(nm=(2, 4)), in_out=True)
    fitness = population_fitness(PROGRAMS[:5], turned, STATS, INPUTS, scoring)
    np.testing.assert_allclose(fitness, [by_hand(t, (2, 4)) for t in TEXTS[:5]], rtol=1e-4)


def test_fingerprints():
    masks = [row_mask(jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32), 0.5) for _ in range(200)]
    prints = {tuple(np.asarray(mask_fingerprint(m)).tolist()) for m in masks}
    assert len(prints) == len({np.asarray(m).tobytes() for m in masks})
    a, b = (np.asarray(mask_fingerprint(masks[0], salt)) for salt in (0, 1))
    assert (a != b).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Scoring(loss_fn, promote=0.0), "promote is 0.0"),
        (lambda: Scoring(loss_fn, pattern=Pattern(0.5, "global")), "within a layer"),
        (
            lambda: population.stack_layers(PARAMS, {"fourth": Stats()}, SCORING),
            "no layer 'fourth'",
        ),
        (lambda: population.stack_layers(PARAMS, {}, SCORING), "no layers to prune"),
        (
            lambda: population.stack_layers(PARAMS, {"first": Stats(X=jnp.ones(8))}, SCORING),
            "'first' lacks the statistic G",
        ),
        (
            lambda: population.stack_layers(
                PARAMS, STATS, Scoring(loss_fn, pattern=Pattern(nm=(2, 3)))
            ),
            "2:3 does not divide the 8 inputs of first",
        ),
        (lambda: GeneticConfig(strategy="greedy"), "strategy is 'greedy'"),
        (lambda: GeneticConfig(generations=0), "0 generations"),
    ],
)
def test_mistakes_are_told(call, says):
    with pytest.raises(UserError, match=says):
        call()


EVOLVE = EvolveConfig(12, crossover=0.7, mutation=0.7, node_rate=0.3, mode="steady", oos="sound")


def search(out=None, mesh=None, **change):
    config = GeneticConfig(EVOLVE, archive=40, **change)
    return genetic.search(PARAMS, STATS, INPUTS, SCORING, config, out=out, mesh=mesh)


@pytest.fixture(scope="module")
def whole():
    return search(generations=6)


def same(a, b):
    def words(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    leaves = zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True)
    return a.history == b.history and all((words(x) == words(y)).all() for x, y in leaves)


def test_a_search_improves_and_keeps_its_laws(whole):
    best = [entry["best"] for entry in whole.history]
    assert (np.diff(best) <= 0).all()
    archive, state = whole.state.archive, whole.state.population
    held = np.isfinite(archive.fitness)
    assert (np.diff(np.asarray(archive.fitness)[held]) >= 0).all()
    prints = {tuple(p) for p in np.asarray(archive.fingerprints)[held]}
    assert len(prints) == held.sum()
    assert valid(GRAMMAR, np.asarray(archive.programs)[held]).all()
    alive = {tuple(p) for p in np.asarray(whole.state.fingerprints)}
    assert len(alive) == 12  # all of them of different masks
    assert np.median(state.fitness) < whole.history[0]["median"]
    assert best[-1] == float(state.fitness.min()) == whole.best(1)[0]["loss"]
    for row in whole.best(3):
        np.testing.assert_allclose(by_hand(row["expression"]), row["loss"], rtol=1e-3)
    assert whole.history[-1]["evaluations"] == 72
    assert whole.history[-1]["fresh"] <= 72


def test_one_compilation_serves_every_generation(whole):
    before = genetic.step._cache_size()
    again = search(generations=6)
    assert genetic.step._cache_size() == before
    assert same(again, whole)


def test_a_search_that_was_stopped_goes_on_as_if_not(whole, tmp_path):
    search(tmp_path, generations=2)
    assert same(search(tmp_path, generations=6), whole)
    assert same(search(tmp_path, generations=6), whole)  # nothing is left to do
    with pytest.raises(UserError, match="another search: its seed is 0 and this one's 1"):
        search(tmp_path, generations=6, seed=1)


@pytest.mark.slow
def test_a_search_on_eight_devices_is_the_same(whole):
    many = search(mesh=replica_mesh(jax.devices()), generations=6)
    # Devices do not see each other's masks within a generation, so more losses are computed.
    for entry, one in zip(many.history, whole.history, strict=True):
        assert entry.pop("fresh") >= one["fresh"]
        assert entry == {k: v for k, v in one.items() if k != "fresh"}
    np.testing.assert_array_equal(many.state.archive.programs, whole.state.archive.programs)
    np.testing.assert_array_equal(many.state.archive.fitness, whole.state.archive.fitness)


def test_random_search_and_generations():
    drawn = search(generations=3, strategy="random")
    assert drawn.history[-1]["evaluations"] == 36
    assert len({to_string(GRAMMAR, p) for p in np.asarray(drawn.state.archive.programs[:5])}) == 5
    config = GeneticConfig(
        EvolveConfig(12, elites=2, mode="generational"), generations=4, archive=40
    )
    found = genetic.search(PARAMS, STATS, INPUTS, SCORING, config)
    assert (np.diff([entry["best"] for entry in found.history]) <= 0).all()
    assert float(found.state.population.fitness.min()) == found.history[-1]["best"]


def test_a_model_without_a_finite_loss_is_told():
    grammar = Grammar(("W",), PAPER[:1], length=3, height=2)
    scoring = Scoring(lambda p, x: jnp.nan * p["first"]["weight"][0, 0], grammar)
    config = GeneticConfig(EvolveConfig(2, elites=0), generations=1)
    with pytest.raises(UserError, match="no expression has a finite loss"):
        genetic.search(PARAMS, {"first": Stats()}, INPUTS, scoring, config)
