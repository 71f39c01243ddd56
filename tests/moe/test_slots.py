"""Drop policies against one-by-one seating, both orders against loops, losses against formulas."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.moe import Capacity, ExpertChoice, Mixing, Slots, TokenChoice, losses
from jaxsys.moe.capacity import fill_groups, fill_slots, seats, slots_per_expert
from jaxsys.moe.contract import POLICIES
from jaxsys.moe.order import einsum_order, mix, sparse_order, unmix

_spec = importlib.util.spec_from_file_location(
    "moe_transcription", Path(__file__).with_name("transcription.py")
)
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

N, K, E = 7, 2, 4
_fill = {
    (size, policy): jax.jit(partial(fill_slots, size=size, policy=policy))
    for size in (1, 3, 7)
    for policy in POLICIES
}


def _choice(experts, weights):
    experts, weights = jnp.asarray(experts), jnp.asarray(weights, jnp.float32)
    zeros = jnp.zeros((experts.shape[0], E))
    return TokenChoice(weights, experts, zeros + 1 / E, zeros)


def _random_choice(seed):
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(E)[:K] for _ in range(N)])
    # Few values, so that ties occur.
    return experts, rng.integers(1, 4, (N, K)) / 4


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from((1, 3, 7)))
def test_a_policy_seats_as_one_by_one(policy, seed, size):
    experts, weights = _random_choice(seed)
    slots = _fill[size, policy](_choice(experts, weights))
    wanted = plain.drop(experts, weights, size, policy)
    kept = wanted >= 0
    places = np.where(kept, experts * size + wanted, E * size)
    assert np.array_equal(slots.places, places)
    tokens = np.full(E * size, N)
    tokens[places[kept]] = np.nonzero(kept)[0]
    assert np.array_equal(np.ravel(slots.tokens), tokens)
    assert policy != "dropless" or size < N or kept.all()


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_groups_hold_every_choice_once(seed):
    experts, weights = _random_choice(seed)
    slots, sizes = jax.jit(fill_groups)(_choice(experts, weights))
    assert np.array_equal(sizes, np.bincount(experts.ravel(), minlength=E))
    owner = np.repeat(np.arange(E), sizes)
    assert np.array_equal(owner[slots.places], experts)
    assert np.array_equal(np.ravel(slots.tokens)[slots.places], np.arange(N)[:, None] * [[1] * K])


@pytest.mark.parametrize(
    ("capacity", "n_rows", "k", "experts", "multiple", "wanted"),
    [
        (Capacity(1.2), 10, 2, 8, 1, 3),  # 1.2 · 2 · 10 / 8 is 3 exactly
        (Capacity(1.25), 10, 2, 8, 1, 4),
        (Capacity(1.2), 64, 2, 8, 8, 24),
        (Capacity(100), 10, 2, 8, 1, 10),
        (Capacity(0.001), 10, 2, 8, 4, 4),
        (Capacity(1, "dropless"), 10, 2, 8, 4, 12),
    ],
)
def test_capacity_is_rounded_up_and_never_more_than_can_happen(
    capacity, n_rows, k, experts, multiple, wanted
):
    assert slots_per_expert(capacity, n_rows, k, experts, multiple) == wanted


def test_no_slots_and_no_tokens_are_refused():
    with pytest.raises(UserError, match="no token"):
        slots_per_expert(Capacity(), 0, 1, 2)
    with pytest.raises(UserError, match="capacity is 0"):
        fill_slots(_choice([[0]], [[1.0]]), 0)


def _slots(kind):
    if kind == "experts chose":
        tokens = jnp.array([[0, 3, 5], [3, 1, 6], [2, 3, 0], [6, 5, 4]])
        weights = jax.random.uniform(jax.random.key(0), (E, 3))
        chosen = ExpertChoice(weights, tokens, jnp.ones((N, E)), jnp.ones((N, E)))
        return seats(chosen, N, multiple=2)
    return fill_slots(_choice(*_random_choice(5)), 3)


def _loops(x, slots, weights):
    """Both directions in float64: the buffer, and what comes back of it doubled."""
    tokens = np.asarray(slots.tokens)
    buffer = np.zeros((*tokens.shape, x.shape[1]))
    y = np.zeros_like(x)
    for e, c in np.ndindex(tokens.shape):
        n = tokens[e, c]
        if n == N:
            continue
        buffer[e, c] = x[n]
        if slots.places is None:
            w = weights[e, c]
        else:
            w = weights[n, np.ravel(slots.places[n]).tolist().index(e * tokens.shape[1] + c)]
        y[n] += w * 2 * buffer[e, c] ** 2
    return buffer, y


@pytest.mark.parametrize("kind", ["tokens chose", "experts chose"])
@pytest.mark.parametrize("order", [einsum_order(), sparse_order()], ids=["einsum", "sparse"])
def test_an_order_is_its_loops_there_and_back_with_gradients(order, kind):
    slots = _slots(kind)
    x = np.random.default_rng(0).normal(size=(N, 3))
    cotangent = np.random.default_rng(1).normal(size=(N, 3))

    def run(x, weights):
        own = Slots(slots.tokens, slots.places, weights)
        buffer = order.forward(x, own)
        y = order.inverse(2 * buffer**2, own, N)
        return jnp.sum(y * cotangent), (buffer, y)

    gradient = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, (buffer, y)), (dx, dweights) = gradient(jnp.asarray(x, jnp.float32), slots.weights)
    wide = np.asarray(slots.weights, np.float64)
    np.testing.assert_allclose(buffer, _loops(x, slots, wide)[0], atol=1e-6)
    np.testing.assert_allclose(y, _loops(x, slots, wide)[1], rtol=1e-5, atol=1e-5)

    def value(x, weights):
        return np.sum(_loops(x, slots, weights)[1] * cotangent)

    np.testing.assert_allclose(dx, plain.slope(lambda a: value(a, wide), x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        dweights, plain.slope(lambda a: value(x, a), wide), rtol=1e-4, atol=1e-4
    )


def test_mixing_pads_and_comes_back():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 5, 3))
    d, c = (jax.random.normal(key, (2, 5, 4, 3)) for key in keys[1:])
    mixing = Mixing(d, c, c)
    buffer = mix(x, mixing, multiple=4)
    assert buffer.shape == (4, 8, 3)
    assert not np.any(buffer[:, 6:])
    wanted = np.stack([np.einsum("tec,td->ecd", d[b], x[b]) for b in range(2)], axis=1)
    np.testing.assert_allclose(buffer[:, :6], wanted.reshape(4, 6, 3), atol=1e-5)
    y = np.stack([np.einsum("tec,ecd->td", c[b], wanted[:, b]) for b in range(2)])
    np.testing.assert_allclose(unmix(buffer, mixing), y, atol=1e-4)


def _chosen(seed=0, noisy=False):
    keys = jax.random.split(jax.random.key(seed), 3)
    logits = jax.random.normal(keys[0], (16, E))
    noise = 0.3 + jax.random.uniform(keys[2], (16, E)) if noisy else None
    ranked = None if noise is None else logits + noise * jax.random.normal(keys[1], (16, E))
    weights, experts = jax.lax.top_k(logits if ranked is None else ranked, K)
    return TokenChoice(weights, experts, jax.nn.softmax(logits), logits, ranked, noise)


def _all(chosen, axes=()):
    return jnp.stack(
        [
            losses.balance(chosen, axes),
            losses.importance_load(chosen, axes),
            losses.z_loss(chosen.logits, axes),
            losses.entropy(chosen.scores, axes),
        ]
    )


@pytest.mark.parametrize("noisy", [False, True])
def test_losses_are_their_formulas(noisy):
    from math import erf

    chosen = _chosen(noisy=noisy)
    p, h = (np.asarray(a, np.float64) for a in (chosen.scores, chosen.logits))
    counts = np.bincount(np.ravel(chosen.experts), minlength=E)
    balance = E / (16**2 * K) * sum(p[:, e].sum() * counts[e] for e in range(E))
    found = dict(zip(("balance", "spread", "z", "entropy"), jax.jit(_all)(chosen), strict=True))
    np.testing.assert_allclose(found["balance"], balance, rtol=1e-5)
    np.testing.assert_allclose(losses.load(chosen.experts, E), counts)
    z = np.mean(np.log(np.exp(h).sum(1)) ** 2)
    np.testing.assert_allclose(found["z"], z, rtol=1e-5)
    np.testing.assert_allclose(
        losses.entropy(chosen.scores), -np.mean((p * np.log(p)).sum(1)), rtol=1e-5
    )
    ranked = h if chosen.ranked is None else np.asarray(chosen.ranked, np.float64)
    sigma = np.full((16, E), 1 / E) if chosen.noise is None else np.asarray(chosen.noise)
    kth = np.sort(ranked, axis=1)[:, -K]
    z_scores = (h - kth[:, None]) / sigma
    load = np.vectorize(lambda v: (1 + erf(v / 2**0.5)) / 2)(z_scores).sum(0)
    importance = p.sum(0)
    wanted = sum(np.var(v) / np.mean(v) ** 2 for v in (importance, load)) / 2
    np.testing.assert_allclose(found["spread"], wanted, rtol=1e-4)


def test_losses_and_their_gradients_do_not_see_the_sharding():
    chosen = _chosen()
    mesh = jax.make_mesh((4,), ("r",), axis_types=(jax.sharding.AxisType.Auto,))

    def of_logits(logits, experts, axes):
        scores = jax.nn.softmax(logits)
        return jnp.sum(_all(TokenChoice(scores[:, :K], experts, scores, logits), axes))

    dense = jax.jit(jax.value_and_grad(partial(of_logits, axes=())))
    whole = dense(chosen.logits, chosen.experts)
    sharded = jax.shard_map(
        partial(of_logits, axes=("r",)), mesh=mesh, in_specs=(P("r"), P("r")), out_specs=P()
    )
    with jax.set_mesh(mesh):
        parts = jax.jit(jax.value_and_grad(sharded))(chosen.logits, chosen.experts)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-4, atol=1e-7)


def test_a_collapsed_router_is_told():
    n_tokens, one = 16, jnp.eye(E)[:1]
    scores = jnp.broadcast_to(one, (n_tokens, E))
    chosen = TokenChoice(jnp.ones((n_tokens, 1)), jnp.zeros((n_tokens, 1), int), scores, scores)
    assert float(losses.balance(chosen)) == E
    assert float(losses.entropy(scores)) == 0.0
