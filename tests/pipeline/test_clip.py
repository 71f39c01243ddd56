"""A bound on the norm of the whole gradient across stages, against optax on the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.stages import cut_at
from jaxsys.pipeline.job import Job, Task
from jaxsys.pipeline.local import local_run
from jaxsys.pipeline.messages import step_bytes
from jaxsys.pipeline.plan import Plan


def loss_fn(params, x):
    """Two nodes, with a tied leaf that two workers hold."""
    h = jnp.tanh(x @ params["a"]) @ params["b"]
    return jnp.mean((h @ params["a"].T - x) ** 2)


@pytest.mark.parametrize("bound", [0.1, 1e3])
def test_clipping_over_stages_and_chains_equals_optax_on_the_whole(bound):
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=(6, 6)), jnp.float32) for k in "ab"}
    batch = (rng.normal(size=(8, 6)).astype(np.float32),)
    plan = Plan(2, (1,), (0, 1), micro_batches=2, replicas=((2, 3),))
    staged = cut_at(loss_fn, params, (jnp.zeros((2, 6)),), (1,), granularity="layer")
    run = local_run(staged, plan, optax.sgd(1.0), params, clip_norm=bound)
    states, infos = run.step(run.init(params), batch)
    grads = jax.grad(loss_fn)(params, *batch)
    clip = optax.clip_by_global_norm(bound)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    assert 0.1 < norm < 1e3
    wanted, _ = clip.update(grads, clip.init(params))
    got = run.params(states)
    for k in params:
        np.testing.assert_allclose(params[k] - got[k], wanted[k], rtol=1e-5, atol=1e-6)
    assert states[0].params["a"].tobytes() == states[1].params["a"].tobytes()
    counted = step_bytes(staged, plan, jax.tree.leaves(params), clip=True)
    sent = {(w.rank, to): n for w, info in zip(run.workers, infos, strict=True)
            for to, n in info.sent_bytes.items()}  # fmt: skip
    assert sent == counted


def test_a_bound_that_is_not_above_0_is_refused():
    with pytest.raises(UserError, match="a bound is above 0"):
        Job(Task(), Plan(1, (), (0,)), 1, clip_norm=0.0)
