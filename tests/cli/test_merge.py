"""`jaxsys merge run`: the plan, the merge, and mistakes told in one sentence."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxsys.cli import main
from jaxsys.core.checkpoint import read_safetensors, write_safetensors


@pytest.fixture
def recipe(tmp_path):
    for i, name in enumerate(("base", "a", "b")):
        arrays = {"w": np.full((8, 4), i, ml_dtypes.bfloat16), "v": np.arange(6.0)}
        write_safetensors(tmp_path / name, arrays, arrays.get)
    lines = [f"  - {{model: {tmp_path / name}, parameters: {{weight: 1}}}}" for name in ("a", "b")]
    text = "\n".join(["merge_method: ties", "models:", *lines, f"base_model: {tmp_path / 'base'}"])
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_plan_then_merge(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["merge", "run", str(recipe), "--out", str(out), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["tensor"] for row in told["plan"]] == ["w", "v"]
    assert told["budget"]["write_bytes"] == 64 + 48
    assert not list(out.glob("*.safetensors"))
    assert main(["merge", "run", str(recipe), "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["resumed"] == 0
    assert "peak memory about" in captured.err
    merged = read_safetensors(out)
    assert merged["w"].dtype == ml_dtypes.bfloat16
    assert (merged["w"] == 1.5).all()
    assert merged["v"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_plan_can_be_read(recipe, capsys):
    assert main(["merge", "run", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "8×4" in shown
    assert "2 tensors: reads" in shown


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("merge_method: ties", "merge_method: ties\nlayers: 3"), "layers is not supported"),
        (("weight: 1", "density: 0.5"), "ties has no weight for"),
        (("weight: 1", "weight: 1, density: 7"), "density is 7"),
        (("merge_method: ties", "merge_method: [ties]"), "no merge_method"),
    ],
)
def test_mistakes_end_with_status_2(change, told, recipe, tmp_path, capsys):
    recipe.write_text(recipe.read_text().replace(*change))
    assert main(["merge", "run", str(recipe), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("jaxsys: error: ")
    assert "Traceback" not in error


def test_a_folder_must_be_named(recipe, capsys):
    assert main(["merge", "run", str(recipe)]) == 2
    assert "pass --out" in capsys.readouterr().err
