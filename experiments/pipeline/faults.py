"""kill -9 of a worker in the middle of a step: how soon it is noticed, and what the run loses.

Command:   python experiments/pipeline/faults.py            about 3 minutes on 2 cores
           python experiments/pipeline/faults.py --smoke    one kill, kept nowhere
Expected:  noticed within a second, by name; the stages go to a standby, training goes on from the
           last checkpoint, every loss equals the uninterrupted run's to the bit, and only the steps
           since that checkpoint are made again; without a standby the rest takes over under another
           partition, and losses agree to rounding
Results:   results/faults.md

Three workers and a standby on this machine; each worker in turn is killed while a step runs, and
one is stopped (SIGSTOP), which its peers notice by its silence.
"""

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from jaxsys.core.graph import dag
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.pipeline.choice import Choice, planner_of
from jaxsys.pipeline.faults import Outcome, supervise
from jaxsys.pipeline.fleets import even_fleet
from jaxsys.pipeline.job import Job, Task, set_up
from jaxsys.pipeline.place import Place
from jaxsys.pipeline.work import work_of

RESULTS = Path(__file__).parent / "results"
TASK = Task(blocks=2, width=32, heads=2, length=16, batch=4)
STEPS, SAVE_EVERY, AT = 12, 4, 6
SILENCE_S = 3.0


def run(
    out: str,
    workers: int,
    victim: int | None = None,
    number: int = signal.SIGKILL,
    spares: tuple[int, ...] = (),
    steps: int = STEPS,
) -> tuple[Outcome, list[dict], float | None]:
    """Train; kill the victim in the middle of step `AT` + 1; gives outcome, events, kill time."""
    setup = set_up(TASK)
    work = work_of(dag(setup.loss_fn, setup.shapes(), *setup.micro_batch(2)))
    fleet = even_fleet([1e10] * (workers + len(spares)))
    planner = planner_of(work, Choice("equal-compute", micro_batches=2))
    plan = planner.over(fleet, range(workers))
    job = Job(TASK, plan, steps, out=out, save_every=SAVE_EVERY, silence_s=SILENCE_S)
    pids: dict[int, int] = {}
    events: list[dict] = []
    killed: list[float] = []
    began = time.monotonic()

    def strike() -> None:
        killed.append(time.monotonic() - began)
        os.kill(pids[victim], number)

    def on_event(event: dict) -> None:
        events.append(event)
        if event["event"] == "start" and not killed:
            pids[event["rank"]] = event["pid"]
        # worker 0 tells of a step when it ends, so that a moment later the next one is running
        if event["event"] == "step" and event["step"] == AT and victim is not None and not killed:
            threading.Timer(0.002, strike).start()

    outcome = supervise(
        job, fleet, Place(workers + len(spares)), planner, spares=spares, on_event=on_event
    )
    return outcome, events, killed[0] if killed else None


def row_of(name: str, found: tuple, losses: dict[int, float]) -> dict:
    """Compare a run that was struck with the uninterrupted one."""
    outcome, events, killed_s = found
    (incident,) = outcome.incidents
    made = [event["step"] for event in events if event["event"] == "step"]
    off = max(abs(outcome.losses[i] / losses[i] - 1) for i in losses)
    first = next(
        event["at_s"]
        for event in events
        if event["event"] == "step" and event["at_s"] > incident.at_s
    )
    return {
        "struck": name,
        "named": incident.device,
        "noticed after, s": round(incident.at_s - killed_s, 3),
        "seen": incident.reason,
        "checkpoint": f"after step {incident.saved}",
        "steps made again": len(made) - len(set(made)),
        "first new step after, s": round(first - killed_s, 1),
        "largest relative difference of a loss": "0 (to the bit)" if off == 0 else f"{off:.1e}",
        "stages now on": ", ".join(map(str, outcome.plan.devices)),
    }


def main() -> int:
    """Strike in every way and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args().smoke
    with tempfile.TemporaryDirectory() as folder:
        if smoke:
            plain = run(f"{folder}/plain", 2, steps=9)[0]
            one = run(f"{folder}/one", 2, victim=1, spares=(2,), steps=9)
            print(row_of("worker 1, standby", one, plain.losses))
            return 0
        plain = run(f"{folder}/plain", 3)[0]
        rows = []
        for victim in range(3):
            found = run(f"{folder}/{victim}", 3, victim, spares=(3,))
            rows.append(row_of(f"worker {victim}, killed; a standby", found, plain.losses))
        found = run(f"{folder}/stopped", 3, 1, signal.SIGSTOP, (3,))
        rows.append(row_of("worker 1, stopped; a standby", found, plain.losses))
        found = run(f"{folder}/rest", 3, 1)
        rows.append(row_of("worker 1, killed; no standby", found, plain.losses))
    text = (
        "# A worker is lost in the middle of a step\n\n`python experiments/pipeline/faults.py`\n\n"
        f"{machine()}\n\nGPT-2 of {TASK.blocks} blocks of width {TASK.width}, 3 workers, {STEPS} "
        f"steps, a checkpoint every {SAVE_EVERY}; struck 2 ms after the end of step {AT}; silence "
        f"counts as loss after {SILENCE_S:g} s. Devices are named from 0.\n\n"
        + markdown_table(rows)
    )
    atomic_write(RESULTS / "faults.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
