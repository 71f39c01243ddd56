"""`jaxsys edit`: a fact changed in files, undone, evaluated; mistakes told in one sentence."""

import json

import numpy as np
import pytest

from jaxsys.cli import main
from jaxsys.core.checkpoint import read_safetensors
from jaxsys.models import lm

FACT = ("The capital of Norway is", "Norway", "Lima")
ONE = ["--prompt", FACT[0], "--subject", FACT[1], "--target", FACT[2]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Write the small model as a folder of safetensors."""
    out = tmp_path_factory.mktemp("plain")
    assert main(["lm", "convert", "tiny", "--out", str(out), "--json"]) == 0
    return out


@pytest.fixture(scope="module")
def edited(plain, tmp_path_factory):
    out = tmp_path_factory.mktemp("edited")
    settings = out / "settings.json"
    settings.write_text('{"layers": [1], "steps": 60, "lr": 0.02, "stop": 0.02}')
    how = ["--method", "ft-m", "--settings", str(settings)]
    assert main(["edit", "apply", str(plain), *how, *ONE, "--out", str(out)]) == 0
    return out


@pytest.fixture
def facts(tmp_path):
    rows = [
        {
            "prompt": "{} lives in",
            "subject": name,
            "target": "Rome",
            "truth": "Oslo",
            "neighbourhood": [["Snow falls in", "Oslo"]],
        }
        for name in ("Ann", "Bob")
    ]
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def told(capsys):
    return json.loads(capsys.readouterr().out)


def test_an_edited_checkpoint_answers_and_is_undone(plain, edited, tmp_path, capsys):
    capsys.readouterr()
    how = ["--prompt", FACT[0], "--max-tokens", "5", "--json"]
    assert main(["lm", "generate", str(edited), *how]) == 0
    assert told(capsys)["text"].strip().startswith("Lima")
    before, after = read_safetensors(plain), read_safetensors(edited)
    assert list(before) == list(after)
    changed = [n for n in before if not np.array_equal(before[n], after[n])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    back = tmp_path / "back"
    undo = ["--undo", str(edited / "edit"), "--out", str(back), "--json"]
    assert main(["edit", "apply", str(edited), *undo]) == 0
    assert told(capsys)["files"]
    restored = read_safetensors(back)
    for name, array in before.items():
        assert restored[name].dtype == array.dtype
        assert np.array_equal(restored[name].view(np.uint8), array.view(np.uint8)), name
    undo[1] = str(plain)
    assert main(["edit", "apply", str(edited), *undo]) == 2
    assert "holds no edit" in capsys.readouterr().err


def test_transformers_answers_the_edited_fact(edited):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from jaxsys.data import load_tokenizer

    tokenizer = load_tokenizer(edited)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(edited), dtype=torch.float32)
    ids = list(tokenizer.encode(FACT[0]))
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.decode(ids).startswith(f"{FACT[0]} {FACT[2]}")


def test_evaluate_a_checkpoint_beside_its_base(plain, edited, facts, tmp_path, capsys):
    capsys.readouterr()
    how = ["--records", str(facts), "--base", str(plain), "--out", str(tmp_path), "--json"]
    assert main(["edit", "evaluate", str(edited), *how]) == 0
    found = {row["metric"]: row for row in told(capsys)["metrics"]}
    assert found["efficacy"]["n"] == 2
    assert {"neighbourhood", "locality", "written"} <= set(found)
    lines = (tmp_path / "evaluate.jsonl").read_text().splitlines()
    assert [json.loads(line)["subject"] for line in lines] == ["Ann", "Bob"]


@pytest.mark.slow
def test_evaluate_a_method_edit_by_edit(facts, tmp_path, capsys):
    how = ["--method", "ft-m", "--layers", "1", "--limit", "1", "--answer-tokens", "0", "--json"]
    assert main(["edit", "evaluate", "tiny", "--records", str(facts), *how]) == 0
    found = told(capsys)
    assert found["records"] == 1
    assert found["failed"] == 0
    assert "edit_s" in {row["metric"] for row in found["metrics"]}


def test_curve_goes_on_where_it_stopped(facts, tmp_path, capsys):
    task = tmp_path / "task.jsonl"
    task.write_text('{"context": "One and one is", "choices": ["two", "six"], "answer": 0}')
    how = ["--records", str(facts), "--methods", "ft-m", "--task", str(task), "--json"]
    how += ["--out", str(tmp_path / "out"), "--answer-tokens", "0"]
    settings = tmp_path / "settings.json"
    settings.write_text('{"mine": {"method": "ft-m", "layers": [1], "steps": 3}}')
    how[3:4] = ["mine", "--settings", str(settings)]
    for counts in (["0", "1"], ["0", "1", "2"]):
        assert main(["edit", "curve", "tiny", *how, "--counts", *counts]) == 0
        captured = capsys.readouterr()
    cells = json.loads(captured.out)["cells"]
    assert [(cell["method"], cell["n"]) for cell in cells] == [
        ("unedited", 0),
        ("mine", 1),
        ("mine", 2),
    ]
    assert captured.err.count("method ") == 1  # two cells were there
    assert {f.name for f in (tmp_path / "out").iterdir()} >= {
        "cells.jsonl",
        "curve.md",
        "curve.png",
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"rome": {}}', "which --methods does not name"),
        ('{"ft-m": 3}', "has a int for ft-m"),
        ('{"ft-m": {"stepz": 3}}', "has no setting 'stepz'"),
        ('{"ft-m": {"method": "roam"}}', "is no editing method"),
    ],
)
def test_settings_of_a_curve_that_say_nothing_end_with_status_2(
    text, sentence, facts, tmp_path, capsys
):
    settings = tmp_path / "settings.json"
    settings.write_text(text)
    how = ["--records", str(facts), "--methods", "ft-m", "--settings", str(settings)]
    assert main(["edit", "curve", "tiny", *how]) == 2
    assert sentence in capsys.readouterr().err


def test_statistics_are_made_and_read(tmp_path, capsys):
    out = tmp_path / "stats"
    how = ["--layers", "0", "1", "--tokens", "300", "--length", "32", "--rows", "1", "--json"]
    assert main(["edit", "stats", "tiny", *how, "--out", str(out)]) == 0
    assert told(capsys)["layers"] == [0, 1]
    from jaxsys.edit import stats

    found = stats.load(out)
    width = lm.load_config(lm.find_model("tiny")).ffn_width
    assert found.moment(1).shape == (width, width)
    assert found.tokens == 288


@pytest.mark.slow
def test_trace_chooses_layers(facts, tmp_path, capsys):
    how = ["--samples", "2", "--json", "--out"]
    one, many = ["--prompt", FACT[0], "--subject", FACT[1]], ["--records", str(facts)]
    for given, out in ((one, tmp_path / "one"), ([*many, "--limit", "1"], tmp_path / "many")):
        assert main(["edit", "trace", "tiny", *given, *how, str(out)]) == 0
        found = told(capsys)
        assert 0 <= found["layers"][-1] < 4
        assert {f.name for f in out.iterdir()} == {"trace.json", "trace.png"}
    assert len(found["traces"]) == 1
    assert main(["edit", "trace", "tiny"]) == 2
    assert "expected either --prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", "Oslo is in", "--subject", "Rome", "--target", "Peru"], "does not name"),
        (["--prompt", "Oslo is in", "--subject", "Oslo", "--target", " "], "empty target"),
        (["--prompt", "Oslo is in", "--subject", "Oslo"], "give all three"),
        ([], "expected either --records"),
        ([*ONE, "--method", "roam"], "is no editing method"),
        ([*ONE, "--method", "ft-m", "--layers", "99"], "(99,)"),
        ([*ONE, "--method", "grace"], "keeps its edits beside the weights"),
        ([*ONE, "--method", "memit"], "jaxsys edit stats"),
        ([*ONE, "--undo", "edit"], "takes an edit out"),
        ([*ONE, "--settings", "SETTINGS"], "has no setting 'stepz'"),
        (["--records", "nowhere.json"], "nowhere.json"),
        (["--records", "TWICE"], "contradict each other"),
        (["--records", "SAME"], "are the same"),
    ],
)
def test_mistakes_end_with_status_2(options, sentence, tmp_path, capsys):
    fact = {"prompt": "{} is in", "subject": "Oslo", "target": "Peru"}
    texts = {
        "SETTINGS": '{"stepz": 1}',
        "TWICE": "\n".join(map(json.dumps, (fact, {**fact, "target": "Chile"}))),
        "SAME": "\n".join(map(json.dumps, (fact, fact))),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    given = [str(tmp_path / f"{o}.jsonl") if o in texts else o for o in options]
    out = tmp_path / "out"
    assert main(["edit", "apply", "tiny", *given, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("jaxsys: error: ") == 1
    assert "Traceback" not in error
    assert not list(out.glob("*.safetensors"))
