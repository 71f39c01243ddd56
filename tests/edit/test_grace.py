"""GRACE: keys placed as a plain transcription says, answers by lookup, nothing else changed."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.edit.codebook import Codebook, CodebookWeight, place
from jaxsys.edit.contract import Editable, Request
from jaxsys.edit.grace import GRACE, answering_grace, edit_grace
from jaxsys.evaluate import from_lm, generate, score
from jaxsys.evaluate.score import encode_pair


def transcription(edits, radius, same):
    """Place keys in lists, as the paper's algorithm 1 reads; entries are [key, label, radius]."""
    entries = []
    for key, label in edits:
        gaps = [np.sqrt(sum((a - b) ** 2 for a, b in zip(e[0], key, strict=True))) for e in entries]
        if not entries or min(gaps) > radius + entries[int(np.argmin(gaps))][2]:
            entries.append([key, label, radius])
            continue
        nearest, gap = entries[int(np.argmin(gaps))], min(gaps)
        if nearest[1] == label:
            nearest[2] = max(nearest[2], gap)
        elif gap <= same * radius:
            nearest[1] = label
        else:
            nearest[2] = max(gap / 2 - 1e-5, 0)
            entries.append([key, label, gap / 2])
    return entries


edit_lists = st.lists(
    st.tuples(
        st.tuples(st.integers(-4, 4), st.integers(-4, 4)),
        st.lists(st.integers(0, 2), min_size=1, max_size=3),
    ),
    max_size=24,
)


@settings(deadline=None, max_examples=60)
@given(edit_lists, st.sampled_from([0.53, 1.07, 2.9]))
def test_keys_are_placed_as_the_algorithm_says(edits, radius):
    book = Codebook.empty(2, 3)
    for key, label in edits:
        book, index = place(book, np.float32(key), label, radius, 1e-3)
        assert index is None or list(book.labels[index][: len(label)]) == label
    expected = transcription(edits, radius, 1e-3)
    assert book.count == len(expected)
    for i, (key, label, size) in enumerate(expected):
        assert tuple(book.keys[i]) == key
        assert [t for t in book.labels[i].tolist() if t >= 0] == label
        assert book.radii[i] == pytest.approx(size, rel=1e-5)
    assert (book.radii[book.count :] == -1).all()


def test_lookup_is_brute_force(llama):
    rng = np.random.default_rng(0)
    w, keys, values = (rng.standard_normal(s).astype(np.float32) for s in ((3, 5), (8, 5), (8, 3)))
    radii = np.array([1.5, 2.5, 0.1, 2.0, 1.0, -1, -1, -1], np.float32)
    x = rng.standard_normal((40, 5)).astype(np.float32)
    x[0], x[1] = keys[2], keys[6]
    weight = CodebookWeight(*map(jnp.asarray, (w, keys, values, radii)))
    hits = 0
    for row, got in zip(x, np.asarray(weight.matmul(jnp.asarray(x))), strict=True):
        gaps = np.linalg.norm(keys[:5] - row, axis=1)
        near = int(gaps.argmin())
        hit = gaps[near] <= radii[near]
        hits += hit
        np.testing.assert_allclose(got, values[near] if hit else w @ row, rtol=1e-5, atol=1e-5)
    assert 5 < hits < 35


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_edited_model_answers_in_scoring_and_writing(name, short_answers, request):
    model, params = request.getfixturevalue(name)
    model = Editable(model.config, short_answers)
    config = GRACE(layer=1, radius=0.01, lr=0.3, steps=60)
    # Answers of one token: the value stands at the prompt's last token.
    asked = [Request("Ada plays the", "Ada", "?"), Request("Rome lies in", "Rome", "!")]
    one = edit_grace(model, config, params, asked[:1])
    two = edit_grace(model, config, one.params, asked[1:], state=one.state)
    assert two.params is params
    assert (two.info.factors, two.state.count, one.state.count) == ({}, 2, 1)
    answering = answering_grace(model, config, params, two.state).model
    pairs = [encode_pair(model.tokenizer, f.prompt, f" {f.target}") for f in asked]
    other = encode_pair(model.tokenizer, "Oslo is", " ?")
    found = score(answering, [*pairs, other])
    assert found.greedy[:2].all()
    plain = score(from_lm(params, model.config), [other])
    np.testing.assert_allclose(found.log_likelihood[2], plain.log_likelihood[0], rtol=1e-5)
    written = generate(answering, [pair.context for pair in pairs], max_tokens=1).tokens
    assert written == ([1], [2])


def test_a_fact_can_be_edited_again_and_runs_do_not_meet(llama, facts):
    model, params = llama
    config = GRACE(layer=1, radius=0.01, lr=0.3, steps=3)
    fact = facts[0]
    first = edit_grace(model, config, params, [fact])
    again = edit_grace(model, config, params, [fact._replace(target="Rhine")], state=first.state)
    assert again.state.count == 1
    assert not np.array_equal(again.state.values[0], first.state.values[0])
    same = edit_grace(model, config, params, [fact])
    for a, b in zip(first.state, same.state, strict=True):
        np.testing.assert_array_equal(a, b)


def test_mistakes(llama, facts):
    model, params = llama
    with pytest.raises(UserError, match="radius is 0"):
        GRACE(radius=0.0)
    with pytest.raises(UserError, match="layer 9"):
        edit_grace(model, GRACE(layer=9), params, facts)
    with pytest.raises(UserError, match="codebook is for a matrix"):
        edit_grace(model, GRACE(layer=1), params, facts, state=Codebook.empty(5, 16))
