"""Likelihoods beside NumPy, one request at a time; windows beside those of lm-eval."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.evaluate import Request, encode_pair, perplexity, score
from jaxsys.evaluate.buckets import batches, bucket
from jaxsys.evaluate.perplexity import ratio_ci, windows


def _requests(seed: int, n: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    found = [
        Request(rng.integers(0, 128, rng.integers(1, 60)), rng.integers(0, 128, rng.integers(1, 9)))
        for _ in range(n)
    ]
    # Four choices of one token after one context, and one whose continuation is what is likely.
    return found + [Request([7, 8, 9], [c]) for c in range(4)]


def test_scores_are_those_of_one_request_at_a_time(toy, by_hand):
    requests = _requests(0, 40)
    greedy = int(np.argmax([by_hand([7, 8, 9], [c])[0] for c in range(128)]))
    requests.append(Request([7, 8, 9], [greedy]))
    found = score(toy, requests, tokens_per_batch=256)
    expected = [by_hand(*r) for r in requests]
    np.testing.assert_allclose(found.log_likelihood, [e[0] for e in expected], atol=2e-4)
    assert found.greedy.tolist() == [e[1] for e in expected]
    assert found.greedy[-1]
    assert found.tokens.tolist() == [len(r.continuation) for r in requests]
    assert not found.truncated.any()


def test_contexts_are_cut_on_the_left(toy, by_hand):
    ids = np.random.default_rng(1).integers(0, 128, 60)
    found = score(toy, [Request(ids[:50], ids[50:]), Request(ids[:2], ids[2:])], max_length=20)
    assert found.truncated.tolist() == [True, True]
    assert found.tokens.tolist() == [10, 20]
    assert found.log_likelihood[0] == pytest.approx(by_hand(ids[39:50], ids[50:])[0], abs=1e-4)
    assert found.log_likelihood[1] == pytest.approx(by_hand(ids[39:40], ids[40:])[0], abs=1e-4)


def test_inputs_that_are_the_same_are_run_once(toy):
    runs = []

    def counted(params, tokens, cache, lengths):
        runs.append(tokens.shape)  # traced once for each shape
        return toy.apply(params, tokens, cache, lengths)

    requests = [Request([1, 2, 3], [c]) for c in range(100)]
    found = score(toy._replace(apply=counted), requests, tokens_per_batch=16)
    assert runs == [(1, 16)]
    assert np.exp(found.log_likelihood).sum() < 1


def test_progress_reaches_the_end(toy):
    seen = []
    score(toy, _requests(2, 30), tokens_per_batch=128, progress=lambda *at: seen.append(at))
    assert seen[-1] == (34, 34)
    assert [a for a, _ in seen] == sorted(a for a, _ in seen)


@pytest.mark.parametrize(
    ("request_", "words"),
    [(Request([], [1]), "empty context"), (Request([1], [300]), "token id 300, outside")],
)
def test_mistakes(toy, request_, words):
    with pytest.raises(UserError, match=words):
        score(toy, [request_])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=60),
    st.integers(1, 2000),
)
def test_batches_hold_every_row_once(lengths, tokens_per_batch):
    found = batches(lengths, tokens_per_batch, most=500)
    assert sorted(i for b in found for i in b.members) == list(range(len(lengths)))
    for b in found:
        assert len(b.members) <= b.rows <= max(1, tokens_per_batch // b.length)
        assert max(lengths[i] for i in b.members) <= b.length <= 500
    assert all(bucket(n) >= n and (bucket(n) < 1.5 * n or bucket(n) == 16) for n in lengths)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 70), st.integers(1, 20), st.data())
def test_windows_score_each_token_once(size, length, data):
    stride = data.draw(st.integers(1, length))
    ids = list(range(1, size + 1))
    found = windows(ids, length, stride, prefix=0)
    assert [i for r in found for i in r.continuation] == ids
    for r in found:
        assert len(r.context) >= 1
        assert len(r.context) + len(r.continuation) <= length + 1
        whole = [*r.context, *r.continuation]
        assert whole == list(range(whole[0], whole[0] + len(whole)))
    for r in found[1:]:
        assert len(r.context) >= length - stride + 1


@pytest.mark.parametrize(
    ("size", "length", "stride"), [(50, 8, 8), (50, 8, 3), (5, 8, 8), (17, 4, 1)]
)
def test_windows_are_those_of_lm_eval(size, length, stride):
    utils = pytest.importorskip("lm_eval.utils")
    ids = list(range(1, size + 1))
    rolling = utils.get_rolling_token_windows(ids, 0, length, length - stride + 1)
    theirs = [utils.make_disjoint_window(pair) for pair in rolling]
    ours = [(list(r.context), list(r.continuation)) for r in windows(ids, length, stride, 0)]
    assert ours == [(list(a), list(b)) for a, b in theirs]


def test_perplexity_is_the_mean_over_all_tokens(toy, ascii_tokens, by_hand):
    texts = ["the cat sat on the mat", "a dog"]
    found = perplexity(toy, ascii_tokens, texts)
    nats = -sum(by_hand([0], ascii_tokens.encode(t))[0] for t in texts)
    assert found.nats == pytest.approx(nats, abs=1e-3)
    assert (found.tokens, found.bytes, found.windows) == (27, 27, 2)
    assert found.per_token == pytest.approx(np.exp(nats / 27), rel=1e-5)
    assert found.per_token == pytest.approx(found.per_byte)  # a token is a byte here
    low, high = found.nats_per_token_ci
    assert low <= found.nats_per_token <= high


def test_perplexity_in_windows(toy, ascii_tokens, by_hand):
    text = "what is seen before decides what comes after, " * 3
    ids = ascii_tokens.encode(text).tolist()
    for stride in (16, 5):
        found = perplexity(toy, ascii_tokens, [text], length=16, stride=stride)
        nats = -sum(by_hand(*r)[0] for r in windows(ids, 16, stride, 0))
        assert found.nats == pytest.approx(nats, abs=1e-3)
        assert found.tokens == found.bytes == len(text)
    part = perplexity(toy, ascii_tokens, [text], length=16, most_windows=2)
    assert (part.tokens, part.bytes, part.windows) == (32, 32, 2)
    assert "the first 2 of each text" in part.protocol


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 97}, "the window is 97 tokens"),
        ({"length": 8, "stride": 9}, "stride is 9"),
        ({"stride": 0}, "stride is 0"),
    ],
)
def test_perplexity_mistakes(toy, ascii_tokens, options, words):
    with pytest.raises(UserError, match=words):
        perplexity(toy, ascii_tokens, ["some text"], **options)
    with pytest.raises(UserError, match="no token to score"):
        perplexity(toy, ascii_tokens, [""])


def test_ratio_interval_covers_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        counts = rng.integers(50, 150, 80)
        low, high = ratio_ci(counts * rng.normal(2.0, 0.5, 80), counts)
        hits += low <= 2.0 <= high
    assert 50 <= hits <= 60


def test_pairs_together_are_the_whole_text(ascii_tokens):
    context, continuation = encode_pair(ascii_tokens, "Answer: ", "yes")
    assert ascii_tokens.decode(context) == "Answer:"
    assert ascii_tokens.decode(continuation) == " yes"
    assert encode_pair(ascii_tokens, "", "yes").context == (0,)
    assert jnp.array(encode_pair(ascii_tokens, " ", "yes").continuation).tolist() == list(b" yes")
