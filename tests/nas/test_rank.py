"""Ranking measures and ranking losses against SciPy, brute force and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy.stats import kendalltau, spearmanr

from jaxsys.core.errors import UserError
from jaxsys.nas import rank
from jaxsys.nas.losses import LOSSES, diff_kendall, list_mle, mixture, pair_loss

VALUES = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=30)


@settings(deadline=None)
@given(VALUES)
def test_tau_b_by_counting_pairs(pairs):
    x, y = np.array(pairs, float).T
    if len(set(y)) < 2 or len(set(x)) < 2:
        return
    a, b = (np.sign(v[:, None] - v[None]) for v in (x, y))
    expected = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    assert rank.kendall_tau(x, y) == pytest.approx(expected, abs=1e-9)
    assert rank.spearman_rho(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)


@given(st.permutations(range(12)), st.integers(1, 12))
def test_regret_and_rank_of_the_best_kept(order, k):
    scores, targets = np.array(order, float), np.arange(12.0)
    kept = targets[np.argsort(-scores)[:k]]
    assert rank.top_k_regret(scores, targets, k) == 11 - kept.max()
    assert rank.best_rank(scores, targets, k) == 12 - kept.max()


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = 2 / np.pi * np.arcsin(0.6)  # τ of a normal pair with correlation 0.6
    held = 0
    for seed in range(60):
        x, e = rng.normal(size=(2, 60))
        y = 0.6 * x + 0.8 * e
        _, (low, high) = rank.with_interval(rank.kendall_tau, x, y, n=100, seed=seed)
        held += low <= truth <= high
    assert 47 <= held <= 60


@pytest.mark.parametrize(
    ("scores", "targets", "says"),
    [
        ([1, np.nan, 3], [1, 2, 3], "score 1 is nan"),
        ([1, 2, 3], [1, np.inf, 3], "target 1 is inf"),
        ([1, 2, 3], [5, 5, 5], "at least two distinct"),
        ([1, 2], [1, 2, 3], "the same length"),
        ([1], [1], "at least 2"),
    ],
)
@pytest.mark.parametrize("metric", list(rank.METRICS.values()))
def test_mistakes_are_told(metric, scores, targets, says):
    with pytest.raises(UserError, match=says):
        metric(scores, targets)


def test_scores_that_are_all_equal_rank_nothing():
    assert rank.kendall_tau([1, 1, 1], [1, 2, 3]) == 0
    with pytest.raises(UserError, match="k is 4 of 3"):
        rank.top_k_regret([1, 2, 3], [1, 2, 3], 4)


X, Y = (jnp.asarray(np.random.default_rng(s).normal(size=40), jnp.float32) for s in (0, 1))


@pytest.mark.parametrize("block", [512, 16, 7])
def test_diff_kendall_by_its_formula(block):
    t = [np.tanh(0.25 * (np.subtract.outer(v, v))) for v in np.asarray([X, Y], np.float64)]
    expected = -(t[0] * t[1]).sum() / (40 * 39 / 2)
    np.testing.assert_allclose(diff_kendall(X, Y, block=block), expected, rtol=1e-5)
    exact = diff_kendall(X, Y, exact=True, block=block)
    np.testing.assert_allclose(exact, expected / 2, rtol=1e-5)


def test_diff_kendall_tends_to_tau_as_alpha_grows():
    tau = kendalltau(np.asarray(X), np.asarray(Y)).statistic
    gaps = [abs(float(diff_kendall(X, Y, a, exact=True)) + tau) for a in (1.0, 100.0, 1e4, 1e6)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6
    for sign in (1, -1):
        assert float(diff_kendall(X, sign * X, 1e7)) == pytest.approx(-2.0 * sign, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name):
    with jax.enable_x64(True):
        x, y = (jnp.asarray(np.asarray(v[:9]), jnp.float64) for v in (X, Y))
        check_grads(
            lambda v: LOSSES[name](jnp.asarray(v), y), (x,), 1, ["rev"], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("block", [512, 7])
def test_blocks_do_not_change_the_gradient(block):
    whole = jax.grad(diff_kendall)(X, Y)
    parts = jax.grad(lambda x: diff_kendall(x, Y, block=block))(X)
    np.testing.assert_allclose(parts, whole, atol=1e-7)


def test_memory_of_diff_kendall_is_linear_in_n():
    """For 5,000 the temporaries stay near N·block numbers, forward and in the gradient."""

    def temporaries(n):
        v = jax.ShapeDtypeStruct((n,), jnp.float32)
        compiled = jax.jit(jax.grad(diff_kendall)).lower(v, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(5_000), temporaries(10_000)
    assert large < 10_000 * 512 * 4 * 8  # N² would be 400 MB for one array
    assert large < 2.6 * small
    x = jnp.linspace(-1, 1, 5_000)
    assert bool(jnp.isfinite(jax.jit(jax.grad(diff_kendall))(x, x[::-1])).all())


def test_pair_and_list_losses_by_loops():
    x, y = (np.asarray(v[:8], np.float64) for v in (X, Y))
    pairs = [
        np.log1p(np.exp(-(x[i] - x[j]) * np.sign(y[i] - y[j])))
        for i in range(8)
        for j in range(8)
        if i != j
    ]
    np.testing.assert_allclose(pair_loss(X[:8], Y[:8]), np.mean(pairs), rtol=1e-5)
    order = np.argsort(-y)
    nll = [np.log(np.exp(x[order[i:]]).sum()) - x[order[i]] for i in range(8)]
    np.testing.assert_allclose(list_mle(X[:8], Y[:8]), np.mean(nll), rtol=1e-5)


def test_mixture_refuses_unknown_names():
    for names in (["mse", "tau"], []):
        with pytest.raises(UserError, match="does not exist"):
            mixture(names)
