"""The pure step against a NumPy oracle, and its three drivers against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.mesh import over_replicas, replica_mesh
from jaxsys.core.tree import Layer
from jaxsys.localsgd.exchange import divergence
from jaxsys.localsgd.plan import plan_sync
from jaxsys.localsgd.step import Due, due, partial_local_sgd
from jaxsys.localsgd.strategy import Strategy, make_plan, presets

R, STEPS, LR = 4, 8, 0.1
LAYERS = (Layer("c", (2,)), Layer("b", (1,)), Layer("a", (0,)))


def loss_fn(params, x):
    y = jnp.tanh(x @ params["a"])
    y = jnp.tanh(y @ params["b"] + params["c"][None])
    return jnp.mean((y - 1.0) ** 2)


def _start():
    k = jax.random.split(jax.random.key(1), 2)
    params = {
        "a": jax.random.normal(k[0], (3, 4)),
        "b": jax.random.normal(k[1], (4, 2)),
        "c": jnp.zeros(2),
    }
    batches = np.asarray(jax.random.normal(jax.random.key(2), (STEPS, R, 5, 3)))
    return params, batches


def _run(strategy, phases, driver, steps=STEPS, optimizer=None):
    params, batches = _start()
    algorithm = partial_local_sgd(loss_fn, optimizer or optax.sgd(LR), LAYERS, strategy)
    one = algorithm.init(params, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.stack([x] * R), one)
    mesh = replica_mesh(jax.devices()[:R])
    programs = {}
    for i in range(steps):
        d = due(phases, strategy, i)
        if d not in programs:
            programs[d] = over_replicas(
                lambda s, b, d=d: algorithm.step(s, b, d), driver, mesh=mesh
            )
        state, info = programs[d](state, jnp.asarray(batches[i]))
    return state, info, programs


def _oracle(rule, phases):
    """Partial local SGD with plain SGD, written with NumPy means over a list of replicas."""
    params, batches = _start()
    names = ["c", "b", "a"]
    replicas = [{k: np.asarray(v) for k, v in params.items()} for _ in range(R)]
    grad = jax.jit(jax.grad(loss_fn))
    for i in range(STEPS):
        updates = [
            {k: -LR * np.asarray(g) for k, g in grad(p, batches[i, r]).items()}
            for r, p in enumerate(replicas)
        ]
        new = [{k: p[k] + u[k] for k in p} for p, u in zip(replicas, updates, strict=True)]
        for layer in phases[i % len(phases)]:
            k = names[layer]
            if rule == "pre":
                mean = np.mean([p[k] for p in replicas], 0)
                for r in range(R):
                    new[r][k] = mean + updates[r][k]
            else:
                mean = np.mean([p[k] for p in new], 0)
                for r in range(R):
                    new[r][k] = mean
        replicas = new
    return {k: np.stack([p[k] for p in replicas]) for k in params}


PHASES = ((0,), (1, 2))


@pytest.mark.parametrize("driver", ["vmap", "pmap", "shard_map"])
@pytest.mark.parametrize(
    ("rule", "launch"), [("pre", "gated"), ("pre", "eager"), ("pre", "after"), ("post", "after")]
)
def test_equals_oracle(rule, launch, driver):
    strategy = Strategy(period=2, rule=rule, launch=launch)
    state, _, _ = _run(strategy, PHASES, driver)
    want = _oracle(rule, PHASES)
    for name, value in want.items():
        np.testing.assert_allclose(state.params[name], value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", sorted(presets(4)))
def test_drivers_agree(name):
    strategy = presets(4)[name]
    phases = make_plan(strategy, [1.0] * 3, [2.0] * 3).phases
    drivers = ("vmap", "shard_map", *(["pmap"] if name in ("dreamddp", "streaming") else []))
    results = [_run(strategy, phases, driver)[0] for driver in drivers]
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("codec", ["f16", "int8", "int4"])
@pytest.mark.parametrize("feedback", [False, True])
def test_codecs_keep_anchors_equal_and_stay_near(codec, feedback):
    exact = dataclasses.replace(presets(2)["local"], codec="f32")
    coded = dataclasses.replace(exact, codec=codec, error_feedback=feedback)
    phases = make_plan(exact, [1.0] * 3, [2.0] * 3).phases
    want, _, _ = _run(exact, phases, "vmap")
    got, _, _ = _run(coded, phases, "vmap")
    for anchor in got.anchors:
        assert bool((anchor == anchor[:1]).all())
    moved = _start()[0]
    for name, tolerance in (("a", {"f16": 0.01, "int8": 0.05, "int4": 0.6}[codec]),):
        step = np.abs(np.asarray(want.params[name]) - np.asarray(moved[name])).max()
        assert np.abs(np.asarray(got.params[name] - want.params[name])).max() < tolerance * step
    assert (len(got.residuals) > 0) == feedback


def test_ssgd_equals_one_big_batch():
    params, batches = _start()
    phases = make_plan(presets()["ssgd"], [1.0] * 3, [2.0] * 3).phases
    state, _, _ = _run(presets()["ssgd"], phases, "vmap", optimizer=optax.adam(1e-2))
    tx = optax.adam(1e-2)
    opt = tx.init(params)
    for i in range(STEPS):
        grads = jax.grad(loss_fn)(params, batches[i].reshape(-1, 3))
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
    for name, value in params.items():
        for r in range(R):
            np.testing.assert_allclose(state.params[name][r], value, rtol=2e-4, atol=2e-5)


def test_divergence_after_a_synchronisation():
    """post leaves a synchronised layer equal everywhere; pre leaves it one local update apart."""
    gamma = over_replicas(lambda p: divergence(p, LAYERS), "vmap")
    post, _, _ = _run(Strategy(period=2, rule="post", launch="after"), PHASES, "vmap", steps=2)
    pre, _, _ = _run(Strategy(period=2), PHASES, "vmap", steps=2)
    np.testing.assert_allclose(gamma(post.params)[0][1:], 0.0, atol=1e-7)
    assert float(gamma(post.params)[0][0]) > 1e-4
    assert float(gamma(pre.params)[0].min()) > 1e-4


def test_diloco_outer_step_by_hand():
    strategy = presets(2)["diloco"]
    phases = ((), (0, 1, 2))
    state, _, _ = _run(strategy, phases, "vmap", steps=4)
    params, batches = _start()
    anchor = {k: np.asarray(v) for k, v in params.items()}
    trace = {k: np.zeros_like(v) for k, v in anchor.items()}
    grad = jax.jit(jax.grad(loss_fn))
    for outer in range(2):
        ends = []
        for r in range(R):
            p = dict(anchor)
            for i in range(2):
                g = grad(p, batches[2 * outer + i, r])
                p = {k: p[k] - LR * np.asarray(g[k]) for k in p}
            ends.append(p)
        for k in anchor:
            delta = anchor[k] - np.mean([p[k] for p in ends], 0)
            trace[k] = 0.9 * trace[k] + delta
            anchor[k] = anchor[k] - 0.7 * (delta + 0.9 * trace[k])
    for k, value in anchor.items():
        np.testing.assert_allclose(state.params[k][0], value, rtol=2e-4, atol=2e-5)


def test_delay_uses_the_value_that_was_sent():
    """With delay 1 and no mixing, the layer becomes the mean of one step ago plus one update."""
    strategy = Strategy(schedule="fragments", launch="eager", fragments=1, period=2, delay=1)
    phases = ((0, 1, 2), ())
    params, batches = _start()
    state, _, _ = _run(strategy, phases, "vmap", steps=4)
    grad = jax.jit(jax.grad(loss_fn))
    reps = [dict(params) for _ in range(R)]
    sent = None
    for i in range(4):
        ups = [{k: -LR * g for k, g in grad(p, batches[i, r]).items()} for r, p in enumerate(reps)]
        if i % 2 == 0:
            sent = {k: sum(p[k] for p in reps) / R for k in params}
        base = [sent] * R if i % 2 == 1 else reps
        reps = [{k: b[k] + u[k] for k in b} for b, u in zip(base, ups, strict=True)]
    for k in params:
        np.testing.assert_allclose(state.params[k][2], reps[2][k], rtol=2e-5, atol=2e-6)


def test_moment_periods_average_only_what_they_name():
    strategy = dataclasses.replace(presets(4)["local"], moment_periods=(("*mu*", 1), ("*nu*", 100)))
    phases = make_plan(strategy, [1.0] * 3, [2.0] * 3).phases
    state, _, _ = _run(strategy, phases, "vmap", steps=2, optimizer=optax.adam(1e-2))
    adam = state.opt_state[0]
    np.testing.assert_allclose(adam.mu["a"][0], adam.mu["a"][1])
    assert float(np.abs(adam.nu["a"][0] - adam.nu["a"][1]).max()) > 0


@pytest.mark.parametrize(
    ("strategy", "phase", "expected"),
    [
        (presets()["wfbp"], (0, 1, 2), 3),
        (presets()["ssgd"], (0, 1, 2), 1),
        (presets()["dreamddp-nofill"], (1, 2), 2),
        (presets()["dreamddp-eager"], (0, 1, 2), 3),
        (presets()["local"], (0, 1, 2), 1),
    ],
)
def test_messages_survive_to_the_compiled_text(strategy, phase, expected):
    """One all-reduce a message: XLA's combiner must be told not to merge them."""
    params, batches = _start()
    algorithm = partial_local_sgd(loss_fn, optax.sgd(LR), LAYERS, strategy)
    state = jax.tree.map(lambda x: jnp.stack([x] * R), algorithm.init(params, jax.random.key(0)))
    step = over_replicas(
        lambda s, b: algorithm.step(s, b, Due(phase, phase)),
        "shard_map",
        mesh=replica_mesh(jax.devices()[:R]),
        keep_collectives=True,
    )
    text = step.lower(state, jnp.asarray(batches[0])).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == expected


def test_plan_indices_reach_the_right_layers():
    plan = plan_sync([1.0] * 3, [1.0] * 3, 3, method="equal")
    assert [due(plan.phases, Strategy(period=3), i).send for i in range(3)] == [(0,), (1,), (2,)]
