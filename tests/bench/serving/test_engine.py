"""The engine: paged attention is attention, and a request's tokens are those it gets alone."""

from dataclasses import replace
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.bench.serving import step as steps
from jaxsys.bench.serving.engine import Engine
from jaxsys.bench.serving.run import layout_for
from jaxsys.bench.serving.schedule import Ask
from jaxsys.core.errors import UserError
from jaxsys.evaluate import Sampling, from_lm, generate
from jaxsys.models import lm
from jaxsys.models.lm import paged
from jaxsys.models.lm.attention import attend, place

from .conftest import CONFIG, LAYOUT

MOST = 14


def draw_asks(random, count, longest, sampled=False):
    """Requests of which half begin alike; lengths from few, so that `generate` compiles little."""
    base = [random.randrange(256) for _ in range(longest)]
    asks = []
    for i in range(count):
        length = random.randrange(1, longest)
        own = [random.randrange(256) for _ in range(length)]
        prompt = base[:length] if random.random() < 0.5 else own
        law = {"temperature": 0.9, "top_p": 0.9, "seed": random.randrange(2**32)}
        asks.append(
            Ask(i, tuple(prompt), random.randrange(1, MOST + 1), **(law if sampled else {}))
        )
    return asks


def run(engine, asks, random):
    """Serve requests that arrive at random between steps."""
    out, left = {ask.ident: [] for ask in asks}, list(asks)
    while left or not engine.idle:
        for _ in range(random.randrange(3)):
            if left:
                engine.submit(left.pop(0))
        for event in engine.step():
            if event.token is not None:
                out[event.ident].append(event.token)
    figures = engine.figures()
    assert figures.pages_held == figures.running == figures.waiting == 0
    return [out[ask.ident] for ask in asks]


def by_itself(model, asks):
    """What each request gets alone."""
    found = []
    for ask in asks:
        law = Sampling(temperature=ask.temperature, top_p=ask.top_p)
        key = jax.random.key(ask.seed)
        made = generate(model, [ask.prompt], max_tokens=MOST, sampling=law, key=key).tokens[0]
        found.append(made[: ask.max_tokens])
    return found


@settings(max_examples=2, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_tokens_are_those_of_a_request_alone(params, alone, seed):
    random = Random(seed)
    asks = draw_asks(random, 8, 16)
    # Twenty pages of four tokens for three slots of up to thirty: pages run out.
    assert run(Engine(params, CONFIG, LAYOUT), asks, random) == by_itself(alone, asks)


def test_nothing_is_compiled_after_the_warm_up(params):
    engine = Engine(params, CONFIG, LAYOUT)
    engine.warm_up()
    before = steps._step._cache_size()
    run(engine, draw_asks(Random(0), 6, 16), Random(0))
    assert steps._step._cache_size() == before


@pytest.mark.slow
def test_draws_are_those_of_generate_with_the_same_seed(params, alone):
    asks = draw_asks(Random(1), 4, 15, sampled=True)
    assert run(Engine(params, CONFIG, LAYOUT), asks, Random(0)) == by_itself(alone, asks)


@pytest.mark.parametrize(
    ("rows", "count", "past", "window", "size"), [(2, 5, 3, 0, 2), (3, 1, 9, 4, 4)]
)
def test_paged_attention_is_attention(rows, count, past, window, size, monkeypatch):
    monkeypatch.setattr(paged, "BLOCK_TOKENS", 4)  # several rounds of the running softmax
    width, heads, shared = 4, 4, 2
    total = past + count
    keys = jax.random.split(jax.random.key(total), 3)
    q = jax.random.normal(keys[0], (rows, count, heads, width))
    k, v = (jax.random.normal(key, (rows, shared, total, width)) for key in keys[1:])
    pages = -(-total // size)
    table = np.random.default_rng(total).permutation(rows * pages).reshape(rows, pages)

    def in_pages(x):
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, pages * size - total), (0, 0)))
        cut = padded.reshape(rows, shared, pages, size, width).transpose(1, 0, 2, 3, 4)
        store = jnp.zeros((shared, rows * pages, size, width))
        return store.at[:, table.reshape(-1)].set(cut.reshape(shared, -1, size, width))

    start = jnp.full(rows, past)
    where = place(CONFIG, start[:, None] + jnp.arange(count)[None], window=window, slots=total,
                  start=start)  # fmt: skip
    run = jax.jit(paged.paged_attend, static_argnums=5)
    found = run(q, in_pages(k), in_pages(v), jnp.asarray(table), start, window)
    wanted = jax.jit(attend)(q, k, v, where.keep)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_the_engine_cannot_serve_is_refused(params):
    engine = Engine(params, CONFIG, LAYOUT)
    for ask, told in (
        (Ask(0, (256,), 1), "token id 256 is outside"),
        (Ask(0, (-1,), 1), "token id -1 is outside"),
        (Ask(0, (1,) * 60, 5), "64 together at most"),
    ):
        with pytest.raises(UserError, match=told):
            engine.submit(ask)
    assert engine.idle
    with pytest.raises(UserError, match="the model 256"):
        Engine(params, CONFIG, layout_for(257, slots=1))


FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 48, "max_position_embeddings": 64},
    "mistral": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 9,
                "max_position_embeddings": 64},
    "mixtral": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4,
                "num_experts_per_tok": 2, "max_position_embeddings": 64},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_other_families_too(family):
    fields = {"model_type": family, "vocab_size": 256, **FAMILIES[family]}
    config = lm.config_from_hf(fields)
    fresh = lm.init(jax.random.key(0), config)
    own = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, fresh)
    random = Random(3)
    asks = draw_asks(random, 8, 16)
    assert run(Engine(own, config, LAYOUT), asks, random) == by_itself(from_lm(own, config), asks)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_sizes_give_the_same_tokens(params, alone, seed):
    random = Random(seed)
    size = random.choice([1, 3, 8, 16])
    layout = replace(
        LAYOUT,
        slots=random.randrange(1, 6),
        page_tokens=size,
        pages=-(-30 // size) + random.randrange(6),
        context=40,
        prompt_rows=random.randrange(1, 4),
        row_tokens=random.choice([1, 4, 7]),
        reuse=random.random() < 0.7,
    )
    asks = draw_asks(random, 12, 16, sampled=random.random() < 0.3)
    assert run(Engine(params, CONFIG, layout), asks, random) == by_itself(alone, asks)


@pytest.mark.slow
def test_a_thousand_at_once_in_bounded_memory(params):
    engine = Engine(params, CONFIG, LAYOUT)
    asks = draw_asks(Random(5), 1000, 30)
    held = sum(x.nbytes for x in jax.tree.leaves(engine._state))
    for ask in asks:
        engine.submit(ask)
    ended = [event.ident for event in engine.run() if event.ended]
    assert sorted(ended) == list(range(1000))
    assert sum(x.nbytes for x in jax.tree.leaves(engine._state)) == held
    assert engine.figures().pages_held == 0
