"""The model that comes with the package: it is found from anywhere, has learned, and writes."""

import json
import math

import jax.numpy as jnp
import pytest

from jaxsys.cli import main
from jaxsys.data import python_docs
from jaxsys.evaluate import perplexity
from jaxsys.evaluate.open import open_model

# Not in any Python; the manner is that of its documentation.
UNSEEN = (
    "A basket holds the objects that were put into it. If the optional argument *size* is given, "
    "it must be an integer; otherwise a ValueError is raised. Return the first object that is "
    "equal to the given value, or None if there is no such object."
)


@pytest.fixture(scope="module")
def tiny():
    return open_model("tiny", dtype=jnp.float32)


def test_it_predicts_text_that_it_has_seen_and_text_that_it_has_not(tiny):
    uniform = math.log(tiny.config.vocab_size)
    docs = python_docs()
    begin = docs.index('The "del" statement') if 'The "del" statement' in docs else 0
    for text, most in ((docs[begin : begin + 4000], 0.6), (UNSEEN, 0.65)):
        found = perplexity(tiny.model, tiny.tokenizer, [text])
        assert found.nats_per_token < most * uniform
        assert found.tokens < 0.5 * found.bytes  # its byte pairs are those of such text
    shuffled = " ".join(sorted(UNSEEN.split()))
    other = perplexity(tiny.model, tiny.tokenizer, [shuffled]).nats_per_token
    assert other > 1.2 * perplexity(tiny.model, tiny.tokenizer, [UNSEEN]).nats_per_token


def test_the_commands_work_from_any_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = ["--prompt", "The return value is", "--max-tokens", "12"]
    assert main(["lm", "generate", "tiny", *options, "--temperature", "0.7", "--seed", "1"]) == 0
    text = capfd.readouterr().out
    assert len(text.split()) >= 3
    assert sum(letter.isascii() for letter in text) > 0.9 * len(text)

    rows = [
        {"context": "The return value is", "choices": ["a string", "the sea"], "answer": 0},
        {"context": "Return the number of", "choices": ["kings", "items"], "answer": 1},
        {"context": "Raised when the file is not", "choices": ["found", "hungry"], "answer": 0},
        {"context": "If the argument is omitted, the default is", "choices": ["used", "sad"]}
        | {"answer": 0},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["lm", "eval", "tiny", "--task", "mine.jsonl", "--json"]) == 0
    [task] = json.loads(capfd.readouterr().out)["tasks"]
    assert [row["metric"] for row in task["rows"]] == ["acc", "acc_norm"]
    assert task["rows"][0]["value"] >= 0.75
    assert task["rows"][0]["chance"] == 0.5
