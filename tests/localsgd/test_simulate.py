"""The simulation against a loop by hand, its drivers against each other, and continued runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import over_replicas
from jaxsys.core.tree import Layer
from jaxsys.localsgd.exchange import divergence
from jaxsys.localsgd.layers import find_layers
from jaxsys.localsgd.plan import plan_sync
from jaxsys.localsgd.simulate import mean_params, simulate
from jaxsys.localsgd.step import due, partial_local_sgd
from jaxsys.localsgd.strategy import Strategy, make_plan, presets

R = 4
TX = optax.adam(1e-2)


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"][None])
    return jnp.mean(jnp.square(hidden @ params["out"]["w"] - y))


def _params():
    k = jax.random.split(jax.random.key(1), 2)
    return {
        "in": {"w": jax.random.normal(k[0], (3, 4)), "b": jnp.zeros(4)},
        "out": {"w": jax.random.normal(k[1], (4, 1))},
    }


def batch_at(step):
    rng = np.random.default_rng(step)
    return (
        rng.standard_normal((R, 5, 3)).astype(np.float32),
        rng.standard_normal((R, 5, 1)).astype(np.float32),
    )


def _run(name="dreamddp", steps=7, **options):
    options = {"workers": R, "strategy": presets(2)[name], **options}
    return simulate(loss_fn, _params(), TX, batch_at, steps=steps, **options)


def _same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("name", ["ssgd", "local", "dreamddp", "streaming"])
def test_equals_a_loop_by_hand(name):
    strategy = presets(2)[name]
    one = jax.tree.map(lambda x: x[0], batch_at(0))
    layers = find_layers(loss_fn, _params(), one)
    phases = make_plan(strategy, [1.0] * len(layers), [1.0] * len(layers)).phases
    algorithm = partial_local_sgd(loss_fn, TX, layers, strategy)
    state = jax.tree.map(lambda x: jnp.stack([x] * R), algorithm.init(_params(), jax.random.key(3)))
    programs, losses, gammas = {}, [], []
    gamma = over_replicas(lambda p: divergence(p, layers), "vmap")
    for i in range(7):
        now = due(phases, strategy, i)
        if now not in programs:
            programs[now] = over_replicas(lambda s, b, now=now: algorithm.step(s, b, now), "vmap")
        state, info = programs[now](state, batch_at(i))
        losses.append(info.loss)
        if i % 2 == 1:
            gammas.append(gamma(state.params)[0])
    run = _run(name, seed=3, divergence_every=2)
    _same(run.state, state)
    np.testing.assert_array_equal(run.loss, np.stack(losses))
    np.testing.assert_allclose(run.divergence, np.stack(gammas))
    assert run.layers == layers
    assert run.plan.phases == phases


@pytest.mark.parametrize("driver", ["pmap", "shard_map"])
@pytest.mark.parametrize("name", ["dreamddp", "diloco"])
def test_drivers_agree(name, driver):
    one = _run(name, divergence_every=1)
    other = _run(name, divergence_every=1, driver=driver)
    _same(one.state, other.state, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(one.loss, other.loss, rtol=2e-5)
    np.testing.assert_allclose(one.divergence, other.divergence, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "driver"),
    [("dreamddp", "vmap"), ("streaming", "vmap"), ("dreamddp", "pmap"), ("dreamddp", "shard_map")],
)
def test_continues_as_if_never_interrupted(name, driver):
    whole = _run(name, driver=driver, divergence_every=2)
    half = _run(name, steps=3, driver=driver, divergence_every=2)  # in the middle of a period
    rest = _run(name, steps=4, driver=driver, divergence_every=2, state=half.state)
    _same(rest.state, whole.state)
    np.testing.assert_array_equal(np.concatenate([half.loss, rest.loss]), whole.loss)
    np.testing.assert_array_equal(
        np.concatenate([half.divergence, rest.divergence]), whole.divergence
    )


def test_compiles_each_duty_once_and_not_again_for_another_start():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    layers = find_layers(loss_fn, _params(), jax.tree.map(lambda x: x[0], batch_at(0)))
    options = {"workers": R, "strategy": presets(2)["dreamddp"], "layers": layers}
    simulate(counted, _params(), TX, batch_at, steps=8, **options)
    once = len(traces)
    assert once == 2
    other = jax.tree.map(lambda x: x + 1.0, _params())
    simulate(counted, other, TX, batch_at, steps=8, **options)
    assert len(traces) == once


def test_takes_a_plan_or_its_phases_and_reports_each_step():
    plan = plan_sync([1.0, 1.0], [3.0, 1.0], 2)
    seen = []
    a = _run(plan=plan, on_step=lambda step, info: seen.append((step, info.loss.shape)))
    b = _run(plan=plan.phases)
    _same(a.state, b.state)
    assert a.plan == plan
    assert b.plan == plan.phases
    assert seen == [(i, (R,)) for i in range(7)]


def test_mean_params_is_the_mean_over_workers():
    run = _run("local", steps=1)
    got = mean_params(run.state)["out"]["w"]
    np.testing.assert_allclose(got, np.asarray(run.state.params["out"]["w"]).mean(0), rtol=1e-6)
    assert float(np.ptp(np.asarray(run.state.params["out"]["w"]), axis=0).max()) > 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"divergence_every": -1}, "divergence_every is -1"),
        ({"workers": 3}, "for 3 workers"),
        ({"workers": 99, "driver": "pmap"}, "99 workers under pmap on 8 devices"),
        ({"plan": ((0,), (2,))}, r"layers \[1, 2\]"),
        ({"layers": (Layer("all", (0, 1, 2)),), "plan": ((0,), (1,))}, r"layers \[1\]"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(UserError, match=words):
        _run(**options)


def test_a_state_of_other_workers_is_refused():
    state = _run(steps=1).state
    halves = jax.tree.map(lambda x: x[:2], state)
    with pytest.raises(UserError, match=r"shape \(2,\) for 4 workers"):
        _run(steps=1, state=halves)


def test_strategy_needs_no_plan_of_its_own():
    run = _run(strategy=Strategy(schedule="equal", period=2), steps=2)
    assert run.plan.phases == ((0,), (1,))
