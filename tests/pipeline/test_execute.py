"""A plan run in one process against `jax.grad` and an optimiser step of the whole loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.cluster.transport import in_memory
from jaxsys.core import tree
from jaxsys.core.errors import UserError
from jaxsys.core.stages import cut_at
from jaxsys.pipeline import codec
from jaxsys.pipeline.execute import Worker
from jaxsys.pipeline.local import local_run, run_local
from jaxsys.pipeline.messages import routes, shared_leaves, step_bytes
from jaxsys.pipeline.plan import Plan

ROWS, WIDTH = 12, 16
OPTIMIZER = optax.adam(1e-2)


def loss_fn(params, x, y):
    """Four nodes; ``h`` skips to stage 2, and ``a`` is tied between the first and the last."""
    h = first = jnp.tanh(x @ params["a"])
    kept = h > 0  # crosses as booleans, without a cotangent
    h = jax.nn.gelu(h @ params["b"]) + first
    h = jnp.where(kept, jnp.tanh(h @ params["c"]), 0.5 * first)
    return jnp.mean((h @ params["d"] @ params["a"].T - y) ** 2)


@pytest.fixture(scope="module")
def params():
    shapes = {"a": (8, WIDTH), "b": (WIDTH,) * 2, "c": (WIDTH,) * 2, "d": (WIDTH,) * 2}
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def _batches(count, seed=1):
    rng = np.random.default_rng(seed)
    return [tuple(rng.normal(size=(2, ROWS, 8)).astype(np.float32)) for _ in range(count)]


_cut = {}


def _staged(params, parts, boundaries=(1, 2, 3)):
    if (parts, boundaries) not in _cut:  # one trace and one compilation for all tests
        data = (jnp.zeros((ROWS // parts, 8)),) * 2
        _cut[parts, boundaries] = cut_at(loss_fn, params, data, boundaries)
    return _cut[parts, boundaries]


def _whole(params, batches):
    """The oracle: one program, one optimiser."""
    step = jax.jit(jax.value_and_grad(loss_fn))
    state, losses = OPTIMIZER.init(params), []
    for batch in batches:
        loss, grads = step(params, *batch)
        updates, state = OPTIMIZER.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return params, losses


PLANS = {
    "gpipe": Plan(4, (1, 2, 3), (0, 1, 2, 3), "gpipe", 4),
    "1f1b": Plan(4, (1, 2, 3), (0, 1, 2, 3), "1f1b", 4),
    "zero-bubble": Plan(4, (1, 2, 3), (0, 1, 2, 3), "zero-bubble", 4),
    "interleaved": Plan(4, (1, 2, 3), (0, 1, 0, 1), "interleaved", 4),
    "replicas": Plan(4, (1, 2, 3), (0, 1, 2, 3), "1f1b", 2, replicas=((4, 5, 6, 7),)),
    "interleaved replicas": Plan(
        4, (1, 2, 3), (0, 1, 0, 1), "interleaved", 2, replicas=((2, 3, 2, 3),)
    ),
}


MORE = {"replicas", "interleaved"}  # their union is among the fast ones


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in MORE else []) for n in PLANS]
)
def test_every_order_equals_the_whole_loss_and_sends_the_bytes_that_were_counted(name, params):
    plan, batches = PLANS[name], _batches(3)
    staged = _staged(params, 4)
    assert set(shared_leaves(staged, plan)) == {0}
    run = local_run(staged, plan, OPTIMIZER, params)
    states, losses = run.init(params), []
    counted = step_bytes(staged, plan, jax.tree.leaves(params))
    for batch in batches:
        states, infos = run.step(states, batch)
        assert len({info.loss for info in infos}) == 1
        losses.append(infos[0].loss)
        sent = {
            (worker.rank, to): n
            for worker, info in zip(run.workers, infos, strict=True)
            for to, n in info.sent_bytes.items()
        }
        assert sent == counted
    expected, expected_losses = _whole(params, batches)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    for path, leaf in tree.flatten(run.params(states)).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_workers_that_share_a_leaf_keep_it_equal_bit_for_bit(params):
    for ratio in (1.0, 8.0):
        plan = Plan(
            4, (1, 2, 3), (0, 1, 2, 3), micro_batches=4, codec="topk",
            ratios_forward=(ratio,) * 3, ratios_backward=(ratio,) * 3,
        )  # fmt: skip
        run = local_run(_staged(params, 4), plan, OPTIMIZER, params)
        states = run.init(params)
        for batch in _batches(2):
            states, _ = run.step(states, batch)
        first, last = (np.asarray(states[w].params["a"]) for w in (0, 3))
        assert first.tobytes() == last.tobytes()
        assert run.workers[3].owned == (3,)  # "d"; the first worker saves "a"
        assert bool(states[0].residuals) == (ratio > 1)


@pytest.mark.parametrize("name", ["topk", "int8"])
def test_a_ratio_of_one_is_dense_bit_for_bit(name, params):
    batches = _batches(2)
    dense = Plan(4, (1, 2, 3), (0, 1, 2, 3), micro_batches=4)
    same = Plan(4, (1, 2, 3), (0, 1, 2, 3), micro_batches=4, codec=name)
    staged = _staged(params, 4)
    a, losses_a = run_local(staged, dense, OPTIMIZER, params, batches)
    b, losses_b = run_local(staged, same, OPTIMIZER, params, batches, error_feedback=True)
    assert losses_a == losses_b
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _chain_loss(params, x, y, link=lambda h: h):
    h = link(jnp.tanh(x @ params["a"]))
    return jnp.mean((jnp.tanh(h @ params["b"]) @ params["c"] - y[:, :1]) ** 2)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("topk", 4.0, 8.0), ("int8", 1.0, 2.0)],
)
def test_compressed_messages_give_the_numbers_of_the_simulated_link(name, forward, backward):
    rng = np.random.default_rng(3)
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32)
        for k, s in {"a": (8, WIDTH), "b": (WIDTH, WIDTH), "c": (WIDTH, 1)}.items()
    }
    batch = _batches(1)[0]
    plan = Plan(3, (1,), (0, 1), codec=name, ratios_forward=(forward,), ratios_backward=(backward,))
    staged = cut_at(_chain_loss, params, batch, (1,))
    assert [len(r.names) for r in routes(staged, plan)] == [1]
    got, losses = run_local(staged, plan, optax.sgd(1.0), params, [batch])

    def through(p):
        return _chain_loss(p, *batch, link=lambda h: codec.lossy(h, forward, backward, name))

    loss, grads = jax.value_and_grad(through)(params)
    np.testing.assert_allclose(losses[0], loss, rtol=1e-6)
    for k in params:
        np.testing.assert_allclose(params[k] - got[k], grads[k], rtol=1e-4, atol=1e-6)


def test_error_feedback_adds_what_earlier_cotangents_lost(params):
    plan = Plan(
        4, (1, 2, 3), (0, 1, 2, 3), micro_batches=4, codec="topk", ratios_backward=(6.0, 6.0, 6.0)
    )
    staged, (batch,) = _staged(params, 4), _batches(1)
    finals = []
    for feedback in (False, True):
        run = local_run(staged, plan, optax.sgd(0.1), params, error_feedback=feedback)
        states, _ = run.step(run.init(params), batch)
        slots = set().union(*(state.residuals for state in states))
        crossing = {f"{r.target}.{r.source}.{v}" for r in routes(staged, plan) for v in r.returned}
        assert slots == {"leaf.a.0", "leaf.a.3"} | (crossing if feedback else set())
        finals.append(np.asarray(run.params(states)["b"]))
    assert not np.array_equal(*finals)


def test_constant_activations_and_zero_cotangents_train_without_a_nan():
    params = {
        "a": jnp.zeros((8, WIDTH)),
        "b": jnp.zeros((WIDTH, WIDTH)),
        "c": jnp.zeros((WIDTH, 1)),
    }
    batch = _batches(1)[0]
    staged = cut_at(_chain_loss, params, batch, (1, 2))
    for name in ("topk", "int8", "int4"):
        plan = Plan(
            3, (1, 2), (0, 1, 2), codec=name, ratios_forward=(8.0,) * 2, ratios_backward=(8.0,) * 2
        )
        got, losses = run_local(staged, plan, optax.sgd(0.1), params, [batch] * 2)
        assert np.isfinite(losses).all()
        assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(got))


def test_random_keys_cross_stages():
    def dropped(params, x, seeds):
        keys = jax.vmap(jax.random.key)(seeds)
        again = jax.vmap(lambda k: jax.random.split(k)[0])(keys)
        h = x @ params["a"]
        h = jnp.where(jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (4,)))(again), h, 0.0)
        return jnp.mean((h @ params["b"]) ** 2)

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    batch = (np.ones((4, 3), np.float32), np.arange(4, dtype=np.uint32))
    staged = cut_at(dropped, params, batch, (1,))
    _, losses = run_local(staged, Plan(2, (1,), (0, 1)), optax.sgd(0.1), params, [batch])
    np.testing.assert_allclose(losses[0], dropped(params, *batch), rtol=1e-6)


def test_a_worker_compiles_the_programs_of_its_own_stages_only(params):
    data = (jnp.zeros((ROWS, 8)),) * 2
    cuts = [cut_at(loss_fn, params, data, (1, 2, 3)) for _ in range(2)]
    plan = Plan(4, (1, 2, 3), (0, 1, 2, 3))
    ends = in_memory(4)
    # Worker 2 has a cut of its own, as a process of its own would.
    workers = [
        Worker(cuts[1 if rank == 2 else 0], plan, ends[rank], OPTIMIZER, params)
        for rank in range(4)
    ]
    runs = [w.run(w.init(params), _batches(1)[0]) for w in workers]
    wanted, done = [None] * 4, set()
    while len(done) < 4:
        for rank in set(range(4)) - done:
            try:
                while wanted[rank] is None or ends[rank].has(*wanted[rank]):
                    wanted[rank] = next(runs[rank])
            except StopIteration:
                done.add(rank)
    compiled = [stage.forward.compiled._cache_size() for stage in cuts[1].stages]
    assert compiled == [0, 0, 1, 0]
    assert [stage.backward._cache_size() for stage in cuts[1].stages] == [0, 0, 1, 0]


def test_mistakes_are_one_sentence(params):
    staged = _staged(params, 4)
    with pytest.raises(UserError, match="the plan needs 4 and 4"):
        Worker(staged, PLANS["1f1b"], in_memory(3)[0], OPTIMIZER, params)
    with pytest.raises(UserError, match="the plan needs 2 and 2"):
        local_run(staged, Plan(4, (2,), (0, 1)), OPTIMIZER, params)
    run = local_run(staged, PLANS["1f1b"], OPTIMIZER, params)
    with pytest.raises(UserError, match="a multiple of the parts"):
        run.step(run.init(params), (np.zeros((10, 8), np.float32),) * 2)
    with pytest.raises(UserError, match="examples along its first axis"):
        run.step(run.init(params), (np.float32(0), np.float32(0)))
