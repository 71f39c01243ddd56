"""The laws of sampling beside those of transformers, and laws that hold for any logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.evaluate import Sampling
from jaxsys.evaluate.sampling import keep_min_p, keep_top_k, keep_top_p, sample, warp

LAWS = [
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.0, top_p=0.7),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=0.6),
    Sampling(temperature=1.0, repetition_penalty=1.7),
    Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    Sampling(temperature=1.9, top_k=3, top_p=0.05, min_p=0.5, repetition_penalty=0.7),
]


def _logits(seed: int, rows: int = 4, vocab: int = 33) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


@pytest.mark.parametrize("laws", LAWS)
def test_laws_are_those_of_transformers(laws):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    for seed in range(5):
        logits = _logits(seed)
        ids = np.random.default_rng(seed + 50).integers(0, 33, (4, 6))
        theirs = torch.tensor(logits)
        chain = [
            process.RepetitionPenaltyLogitsProcessor(float(laws.repetition_penalty)),
            process.TemperatureLogitsWarper(float(laws.temperature)),
            *([process.TopKLogitsWarper(laws.top_k)] if laws.top_k else []),
            *([process.TopPLogitsWarper(float(laws.top_p))] if laws.top_p < 1 else []),
            *([process.MinPLogitsWarper(float(laws.min_p))] if laws.min_p else []),
        ]
        for law in chain:
            theirs = law(torch.tensor(ids), theirs)
        seen = np.zeros((4, 33), bool)
        np.put_along_axis(seen, ids, True, axis=1)
        ours = warp(jnp.asarray(logits), jnp.asarray(seen), laws)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def _kept_by_definition(probabilities: np.ndarray, p: float) -> set[int]:
    total, kept = 0.0, set()
    for i in np.argsort(-probabilities, kind="stable"):
        kept.add(int(i))
        total += probabilities[i]
        if total >= p:
            break
    return kept


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_top_p_is_the_smallest_set_that_reaches_p(seed, p):
    logits = _logits(seed, rows=1, vocab=12)
    likely = np.exp(logits[0].astype(np.float64))
    likely /= likely.sum()
    kept = set(np.flatnonzero(np.isfinite(keep_top_p(jnp.asarray(logits), p)[0])).tolist())
    edge = np.abs(np.cumsum(np.sort(likely)[::-1]) - p).min()
    if edge > 1e-5:  # at the edge rounding decides
        assert kept == _kept_by_definition(likely, p)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.floats(0.0, 1.0))
def test_what_is_kept(seed, k, min_p):
    logits = _logits(seed, rows=2, vocab=12)
    top = np.asarray(keep_top_k(jnp.asarray(logits), k))
    assert (np.isfinite(top).sum(1) == min(k, 12)).all()
    assert (np.where(np.isfinite(top), logits, -np.inf).max(1) == logits.max(1)).all()
    least = np.asarray(keep_min_p(jnp.asarray(logits), min_p))
    assert (np.isfinite(least).any(1)).all()


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(3), 4000)
    rows = jnp.broadcast_to(logits, (4000, 4))
    drawn = np.bincount(sample(keys, rows, None, Sampling(temperature=1.0, top_p=0.9)), minlength=4)
    assert drawn[3] == 0
    expected = np.array([0.5, 0.3, 0.15]) / 0.95
    np.testing.assert_allclose(drawn[:3] / 4000, expected, atol=0.03)


def test_greedy_is_the_limit_of_temperature():
    logits = jnp.asarray(_logits(1))
    keys = jax.random.split(jax.random.key(0), 4)
    greedy = sample(keys, logits, None, Sampling(top_k=3, top_p=0.5))
    cold = sample(keys, logits, None, Sampling(temperature=1e-4))
    assert greedy.tolist() == cold.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("laws", "words"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_mistakes(laws, words):
    with pytest.raises(UserError, match=words):
        Sampling(**laws)
