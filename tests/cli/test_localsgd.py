"""`jaxsys localsgd`: mistakes are one sentence and status 2; plans need no hardware."""

import json
import socket

import pytest

from jaxsys.cli import main
from jaxsys.cluster import Availability
from jaxsys.core.cost import LinearCost
from jaxsys.localsgd import Profile, supervise

SMALL = ["--model", "tiny", "--batch", "2", "--length", "16", "--workers", "2"]


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def _one_sentence(capsys, says):
    captured = capsys.readouterr()
    assert captured.out == ""
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("jaxsys: error: ")
    assert says in error
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--period", "0"], "period is 0"),
        (["--workers", "1000000"], "1000000 workers"),
        (["--bandwidth", "fast"], "link rate is 'fast'"),
        (["--text", "no/such/file.txt"], "no/such/file.txt"),
        (["--layers", "nothing.*", "*"], "matches no parameter"),
        (["--strategies", "sgdx"], "strategy 'sgdx'"),
        (["--model", "huge"], "model 'huge'"),
        (["--length", "100000"], "length is 100000"),
        (["--profile", "no/profile.json"], "no/profile.json"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, says, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["localsgd", "compare", *SMALL, "--link", "none", *out, *arguments]) == 2
    _one_sentence(capsys, says)


def test_occupied_port(taken_port, tmp_path, capsys):
    command = ["localsgd", "compare", *SMALL, "--link", "none", "--port", str(taken_port)]
    assert main([*command, "--out", str(tmp_path)]) == 2
    _one_sentence(capsys, str(taken_port))


def test_netlab_that_cannot_be_had(tmp_path, capsys, monkeypatch):
    refusal = Availability(False, "", "user namespaces are switched off", "ask for privileges")
    monkeypatch.setattr(supervise, "available", lambda: refusal)
    command = ["localsgd", "compare", *SMALL, "--link", "netlab", "--out", str(tmp_path)]
    assert main(command) == 2
    _one_sentence(capsys, "user namespaces are switched off")
    assert supervise.Links("auto").resolve()[0] == "emulated"


def _profile(path):
    n = 12
    profile = Profile(
        tuple(f"layer{i}" for i in range(n)),
        (250_000,) * n,
        (0.01,) * n,
        (0.02,) * n,
        0.01,
        LinearCost(0.003, 8e-8, 1.0, 0.0, 18),
        4,
    )
    path.write_text(profile.to_json())


def test_plan_sweeps_without_hardware(tmp_path, capfd):
    _profile(tmp_path / "profile.json")
    command = ["localsgd", "plan", "--profile", str(tmp_path / "profile.json"), "--json"]
    command += ["--workers", "4", "4096", "--bandwidths", "10mbit", "1gbit", "--periods", "2", "8"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert len(rows) == 5 * 2 * 2 * 2  # strategies x workers x bandwidths x periods
    assert (tmp_path / "plan.png").exists()
    assert json.loads((tmp_path / "plan.json").read_text()) == rows
    best = {(r["strategy"], r["workers"], r["bandwidth_bits_s"], r["period"]): r for r in rows}
    for workers in (4, 4096):
        slow = {s: best[s, workers, 1e7, 8]["predicted_s"] for s in ("local", "dreamddp")}
        assert slow["dreamddp"] < slow["local"]
    assert best["local", 4, 1e9, 8]["predicted_s"] < best["local", 4, 1e9, 2]["predicted_s"]


def test_plan_refuses_what_is_no_profile(tmp_path, capsys):
    (tmp_path / "profile.json").write_text('{"layers": ["a"]}')
    command = ["localsgd", "plan", "--profile", str(tmp_path / "profile.json")]
    assert main([*command, "--out", str(tmp_path)]) == 2
    _one_sentence(capsys, "the profile cannot be read")


def test_sweep_tables():
    from jaxsys.localsgd.sweep import schedule_table, sweep, sweep_table

    profile = Profile(
        ("b", "a"), (1000, 1000), (0.1, 0.1), (0.2, 0.2), 0.0, LinearCost(0.0, 1e-6, 1, 0, 3), 2
    )
    rows = sweep(
        profile,
        strategies=("equal",),
        bandwidths_bits_s=[1e6],
        workers=[2, 8],
        periods=[2],
    )
    assert [r["workers"] for r in rows] == [2, 8]
    # ring over 2 workers: 4000 bytes at 1 Mbit/s, behind a backward pass of 0.4 s
    assert rows[0]["predicted_s"] == pytest.approx(0.6 + (0.0 + 0.032) / 2)
    assert schedule_table(rows)[0]["layers by step"] == "0 | 1"
    assert sweep_table(rows)[0]["1mbit"] == f"{rows[0]['predicted_s']:.3f}"
