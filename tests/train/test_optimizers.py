"""Presets: one contract for all, and each against its own formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.errors import UserError
from jaxsys.train.optimizers import PRESETS, adamw, nesterov_outer, sgd


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_a_rate_and_descends_under_jit(name):
    optimizer = PRESETS[name](lr=0.02)
    params = {"w": jnp.array([[3.0, -2.0]]), "b": jnp.array([1.0])}

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2) + jnp.sum(p["b"] ** 2))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(300):
        params, state = step(params, state)
    assert max(float(jnp.abs(p).max()) for p in params.values()) < 0.05


def _updates(optimizer, grads, params):
    state, out = optimizer.init(params), []
    for grad in grads:
        update, state = optimizer.update(grad, state, params)
        out.append(np.asarray(update))
    return out


def test_nesterov_follows_its_formula():
    # v <- mu v + g; u = -lr (g + mu v)
    grads = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    velocity, expected = np.zeros(3), []
    for grad in grads:
        velocity = 0.9 * velocity + grad
        expected.append(-0.7 * (grad + 0.9 * velocity))
    got = _updates(nesterov_outer(), jnp.asarray(grads), jnp.zeros(3))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_sgd_momentum_and_warmup():
    grads = [jnp.ones(1)] * 4
    np.testing.assert_allclose(
        np.ravel(_updates(sgd(0.1, 0.5), grads, jnp.zeros(1))), [-0.1, -0.15, -0.175, -0.1875]
    )
    np.testing.assert_allclose(
        np.ravel(_updates(sgd(0.4, warmup_steps=2), grads, jnp.zeros(1))), [0, -0.2, -0.4, -0.4]
    )


def test_adamw_decays_matrices_only_and_follows_its_schedule():
    params = {"w": jnp.ones((1, 1)), "b": jnp.ones(1)}
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer = adamw(1.0, weight_decay=0.5)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert updates["w"].tolist() == [[-0.5]]
    assert updates["b"].tolist() == [0.0]

    # A constant gradient makes Adam's step the learning rate itself.
    scheduled = adamw(1.0, warmup_steps=2, total_steps=6, weight_decay=0.0)
    got = -np.ravel(_updates(scheduled, [jnp.ones(1)] * 8, jnp.zeros(1)))
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(5)]
    np.testing.assert_allclose(got, [0, 0.5, *cosine, 0.1], atol=1e-4)


def test_clipping_bounds_the_gradient():
    params = jnp.zeros(2)
    small, big = jnp.array([0.6, 0.8]), jnp.array([600.0, 800.0])
    clipped = adamw(1.0, clip_norm=1.0, weight_decay=0.0)
    a = _updates(clipped, [small, small / 2, big], params)
    b = _updates(clipped, [small, small / 2, small], params)
    np.testing.assert_allclose(a[2], b[2], rtol=1e-5)


def test_mistakes_are_user_errors():
    with pytest.raises(UserError, match="warmup_steps is 5 and total_steps 5"):
        adamw(1.0, warmup_steps=5, total_steps=5)
    with pytest.raises(UserError, match="warmup_steps is -1"):
        sgd(1.0, warmup_steps=-1)
