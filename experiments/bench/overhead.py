"""Check the measuring itself: what it costs, and whether two runs of one thing agree.

    python experiments/bench/overhead.py            four minutes on 2 cores, idle
    python experiments/bench/overhead.py --smoke    a few seconds, nothing written

A training step (the shape `small`, 4 rows of 256 tokens, donated) is run

- measured: each step waited for and timed as `jaxsys.core.measure.interleaved` does;
- waited: each step waited for, nothing else;
- free: steps in a row, waited for once at the end, so that the next is prepared meanwhile;

in turns. Reported over waited, by pairs, is the overhead of measuring; over free it says what
a loop that never looks at a step would save. What the timer alone takes is measured on a function
that does nothing.

Then the same compiled step is measured by two runs, a number of times: in turns, which is how
everything here is compared, and one run after the other, between which a machine may drift. Each
run has a state of its own, allocated anew. Counted is how often the two 95 % intervals overlap.

The process keeps freed memory (MALLOC_*), as experiments/bench/cpu.py does.

Asked: overhead below 1 %; intervals of the two runs overlap. A first version, without the kept
memory, with free as the base and with the interval's computation counted, gave 4.9 % [1.3, 6.8];
with the memory kept and waited as the base, 1.4 % [-0.1, 3.0]. Intervals that take steps to be
independent did not overlap for 7 of 11 neighbouring runs; they are drawn in blocks since. With ten
pairs: overhead 0.1 % [-0.7, 0.7]; intervals overlap ten times in turns, nine times in a row.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import jax

from jaxsys.bench.records import figure_of
from jaxsys.bench.shapes import shape
from jaxsys.bench.static import analyse
from jaxsys.bench.step import Task
from jaxsys.bench.techniques import Technique
from jaxsys.core.measure import interleaved, machine, ratio, timing
from jaxsys.core.report import atomic_write, markdown_table, to_json

RESULTS = Path(__file__).parent / "results"
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_ARENA_MAX": "1",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what measuring costs.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=4, help="in a row")
    parser.add_argument("--pairs", type=int, default=12, help="of runs of the same thing")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, nothing written")
    given = parser.parse_args(argv)
    if KEEP_MEMORY.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    if given.smoke:
        given.rounds, given.pairs = 3, 2
    found = measure(given)
    text = report(found)
    print(text)
    if not given.smoke:
        atomic_write(RESULTS / "overhead.md", text)
        atomic_write(RESULTS / "overhead.json", to_json(found) + "\n")


class Steps:
    """A state that goes through some steps at a call."""

    def __init__(self, found: Any, steps: int, way: str) -> None:
        self.compiled, self.batch = found.compiled, found.built.data(0)
        self.state, self.steps, self.way = found.built.init(), steps, way
        self.reported: list[float] = []

    def step(self) -> Any:
        state, self.state = self.state, None
        self.state, info = self.compiled(state, self.batch)
        return self.state, info

    def __call__(self) -> Any:
        if self.way == "measured":
            times = interleaved({"step": self.step}, warmup=0, runs=self.steps)["step"]
            self.reported.append(sum(times.seconds))
            return self.state
        for _ in range(self.steps):
            out = self.step()
            if self.way == "waited":
                jax.block_until_ready(out)
        return self.state


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Time steps in three ways, in turns; then the same step twice, in turns and in a row."""
    size = (1, 16) if given.smoke else (4, 256)
    task = Task(batch=size[0], tokens=size[1])
    found = analyse(shape("small"), Technique(donate=True), task)
    ways = {way: Steps(found, given.steps, way) for way in ("measured", "waited", "free")}
    times = interleaved(ways, warmup=2, runs=given.rounds)
    # What is reported; a round also computes an interval, after the clock has stopped.
    outside = times["measured"].median_s
    times["measured"] = timing("measured", ways["measured"].reported[-given.rounds :])
    ratios = {way: ratio(times["measured"], times[way]) for way in ("waited", "free")}
    nothing = interleaved({"nothing": lambda: None}, warmup=2, runs=1000)["nothing"]
    turns, rows = [], []
    for k in range(given.pairs):
        pair = {name: Steps(found, 1, "free") for name in ("first", "second")}
        turns.append(list(interleaved(pair, warmup=3, runs=given.rounds, seed=k).values()))
        alone = [interleaved({"step": s}, warmup=3, runs=given.rounds) for s in pair.values()]
        rows.append([times["step"] for times in alone])
    steps = {
        way: timing(way, [second / given.steps for second in time.seconds])
        for way, time in times.items()
    }
    return {
        "machine": str(machine(devices=True)),
        "steps": {way: figure_of(time) for way, time in steps.items()},
        "overhead": {
            way: {"median": r.median - 1, "low": r.ci[0] - 1, "high": r.ci[1] - 1}
            for way, r in ratios.items()
        },
        "timer_s": nothing.median_s,
        "interval_s": outside - times["measured"].median_s,
        "twice": {"in turns": _twice(turns), "in a row": _twice(rows)},
    }


def _twice(pairs: list[list[Any]]) -> dict[str, Any]:
    ends = [[time.ci_s for time in pair] for pair in pairs]
    return {
        "runs": [[figure_of(time) for time in pair] for pair in pairs],
        "ratios": [second.median_s / first.median_s for first, second in pairs],
        "agree": sum(a[0] <= b[1] and b[0] <= a[1] for a, b in ends),
    }


def report(found: dict[str, Any]) -> str:
    rows = [
        {
            "step": name,
            "median ms": f"{1e3 * figure['median_s']:.2f}",
            "95 %": f"{1e3 * figure['low_s']:.2f} to {1e3 * figure['high_s']:.2f}",
            "runs": figure["runs"],
        }
        for name, figure in found["steps"].items()
    ]
    lines = ["# What measuring costs", "", found["machine"], "", markdown_table(rows), ""]
    for way, over in found["overhead"].items():
        lines.append(
            f"Reported times over {way}: {100 * over['median']:+.2f} % "
            f"[{100 * over['low']:+.2f}, {100 * over['high']:+.2f}], median of pairs."
        )
    lines.append(
        f"The timer alone takes {1e6 * found['timer_s']:.1f} µs a step, an interval "
        f"{1e3 * found['interval_s']:.1f} ms once a run, after the steps."
    )
    for how, pairs in found["twice"].items():
        off = sorted(abs(ratio - 1) for ratio in pairs["ratios"])
        lines.append(
            f"Two runs {how}, {len(off)} times: their intervals overlap {pairs['agree']} times; "
            f"medians differ by {100 * off[len(off) // 2]:.1f} % (median), {100 * off[-1]:.1f} % "
            "at most."
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
