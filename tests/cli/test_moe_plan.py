"""`jaxsys moe plan` and `profile`: tables, files, one sentence for a mistake."""

import json

import pytest

from jaxsys.cli import main
from jaxsys.core.measure import timing
from jaxsys.moe import profile
from jaxsys.moe.contract import MoEPlan
from jaxsys.moe.costs import TESTBED_B, Costs

SMALL = ("--layers", "2", "--degrees", "1", "2", "--systems", "tutel", "jaxsys")


def test_plan_from_a_file(tmp_path, capsys):
    (tmp_path / "costs.json").write_text(TESTBED_B.to_json())
    costs = ("--costs", str(tmp_path / "costs.json"))
    assert main(["moe", "plan", *SMALL, *costs, "--json", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["system"] for row in found["rows"]] == ["tutel", "jaxsys"]
    assert found["rows"][1]["speed-up"] > 1
    chosen = MoEPlan.from_json((tmp_path / "plan.json").read_text())
    assert chosen == MoEPlan.from_json(found["plan"])
    assert len(chosen.layers) == 2
    assert (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--costs", "nowhere.json"), "cannot be read"),
        (("--degrees", "0", "2"), "different whole numbers from 1 up"),
        (("--systems", "megatron"), "the system is 'megatron'"),
        (("--min-r2", "2"), "r²"),
        (("--layers", "0"), "there are 0 layers"),
        (("--hidden", "-1"), "hidden is -1"),
    ],
)
def test_plan_refuses(options, sentence, tmp_path, capsys):
    assert main(["moe", "plan", "--out", str(tmp_path), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_profile_writes_what_plan_reads(tmp_path, capsys, monkeypatch):
    def clock(functions, *, runs):
        return {k: timing(k, [1e-3 * (1 + int(k))] * runs) for k in functions}

    monkeypatch.setattr(profile, "interleaved", clock)
    sizes = ("--elements", "64", "128", "192", "--width", "8", "--tensor", "2")
    assert main(["moe", "profile", *sizes, "--out", str(tmp_path)]) == 0
    assert "4 expert ranks × 2" in capsys.readouterr().out
    found = Costs.from_json((tmp_path / "costs.json").read_text())
    assert found.all_to_all.beta_s_per_unit == pytest.approx(1e-3 / 64)
    assert main(["moe", "profile", "--tensor", "3", "--out", str(tmp_path)]) == 2
    assert "3 tensor ranks" in capsys.readouterr().err
