"""Search over merges: known optima, the same run after a stop, one compilation for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.merge.in_memory import merge_tree
from jaxsys.merge.linear import TaskArithmetic
from jaxsys.merge.space import Coordinate, Range, parameter_space, settings
from jaxsys.merge.tune import RECORD, TuneConfig, merge_objective, tune

pytest.importorskip("cmaes", reason="the extra merge is not installed")

SHAPES = {"h": {str(i): {"mlp": {"w": (6, 4)}, "attn": {"w": (4,)}} for i in range(4)}, "e": (5,)}


def _tree(seed):
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    drawn = [rng.normal(size=shape).astype(np.float32) for shape in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(x) for x in drawn])


BASE, MODELS = _tree(0), [_tree(1), _tree(2)]


def _distance(params, wanted):
    return sum(
        jnp.mean((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, wanted)), strict=True)
    )


def _settings(space, vector, config):
    return settings(space, vector, lambda path: config, lambda path: np.ones(2))


def test_finds_the_weights_that_made_the_target():
    """A target that is a merge itself: its weights, layer group by layer group, are the optimum."""
    space = parameter_space(
        list(flatten(BASE)), 2, {"weight": Range(-0.5, 1.5, 0.3)}, layer_groups=2, filters=("mlp",)
    )
    names = [c.name for c in space.coordinates]
    assert len(names) == 2 * 5  # two groups of layers with mlp and rest each, and what is outside
    assert names[0] == "weight/model 0/outside rest"
    assert "weight/model 1/layers 2-3 mlp" in names
    hidden = np.random.default_rng(3).uniform(0, 1, len(names))
    weights_of, _ = _settings(space, jnp.asarray(hidden), TaskArithmetic())
    wanted = merge_tree("task_arithmetic", MODELS, base=BASE, weights=weights_of)
    calls = []

    def score(params, wanted):
        calls.append(None)
        return _distance(params, wanted)

    found = tune(
        merge_objective("task_arithmetic", space, score),
        space.coordinates,
        (MODELS, BASE, wanted),
        TuneConfig(generations=100, population=12),
    )
    np.testing.assert_allclose(found.best, hidden, atol=0.02)
    assert found.value < 1e-4 * found.start_value
    assert found.evaluations == 1 + 12 * len(found.history)
    assert len(calls) <= 2  # one program, however many candidates


def test_finds_the_density_that_made_the_target():
    space = parameter_space(
        list(flatten(BASE)), 2, {"density": Range(0.05, 1.0, 0.9), "lambda_": Range(0.1, 2.0, 1.5)}
    )
    assert [c.name for c in space.coordinates] == [
        "density/model 0/all",
        "density/model 1/all",
        "lambda_/all",
    ]
    from jaxsys.merge.ties import Ties

    wanted = merge_tree("ties", MODELS, base=BASE, config=Ties(density=(0.3, 0.7), lambda_=0.8))
    objective = merge_objective("ties", space, _distance)
    config = TuneConfig(generations=30, population=12)
    found = tune(objective, space.coordinates, (MODELS, BASE, wanted), config)
    assert found.value < 0.01 * found.start_value
    assert found.named["lambda_/all"] == pytest.approx(0.8, abs=0.05)
    # Tracing changes nothing: the merge by the found values is the merge that was scored.
    weights_of, config_of = _settings(space, found.best, Ties())
    again = merge_tree(
        "ties", MODELS, base=BASE, weights=lambda p: np.asarray(weights_of(p)), config=config_of
    )
    assert float(_distance(again, wanted)) == pytest.approx(found.value, rel=1e-3, abs=1e-7)


BOWL = [Coordinate("x", -1.0, 2.0, 1.5), Coordinate("y", 0.0, 4.0, 3.0)]


def _bowl(v):
    value = (v[0] - 0.5) ** 2 + 10 * (v[1] - 1.0) ** 2
    return jnp.where(v[0] > 1.8, jnp.nan, value)


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_stopped_search_goes_on_as_if_it_had_not(tmp_path, at_once):
    config = TuneConfig(generations=12, seed=5, at_once=at_once)
    whole = tune(_bowl, BOWL, config=config)
    short = TuneConfig(generations=4, seed=5, at_once=at_once)
    tune(_bowl, BOWL, config=short, out=tmp_path)
    seen = []
    found = tune(_bowl, BOWL, config=config, out=tmp_path, progress=lambda g, v: seen.append(g))
    np.testing.assert_array_equal(found.history, whole.history)
    np.testing.assert_array_equal(found.best, whole.best)
    assert seen == list(range(1, 13))
    assert len((tmp_path / RECORD).read_text().splitlines()) == 2 + 12

    def never(v):
        raise AssertionError("everything is on record")

    assert tune(never, BOWL, config=config, out=tmp_path).value == found.value
    with pytest.raises(UserError, match="another search"):
        tune(_bowl, BOWL, config=TuneConfig(seed=6), out=tmp_path)


def test_candidates_stay_inside_and_nan_loses():
    inside = []

    def objective(v):
        jax.debug.callback(lambda x: inside.append(np.asarray(x)), v)
        return jnp.where(v[0] < 0.0, jnp.nan, v[0] + v[1])

    found = tune(objective, BOWL, config=TuneConfig(generations=25))
    jax.effects_barrier()
    points = np.stack(inside)
    assert points.min(0)[0] >= -1
    assert points.max(0)[0] <= 2
    assert points[:, 1].min() >= 0
    assert 0 <= found.named["x"] < 0.1
    assert 0 <= found.named["y"] < 0.1


PATHS = ["h.0.w", "h.1.w"]
WEIGHT = {"weight": Range(0.0, 1.0, 0.5)}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: parameter_space(PATHS, 2, {"weight": Range(1.0, 0.0, 0.5)}), "from 1.0 to 0.0"),
        (lambda: parameter_space(PATHS, 2, {"weight": Range(0.0, 1.0, 2.0)}), "beginning at 2.0"),
        (lambda: parameter_space(PATHS, 2, {}), "nothing to search"),
        (lambda: parameter_space(PATHS, 2, WEIGHT, layer_groups=3), "3 groups .* of 2 layers"),
        (lambda: parameter_space(PATHS, 2, WEIGHT, filters=("mlp",)), "'mlp', a filter"),
        (
            lambda: merge_objective(
                "linear", parameter_space(PATHS, 2, {"density": Range(0.1, 1.0, 0.5)}), sum
            ),
            "'density' is no parameter of linear",
        ),
        (lambda: TuneConfig(generations=0), "at least one generation"),
        (lambda: TuneConfig(population=1), "two in a population"),
    ],
)
def test_mistakes(call, says):
    with pytest.raises(UserError, match=says):
        call()
