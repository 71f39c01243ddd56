"""Every gate against its NumPy transcription: whom it chooses, weights, gradients; bad input."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.moe import Dims, ExpertChoice
from jaxsys.moe.gates import cosine, noisy_top_k, round_robin, sigmoid
from jaxsys.moe.gates_balanced import (
    balance_rows,
    best_in_groups,
    bias_balanced,
    group_limited,
    move_bias,
    sinkhorn,
)
from jaxsys.moe.gates_dense import expert_choice, soft_moe

_spec = importlib.util.spec_from_file_location(
    "moe_transcription", Path(__file__).with_name("transcription.py")
)
np_gates = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(np_gates)

DIMS = Dims(width=5, hidden=4, experts=6)
X = jax.random.normal(jax.random.key(7), (2, 7, 5))
CASES = {
    "gshard": (noisy_top_k(2), np_gates.gshard),
    "switch": (noisy_top_k(1, over="all"), np_gates.switch),
    "sigmoid": (sigmoid(2), np_gates.sigmoid),
    "cosine": (cosine(2, projected=4), np_gates.cosine),
    "sinkhorn": (sinkhorn(1), np_gates.sinkhorn),
    "sinkhorn of two": (sinkhorn(2), lambda p, x: np_gates.sinkhorn(p, x, 2)),
    "groups": (group_limited(2, 3, 2), np_gates.group_limited),
    "bias": (bias_balanced(2, groups=3, kept=2, scale=2.5), np_gates.biased),
    "expert choice": (expert_choice(2), np_gates.expert_choice),
    "expert choice over tokens": (
        expert_choice(2, over="tokens"),
        lambda p, x: np_gates.expert_choice(p, x, over="tokens"),
    ),
}


def _matrix(routed):
    """The gate's weights as [N, E]."""
    n_rows, n_experts = routed.logits.shape
    if isinstance(routed, ExpertChoice):
        mask = jax.nn.one_hot(routed.tokens, n_rows)
        return jnp.einsum("ec,ecn->ne", routed.weights, mask)
    return jnp.einsum("nk,nke->ne", routed.weights, jax.nn.one_hot(routed.experts, n_experts))


def _params(gate):
    params = gate.init(jax.random.key(3), DIMS)
    if "bias" in params:
        params["bias"] = 0.3 * jax.random.normal(jax.random.key(4), (6,))
    if "noise" in params:
        params["noise"] = 0.5 * jax.random.normal(jax.random.key(5), params["noise"].shape)
    return params


def _wide(tree):
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_gate_is_its_transcription_with_its_gradient(name):
    gate, oracle = CASES[name]
    params = _params(gate)
    cotangent = np.random.default_rng(0).normal(size=(14, 6))

    @jax.jit
    def run(params, x):
        def scored(params, x):
            routed = gate.route(params, x, None, ())
            return jnp.sum(_matrix(routed) * cotangent), (_matrix(routed), routed.scores)

        return jax.value_and_grad(scored, argnums=(0, 1), has_aux=True)(params, x)

    (_, (weights, scores)), (dparams, dx) = run(params, X)
    rows, wide = np.asarray(X, np.float64).reshape(14, 5), _wide(params)
    np.testing.assert_allclose(weights, oracle(wide, rows), atol=2e-6)
    np.testing.assert_allclose(scores.sum(-1), 1.0, atol=1e-5)

    def value(rows, **changed):
        return np.sum(oracle(wide | changed, rows) * cotangent)

    np.testing.assert_allclose(dx.reshape(14, 5), np_gates.slope(value, rows), rtol=2e-4, atol=2e-5)
    for leaf in set(dparams) - {"bias", "noise"}:
        wanted = np_gates.slope(lambda w, leaf=leaf: value(rows, **{leaf: w}), wide[leaf])
        np.testing.assert_allclose(dparams[leaf], wanted, rtol=2e-4, atol=2e-5)
    for leaf in {"bias", "noise"} & set(dparams):
        assert not np.any(dparams[leaf])


def test_noise_is_added_as_the_formula_says_and_is_trained():
    gate = noisy_top_k(2)
    params, key = _params(gate), jax.random.key(11)
    c = np.random.default_rng(0).normal(size=(14, 6))

    @jax.jit
    def run(params):
        def scored(params):
            routed = gate.route(params, X, key, ())
            return jnp.sum(_matrix(routed) * c), routed

        return jax.grad(scored, has_aux=True)(params)

    grads, routed = run(params)
    noise = np.asarray(jax.random.normal(key, (14, 6)), np.float64)
    rows, wide = np.asarray(X, np.float64).reshape(14, 5), _wide(params)
    np.testing.assert_allclose(_matrix(routed), np_gates.gshard(wide, rows, 2, noise), atol=2e-6)
    np.testing.assert_allclose(routed.logits, rows @ wide["weight"].T, atol=2e-6)
    assert not np.allclose(routed.ranked, routed.logits)
    wanted = np_gates.slope(
        lambda w: np.sum(np_gates.gshard(wide | {"noise": w}, rows, 2, noise) * c), wide["noise"]
    )
    np.testing.assert_allclose(grads["noise"], wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("normalise", [False, True])
def test_softmoe_mixes_as_its_equations_say(normalise):
    gate = soft_moe(3, normalise=normalise)
    params = gate.init(jax.random.key(3), DIMS)
    if normalise:
        params["scale"] = jnp.array(1.7)
    routed, wide = gate.route(params, X, None, ()), _wide(params)
    for b in range(2):
        dispatch, combine = np_gates.soft(wide, np.asarray(X[b], np.float64), normalise)
        np.testing.assert_allclose(routed.dispatch[b], dispatch, atol=1e-6)
        np.testing.assert_allclose(routed.combine[b], combine, atol=1e-6)


def test_sinkhorn_balances_rows_and_columns_and_does_not_see_the_sharding():
    logits = 3 * jax.random.normal(jax.random.key(0), (16, 4))
    balanced = balance_rows(logits, 1e-6)
    np.testing.assert_allclose(balanced.sum(1), 1 / 16, rtol=1e-4)
    np.testing.assert_allclose(balanced.sum(0), 1 / 4, rtol=1e-4)
    parts = jax.vmap(lambda own: balance_rows(own, 1e-6, ("r",)), axis_name="r")(
        logits.reshape(4, 4, 4)
    )
    np.testing.assert_allclose(parts.reshape(16, 4), balanced, rtol=1e-5)


def test_all_groups_open_is_no_limit():
    scores = jax.random.normal(jax.random.key(0), (9, 6))
    free = jax.lax.top_k(scores, 2)[1]
    assert np.array_equal(best_in_groups(scores, 2, 3, 3), free)
    assert np.array_equal(best_in_groups(scores, 2, 1, 1), free)


def test_moving_the_bias_evens_the_load_out():
    gate = bias_balanced(2)
    params = gate.init(jax.random.key(3), DIMS)
    params["weight"] = params["weight"] + jnp.array([3.0, 0, 0, 0, 0, 0])[:, None]
    x = jnp.abs(jax.random.normal(jax.random.key(1), (4, 64, 5)))

    @jax.jit
    def turn(bias):
        chosen = gate.route({**params, "bias": bias}, x, None, ()).experts
        load = jnp.sum(jax.nn.one_hot(chosen, 6), axis=(0, 1))
        return move_bias(bias, load, 0.02), jnp.std(load) / jnp.mean(load)

    bias, variation = params["bias"], []
    for _ in range(150):
        bias, now = turn(bias)
        variation.append(float(now))
    assert np.mean(variation[-10:]) < 0.4 * variation[0]


def test_round_robin_is_balanced():
    gate = round_robin(2)
    routed = gate.route(gate.init(jax.random.key(0), DIMS), X[:, :6], None, ())
    assert np.bincount(np.ravel(routed.experts)).tolist() == [4] * 6


def test_the_coldest_cosine_gate_has_a_bounded_temperature():
    gate = cosine(1, projected=4)
    params = _params(gate) | {"temperature": jnp.array(99.0)}
    assert float(jnp.max(jnp.abs(gate.route(params, X, None, ()).logits))) <= 100.001


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: noisy_top_k(7), "chooses 7 of 6"),
        (lambda: sigmoid(0), "chooses 0 of 6"),
        (lambda: cosine(7), "chooses 7 of 6"),
        (lambda: sinkhorn(7), "chooses 7 of 6"),
        (lambda: round_robin(7), "chooses 7 of 6"),
        (lambda: group_limited(2, 4, 1), "4 equal groups"),
        (lambda: group_limited(2, 0, 1), "0 equal groups"),
        (lambda: group_limited(2, 3, 4), "4 of 3 groups"),
        (lambda: group_limited(3, 3, 1), "chooses 3 of 2"),
        (lambda: bias_balanced(5, groups=3, kept=2), "chooses 5 of 4"),
        (lambda: expert_choice(0), "factor 0"),
        (lambda: expert_choice(7), "factor 7"),
        (lambda: soft_moe(0), "0 slots"),
    ],
)
def test_what_cannot_be_chosen_is_refused(make, word):
    with pytest.raises(UserError, match=word):
        make().init(jax.random.key(0), DIMS)
