"""Whole jobs in worker processes: results, checks at the start, and a killed run that goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxsys.core.cost import LinearCost
from jaxsys.core.errors import UserError
from jaxsys.localsgd.compare import Comparison, compare
from jaxsys.localsgd.job import Job
from jaxsys.localsgd.profile import Profile
from jaxsys.localsgd.record import Record
from jaxsys.localsgd.strategy import choose
from jaxsys.localsgd.supervise import Links
from jaxsys.localsgd.task import Task, set_up

TASK = Task(model="tiny", batch=2, length=16, min_layer_bytes=20_000)


def _profile(path: Path) -> Path:
    """A made-up profile, so that every run has the same plan."""
    layers = set_up(TASK, 0).layers
    n = len(layers)
    profile = Profile(
        tuple(layer.name for layer in layers),
        (8000,) * n,
        (0.01,) * n,
        (0.02,) * n,
        0.01,
        LinearCost(0.001, 1e-7, 1.0, 0.0, 3),
        2,
    )
    path.write_text(profile.to_json())
    return path


def _request(out, tmp_path, **more):
    return Comparison(
        **{
            "workers": 2,
            "steps": 6,
            "period": 2,
            "links": Links("none"),
            "task": TASK,
            "out": str(out),
            "profile": str(_profile(tmp_path / "given.json")),
        }
        | more
    )


def test_compare_writes_its_results_and_ssgd_equals_wfbp(tmp_path):
    out = tmp_path / "out"
    record, job = compare(_request(out, tmp_path, strategies=("ssgd", "wfbp", "dreamddp")))
    ssgd, wfbp = record.series("ssgd")[1], record.series("wfbp")[1]
    assert len(ssgd) == 6
    np.testing.assert_allclose(ssgd, wfbp, rtol=1e-4)  # the same mathematics, another schedule
    assert {p.name for p in out.iterdir()} >= {
        "table.md", "result.json", "compare.png", "profile.json", "events.jsonl", "metrics.jsonl"
    }  # fmt: skip
    rows = json.loads((out / "result.json").read_text())["rows"]
    assert [r["strategy"] for r in rows] == ["ssgd", "wfbp", "dreamddp"]
    assert all(np.isfinite(r["valid_loss"]) for r in rows)
    assert rows[0]["divergence"] == 0.0 < rows[2]["divergence"]
    again = Record.read(out / "events.jsonl")
    assert again.rows() == record.rows()
    assert Job.from_json((out / "job.json").read_text()) == job
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 18


@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_another_model_is_refused(tmp_path):
    whole, _ = compare(
        _request(tmp_path / "whole", tmp_path, strategies=("streaming",), save_every=100)
    )
    part = _request(tmp_path / "part", tmp_path, strategies=("streaming",), save_every=1)
    compare(dataclasses.replace(part, steps=3))  # ends in the middle of a period
    resumed, _ = compare(part)
    np.testing.assert_array_equal(resumed.series("streaming")[1], whole.series("streaming")[1])
    other = dataclasses.replace(part, task=dataclasses.replace(TASK, model="small"), steps=8)
    with pytest.raises(UserError, match="layers"):
        compare(dataclasses.replace(other, profile=None))


@pytest.mark.slow
def test_killed_worker_ends_with_the_loss_of_an_uninterrupted_run(tmp_path):
    profile = _profile(tmp_path / "given.json")

    def command(out):
        return [
            sys.executable, "-m", "jaxsys", "localsgd", "train", "--strategy", "dreamddp",
            "--workers", "2", "--steps", "60", "--period", "3", "--link", "none", "--save-every",
            "6", "--restarts", "1", "--model", "tiny", "--batch", "2", "--length", "16",
            "--min-layer-bytes", "20000", "--profile", str(profile), "--out", str(out), "--json",
        ]  # fmt: skip

    calm = subprocess.run(
        command(tmp_path / "calm"), capture_output=True, text=True, timeout=200, check=True
    )
    struck = subprocess.Popen(
        command(tmp_path / "struck"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    events = tmp_path / "struck" / "events.jsonl"
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if events.exists() and '"event": "step"' in (text := events.read_text()):
            steps = [json.loads(x) for x in text.splitlines() if '"step"' in x]
            if max((e["step"] for e in steps if e["event"] == "step"), default=0) >= 10:
                break
        time.sleep(0.01)
    os.kill(_a_worker_of(struck.pid), signal.SIGKILL)
    out, err = struck.communicate(timeout=200)
    assert struck.returncode == 0, err[-2000:]
    result, want = json.loads(out), json.loads(calm.stdout)
    assert result["time_lost_s"] > 0
    got = Record.read(events).series("dreamddp")[1]
    np.testing.assert_array_equal(
        got, Record.read(tmp_path / "calm" / "events.jsonl").series("dreamddp")[1]
    )
    assert result["rows"][0]["loss_equal_steps"] == want["rows"][0]["loss_equal_steps"]


def _a_worker_of(pid: int) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
                environ = (entry / "environ").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            worker = b"jaxsys.localsgd.worker" in line and b"JAXSYS_PROCESS_ID=1" in environ
            if worker and parent == pid:
                return int(entry.name)
    raise AssertionError("no worker found")


def test_mistakes_are_found_before_anything_starts(tmp_path):
    for change, says in (
        ({"steps": 0}, "steps is 0"),
        ({"period": 0}, "period is 0"),
        ({"strategies": ("sgdx",)}, "'sgdx' is not known"),
        ({"task": dataclasses.replace(TASK, text="no/such/file.txt")}, "no/such/file.txt"),
        ({"task": dataclasses.replace(TASK, layers=("nothing.*",))}, "matches no parameter"),
        ({"links": Links("none", ("fast",))}, "link rate"),
        ({"links": Links("none", ("1mbit", "2mbit", "3mbit"))}, "3 link rates for 2 workers"),
        ({"workers": 100_000}, "100000 workers"),
        ({"profile": "no/profile.json"}, "no/profile.json"),
    ):
        with pytest.raises(UserError, match=says):
            compare(dataclasses.replace(_request(tmp_path / "out", tmp_path), **change))
        assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_one_program_a_step_gives_the_losses_of_the_host_schedule(tmp_path):
    names = ("wfbp", "dreamddp", "streaming")
    by_host, _ = compare(_request(tmp_path / "host", tmp_path, strategies=names, drive="host"))
    request = _request(tmp_path / "fused", tmp_path, strategies=names, drive="program")
    fused, _ = compare(request)
    for name in names:
        np.testing.assert_allclose(fused.series(name)[1], by_host.series(name)[1], rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_with_step_and_layer(tmp_path):
    task = dataclasses.replace(TASK, lr=1e38)
    request = _request(
        tmp_path / "out", tmp_path, strategies=("local",), task=task, steps=50, save_every=10
    )
    with pytest.raises(UserError, match=r"step \d+: .* is not finite"):
        compare(request)
    assert (tmp_path / "out" / "checkpoints" / "0").exists()  # the last good one is kept


def test_job_survives_json():
    strategies = choose(["streaming", "wfbp"], 4)
    job = Job(TASK, strategies, 10, 3, "out", hold_bits_s=1e8)
    assert Job.from_json(job.to_json()) == job
