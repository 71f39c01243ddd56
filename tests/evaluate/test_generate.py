"""Generation: the cache changes nothing, rows do not meet, a seed is a text, stops stop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.data import ByteTokenizer
from jaxsys.evaluate import Sampling, from_forward, from_lm, generate
from jaxsys.evaluate.stream import TextStream, cut, settled
from jaxsys.models import lm

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1] * 2, [40, 2]]
CONFIG = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64, rope=lm.Rope(width=8))


@pytest.fixture(scope="module")
def params():
    # Larger weights than usual: fresh ones give nearly the same logits for every token.
    fresh = lm.init(jax.random.key(0), CONFIG)
    return jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, fresh)


@pytest.fixture(scope="module")
def llama(params):
    return from_lm(params, CONFIG)


def _plain(params, tokens):
    return lm.apply(params, CONFIG, tokens).logits


def _one_by_one(params, prompt, count):
    """Generate greedily by running the whole text again for each token."""
    ids = list(prompt)
    for _ in range(count):
        padded = jnp.array([ids + [0] * (32 - len(ids))])
        ids.append(int(_plain_jit(params, padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


_plain_jit = jax.jit(_plain)


def test_cache_and_batch_change_no_token(llama, params):
    together = generate(llama, PROMPTS, max_tokens=12).tokens
    assert list(together) == [_one_by_one(params, p, 12) for p in PROMPTS]
    assert len({tuple(t) for t in together}) == len(PROMPTS)


LAWS = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2)


def test_cached_and_recomputed_sampling_agree(llama, params):
    recomputed = from_forward(_plain, params, CONFIG.vocab_size, CONFIG.max_positions)
    options = {"max_tokens": 9, "sampling": LAWS, "key": jax.random.key(4)}
    assert generate(llama, PROMPTS, **options).tokens == (
        generate(recomputed, PROMPTS, **options).tokens
    )


def test_a_seed_is_a_text_whatever_stands_beside_it(toy):
    def run(prompts, seed, **more):
        options = {"max_tokens": 10, "sampling": LAWS, "key": jax.random.key(seed)} | more
        return generate(toy, prompts, **options).tokens

    first = run(PROMPTS, 1)
    assert first == run(PROMPTS, 1) == run(PROMPTS, 1, steps_per_call=4)
    assert first[:2] == run(PROMPTS[:2], 1)
    assert first != run(PROMPTS, 2)
    same = run([[5, 6]] * 4, 1)
    assert len({tuple(row) for row in same}) > 1  # rows draw for themselves


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_per_call_changes_no_token(toy, steps):
    expected = generate(toy, PROMPTS, max_tokens=10).tokens
    assert generate(toy, PROMPTS, max_tokens=10, steps_per_call=steps).tokens == expected


def test_repetition_penalty_counts_prompt_and_new_tokens(toy):
    huge = Sampling(repetition_penalty=1e6)
    rows = generate(toy, PROMPTS, max_tokens=12, sampling=huge).tokens
    for prompt, row in zip(PROMPTS, rows, strict=True):
        # Positive logits of what was seen become about 0, so nothing comes twice.
        assert len({*prompt, *row}) == len(set(prompt)) + len(row)


@pytest.fixture
def counting():
    """Give the byte after the last one: 'a' is followed by 'bcdef…'."""
    return from_forward(_next_byte, {}, 256, 200)


def _next_byte(params, tokens):
    return jax.nn.one_hot((tokens + 1) % 256, 256)


def test_ends(counting):
    found = generate(
        counting,
        [list(b) for b in (b"a", b"m", b"x", b"A")],
        max_tokens=8,
        end_ids=[ord("q")],
        tokenizer=ByteTokenizer(),
        stop=["ef", "zz", "FG"],
    )
    assert found.ended == ("stop", "end", "length", "stop")
    assert found.texts == ("bcd", "nop", "yz{|}~\x7f�", "BCDE")
    assert bytes(found.tokens[0]) == b"bcdef"
    assert found.tokens[1] == list(b"nop")
    assert len(found.tokens[2]) == 8


def test_stream_gives_the_text_in_pieces(counting):
    pieces = []
    found = generate(
        counting,
        [list(b"a"), list(b"k")],
        max_tokens=20,
        tokenizer=ByteTokenizer(),
        stop=["gh"],
        on_piece=pieces.append,
    )
    for row in (0, 1):
        assert "".join(p.text for p in pieces if p.row == row) == found.texts[row]
    counts = [p.tokens for p in pieces if p.row == 1]
    assert counts == list(range(1, 21))
    assert np.isnan(pieces[0].tokens_per_s)
    assert pieces[-1].tokens_per_s == found.tokens_per_s
    assert found.tokens_per_s == pytest.approx(18 * 2 / found.decode_s)
    assert found.texts[0] == "bcdef"


def test_prompts_of_any_shape_share_programs(toy):
    from jaxsys.evaluate.generate import _decode

    generate(toy, [[1] * 3], max_tokens=5)
    before = _decode._cache_size()
    for size in range(4, 10):
        generate(toy, [[1] * size], max_tokens=5)
    assert _decode._cache_size() == before


def test_cache_is_donated(llama):
    from jaxsys.evaluate.generate import _begin, _decode
    from jaxsys.evaluate.rows import row_keys

    keys = row_keys(jax.random.key(0), 1)
    state, _ = _begin(llama, [np.array([1, 2], np.int32)], 4, Sampling(), keys)
    _decode(llama.apply, llama.head, Sampling(), 1, llama.params, state, keys)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "holds no token"),
        ([[1], []], {}, "holds no token"),
        ([[1, 128]], {}, "token id 128 is outside"),
        ([[-1]], {}, "token id -1 is outside"),
        ([[1] * 90], {"max_tokens": 7}, "needs 97 tokens, and the model's context holds 96"),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[1]], {"stop": ["x"]}, "without a tokenizer"),
    ],
)
def test_mistakes(toy, prompts, options, words):
    with pytest.raises(UserError, match=words):
        generate(toy, prompts, **({"max_tokens": 3} | options))


def test_the_whole_context_can_be_used(toy):
    assert len(generate(toy, [[1] * 90], max_tokens=6).tokens[0]) == 6


@settings(max_examples=60, deadline=None)
@given(st.text("abé", max_size=12), st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_text_in_pieces_is_the_text(text, stop):
    stream = TextStream(ByteTokenizer(), [], stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push([byte]))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == cut(text, stop)[0]
    assert stream.stopped == cut(text, stop)[1]


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_settled_holds_back_no_more_than_a_beginning(text, stop):
    held = text[len(settled(text, stop)) :]
    assert text.startswith(settled(text, stop))
    assert held == "" or any(s.startswith(held) and s != held for s in stop)
    assert not any(len(s) > 1 and text.endswith(s[:-1]) for s in stop) or held


def test_a_prompt_that_ends_within_a_letter():
    first, second = "é".encode()
    stream = TextStream(ByteTokenizer(), [97, first])
    assert stream.push([second]) == "é"
    with pytest.raises(UserError, match="stop string is empty"):
        TextStream(ByteTokenizer(), [], [""])
