"""Every method under one contract, and every formula against a float64 transcription."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.prune.alps import alps
from jaxsys.prune.dsnot import dsnot
from jaxsys.prune.methods import METHODS, Method, find_method, prune_linear
from jaxsys.prune.metrics import METRICS
from jaxsys.prune.patterns import Pattern, parse_pattern
from jaxsys.prune.permute import permute_channels, permuted_nm_mask, retained
from jaxsys.prune.sparsegpt import inverse_factor, reconstruct, sparsegpt
from jaxsys.prune.stats import Stats, add_inputs, finish, init_moments

sys.path.insert(0, str(Path(__file__).parent))
import transcription as plain

OUT, IN = 12, 40
RNG = np.random.default_rng(3)
W = RNG.standard_normal((OUT, IN))
# Correlated inputs with channels of unlike size and a mean, as in real models.
MIX = RNG.standard_normal((IN, IN)) / 6 + np.diag(RNG.uniform(0.2, 3, IN))
INPUTS = (RNG.standard_normal((3, 50, IN)) + 0.3) @ MIX
G = np.abs(RNG.standard_normal((OUT, IN)))


@pytest.fixture(scope="module")
def stats() -> Stats:
    moments = init_moments(IN, outer=True)
    for batch in (INPUTS[:2], INPUTS[2:]):
        moments = add_inputs(moments, jnp.asarray(batch, jnp.float32))
    return finish(moments)._replace(G=jnp.asarray(G, jnp.float32), G1=jnp.asarray(G, jnp.float32))


def layer() -> jnp.ndarray:
    return jnp.asarray(W, jnp.float32)


def test_statistics_are_their_formulas(stats):
    rows = INPUTS.reshape(-1, IN)
    norms = (INPUTS**2).sum(1).mean(0)
    np.testing.assert_allclose(stats.X, norms, rtol=1e-5)
    np.testing.assert_allclose(stats.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.var, rows.var(0), rtol=1e-4)
    np.testing.assert_allclose(stats.H, 2 / 3 * rows.T @ rows, rtol=1e-4, atol=1e-3)


PATTERNS = [Pattern(0.3), Pattern(0.5, "row"), Pattern(nm=(2, 4)), Pattern(nm=(4, 8))]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", [*METHODS, "W*sqrt(X)"])
def test_the_contract(name, pattern, stats):
    method = find_method(name)
    if method.ratios != "uniform":
        method = Method(method.metric)  # how much goes where is settled outside a layer
    found = prune_linear(layer(), stats, method, pattern, "h.0.attn")
    mask, weight = np.asarray(found.mask), np.asarray(found.weight)
    assert np.isfinite(weight).all()
    assert (weight[~mask] == 0).all()
    if pattern.nm:
        n, m = pattern.nm
        order = np.arange(IN) if found.permutation is None else found.permutation
        assert (mask[:, order].reshape(OUT, -1, m).sum(2) == n).all()
    elif pattern.scope == "row":
        assert ((~mask).sum(1) == int(IN * pattern.sparsity)).all()
    else:
        per_row = name not in ("magnitude", "wanda_alpha", "sparsegpt", "alps")
        expected = OUT * int(IN * pattern.sparsity) if per_row else int(OUT * IN * pattern.sparsity)
        assert (~mask).sum() == expected
    if method.metric not in ("sparsegpt", "alps") and method.update == "none":
        np.testing.assert_array_equal(weight[mask], np.float32(W)[mask])
    again = prune_linear(layer(), stats, method, pattern, "h.0.attn")
    np.testing.assert_array_equal(again.mask, mask)
    half = prune_linear(layer().astype(jnp.bfloat16), stats, method, pattern, "h.0.attn")
    assert half.weight.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "gradient", "gblm", "pruner_zero"])
def test_metrics_are_their_formulas(name, stats):
    norms = (INPUTS**2).sum(1).mean(0)
    expected = plain.scores(name, W, norms, G)
    found = METRICS[name].apply(layer(), stats)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    kept = prune_linear(layer(), stats, Method(name), Pattern(0.5, "row")).mask
    np.testing.assert_array_equal(kept, plain.rows_kept(expected, 0.5))


def test_the_alpha_variant_is_the_bisection_on_alpha(stats):
    scores = plain.scores("wanda", W, (INPUTS**2).sum(1).mean(0), G)
    found = prune_linear(layer(), stats, Method("wanda_alpha"), Pattern(0.5)).mask
    np.testing.assert_array_equal(found, plain.wanda_alpha(scores, 0.5))
    assert len(set(np.asarray(found).sum(1).tolist())) > 1


@pytest.mark.parametrize("nm", [None, (2, 4)])
@pytest.mark.parametrize("block", [16, 128])
def test_sparsegpt_is_its_transcription(nm, block, stats):
    w, kept = plain.sparsegpt(W, np.asarray(stats.H), 0.5, nm, block=block)
    found, mask, loss = sparsegpt(layer(), stats.H, 0.5, nm=nm, block=block)
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(found, w, rtol=1e-3, atol=1e-3)
    assert float(loss) > 0


def test_an_update_under_a_given_mask_nears_least_squares(stats):
    kept = plain.rows_kept(np.abs(W), 0.5)
    w, _ = plain.sparsegpt(W, np.asarray(stats.H), given=kept)
    found = np.asarray(reconstruct(layer(), stats.H, jnp.asarray(kept))[0])
    np.testing.assert_allclose(found, w, rtol=1e-3, atol=1e-3)
    h = np.asarray(stats.H, np.float64)

    def error(new: np.ndarray) -> float:
        return float(np.einsum("oi,ij,oj->", new - W, h, new - W))

    exact = plain.least_squares(W, h, kept)
    assert error(exact) <= error(found) < 0.9 * error(np.where(kept, W, 0))


def test_sparsegpt_without_correlation_is_magnitude_in_blocks():
    found, mask, _ = sparsegpt(layer(), jnp.eye(IN), 0.5, block=8)
    expected = np.concatenate(
        [~plain.smallest(np.abs(W[:, a : a + 8]), OUT * 4) for a in range(0, IN, 8)], axis=1
    )
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(found, np.where(expected, W, 0), rtol=1e-5, atol=1e-6)


def test_singular_hessians_never_fail():
    dead = np.zeros((IN, IN), np.float32)
    one = np.outer(np.arange(IN), np.arange(IN)).astype(np.float32)  # rank one, first channel dead
    for hessian in (dead, one, -np.eye(IN, dtype=np.float32), 1e-30 * one, 1e30 * one):
        assert np.isfinite(inverse_factor(jnp.asarray(hessian), 0.0)).all()
    for hessian in (dead, one):
        found, mask, _ = sparsegpt(layer(), jnp.asarray(hessian), 0.5)
        assert np.isfinite(found).all()
        assert (~np.asarray(mask)).sum() == OUT * IN // 2


def test_alps_is_its_transcription_and_beats_sparsegpt(stats):
    h = np.asarray(stats.H, np.float64)
    best, kept = plain.alps(W, h, 0.6)
    found, mask, loss = alps(layer(), stats.H, 0.6)
    assert (np.asarray(mask) != kept).mean() < 0.02  # float32 may part ties of the support
    delta = best - W
    exact = 0.5 * np.einsum("oi,ij,oj->", delta, h, delta)
    np.testing.assert_allclose(float(loss), exact, rtol=0.03)
    other = np.asarray(sparsegpt(layer(), stats.H, 0.6)[0]) - W
    assert float(loss) < 0.5 * np.einsum("oi,ij,oj->", other, h, other)
    assert np.isfinite(found).all()


def test_dsnot_is_its_transcription_and_lowers_the_error(stats):
    kept = plain.rows_kept(np.abs(W), 0.6)
    values = [np.asarray(v, np.float64) for v in (stats.X, stats.mean, stats.var)]
    found = np.asarray(dsnot(layer(), jnp.asarray(kept), stats))
    np.testing.assert_array_equal(found, plain.dsnot(np.float32(W), kept, *values))
    change = W * values[1]
    before = np.abs(np.where(kept, 0, change).sum(1))
    after = np.abs(np.where(found, 0, change).sum(1))
    assert (after <= before + 1e-6).all()
    assert after.sum() < before.sum()
    groups = dsnot(layer(), jnp.asarray(plain.nm_kept(np.abs(W), 2, 4)), stats, nm=(2, 4))
    assert (np.asarray(groups).reshape(OUT, -1, 4).sum(2) == 2).all()


def test_permuted_channels_keep_more(stats):
    scores = METRICS["ria"].apply(layer(), stats)
    permutation = permute_channels(scores, 2, 4)
    assert sorted(permutation.tolist()) == list(range(IN))
    assert retained(scores, permutation, 2, 4) > retained(scores, np.arange(IN), 2, 4)
    mask = np.asarray(permuted_nm_mask(scores, permutation, 2, 4))
    kept = float(np.asarray(scores)[mask].sum())
    np.testing.assert_allclose(kept, retained(scores, permutation, 2, 4), rtol=1e-5)


def test_bad_input_is_told(stats):
    with pytest.raises(UserError, match="'Y' at position 3"):
        Method("W*Y")
    with pytest.raises(UserError, match=r"lies in \[0, 1\)"):
        Pattern(1.0)
    with pytest.raises(UserError, match=r"3:7 does not divide the 40 inputs of h\.0"):
        prune_linear(layer(), stats, Method(), Pattern(nm=(3, 7)), "h.0")
    with pytest.raises(UserError, match=r"needs the statistic H of h\.0"):
        prune_linear(layer(), Stats(), Method("alps"), Pattern(), "h.0")
    bad = stats._replace(X=stats.X.at[3].set(jnp.nan))
    with pytest.raises(UserError, match=r"'wanda' gives 12 of 480 scores of h\.0"):
        prune_linear(layer(), bad, Method(), Pattern(), "h.0")
    with pytest.raises(UserError, match="chooses mask and weights by itself"):
        Method("sparsegpt", refine="dsnot")
    with pytest.raises(UserError, match="pattern is '2:x'"):
        parse_pattern("2:x")
    with pytest.raises(UserError, match="blocks"):
        prune_linear(layer(), stats, Method("alps"), Pattern(0.5, block=(2, 2)), "h.0")
