"""`jaxsys bench`: operators, copies, reports and comparisons from the command line."""

import json

import pytest

from jaxsys import cli
from jaxsys.bench import ops, roofline
from jaxsys.core.report import write_jsonl


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "peaks", lambda *_: roofline.Peaks(1e9, 1e9, "a test's"))
    out = tmp_path / "results"
    chosen = ["--size", "smoke", "--groups", "softmax", "--runs", "2"]
    assert cli.main(["bench", "ops", *chosen, "--json", "--out", str(out)]) == 0
    sizes = ["--sizes", "1024", "4096", "16384"]
    assert cli.main(["bench", "comm", *sizes, "--runs", "2", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[0])["rows"][0]["kind"] == "ops"
    return out


def test_results_are_reported_and_compared(measured, capsys):
    assert cli.main(["bench", "report", "--results", str(measured), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] > 10
    assert "softmax" in (measured / "report.html").read_text()
    both = ["--a", str(measured), "--b", str(measured)]
    assert cli.main(["bench", "compare", *both, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["only_a"]
    assert not any(change["significant"] for change in found["changes"])
    assert cli.main(["bench", "compare", *both]) == 0
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "--results", "RESULTS"], "has format 2"),
        (["compare", "--a", "RESULTS", "--b", "RESULTS"], "has format 2"),
        (["report", "--results", "RESULTS/none"], "cannot be read"),
        (["ops", "--runs", "0"], "--runs is 0"),
        (["ops", "--groups", "dance"], "dance"),
        (["comm", "--virtual", "99"], "--virtual is 99"),
        (["modules", "--model", "nothing"], "nothing"),
        (["modules", "--batch", "0"], "--batch is 0"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, tmp_path, capsys):
    write_jsonl(tmp_path / "x.jsonl", [{"format": 2, "kind": "train"}])
    given = [argument.replace("RESULTS", str(tmp_path)) for argument in arguments]
    assert cli.main(["bench", *given]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
