"""Fine-tuning: a killed run continues bit for bit, the frozen stays, only answers are learned."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.data import (
    ByteTokenizer,
    InstructionStream,
    TokenStream,
    encode_example,
    read_instructions,
)
from jaxsys.models import lm, lora
from jaxsys.models.quantise import BLOCK_WEIGHTS, dequantise, quantise, weights
from jaxsys.train import NonFiniteError
from jaxsys.train.finetune import Recipe, finetune
from jaxsys.train.logs import JsonLines
from jaxsys.train.optimizers import adamw

CONFIG = lm.LMConfig("llama", 256, 32, 2, 4, 2, 8, 48, 64, rope=lm.Rope(width=8), tied=True)
STEPS = 8
RECIPES = {
    "full": Recipe(STEPS, "full", save_every=3),
    "lora": Recipe(STEPS, rank=4, save_every=3),
    "int8": Recipe(STEPS, rank=4, bits=8, save_every=3),
    "4bit": Recipe(STEPS, rank=4, bits=4, save_every=3),
}


@pytest.fixture(scope="module")
def params():
    return lm.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def stream():
    text = "what is learned at night is known by day. " * 20
    return TokenStream(ByteTokenizer().encode(text), batch=4, length=16, seed=5)


def _loss(params, tokens):
    return lm.loss(params, CONFIG, tokens)


# One object, so that a run, its killed copy and the rest of that share a compiled step.
OPTIMIZER = adamw(1e-2, warmup_steps=2, total_steps=STEPS, clip_norm=1.0)


def _equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_and_resumed_run_is_the_whole_one(name, params, stream, tmp_path):
    recipe = RECIPES[name]
    before = {path: np.array(x) for path, x in weights(params).items()}
    log = tmp_path / "log.jsonl"
    whole = finetune(params, _loss, stream.batch_at, OPTIMIZER, recipe, writer=JsonLines(log))
    assert whole.losses[-1] < whole.losses[0]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["loss"] for row in rows] == list(whole.losses)
    assert {"step", "grad_norm", "step_s"} < set(rows[0])
    # The caller's arrays are as they were, and still there.
    _equal(before, weights(params))

    def killed_at(step):
        if step == 5:
            raise KeyboardInterrupt
        return stream.batch_at(step)

    store = RunStore(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        finetune(params, _loss, killed_at, OPTIMIZER, recipe, store=store)
    assert store.latest() == 2
    rest = finetune(params, _loss, stream.batch_at, OPTIMIZER, recipe, store=store)
    assert rest.losses == whole.losses[3:]
    _equal(rest.params, whole.params)
    # A finished run has nothing left to do, and gives what it came to.
    again = finetune(params, _loss, stream.batch_at, OPTIMIZER, recipe, store=store)
    assert again.losses == ()
    _equal(again.adapters, whole.adapters)

    if recipe.method == "lora":
        base = quantise(params, bits=recipe.bits) if recipe.bits else params
        _equal(whole.params, lora.apply(base, whole.adapters))
        merged = lora.merge(base, whole.adapters)
        tokens = stream.batch_at(0)
        np.testing.assert_allclose(_loss(merged, tokens), _loss(whole.params, tokens), rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_beside_codes_are_those_beside_their_dequantised_copy(bits, params, stream):
    base = quantise(params, bits=bits)
    adapters = lora.init(jax.random.key(3), base, rank=2)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    batch = stream.batch_at(0)
    found, expected = (
        jax.grad(lambda a, b=b: _loss(lora.apply(b, a), batch))(adapters)
        for b in (base, dequantise(base))
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_checkpoint_of_another_run_is_refused(params, stream, tmp_path):
    store = RunStore(tmp_path)
    args = (params, _loss, stream.batch_at, OPTIMIZER)
    finetune(*args, Recipe(1, rank=4), store=store, meta={"text": "a", "split": (1, 2)})
    finetune(*args, Recipe(1, rank=4), store=store, meta={"text": "a", "split": (1, 2)})
    with pytest.raises(UserError, match="with text 'a' and this one has 'b'"):
        finetune(*args, Recipe(1, rank=4), store=store, meta={"text": "b", "split": (1, 2)})
    with pytest.raises(UserError, match=r"with alpha 16\.0 and this one has 8\.0"):
        finetune(*args, Recipe(1, rank=4, alpha=8.0), store=store, meta={"text": "a"})


def test_a_loss_that_is_no_number_stops_the_run(params, stream, tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(NonFiniteError):
        finetune(
            params,
            lambda p, tokens: _loss(p, tokens) * jnp.nan,
            stream.batch_at,
            OPTIMIZER,
            Recipe(2, save_every=1),
            store=store,
        )
    assert store.latest() is None


def test_instructions_are_learned_and_only_the_answers_count(params, tmp_path):
    path = tmp_path / "colours.jsonl"
    pairs = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
    rows = [{"prompt": f"{thing} is ", "completion": colour} for thing, colour in pairs.items()]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = ByteTokenizer()
    examples = [encode_example(e, tokenizer, end_id=10) for e in read_instructions(path)]
    stream = InstructionStream(examples, batch=4, length=20)

    tokens, mask = stream.batch_at(0)
    logits = np.asarray(lm.apply(params, CONFIG, tokens[:, :-1]).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = [-log_p[b, t - 1, tokens[b, t]] for b in range(4) for t in range(1, 21) if mask[b, t]]
    assert len(nats) == sum(len(colour) + 1 for colour in pairs.values())
    np.testing.assert_allclose(lm.loss(params, CONFIG, tokens, mask), np.mean(nats), rtol=1e-5)

    tuned = finetune(
        params,
        lambda p, batch: lm.loss(p, CONFIG, *batch),
        stream.batch_at,
        adamw(5e-3, weight_decay=0.0),
        Recipe(90, patterns=(*BLOCK_WEIGHTS, "*embed*"), rank=16, alpha=32.0),
    )
    assert tuned.losses[-1] < 0.1
    ids = tokenizer.encode("grass is ")
    for _ in range(5):
        logits = lm.apply(tuned.params, CONFIG, ids[None]).logits
        ids = np.append(ids, np.int32(logits[0, -1].argmax()))
    assert tokenizer.decode(ids) == "grass is green"


def test_mistakes_are_named():
    with pytest.raises(UserError, match="steps is 0"):
        Recipe(0)
    with pytest.raises(UserError, match="codes cannot be trained"):
        Recipe(1, "full", bits=8)
