"""Check the measuring itself: what it costs, and whether two runs of one thing agree.

    python experiments/bench/overhead.py            about 2 minutes on 2 cores, idle
    python experiments/bench/overhead.py --smoke    a few seconds, nothing written

A training step (the shape `small`, 4 rows of 256 tokens, donated) is run

- freely: some steps in a row, waited for once at the end;
- measured: as many, each waited for and timed as `jaxsys.core.measure.interleaved` does;

in turns, and the ratio of pairs is the overhead. Then the same compiled step is measured twice, one
run after the other, and the two medians and their 95 % intervals are put side by side. What the
timer alone takes is measured on a function that does nothing.

Asked: overhead below 1 %; intervals of the two runs overlap.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxsys.bench.records import figure_of
from jaxsys.bench.shapes import shape
from jaxsys.bench.static import analyse
from jaxsys.bench.step import Task
from jaxsys.bench.techniques import Technique
from jaxsys.core.measure import interleaved, machine, ratio, timing
from jaxsys.core.report import atomic_write, markdown_table, to_json

RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what measuring costs.")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=4, help="in a row")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, nothing written")
    given = parser.parse_args(argv)
    if given.smoke:
        given.rounds = 3
    found = measure(given)
    text = report(found)
    print(text)
    if not given.smoke:
        atomic_write(RESULTS / "overhead.md", text)
        atomic_write(RESULTS / "overhead.json", to_json(found) + "\n")


class Steps:
    """A state that goes through some steps at a call, waited for each time or once."""

    def __init__(self, found: Any, steps: int, *, each: bool) -> None:
        self.compiled, self.batch = found.compiled, found.built.data(0)
        self.state, self.steps, self.each = found.built.init(), steps, each

    def step(self) -> Any:
        state, self.state = self.state, None
        self.state, info = self.compiled(state, self.batch)
        return self.state, info

    def __call__(self) -> Any:
        if self.each:
            interleaved({"step": self.step}, warmup=0, runs=self.steps)
        else:
            for _ in range(self.steps):
                self.step()
        return self.state


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Time steps freely and measured, in turns; then the same step twice."""
    size = (1, 16) if given.smoke else (4, 256)
    task = Task(batch=size[0], tokens=size[1])
    found = analyse(shape("small"), Technique(donate=True), task)
    ways = {"measured": Steps(found, given.steps, each=True),
            "free": Steps(found, given.steps, each=False)}  # fmt: skip
    times = interleaved(ways, warmup=2, runs=given.rounds)
    both = ratio(times["measured"], times["free"])
    nothing = interleaved({"nothing": lambda: None}, warmup=2, runs=1000)["nothing"]
    twice = []
    for seed in (0, 1):
        step = Steps(found, 1, each=False)
        twice.append(
            interleaved({"step": step}, warmup=3, runs=2 * given.rounds, seed=seed)["step"]
        )
    (low, high), (low2, high2) = (t.ci_s for t in twice)
    per_step = {
        name: timing(name, [s / given.steps for s in t.seconds]) for name, t in times.items()
    }
    return {
        "machine": str(machine(devices=True)),
        "steps": {name: figure_of(t) for name, t in per_step.items()},
        "overhead": {"median": both.median - 1, "low": both.ci[0] - 1, "high": both.ci[1] - 1},
        "timer_s": nothing.median_s,
        "twice": [figure_of(t) for t in twice],
        "ratio_of_medians": twice[1].median_s / twice[0].median_s,
        "agree": low <= high2 and low2 <= high,
        "smoke": given.smoke,
    }


def report(found: dict[str, Any]) -> str:
    over, rows = found["overhead"], []
    figures = {**found["steps"], "first run": found["twice"][0], "second run": found["twice"][1]}
    for name, figure in figures.items():
        rows.append({
            "step": name,
            "median ms": f"{1e3 * figure['median_s']:.2f}",
            "95 %": f"{1e3 * figure['low_s']:.2f} to {1e3 * figure['high_s']:.2f}",
            "runs": figure["runs"],
        })  # fmt: skip
    agree = "overlap" if found["agree"] else "do not overlap"
    return "\n".join([
        "# What measuring costs",
        "",
        found["machine"],
        "",
        markdown_table(rows),
        "",
        f"Overhead of measuring each step: {100 * over['median']:.2f} % "
        f"[{100 * over['low']:.2f}, {100 * over['high']:.2f}], median of pairs; the timer alone "
        f"takes {1e6 * found['timer_s']:.1f} µs.",
        "",
        f"The intervals of the two runs {agree}; their medians are {found['ratio_of_medians']:.4f} "
        "of each other.",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
