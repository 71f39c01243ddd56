"""`jaxsys doctor`: it says what is there, what is missing, and how to get it."""

import json
import tomllib
from pathlib import Path

from jaxsys import cluster
from jaxsys.cli import doctor, main


def test_json_holds_everything(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["devices"]) == 8
    assert "device" in found["devices"][0]["memory_kinds"]
    assert found["machine"]["cores"] >= 1
    assert found["workers"]["most"] >= 1
    assert isinstance(found["shaped_networks"]["ok"], bool)
    assert found["extras"]["bpe"] is True
    assert any("accelerator" in remedy for remedy in found["remedies"])


def test_what_is_missing_comes_last_with_its_remedy(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_has", lambda module: module == "torch")
    refused = cluster.Availability(False, "", "tc is missing", "install iproute2")
    monkeypatch.setattr(cluster, "available", lambda: refused)
    assert main(["doctor"]) == 0
    table, _, rest = capsys.readouterr().out.partition("To get the rest:")
    assert "no: tc is missing" in table
    assert "extra peers" in table
    assert "pip install 'jaxsys[bpe]'" in rest
    assert "jaxsys[peers]" not in rest
    assert "install iproute2" in rest


def test_the_extras_are_those_of_the_package():
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(declared["optional-dependencies"]) - {"test", "dev"}
