"""Grids of training steps: rows, what cannot run, going on where a run stopped; and the verbs."""

import json

import jax
import pytest

from jaxsys.bench import finetune, train
from jaxsys.bench.records import read
from jaxsys.bench.step import Task
from jaxsys.bench.techniques import Technique
from jaxsys.cli import main
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 64, 16, 1, 4, 2, 4, 24, 32)
TASK = Task(batch=1, tokens=7)


MANY = [Technique(), Technique(donate=True), Technique(attention="cudnn")]


def grid(techniques=MANY, **options):
    options = {"runs": 3, "memory": False, "devices": jax.devices()[:1]} | options
    return train.measure("tiny", CONFIG, techniques, TASK, **options)


def test_a_grid_has_a_row_for_every_cell_and_goes_on():
    said = []
    rows = grid(on_row=said.append)
    assert [row["status"] for row in rows] == ["ok", "ok", "not here"]
    assert sorted(map(str, said)) == sorted(map(str, rows))
    for row in rows[:2]:
        assert 0 < row["mfu"] <= row["hfu"]
        assert row["tokens_per_s"] == 7 / row["step"]["median_s"]
        assert row["step"]["low_s"] <= row["step"]["median_s"] <= row["step"]["high_s"]
    first, again = rows[0] | {"mark": 1}, []
    later = grid(done=[first], on_row=again.append)
    assert later[0] == first
    assert len(again) == 2


def test_a_cell_that_would_not_fit_is_a_row():
    rows = grid(MANY[1:], budget_bytes=1000)
    assert [row["status"] for row in rows] == ["out of memory", "not here"]
    assert "by static analysis" in rows[0]["why"]
    assert rows[0]["peak_memory_predicted_bytes"] > 1000


def test_qlora_is_lora_beside_codes():
    rows = finetune.measure(
        "tiny", CONFIG, ["qlora"], [Technique(), Technique(zero=1)],
        Task(batch=1, tokens=7, rank=2), runs=1, memory=False, devices=jax.devices()[:1],
    )  # fmt: skip
    assert rows[0]["flags"]["technique"] == "weights 4bit"
    assert rows[0]["flags"]["method"] == "lora"
    assert rows[1]["status"] == "not here"


def test_verbs_write_rows_and_do_not_repeat_them(tmp_path, capsys):
    sizes = ["--batch", "1", "--tokens", "8", "--out", str(tmp_path), "--json"]
    options = [*sizes, "--most", "0", "--no-memory", "--attention", "cudnn"]
    for _ in range(2):
        assert main(["bench", "train", "tiny", *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert found[0]["status"] == "not here"
    assert "GPU" in found[0]["why"]
    assert len(read(tmp_path / "train.jsonl")) == 1


@pytest.mark.slow
def test_the_static_verb_searches_what_fits(tmp_path, capsys):
    options = ["--tokens", "8", "--most", "0", "--budget-gib", "0.5", "--fits", "--json"]
    assert main(["bench", "static", "tiny", *options, "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert found[0]["largest_batch"] > 1
    assert found[0]["peak_memory_predicted_bytes"] <= 2**29


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["llama9"], "llama2-7b"),
        (["--batch", "0"], "--batch is 0"),
        (["--accumulate", "0"], "--accumulate"),
        (["--budget-gib", "-1"], "--budget-gib"),
    ],
)
def test_mistakes_are_one_sentence(given, said, capsys):
    assert main(["bench", "train", *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert said in error[0]
