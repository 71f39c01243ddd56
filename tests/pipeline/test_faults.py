"""The supervisor against workers that are killed, fall silent or slow down; no JAX in them.

A worker here is a small program that counts steps, saves, and reports as real ones do; the losses
that it reports depend on the step alone, so a step that is lost or made twice would show.
"""

import dataclasses
import os
import signal

import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.pipeline import faults, replan
from jaxsys.pipeline.devices import Device, Fleet
from jaxsys.pipeline.faults import supervise
from jaxsys.pipeline.job import Job, Task
from jaxsys.pipeline.place import Place, _cores
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.work import Work

_WORKER = """
import json, os, pathlib, sys, time
job = json.loads(pathlib.Path(sys.argv[1]).read_text())
rank = int(os.environ["JAXSYS_PROCESS_ID"])
plan, out = job["plan"], pathlib.Path(job["out"])
def say(**event): print("@jaxsys " + json.dumps(event), flush=True)
say(event="start", rank=rank, pid=os.getpid())
saved = out / "saved"
first = int(saved.read_text()) + 1 if saved.exists() else 0
device = plan["devices"][rank]
for step in range(first, job["steps"]):
    time.sleep(0.02)
    trouble = out / f"trouble-{device}"
    if trouble.exists() and step == 5:
        what = trouble.read_text()
        trouble.unlink()
        if what == "die":
            os.kill(os.getpid(), 9)
        if what == "hang":
            say(event="lost", rank=rank, peer=1 - rank, reason="it has been silent for 1 s")
            sys.exit(4)
        if what == "mistake":
            print("!jaxsys the batch is odd; expected an even one; change it", flush=True)
            sys.exit(2)
        raise ValueError("a bug")
    slow = 4.0 if device == 0 and (out / "slow").exists() else 1.0
    say(event="stages", rank=rank, busy_s={str(rank): slow})
    if rank == 0:
        say(event="step", step=step, loss=100.0 - step, step_s=0.02)
        if (step + 1) % 2 == 0:
            time.sleep(0.02)
            part = out / "saved.part"  # whole or not at all: a launcher may end us between the two
            part.write_text(str(step))
            part.replace(saved)
            say(event="saved", step=step)
"""


def _planner(n_nodes: int = 6) -> replan.Planner:
    """Plan by speed alone: the more nodes the faster a device; a step takes the slowest stage."""
    ramp = np.arange(n_nodes + 1.0)
    empty = np.zeros(n_nodes + 1)
    names = tuple("abcdefgh"[:n_nodes])
    work = Work(names, ramp, 3 * ramp, empty, ramp, np.zeros((0, 3)), (), empty)

    def make(fleet: Fleet) -> Plan:
        total = np.cumsum(fleet.speed_flops_s) / fleet.speed_flops_s.sum()
        cuts = [max(1, round(float(t) * n_nodes)) for t in total[:-1]]
        if len(fleet) > n_nodes:
            raise UserError("more devices than nodes")
        plan = Plan(n_nodes, tuple(cuts), tuple(range(len(fleet))), method="test")
        return dataclasses.replace(plan, predicted_s=predict(plan, fleet))

    def predict(plan: Plan, fleet: Fleet) -> float:
        return max(
            3 * len(plan.nodes(s)) / fleet.devices[d].speed_flops_s
            for s, d in enumerate(plan.devices)
        )

    return replan.Planner(make, predict, work)


def _fleet(*speeds: float, memory: float = 1e9) -> Fleet:
    n = len(speeds)
    devices = tuple(Device(f"w{i}", s, memory) for i, s in enumerate(speeds))
    return Fleet(devices, np.zeros((n, n)), np.ones((n, n)))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Supervise two workers on devices 0 and 1 of three; gives the outcome and the events."""
    (tmp_path / "counting_worker.py").write_text(_WORKER)
    monkeypatch.setattr(faults, "_WORKER", "counting_worker")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    out.mkdir()

    def start(trouble: dict[str, str], *, fleet: Fleet | None = None, **options):
        for name, text in trouble.items():
            (out / name).write_text(text)
        job = Job(Task(), Plan(6, (3,), (0, 1)), steps=12, out=str(out), save_every=2)
        seen: list[dict] = []
        outcome = supervise(
            job, fleet or _fleet(1.0, 1.0, 1.0), Place(3), _planner(), on_event=seen.append,
            **options,
        )  # fmt: skip
        return outcome, seen

    return start


def _complete(outcome) -> bool:
    return outcome.losses == {step: 100.0 - step for step in range(12)}


def test_nothing_happens_to_a_run_without_trouble(run):
    outcome, _ = run({}, threshold=1.2)
    assert _complete(outcome)
    assert outcome.incidents == ()


def test_a_killed_worker_is_named_and_a_standby_takes_its_place(run):
    outcome, seen = run({"trouble-1": "die"}, spares=[2])
    assert _complete(outcome)
    (incident,) = outcome.incidents
    assert (incident.kind, incident.device) == ("lost", "w1")
    assert incident.reason == f"killed by signal {signal.SIGKILL.value}"
    assert outcome.plan.devices == (0, 2)
    assert outcome.plan.boundaries == (3,)
    # no step up to the checkpoint is made again
    made = [e["step"] for e in seen if e["event"] == "step"]
    saved = -1 if incident.saved is None else incident.saved
    assert all(made.count(step) == 1 for step in range(saved + 1))
    assert sorted(set(made)) == list(range(12))


def test_without_a_standby_the_rest_takes_over(run):
    outcome, _ = run({"trouble-0": "die"})
    assert _complete(outcome)
    assert outcome.plan.devices == (1,)


def test_a_silent_worker_is_named_by_its_peer(run):
    outcome, _ = run({"trouble-0": "hang"}, spares=[2])
    assert _complete(outcome)
    (incident,) = outcome.incidents
    assert incident.device == "w1"  # process 0 accused process 1
    assert "silent" in incident.reason


def test_a_second_loss_is_one_too_many_where_one_is_allowed(run):
    with pytest.raises(RuntimeError, match=r"w0 is lost .* no restart is left of 0"):
        run({"trouble-0": "die"}, restarts=0)


def test_a_mistake_of_the_user_is_told_as_such(run):
    with pytest.raises(UserError, match="the batch is odd"):
        run({"trouble-0": "mistake"})


def test_an_error_of_the_program_is_not_taken_for_a_loss(run):
    with pytest.raises(RuntimeError, match=r"(?s)process 1 ended with status 1.*a bug"):
        run({"trouble-1": "bug"})


def test_a_straggler_gets_fewer_nodes_at_a_checkpoint(run):
    """Seen times of 4 s against equal ones predicted: device 0 keeps the least it can have."""
    fleet = _fleet(9.0, 9.0)
    outcome, seen = run({"slow": ""}, fleet=fleet, threshold=1.2)
    assert _complete(outcome)
    slow = [i for i in outcome.incidents if i.kind == "slow"]
    assert slow
    assert slow[0].device == "w0"
    assert slow[0].plan.boundaries == (1,)
    # it changed over right after a checkpoint: no step was made twice
    steps = [e["step"] for e in seen if e["event"] == "step"]
    assert steps == sorted(steps)


def test_a_gain_below_the_threshold_is_not_worth_it(run):
    outcome, _ = run({"slow": ""}, fleet=_fleet(9.0, 9.0), threshold=50.0)
    assert outcome.incidents == ()


def test_standby_or_rest_by_predicted_time():
    """A slow standby loses against the rest, a fast one wins; ties go to the standby."""
    plan, planner = Plan(6, (3,), (0, 1)), _planner()
    rest = replan.after_loss(plan, _fleet(1.0, 1.0, 0.01), {1}, planner, [2])
    assert rest.devices == (0,)
    swap = replan.after_loss(plan, _fleet(1.0, 1.0, 1.0), {1}, planner, [2])
    assert (swap.devices, swap.boundaries) == ((0, 2), (3,))
    both = replan.after_loss(plan, _fleet(1.0, 1.0, 5.0), {1}, planner, [2])
    assert both.devices == (0, 2)
    assert both.predicted_s == planner.predict(both, _fleet(1.0, 1.0, 5.0))


def test_a_standby_without_the_memory_is_passed_over():
    fleet = Fleet(
        (Device("w0", 1.0, 1e9), Device("w1", 1.0, 1e9), Device("w2", 1.0, 1.0)),
        np.zeros((3, 3)),
        np.ones((3, 3)),
    )
    swapped = dataclasses.replace(Plan(6, (3,), (0, 1)), devices=(0, 2))
    assert not replan.fits(swapped, fleet, _planner())
    assert replan._swaps(Plan(6, (3,), (0, 1)), fleet, [1], [2], _planner()) == []


def test_nothing_left_is_one_sentence():
    with pytest.raises(UserError, match="w0, w1 are lost and no other is left") as caught:
        replan.after_loss(Plan(6, (3,), (0, 1)), _fleet(1.0, 1.0), {0, 1}, _planner())
    assert "\n" not in str(caught.value)


def test_replicas_keep_their_place_when_a_standby_joins():
    plan = Plan(6, (3,), (0, 1), replicas=((2, 3),))
    found = replan._swaps(plan, _fleet(1, 1, 1, 1, 1), [3], [4], _planner())
    assert [each.chains for each in found] == [((0, 1), (2, 4))]


@pytest.mark.parametrize(
    "options",
    [
        {"devices": 0},
        {"devices": 2, "cores": (0.5,)},
        {"devices": 3, "bandwidth": ("1mbit", "1mbit")},
        {"devices": 2, "clusters": ((0,), (1,)), "bandwidth": ("1mbit",)},
    ],
)
def test_a_place_that_cannot_be_is_one_sentence(options):
    with pytest.raises(UserError) as caught:
        Place(**options)
    assert "\n" not in str(caught.value)


def test_devices_are_bound_so_that_no_core_is_overdrawn(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5})
    assert _cores((0.6, 0.6, 0.3, 0.3)) in ((2, 5, 2, 5), (2, 5, 5, 2))
    assert _cores((0.9, 0.9, 0.9)) == ()
