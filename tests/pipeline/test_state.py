"""Checkpoints: saved under one partition, restored under another; half a step does not count."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core import tree
from jaxsys.core.errors import UserError
from jaxsys.core.stages import cut_at
from jaxsys.pipeline.local import local_run
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.state import PipelineStore

OPTIMIZER = optax.adam(1e-2)


def loss_fn(params, x, y):
    h = jnp.tanh(x @ params["emb"])
    h = jnp.tanh(h @ params["h"]["0"]["w"] + params["h"]["0"]["b"])
    h = jnp.tanh(h @ params["h"]["1"]["w"] + params["h"]["1"]["b"])
    return jnp.mean((h @ params["emb"].T - y) ** 2)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = {str(i): {"w": normal(6, 6), "b": normal(1, 6)} for i in range(2)}
    return {"emb": normal(4, 6), "h": blocks}


def _batch(step):
    rng = np.random.default_rng(step)
    return tuple(rng.normal(size=(2, 8, 4)).astype(np.float32))


def _run(params, plan):
    parts = len(plan.chains) * plan.micro_batches
    data = (jnp.zeros((8 // parts, 4)),) * 2
    staged = cut_at(loss_fn, params, data, plan.boundaries)
    return local_run(staged, plan, OPTIMIZER, params)


def _go_on(run, states, steps):
    losses = []
    for step in steps:
        states, infos = run.step(states, _batch(step))
        losses.append(infos[0].loss)
    return states, losses


def _save(store, run, states):
    for worker, state in zip(run.workers, states, strict=True):
        store.save(worker, state)


def _restore(store, run, params):
    found = [store.restore(w, s) for w, s in zip(run.workers, run.init(params), strict=True)]
    return [state for state, _ in found]


THREE = Plan(3, (1, 2), (0, 1, 2), micro_batches=2)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(3, (2,), (0, 1), micro_batches=2),
        pytest.param(Plan(3, (), (0,), micro_batches=2), marks=pytest.mark.slow),
        pytest.param(
            Plan(3, (1, 2), (0, 1, 2), micro_batches=1, replicas=((3, 4, 5),)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two", "one", "replicas"],
)
def test_three_stages_saved_go_on_under_another_partition(plan, params, tmp_path):
    store, run = PipelineStore(tmp_path), _run(params, THREE)
    states, _ = _go_on(run, run.init(params), range(2))
    _save(store, run, states)
    _, expected = _go_on(run, states, range(2, 4))
    other = _run(params, plan)
    restored = _restore(store, other, params)
    assert store.latest() == 2
    assert {state.step for state in restored} == {2}
    for path, leaf in tree.flatten(run.params(states)).items():
        np.testing.assert_array_equal(tree.flatten(other.params(restored))[path], leaf)
    restored, losses = _go_on(other, restored, range(2, 4))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    # the first checkpoint of the new partition takes the place of the old one's
    _save(store, other, restored)
    _save(store, other, restored)
    assert len(list(tmp_path.iterdir())) == 1
    assert store.latest() == 4


def test_a_run_that_goes_on_is_the_uninterrupted_one_bit_for_bit(params, tmp_path):
    plan = Plan(3, (1, 2), (0, 1, 2), micro_batches=2, codec="topk", ratios_backward=(3.0, 3.0))
    store, run = PipelineStore(tmp_path), _run(params, plan)
    states, _ = _go_on(run, run.init(params), range(2))
    assert states[0].residuals
    _save(store, run, states)
    states, expected = _go_on(run, states, range(2, 5))
    again = _run(params, plan)
    restored, losses = _go_on(again, _restore(store, again, params), range(2, 5))
    assert losses == expected
    for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(restored), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_leaf_is_saved_once_and_under_its_own_name(params, tmp_path):
    run = _run(params, THREE)
    states = run.init(params)
    _save(PipelineStore(tmp_path), run, states)
    from jaxsys.core.checkpoint import RunStore

    names = []
    for part in sorted(tmp_path.glob("*/part-*")):
        contents, meta = RunStore(part).contents(0)
        assert Plan.from_json(meta["plan"]) == THREE
        names += [name for name in contents if name.startswith("params.")]
    assert sorted(names) == sorted(f"params.{path}" for path in tree.paths(params))


def test_a_step_that_one_process_has_not_saved_does_not_count(params, tmp_path):
    store, run = PipelineStore(tmp_path), _run(params, THREE)
    states = [s._replace(step=1) for s in run.init(params)]
    _save(store, run, states)
    states = [s._replace(step=2) for s in states]
    for worker, state in list(zip(run.workers, states, strict=True))[:2]:
        store.save(worker, state)  # the third one is killed here
    assert store.latest() == 1
    assert {state.step for state in _restore(store, run, params)} == {1}
    shutil.rmtree(next(tmp_path.glob("*/part-2")))
    assert store.latest() is None
    assert store.restore(run.workers[0], states[0]) is None


def test_a_checkpoint_of_another_model_is_refused_by_name(params, tmp_path):
    store, run = PipelineStore(tmp_path), _run(params, THREE)
    _save(store, run, run.init(params))
    worker, state = run.workers[0], run.init(params)[0]
    more = state._replace(
        params=state.params | {"new": jnp.ones(2)}, opt_state=state.opt_state | {"new": ()}
    )
    with pytest.raises(UserError, match=r"lacks params\.new"):
        store.restore(worker, more)
    other = state._replace(params={"emb": jnp.zeros((4, 7))}, opt_state={"emb": ()})
    with pytest.raises(UserError, match=r"holds params\.emb as float32\[4, 6\]"):
        store.restore(worker, other)
    with pytest.raises(UserError, match="at least 2 must stay"):
        PipelineStore(tmp_path, keep=1)
