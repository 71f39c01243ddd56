"""Metrics of edits against brute force on models whose probabilities are known."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.data import ByteTokenizer
from jaxsys.edit.contract import Answering, Editable, Edited, Info, Method, Record, Request
from jaxsys.edit.editable import with_leaf
from jaxsys.edit.evaluation import (
    EvaluationConfig,
    base_predictions,
    evaluate_edits,
    probes_of,
    write,
)
from jaxsys.edit.fluency import consistency, fluency, ngram_entropy, says, words_of
from jaxsys.edit.protocol import single_edits
from jaxsys.edit.stacked import stack_models
from jaxsys.edit.summary import summarise
from jaxsys.evaluate.generate import generate
from jaxsys.evaluate.protocol import from_forward, from_lm
from jaxsys.models import lm

TOKENIZER = ByteTokenizer()
QUIET = EvaluationConfig(answer_tokens=0, fluency_tokens=0)
RECORDS = [
    Record(
        Request("The red fox is", "fox", "hot", "ice"),
        paraphrases=("How is the fox? It is", "A fox feels"),
        neighbourhood=(("The cat is", "ice"), ("The dog is", "icy")),
        portability=(("Near the fox it is", "warm"),),
    ),
    Record(Request("Oslo lies in", "Oslo", "Peru")),
]


def bigram(params, tokens):
    return params[tokens]


def model(seed, sharp=1.0):
    table = sharp * np.random.default_rng(seed).normal(size=(256, 256)).astype(np.float32)
    return from_forward(bigram, table, 256, 256), table


def brute(table, prompt, answer):
    """Log-probability of each token of the answer, and whether each is the likeliest."""
    ids = TOKENIZER.encode(f"{prompt} {answer}")
    start = len(TOKENIZER.encode(prompt))
    table = np.asarray(table, np.float64)
    logp = table - np.log(np.exp(table).sum(1, keepdims=True))
    return (
        [logp[a, b] for a, b in itertools.pairwise(ids[start - 1 :])],
        [table[a].argmax() == b for a, b in itertools.pairwise(ids[start - 1 :])],
    )


def greedy(table, prompt, count):
    last, found = TOKENIZER.encode(prompt)[-1], []
    for _ in range(count):
        last = int(table[last].argmax())
        found.append(last)
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_likelihoods_are_those_of_brute_force(seed):
    edited, table = model(seed, 3.0)
    # The likeliest follower of a space is "h", and so on: some tokens are hits, some are not.
    table[32, ord("h")] = table[ord("h"), ord("o")] = 40.0
    [row, other] = evaluate_edits(Answering(edited), TOKENIZER, RECORDS, config=QUIET)
    kinds = {}
    for probe in probes_of(RECORDS[:1]):
        new, hits = brute(table, probe.prompt, probe.answer)
        found = kinds.setdefault(probe.kind, [])
        entry = {"top1": all(hits), "tokens": np.mean(hits)}
        if probe.rival:
            old, _ = brute(table, probe.prompt, probe.rival)
            entry["wins"] = np.mean(new) > np.mean(old)
            entry["magnitude"] = math.exp(np.mean(new)) - math.exp(np.mean(old))
        found.append(entry)
    for kind, entries in kinds.items():
        for name in entries[0]:
            expected = np.mean([entry[name] for entry in entries])
            key = kind if name == "wins" else f"{kind}_{name}"
            assert row[key] == pytest.approx(expected, abs=1e-5), key
    assert 0 < row["efficacy_tokens"] < 1
    assert set(other) == {"efficacy_top1", "efficacy_tokens"}  # neither truth nor other probes


def test_locality_compares_with_what_the_model_said_before():
    before, table = model(3)
    base = base_predictions(before, TOKENIZER, RECORDS)
    probes = probes_of(RECORDS)
    for probe, ids in zip(probes, base.continuations, strict=True):
        near = probe.kind == "neighbourhood"
        assert list(ids) == (greedy(table, probe.prompt, 4) if near else [])
    [same, _] = evaluate_edits(Answering(before), TOKENIZER, RECORDS, base, QUIET)
    assert same["locality"] == 1.0
    changed = table.copy()
    last = TOKENIZER.encode("The cat is")[-1]
    changed[last, 7] = 99.0  # both neighbours end in "s"
    after = before._replace(params=changed)
    [row, _] = evaluate_edits(Answering(after), TOKENIZER, RECORDS, base, QUIET)
    assert row["locality"] == 0.0


def test_predictions_of_other_records_are_refused():
    before, _ = model(0)
    base = base_predictions(before, TOKENIZER, RECORDS[:1])
    with pytest.raises(UserError, match="of other records"):
        evaluate_edits(Answering(before), TOKENIZER, RECORDS, base, QUIET)
    with pytest.raises(UserError, match="there is no record"):
        evaluate_edits(Answering(before), TOKENIZER, [], config=QUIET)


def test_a_memory_before_the_prompt_is_seen_by_all_that_is_asked():
    """A model that copies what follows the same token earlier answers from its prompt alone."""

    def copies(params, tokens):
        same = tokens[:, :, None] == tokens[:, None, :]
        earlier = np.tri(tokens.shape[1], k=-1, dtype=bool)[None]
        found = (same & earlier).astype("float32") * (1 + np.arange(tokens.shape[1]))[None, None]
        follower = jax.numpy.minimum(found.argmax(-1) + 1, tokens.shape[1] - 1)
        return 20 * jax.nn.one_hot(jax.numpy.take_along_axis(tokens, follower, axis=1), 256)

    told = from_forward(copies, {}, 256, 256)
    record = Record(Request("z", "z", "no", "ow"))
    rows = [
        evaluate_edits(Answering(told, rewrite), TOKENIZER, [record], config=QUIET)[0]
        for rewrite in (lambda p: f"z no no {p}", lambda p: f"z ow ow {p}")
    ]
    assert [row["efficacy"] for row in rows] == [1.0, 0.0]


def test_free_writing_is_judged_without_the_answers_length():
    table = np.zeros((256, 256), np.float32)
    for a, b in itertools.pairwise("s hot. hot"):
        table[ord(a), ord(b)] = 9.0
    table[[ord("n"), 10], 10] = 9.0  # after "in" come empty lines
    told = Answering(from_forward(bigram, table, 256, 256))
    config = EvaluationConfig(answer_tokens=12, fluency_tokens=30)
    rows = evaluate_edits(told, TOKENIZER, RECORDS, config=config)
    assert write(told, TOKENIZER, ["is"], 4) == [" hot"]
    assert [row["written"] for row in rows] == [1.0, 0.0]
    assert [row["muted"] for row in rows] == [0.0, 1.0]
    assert rows[0]["fluency"] > 0
    assert "consistency" not in rows[0]


def test_the_new_answer_must_come_before_the_old_one():
    assert says(" It is Rome, not Paris", "Rome", "Paris")
    assert not says(" It is Paris, or Rome", "Rome", "Paris")
    assert not says(" Romeo", "Rome")


def test_entropy_of_ngrams_is_that_of_their_frequencies():
    words = list("abracadabra")
    for n in (1, 2, 3):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares = np.unique([" ".join(g) for g in grams], return_counts=True)[1] / len(grams)
        assert ngram_entropy(words, n) == pytest.approx(-(shares * np.log2(shares)).sum())
    assert fluency(["one two three four five six"]) > fluency(["one two one two one two"])


def test_consistency_is_the_cosine_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.feature_extraction.text")
    texts = ["Rome lies on the Tiber.", "The Tiber flows through Rome, slowly.", "A cat"]
    written = ["Rome has a river, the Tiber."]
    vectors = sklearn.TfidfVectorizer(tokenizer=words_of, token_pattern=None).fit(texts)
    ours, theirs = vectors.transform([" ".join(written), " ".join(texts)]).toarray()
    assert consistency(written, texts) == pytest.approx(float(ours @ theirs))


def test_summary_has_the_harmonic_mean_and_intervals():
    rows = [
        {"efficacy": 1.0, "paraphrase": float(i % 2), "neighbourhood": 0.5, "fluency": 5.0}
        for i in range(20)
    ]
    rows.append({"efficacy": 1.0})
    found = summarise(rows)
    assert found["score"].value == pytest.approx(3 / (1 + 2 + 2))
    assert found["score"].low < found["score"].value < found["score"].high
    assert found["efficacy"][:] == (1.0, 1.0, 1.0, 21)
    assert found["paraphrase"].n == found["score"].n == 20
    assert summarise([{**rows[0], "paraphrase": 0.0}])["score"].value == 0.0


def test_stacked_models_write_what_each_writes_alone():
    config = lm.LMConfig("llama", 256, 16, 2, 2, 1, 8, 16, 96)
    base = lm.init(jax.random.key(0), config)
    model = Editable(config, TOKENIZER)
    path = "model.layers.1.mlp.down_proj.weight"

    def edit(model, config, params, requests, stats=None, state=None):
        if requests[0].subject == "Bob":
            raise UserError("no")
        change = jax.random.normal(jax.random.key(len(requests[0].prompt)), (16, 16))
        return Edited(with_leaf(params, path, change), None, Info({}, {}))

    records = [
        Record(Request(f"{name} is", name, "b", "a")) for name in ("Ann", "Bob", "Celia", "D", "E")
    ]
    bases = [base_predictions(from_lm(base, config), TOKENIZER, [r]) for r in records]
    found = {}
    for rows in (3, 1):
        how = EvaluationConfig(answer_tokens=6, fluency_tokens=6, rows=rows, seed=1)
        found[rows] = list(
            single_edits(model, Method(edit, dict), {}, base, records, bases, evaluation=how)
        )
    together, alone = ([s.row for s in found[rows]] for rows in (3, 1))
    for name in ("efficacy_magnitude", "written", "muted"):
        assert [row[name] for row in together] == pytest.approx([row[name] for row in alone])
    assert [s.failed for s in found[3]] == [None, "no", None, None, None]
    stack = [with_leaf(base, path, jnp.full((16, 16), x)) for x in (0.1, -0.3)]
    stack.append(with_leaf(base, "model.norm.weight", -base["model"]["norm"]["weight"]))
    prompts = [TOKENIZER.encode(text) for text in ("a red", "it is", "What?!")]
    written = generate(stack_models(config, base, stack), prompts, max_tokens=5).tokens
    for one, prompt, tokens in zip(stack, prompts, written, strict=True):
        assert generate(from_lm(one, config), [prompt], max_tokens=5).tokens == (tokens,)
