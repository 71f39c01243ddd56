"""Keep a pipeline's workers running: notice who is lost or slow, plan again, go on.

A worker that dies is seen by its launcher at once, one that is stopped or cut off by its peers
after a few seconds of silence, who name it. Its stages are planned anew and all workers start
again from the last checkpoint; nothing but the steps since then is lost. A device that is slower
than was predicted is seen in its stages' times; at the next checkpoint, if a new plan gains enough,
the workers change over to it.
"""

import collections
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsys.cluster import LaunchReport, launch
from jaxsys.cluster.events import Listener
from jaxsys.core.errors import UserError
from jaxsys.core.report import atomic_write
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.job import Job
from jaxsys.pipeline.place import Place, Standing
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.replan import Planner, after_loss, after_slowdown

_WORKER = "jaxsys.pipeline.worker"


@dataclasses.dataclass(frozen=True)
class Incident:
    """Something that made the supervisor change the plan.

    Attributes:
      kind: ``lost`` or ``slow``.
      device: name of the device.
      reason: what was seen.
      at_s: when it was noticed, in seconds after the start.
      saved: step of the last checkpoint, from which it goes on; None where there is none yet.
      plan: the new plan.

    >>> Incident("lost", "w1", "killed by signal 9", 4.2, 19, Plan(2, (), (0,))).kind
    'lost'
    """

    kind: str
    device: str
    reason: str
    at_s: float
    saved: int | None
    plan: Plan


class Outcome(NamedTuple):
    """What became of a supervised run.

    Attributes:
      losses: of every step, as last run.
      step_s: seconds of every step.
      incidents: what went wrong on the way.
      plan: the last one.

    >>> Outcome({0: 5.5}, {0: 0.1}, (), Plan(2, (), (0,))).losses[0]
    5.5
    """

    losses: dict[int, float]
    step_s: dict[int, float]
    incidents: tuple[Incident, ...]
    plan: Plan


class _Change(Exception):
    """Carries a new plan out of the launcher."""


class _Follower:
    """What is known of the present attempt from its workers' events."""

    def __init__(self, on_event: Callable[[dict[str, Any]], None]):
        self.on_event = on_event
        self.losses: dict[int, float] = {}
        self.step_s: dict[int, float] = {}
        self.saved: int | None = None
        self.on_saved: Callable[[], None] = lambda: None
        self.begin()

    def begin(self) -> None:
        self.accused: list[tuple[int, str]] = []
        self.noticed_s: float | None = None
        self.warm: set[int] = set()
        self.busy: dict[int, list[float]] = collections.defaultdict(list)

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "step":
            self.losses[event["step"]] = event["loss"]
            self.step_s[event["step"]] = event["step_s"]
        elif kind == "stages":
            for stage, seconds in event["busy_s"].items():
                if int(stage) in self.warm:  # the first step of an attempt compiles
                    self.busy[int(stage)].append(seconds)
                self.warm.add(int(stage))
        elif kind == "saved":
            self.saved = event["step"]
        elif kind == "lost":
            self.accused.append((event["peer"], event["reason"]))
            self.noticed_s = self.noticed_s or event["at_s"]
        self.on_event(event)
        if kind == "saved":
            self.on_saved()
            self.busy.clear()

    def busy_s(self, n_stages: int) -> list[float] | None:
        """Median seconds of each stage since the last checkpoint; None without two of each."""
        if any(len(self.busy[stage]) < 2 for stage in range(n_stages)):
            return None
        return [statistics.median(self.busy[stage]) for stage in range(n_stages)]


def supervise(
    job: Job,
    fleet: Fleet,
    place: Place | Standing,
    planner: Planner,
    *,
    spares: Sequence[int] = (),
    restarts: int = 3,
    threshold: float | int | None = None,
    port: int | None = None,
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Outcome:
    """Run a job in worker processes on this machine until it ends, whatever happens to them.

    Args:
      job: what to run; its folder receives ``job.json``, ``events.jsonl`` and ``workers.log``.
      fleet: all devices, those that stand by included.
      place: what stands for them, or what stands already.
      planner: makes and judges plans.
      spares: devices that stand by.
      restarts: how often workers may be lost; 0 gives up at the first time.
      threshold: least predicted gain for which a plan is changed because a device is slow; None
        never does.
      port: of the coordinator; a free one by default.
      on_event: gets every event, with the seconds since the start as ``at_s``.

    Returns:
      The losses, the incidents and the last plan.

    Raises:
      UserError: a mistake that a worker reported, or nothing is left to run on.
      RuntimeError: a worker failed by an error of the program, or too many were lost.

    >>> supervise.__name__  # starts processes: see tests/pipeline/test_faults.py
    'supervise'
    """
    if isinstance(place, Place):
        with place.stand() as standing:
            return supervise(
                job, fleet, standing, planner, spares=spares, restarts=restarts,
                threshold=threshold, port=port, on_event=on_event,
            )  # fmt: skip
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    follower = _Follower(on_event)
    listener = Listener(out, follower)
    incidents: list[Incident] = []
    lost: set[int] = set()
    while True:
        listener.tell({"event": "plan", "plan": dataclasses.asdict(job.plan), "ranks": job.ranks})
        follower.begin()
        follower.on_saved = _watch(job, fleet, planner, threshold, follower, spares, lost)
        try:
            report = _start(job, place, listener, port)
        except _Change as change:
            (remade,) = change.args
            device = fleet.devices[remade.slowest].name
            reason = (
                f"{remade.factor:.2f} times as slow as predicted; the new plan gains "
                f"{remade.gain:.2f}"
            )
            found = ("slow", device, reason, remade.plan)
        else:
            if report.exit_code == 0:
                break
            rank, reason = _culprit(report, follower, listener)
            device = job.ranks[rank]
            lost.add(device)
            if sum(i.kind == "lost" for i in incidents) == restarts:
                raise RuntimeError(
                    f"device {fleet.devices[device].name} is lost ({reason}) and no restart is "
                    f"left of {restarts}; the last checkpoint is of step {follower.saved}"
                )
            plan = after_loss(job.plan, fleet, lost, planner, spares)
            found = ("lost", fleet.devices[device].name, reason, plan)
        kind, name, reason, plan = found
        at_s = follower.noticed_s or listener.now_s()
        incidents.append(Incident(kind, name, reason, at_s, follower.saved, plan))
        job = dataclasses.replace(job, plan=plan)
        listener.tell(
            {"event": "incident", "kind": kind, "device": name, "reason": reason,
             "noticed_s": at_s, "saved": follower.saved}
        )  # fmt: skip
    return Outcome(follower.losses, follower.step_s, tuple(incidents), job.plan)


def _start(job: Job, place: Standing, listener: Listener, port: int | None) -> LaunchReport:
    ranks = job.ranks
    atomic_write(Path(job.out) / "job.json", job.to_json())
    return launch(
        [sys.executable, "-m", _WORKER, str(Path(job.out) / "job.json")],
        len(ranks),
        wrap=lambda rank, argv: place.wrap(ranks[rank], argv),
        host=place.hosts[ranks[0]],
        port=port,
        on_line=listener,
    )


def _watch(
    job: Job,
    fleet: Fleet,
    planner: Planner,
    threshold: float | int | None,
    follower: _Follower,
    spares: Sequence[int],
    lost: set[int],
) -> Callable[[], None]:
    """Look at the measured times whenever all have saved; raise the change to a better plan."""

    def look() -> None:
        busy_s = follower.busy_s(job.plan.n_stages)
        done = follower.saved is not None and follower.saved >= job.steps - 1
        if threshold is None or busy_s is None or done:
            return
        devices = sorted({*job.ranks, *spares} - lost)
        remade = after_slowdown(job.plan, fleet, busy_s, planner, devices, threshold)
        if remade is not None:
            raise _Change(remade)

    return look


def _culprit(report: LaunchReport, follower: _Follower, listener: Listener) -> tuple[int, str]:
    """Tell which process was lost, and what was seen of it."""
    if listener.mistakes:
        raise UserError(listener.mistakes[0])
    last = report.attempts[-1]
    assert last.first_failed is not None
    if last.code < 0:
        return last.first_failed, f"killed by signal {-last.code}"
    if follower.accused:
        counts = collections.Counter(peer for peer, _ in follower.accused)
        peer = counts.most_common(1)[0][0]
        return peer, next(reason for other, reason in follower.accused if other == peer)
    raise RuntimeError(
        f"process {last.first_failed} ended with status {last.code}; its last lines were:\n"
        f"{listener.tail()}"
    )
