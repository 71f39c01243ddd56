"""Predictors, their training, and searches with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.nas import predictor as predictors
from jaxsys.nas import search, space
from jaxsys.nas.combine import apply_formula, find_formula
from jaxsys.nas.features import flat_features, node_features, predictor_inputs
from jaxsys.nas.fit import FitConfig, Fitted, fit, predict
from jaxsys.nas.predictor import Predictor, PredictorConfig
from jaxsys.nas.rank import kendall_tau
from jaxsys.nas.run import draw_rows, fit_and_test
from jaxsys.nas.tables import Table

TINY = PredictorConfig(sequence=32, width=8, depth=1, heads=2, head_width=4, graph_width=8, inner=8)
CELLS = space.all_cells()[::25]
RNG = np.random.default_rng(0)
INPUTS = predictor_inputs(CELLS, {"snip": RNG.normal(size=(625, 7))})
TARGETS = (CELLS == 2).sum(1) + INPUTS["nodes"][:, 0].astype(float)
LINE = Predictor(lambda key: jnp.zeros(7), lambda p, x, key: x["nodes"] @ p)


@pytest.mark.parametrize(
    "name", ["gcn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("parzc", "mabn", "mlp"))]
)
def test_every_predictor_learns_with_several_seeds_in_one_program(name):
    rows = draw_rows(625, 100, 2)
    config = FitConfig(("mse", "pair"), epochs=30, batch=20, lr=3e-3)
    found = fit_and_test(name, INPUTS, TARGETS, TARGETS, rows, config, sizes=TINY)
    assert found.fitted is not None
    assert found.fitted.losses.shape == (2, 30)
    assert (found.fitted.losses[:, -1] < found.fitted.losses[:, 0]).all()
    assert (found.tau > 0.2).all()
    assert not np.allclose(found.predictions[0], found.predictions[1])


def test_training_equals_adam_by_hand():
    rows, x = np.arange(6)[None], INPUTS["nodes"]
    config = FitConfig(("mse",), epochs=1, batch=6, lr=0.1, weight_decay=0.5)
    found = fit(LINE, {"nodes": x}, TARGETS, rows, config)
    y = (TARGETS[:6] - TARGETS[:6].mean()) / TARGETS[:6].std()
    g = -2 * x[:6].T @ y / 6  # at the start, where all parameters and so their decay are 0
    np.testing.assert_allclose(found.params[0], -0.1 * g / (np.abs(g) + 1e-8), rtol=1e-3)


def test_early_stopping_keeps_the_best_epoch():
    """What is held out contradicts what is learned, so the first epoch is the best."""
    x = np.zeros((60, 7), np.float32)
    x[:, 0] = np.linspace(-1, 1, 60)[np.random.default_rng(0).permutation(60)]
    y = np.where(np.arange(60) < 12, -1, 1) * x[:, 0].astype(float)
    config = FitConfig(("mse",), epochs=200, lr=0.02, valid_fraction=0.2, patience=10, round=10)
    kept = fit(LINE, {"nodes": x}, y, np.arange(60)[None], config)
    assert kept.losses.shape[1] == 20  # the first look that is 10 epochs after the best
    last = fit(LINE, {"nodes": x}, y, np.arange(60)[None], FitConfig(("mse",), epochs=20, lr=0.02))
    assert 0 < float(kept.params[0, 0]) < 0.5 * float(last.params[0, 0])


def test_draws_of_bayesian_weights_spread_and_means_do_not():
    model = predictors.make("mabn", 7, TINY)
    params = jax.vmap(model.init)(jax.random.split(jax.random.key(0), 2))
    fitted = Fitted(params, jnp.zeros(2), jnp.ones(2), None)
    few = {k: v[:5] for k, v in INPUTS.items()}
    mean, none = predict(model, fitted, few)
    drawn, spread = predict(model, fitted, few, draws=4)
    assert mean.shape == (2, 5)
    assert (none == 0).all()
    assert (spread > 0).all()
    again, _ = predict(model, fitted, few, draws=4)
    np.testing.assert_array_equal(drawn, again)


@pytest.mark.parametrize("name", predictors.SIZES)
def test_published_sizes_can_be_built(name):
    model = predictors.make("parzc", 294, predictors.SIZES[name])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(v.size for v in jax.tree.leaves(shapes)) > 1e5


def test_features():
    nodes = np.array([[0.0, 2.0, 0.0, 4.0], [1.0, 3.0, 0.0, 0.0]])
    packed = node_features({"a": nodes}, scale="network", order=np.array([3, 2, 1, 0]))
    np.testing.assert_allclose(packed, [[1, 0.5, 0, 0], [1, 1 / 3, 0, 0]], atol=1e-6)
    table = node_features({"a": nodes, "b": nodes + 1}, scale="table")
    assert table.shape == (2, 8)
    np.testing.assert_allclose(table.mean(0), 0, atol=1e-6)
    assert flat_features(INPUTS).shape == (625, 37)
    with pytest.raises(UserError, match="not finite for 1 networks"):
        node_features({"a": np.array([[np.nan], [1.0]])})


def test_canonical_cells_are_distinct_functions():
    canonical = space.canonical(space.all_cells())
    np.testing.assert_array_equal(space.canonical(canonical), canonical)
    carried = space.reaches(space.all_cells())
    assert ((canonical != space.NONE) == carried).all()


@pytest.mark.parametrize("method", ["random", "evolution", "guided"])
def test_searches_ask_what_they_may_and_keep_the_best(method):
    values = {int(space.to_index(c)): float(t) for c, t in zip(CELLS, TARGETS, strict=True)}
    asked = []

    def evaluate(cells):
        asked.append(len(cells))
        return np.array([values.get(int(space.to_index(c)), (c == 2).sum()) for c in cells])

    if method == "guided":
        config = FitConfig(("mse",), epochs=40, lr=0.05)
        inputs = {"nodes": np.float32(CELLS == 2)}
        six = Predictor(lambda key: jnp.zeros(6), LINE.apply)
        traces = search.guided_search(
            evaluate, CELLS, six, inputs, config, queries=50, start=20, step=15, seeds=(0, 1)
        )
        assert sum(asked) == 100
        assert all(len(np.unique(t.cells, axis=0)) == 50 for t in traces)
        assert all(t.values[20:].mean() > t.values[:20].mean() for t in traces)
    else:
        one = search.random_search if method == "random" else search.evolution
        options = {"pool": CELLS} if method == "random" else {"population": 20, "sample": 5}
        traces = [one(evaluate, 50, seed=s, **options) for s in (0, 0, 1)]
        assert sum(asked) == 150
        np.testing.assert_array_equal(traces[0].cells, traces[1].cells)
        assert (traces[0].cells != traces[2].cells).any()
    for trace in traces:
        curve = search.kept_so_far(trace, evaluate)
        np.testing.assert_allclose(curve, np.maximum.accumulate(trace.values))


def test_formula_over_columns():
    a, b, noise = np.random.default_rng(0).normal(size=(3, 200))
    columns = {"a": a * 5 + 2, "b": b, "noise": noise}
    formula = find_formula(columns, a - b, generations=12, population=200)
    alone = [abs(kendall_tau(v, a - b)) for v in columns.values()]
    assert formula.tau > max(alone) + 0.1
    assert kendall_tau(apply_formula(formula, columns), a - b) == pytest.approx(formula.tau)
    with pytest.raises(UserError, match="column 'a' is missing"):
        apply_formula(formula._replace(mean={"a": 0.0}), {"b": b})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: predictors.make("forest", 3), "'forest' does not exist"),
        (lambda: PredictorConfig(sequence=250), "whole segments"),
        (lambda: fit(LINE, INPUTS, TARGETS * 0, draw_rows(625, 20, 1)), "all equal"),
        (lambda: fit(LINE, INPUTS, TARGETS / 0, draw_rows(625, 20, 1)), "not finite"),
        (lambda: fit(LINE, INPUTS, TARGETS, draw_rows(625, 9, 1)), "lower the batch"),
        (lambda: draw_rows(20, 19, 1), "2 left to test on"),
        (lambda: FitConfig(epochs=0), "epochs of at least 1"),
        (lambda: search.random_search(len, 0, seed=0), "0 queries"),
        (lambda: search.evolution(len, 20, population=10, sample=11, seed=0), "sample is 11"),
        (
            lambda: search.from_table(Table(CELLS, {"a": TARGETS}), "a")((CELLS + 1) % 5),
            "does not hold",
        ),
        (lambda: search.from_table(Table(None, {"a": TARGETS}), "a"), "names no cells"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_mistakes_are_told(call, says):
    with pytest.raises(UserError, match=says):
        call()
