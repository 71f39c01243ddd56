"""`jaxsys lm`: text alone on standard output, a seed is a text, mistakes are one sentence."""

import json
import os

import jax
import pytest

from jaxsys.cli import main
from jaxsys.data import python_docs, train_bpe
from jaxsys.data.tokenizer import LMTokenizer, save_tokenizer
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 300, 32, 2, 4, 2, 8, 48, 64, rope=lm.Rope(width=8), eos_ids=(0,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a small model of the user's own, as any program would."""
    path = tmp_path_factory.mktemp("own")
    fresh = lm.init(jax.random.key(0), CONFIG)
    lm.save(path, jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, fresh), CONFIG)
    bpe = train_bpe(python_docs()[:20_000], 300).tokenizer
    save_tokenizer(path, LMTokenizer(bpe, bos_id=0, eos_id=0))
    return str(path)


def _json(capfd, *argv):
    capfd.readouterr()
    assert main(["lm", *argv, "--json"]) == 0
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_info(folder, capfd):
    facts = _json(capfd, "info", folder)
    sizes = [leaf.size for leaf in jax.tree.leaves(lm.shapes(CONFIG))]
    assert (facts["parameters"], facts["tensors"]) == (sum(sizes), len(sizes))
    assert facts["tokenizer"] == "300 tokens"
    assert main(["lm", "info", folder]) == 0
    assert "kv_heads" in capfd.readouterr().out


def test_convert_and_generate_the_same(folder, tmp_path, capfd):
    options = ["--prompt", "The value of", "--max-tokens", "9", "--temperature", "0.8"]
    first = _json(capfd, "generate", folder, *options, "--seed", "3")
    out = tmp_path / "copy"
    found = _json(capfd, "convert", folder, "--out", str(out))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        os.path.basename(file) for file in found["files"]
    }
    again = _json(capfd, "generate", str(out), *options, "--seed", "3", "--out", str(tmp_path))
    assert again["text"] == first["text"]
    assert again["tokens"] == first["tokens"]
    assert json.loads((tmp_path / "generate.json").read_text())["text"] == first["text"]
    other = _json(capfd, "generate", folder, *options, "--seed", "4")
    assert other["tokens"] != first["tokens"]


def test_text_alone_on_stdout(folder, capfd):
    options = ["--prompt", "The value of", "--max-tokens", "6"]
    found = _json(capfd, "generate", folder, *options)
    assert main(["lm", "generate", folder, *options]) == 0
    out, err = capfd.readouterr()
    assert out == found["text"] + "\n"
    assert "6 tokens" in err
    assert "ended by length" in err


def test_eval_own_questions(folder, tmp_path, capfd):
    row = {"context": "Which?", "choices": ["this one", "that"], "answer": 1}
    (tmp_path / "own.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    (tmp_path / "own.txt").write_text("An assignment statement evaluates the list. " * 20)
    files = [str(tmp_path / "own.jsonl"), str(tmp_path / "own.txt")]
    out = tmp_path / "out"
    found = _json(capfd, "eval", folder, "--task", *files, "--limit", "2", "--out", str(out))
    [choice, text] = found["tasks"]
    assert [r["metric"] for r in choice["rows"]] == ["acc", "acc_norm"]
    assert all(r["n"] == 2 and r["chance"] == 0.5 for r in choice["rows"])
    assert {"low", "high", "empty", "constant", "majority"} <= set(choice["rows"][0])
    assert text["rows"][0]["bytes"] == 20 * len("An assignment statement evaluates the list. ")
    assert "the first 2 of 3" in choice["protocol"]
    assert len((out / "own.jsonl").read_text().splitlines()) == 2
    assert (out / "eval.md").read_text().count("## ") == 2
    assert main(["lm", "eval", folder, "--task", files[1], "--window", "32", "--stride", "8"]) == 0
    assert "windows moved by 8 of 32 input tokens" in capfd.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["info", "no/such/model"], "no/such/model"),
        (["generate", "MODEL", "--prompt", "a", "--top-p", "0"], "top_p is 0"),
        (["generate", "MODEL", "--prompt", "a", "--max-tokens", "99"], "the model's context holds"),
        (["generate", "MODEL", "--prompt", "a", "--chat"], "chat template"),
        (["eval", "MODEL", "--task", "arc"], "no task 'arc'"),
        (["eval", "MODEL", "--task", "no.jsonl"], "no.jsonl cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(folder, argv, says, capfd):
    assert main(["lm", *[folder if a == "MODEL" else a for a in argv]]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert says in err
    assert err.strip().count("\n") == 0
    assert "Traceback" not in err
