"""The whole layer against every expert on every token; hooks, shared experts, back ends."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.grouped import grouped_matmul
from jaxsys.moe import Capacity, Dims, Hooks, LayerPlan, Losses, MoESpec, layer
from jaxsys.moe.experts import choose_backend, gpt_ffn, swiglu
from jaxsys.moe.gates import noisy_top_k, sigmoid
from jaxsys.moe.gates_dense import expert_choice, soft_moe
from jaxsys.moe.hooks import int8_hooks, top_k_hooks
from jaxsys.moe.order import einsum_order, sparse_order

_spec = importlib.util.spec_from_file_location(
    "moe_transcription", Path(__file__).with_name("transcription.py")
)
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

DIMS = Dims(width=6, hidden=8, experts=4)
X = jax.random.normal(jax.random.key(7), (2, 7, 6))
DROPLESS = Capacity(1, "dropless")
SPEC = MoESpec(noisy_top_k(2), sparse_order(), swiglu(), capacity=DROPLESS)
GATES = {
    "gshard": (noisy_top_k(2), plain.gshard),
    "sigmoid": (sigmoid(2), plain.sigmoid),
    "expert choice": (expert_choice(2), plain.expert_choice),
}


def _wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _with_gradient(params, spec, plan=layer.ONE):
    @jax.jit
    def run(params, x):
        def scored(params, x):
            y, info = layer.apply(params, x, spec, plan)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), (y, info)

        return jax.value_and_grad(scored, argnums=(0, 1), has_aux=True)(params, x)

    (_, (y, info)), grads = run(params, X)
    return y, info, grads


def _close(a, b, rtol=1e-4):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(1e-3, float(np.max(np.abs(other))))
        np.testing.assert_allclose(one / scale, other / scale, atol=rtol)


@pytest.mark.parametrize(
    ("gate", "ffn"), [*((gate, "swiglu") for gate in GATES), ("gshard", "gpt")]
)
def test_a_layer_is_every_expert_on_every_token(gate, ffn):
    make, expert = {"swiglu": (swiglu, plain.swiglu), "gpt": (gpt_ffn, plain.gpt)}[ffn]
    own, oracle = GATES[gate]
    spec = replace(SPEC, gate=own, experts=make())
    params = layer.init(jax.random.key(0), spec, DIMS)
    if ffn == "gpt":
        for i, name in enumerate(("up_bias", "down_bias")):
            shape = params["experts"][name].shape
            params["experts"][name] = jax.random.normal(jax.random.key(i), shape)
    y, info, (_, dx) = _with_gradient(params, spec)
    rows, wide = np.asarray(X, np.float64).reshape(14, 6), _wide(params)

    def dense(rows):
        return plain.weighted(oracle(wide["gate"], rows), wide["experts"], rows, expert)

    np.testing.assert_allclose(y.reshape(14, 6), dense(rows), atol=1e-5)
    cotangent = np.cos(np.arange(rows.size)).reshape(rows.shape)
    slope = plain.slope(lambda a: np.sum(dense(a) * cotangent), rows)
    np.testing.assert_allclose(dx.reshape(14, 6), slope, rtol=1e-3, atol=1e-4)
    weights = oracle(wide["gate"], rows)
    np.testing.assert_allclose(info.load, (weights > 0).sum(0) / (weights > 0).sum(), rtol=1e-5)
    missed = np.mean((weights == 0).all(1)) if gate == "expert choice" else 0.0
    np.testing.assert_allclose(info.dropped, missed, atol=1e-6)


def test_softmoe_is_its_equations():
    spec = replace(SPEC, gate=soft_moe(2))
    params = layer.init(jax.random.key(0), spec, DIMS)
    y, info, _ = _with_gradient(params, spec, plan=LayerPlan(2, 4))
    wide = _wide(params)
    for b in range(2):
        x = np.asarray(X[b], np.float64)
        dispatch, combine = plain.soft(wide["gate"], x)
        slots = np.einsum("tec,td->ecd", dispatch, x)
        out = np.stack([plain.swiglu(wide["experts"], e, slots[e]) for e in range(4)])
        np.testing.assert_allclose(y[b], np.einsum("tec,ecd->td", combine, out), atol=1e-5)
    assert (info.capacity, float(info.dropped)) == (4, 0.0)
    np.testing.assert_allclose(info.load.sum(), 1.0, rtol=1e-6)


def test_orders_and_degrees_change_nothing():
    spec = replace(SPEC, capacity=Capacity(1.0))
    params = layer.init(jax.random.key(0), spec, DIMS)
    y, info, grads = _with_gradient(params, spec)
    assert 0 < float(info.dropped) < 0.5
    others = [
        (replace(spec, order=einsum_order()), LayerPlan()),
        (replace(spec, capacity=Capacity(8 / 7)), LayerPlan(2, 4)),
    ]
    _close((y, grads), _with_gradient(params, others[0][0])[::2], 1e-5)
    base = _with_gradient(params, others[1][0])
    split = _with_gradient(params, others[1][0], plan=others[1][1])
    assert int(base[1].capacity) == int(split[1].capacity) == 8
    _close(split[::2], base[::2], 1e-5)


@pytest.mark.parametrize(
    ("backend", "make", "capacity"),
    [
        ("ragged_dot", swiglu, DROPLESS),
        ("ragged_dot", gpt_ffn, DROPLESS),
        ("ragged_dot", swiglu, Capacity(1.0)),
        ("pallas", swiglu, DROPLESS),
    ],
)
def test_back_ends_agree_on_slots_and_on_unequal_groups(backend, make, capacity):
    spec = replace(SPEC, experts=make(), capacity=capacity)
    params = layer.init(jax.random.key(0), spec, DIMS)
    other = replace(spec, experts=make(backend=backend))
    _close(_with_gradient(params, other)[::2], _with_gradient(params, spec)[::2], 1e-5)


def test_grouped_products_of_empty_and_uneven_groups():
    keys = jax.random.split(jax.random.key(0), 2)
    rows, weights = jax.random.normal(keys[0], (150, 40)), jax.random.normal(keys[1], (4, 40, 70))
    sizes = jnp.array([70, 0, 13, 67])

    def run(backend):
        return jax.value_and_grad(
            lambda r, w: jnp.sum(grouped_matmul(r, w, sizes, backend) ** 2), argnums=(0, 1)
        )(rows, weights)

    _close(run("pallas"), run("ragged_dot"), 1e-5)
    e = np.repeat(np.arange(4), sizes)
    wanted = np.einsum("md,mdf->mf", np.asarray(rows, np.float64), np.asarray(weights)[e])
    np.testing.assert_allclose(grouped_matmul(rows, weights, sizes), wanted, atol=1e-4)


def test_the_chosen_back_end_is_the_fastest_of_those_asked():
    names = ("einsum", "ragged_dot")
    found = choose_backend(
        lambda b: swiglu(backend=b), DIMS, 4, runs=1, backends=names, gradient=False
    )
    assert found in names


def test_shared_experts_see_every_token():
    spec = replace(SPEC, shared=swiglu(), shared_hidden=5)
    params = layer.init(jax.random.key(0), spec, DIMS)
    assert params["shared"]["up"].shape == (1, 6, 5)
    y, _ = layer.apply(params, X, spec)
    routed, _ = layer.apply(params, X, SPEC)
    wide, rows = _wide(params["shared"]), np.asarray(X, np.float64).reshape(14, 6)
    own = plain.swiglu(wide, 0, rows).reshape(X.shape)
    np.testing.assert_allclose(y - routed, own, atol=1e-5)


def test_hooks_stand_where_their_names_say():
    seen = []

    def hook(name):
        def run(batch):
            seen.append((name, batch.shape))
            return batch

        return run

    names = Hooks._fields[:6]
    spec = replace(SPEC, hooks=Hooks(**{name: hook(name) for name in names}))
    params = layer.init(jax.random.key(0), spec, DIMS)
    y, _ = layer.apply(params, X, spec)
    assert [name for name, _ in seen] == list(names)
    assert {shape for _, shape in seen[1:5]} == {(4, 14, 6)}
    assert np.array_equal(y, layer.apply(params, X, SPEC)[0])
    twice = replace(
        SPEC, hooks=Hooks(before_moe_start=lambda x: 2 * x, before_moe_end=jnp.negative)
    )
    wanted = -layer.apply(params, 2 * X, SPEC)[0]
    np.testing.assert_allclose(layer.apply(params, X, twice)[0], wanted, atol=1e-6)


def test_compression_rounds_what_is_sent_and_lets_the_gradient_through():
    params = layer.init(jax.random.key(0), SPEC, DIMS)
    y, _, grads = _with_gradient(params, SPEC)
    whole = _with_gradient(params, replace(SPEC, hooks=top_k_hooks(6, 6)))
    _close((whole[0], whole[2]), (y, grads), 1e-5)
    groups = replace(SPEC, experts=swiglu(backend="ragged_dot"))
    for spec in (SPEC, groups):
        rounded = _with_gradient(params, replace(spec, hooks=int8_hooks()))
        error = jnp.max(jnp.abs(rounded[0] - y)) / jnp.max(jnp.abs(y))
        assert 1e-6 < float(error) < 0.05
        off = jnp.max(jnp.abs(rounded[2][1] - grads[1])) / jnp.max(jnp.abs(grads[1]))
        assert float(off) < 0.1


def test_int8_rows_are_off_by_half_a_step_at_most():
    hooks = int8_hooks()
    rows = 10 * jax.random.normal(jax.random.key(0), (3, 5, 16))
    back = hooks.after_dispatch(hooks.before_dispatch(rows))
    step = jnp.max(jnp.abs(rows), axis=-1, keepdims=True) / 127
    assert bool(jnp.all(jnp.abs(back - rows) <= 0.5001 * step))


def test_the_loss_is_the_weighted_sum_of_its_terms():
    spec = replace(SPEC, losses=Losses(0.5, 0.25, 0.125))
    params = layer.init(jax.random.key(0), spec, DIMS)
    _, info = layer.apply(params, X, spec)
    terms = info.losses
    wanted = 0.5 * terms["balance"] + 0.25 * terms["importance_load"] + 0.125 * terms["z"]
    np.testing.assert_allclose(info.loss, wanted, rtol=1e-6)
    none = replace(SPEC, losses=Losses(0))
    _, info = layer.apply(params, X, none)
    assert (float(info.loss), dict(info.losses)) == (0.0, {})


def test_narrow_tokens_are_routed_in_float32_and_come_back_narrow():
    params = layer.init(jax.random.key(0), SPEC, DIMS)
    y, info = layer.apply(params, X.astype(jnp.bfloat16), SPEC)
    assert (y.dtype, info.entropy.dtype) == (jnp.bfloat16, jnp.float32)
    wide, _ = layer.apply(params, X.astype(jnp.bfloat16).astype(jnp.float32), SPEC)
    np.testing.assert_allclose(y.astype(jnp.float32), wide, atol=0.06)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: swiglu("tanh"), "activation is 'tanh'"),
        (lambda: gpt_ffn(backend="cuda"), "back end is 'cuda'"),
        (lambda: top_k_hooks(0, 6), "top-0"),
        (lambda: top_k_hooks(7, 6), "top-7"),
        (
            lambda: grouped_matmul(jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.ones(1, int), "x"),
            "'x'",
        ),
    ],
)
def test_unknown_parts_are_refused(make, word):
    with pytest.raises(UserError, match=word):
        make()
