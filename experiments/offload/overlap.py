"""Show that CPU, accelerator and link work at once, on two virtual CPU devices.

    python experiments/offload/overlap.py            about a minute on 2 idle cores
    python experiments/offload/overlap.py --smoke    half a minute: small model, nothing written

Two virtual CPU devices stand for the two processors. Three things are timed in one interleaved run:

- one task at a time (every task is waited for), which also gives each resource's time: their sum;
- the engine as it is, which dispatches without waiting: the makespan;
- the largest of the resources' times, which no order of tasks can beat (the maximum).

What can overlap here is limited by the two cores and the one memory that both devices share. The
pool of XLA:CPU has a thread for each virtual device at least, and a product is cut for all of them,
so that a program on one device takes both cores; one row times a float32 matrix keeps to one core
and takes most of the memory's rate. Rows in which both devices compute therefore take about their
sum here. Two parts are emulated to get round that:

- **A link** (rows `link`): a copy takes its bytes over a given rate and no core, and what it brings
  has been put on the accelerator beforehand.
- **An accelerator that waits** (rows `waiting`): its pieces are computed, a few columns of every
  part, and then wait for as long as an accelerator would take that reads them at a given rate. The
  wait takes no core. The CPU's pieces, nine tenths or more of the columns, really compute.

Before and after each comparison a control is timed: two programs that know nothing of each other,
one on each device, over one of them alone. 1 says that the machine ran both at once, 2 that it did
not, as where neighbours have the other core.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.measure import interleaved, machine, ratio, timing
from jaxsys.core.report import atomic_write, format_seconds, markdown_table, to_json
from jaxsys.models import lm
from jaxsys.offload.engine import Engine, forward, init_state, make_engine
from jaxsys.offload.layers import Programs
from jaxsys.offload.load import place_model
from jaxsys.offload.monitor import Monitor
from jaxsys.offload.parts import parts_of
from jaxsys.offload.place import find_devices
from jaxsys.offload.transfer import Ring
from jaxsys.offload.types import Part, Plan

RESULTS = Path(__file__).parent / "results"
SLOTS = 64


def models(smoke: bool) -> dict[str, lm.LMConfig]:
    """Give a dense model and a mixture, wide enough that a task outlasts its dispatch."""
    width = 64 if smoke else 2048
    common = {"vocab_size": 512, "hidden_size": width, "num_hidden_layers": 3,
              "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip
    dense = {"model_type": "llama", "intermediate_size": 8 * width}
    sparse = {"model_type": "mixtral", "intermediate_size": 4 * width, "num_local_experts": 4}
    return {
        "Llama form": lm.config_from_hf(common | dense),
        "Mixtral form": lm.config_from_hf(common | sparse),
    }


class _Coming:
    """A copy over the emulated link: there when its time has come."""

    def __init__(self, arrays: Any, end_s: float):
        self.arrays, self.end_s = arrays, end_s

    def block_until_ready(self) -> Any:
        time.sleep(max(0.0, self.end_s - time.perf_counter()))
        return self.arrays


class EmulatedLink(Ring):
    """Bring weights at a given rate, one copy after another, without the work of a core."""

    def __init__(self, device: Any, depth: int, bytes_per_s: float, held: dict[int, Any]):
        super().__init__(device, depth)
        self.bytes_per_s, self.held, self.free_s = bytes_per_s, held, 0.0

    def _copy(self, tree: Any) -> Any:
        leaves = jax.tree.leaves(tree)
        if id(leaves[0]) not in self.held:
            self.held[id(leaves[0])] = super()._copy(tree)
        begin_s = max(self.free_s, time.perf_counter())
        self.free_s = begin_s + sum(x.nbytes for x in leaves) / self.bytes_per_s
        return _Coming(self.held[id(leaves[0])], self.free_s)

    def fetch(self, key: Any, tree: Any) -> Any:
        return super().fetch(key, tree).block_until_ready()


def waiting(programs: Programs, accelerator: Any, bytes_per_s: float) -> Programs:
    """Make the accelerator's pieces wait, after their work, for their bytes over a rate."""

    @partial(jax.jit, static_argnums=0)
    def slow(seconds, y, *args):
        out = programs.piece(y, *args)

        def wait(_):
            time.sleep(seconds)
            return np.zeros((), np.float32)

        nothing = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), out.ravel()[0])
        return out + nothing.astype(out.dtype)

    def piece(y, weights, *args):
        if y.devices() != {accelerator}:
            return programs.piece(y, weights, *args)
        n_bytes = sum(x.nbytes for x in jax.tree.leaves(weights))
        return slow(n_bytes / bytes_per_s, y, weights, *args)

    return programs._replace(piece=piece)


def plan_of(parts: tuple[Part, ...], resident: float, stream: float) -> Plan:
    """Keep and copy shares of every feed-forward part; everything else is resident."""
    here, over = [], []
    for part in parts:
        columns = max(part.columns, 1)
        here.append(round(resident * columns) if part.columns else 1)
        over.append(round(stream * columns) if part.columns else 0)
    layers = 1 + max(part.layer for part in parts)
    return Plan(parts, tuple(here), tuple(over), ("accelerator",) * layers)


def stepper(engine: Engine, tokens: np.ndarray) -> Any:
    """Give a function that runs one step from the same state each time."""
    state = init_state(engine.placed, *tokens.shape[:1], SLOTS)
    holder = [state]

    def step():
        logits, after = forward(engine, holder[0], tokens)
        holder[0] = after._replace(lengths=np.zeros_like(after.lengths))
        return logits

    return step


# Name; resident and streamed shares; GB/s of the emulated link and of the accelerator that waits
# (0: none).
CASES = (
    ("cpu + accelerator", 0.5, 0.0, 0.0, 0.0),
    ("cpu + waiting accelerator", 0.05, 0.0, 0.0, 2.0),
    ("link + accelerator", 0.5, 0.5, 16.0, 0.0),
    ("cpu + link + waiting accelerator", 0.05, 0.05, 2.0, 4.0),
)


def compare(name: str, config: lm.LMConfig, runs: int) -> tuple[list[dict], list[dict]]:
    """Time a decode step of one model under plans that use two or three resources."""
    params = lm.init(jax.random.key(0), config)
    parts, rows, record = parts_of(config), [], []
    tokens = np.ones((1, 1), np.int32)
    for at_work, resident, stream, rate, waits in CASES:
        plan, devices = plan_of(parts, resident, stream), find_devices("virtual")
        placed = place_model(params, plan, devices, config=config)
        monitor = Monitor(blocking=True)
        apart, free = make_engine(placed, monitor=monitor), make_engine(placed)
        if rate:
            held: dict[int, Any] = {}
            link = [EmulatedLink(devices.accelerator, 2, rate * 1e9, held) for _ in range(2)]
            apart, free = (e._replace(ring=r) for e, r in zip((apart, free), link, strict=True))
        if waits:
            slow = waiting(free.programs, devices.accelerator, waits * 1e9)
            apart, free = (e._replace(programs=slow) for e in (apart, free))
        one_by_one, together = stepper(apart, tokens), stepper(free, tokens)
        for _ in range(3):
            jax.block_until_ready((one_by_one(), together()))
        terms: list[dict[str, float]] = []

        def serial(run=one_by_one, monitor=monitor, terms=terms):
            monitor.busy_s.clear()
            found = run()
            terms.append(dict(monitor.busy_s))
            return found

        before = control(7)
        times = interleaved({"serial": serial, "engine": together}, warmup=1, runs=runs)
        after = control(7)
        counted = terms[1:]
        largest = timing("maximum", [max(t.values()) for t in counted])
        total = timing("sum", [sum(t.values()) for t in counted])
        names = ("cpu", "link", "accelerator")
        busy = {n: float(np.median([t.get(n, 0.0) for t in counted])) for n in names}
        span = times["engine"]
        rows.append({
            "model": name, "at work": at_work,
            **{n: format_seconds(s) for n, s in busy.items()},
            "sum": format_seconds(total.median_s), "maximum": format_seconds(largest.median_s),
            "makespan": format_seconds(span.median_s),
            "makespan / maximum": f"{ratio(span, largest):.2f}",
            "sum / makespan": f"{ratio(total, span):.2f}",
            "control": f"{before:.2f}, {after:.2f}",
        })  # fmt: skip
        record.append({"model": name, "at work": at_work, "busy_s": busy, "sum_s": total.seconds,
                       "maximum_s": largest.seconds, "makespan_s": span.seconds,
                       "control": [before, after]})  # fmt: skip
    return rows, record


def control(runs: int) -> float:
    """Time two programs that know nothing of each other, one on each device, over one of them."""

    @jax.jit
    def work(weight, x):  # milliseconds of one core, from its cache
        return jax.lax.fori_loop(0, 100, lambda _, x: 0.001 * (x @ weight), x)

    devices = find_devices("virtual")
    args = [jax.device_put((np.ones((1024, 1024), np.float32), np.ones((1, 1024), np.float32)), d)
            for d in devices]  # fmt: skip
    calls = {"one": lambda: work(*args[0]), "two": lambda: [work(*pair) for pair in args]}
    times = interleaved(calls, runs=runs)
    return times["two"].median_s / times["one"].median_s


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Show the overlap of the resources.")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--smoke", action="store_true", help="small models, nothing written")
    given = parser.parse_args(argv)
    told, _ = machine(), find_devices("virtual")  # before the first computation
    rows, record = [], []
    for name, config in models(given.smoke).items():
        found = compare(name, config, 3 if given.smoke else given.runs)
        rows, record = rows + found[0], record + found[1]
        print(markdown_table(found[0]), file=sys.stderr, flush=True)
    text = (
        "# Overlap on two virtual CPU devices\n\n"
        f"{told}; a decode step. {given.runs} interleaved rounds; medians, ratios "
        "of pairs with bootstrap intervals. Sum and maximum are of the times that each resource "
        "was busy when every task was waited for. The link is emulated: 2 or 16 GB/s and no core; "
        "a waiting accelerator computes its pieces, a twentieth or a tenth of the columns, and "
        "then waits for their bytes at 2 or 4 GB/s. A program on either device may take both "
        "cores, and one row times a matrix takes most of the memory's rate, so that two devices "
        "that compute take turns. Control: two independent programs, one on each device, over "
        "one of them, before and after (1: the machine runs both at once).\n\n"
        + markdown_table(rows)
    )
    print(text)
    if not given.smoke:
        atomic_write(RESULTS / "overlap.md", text)
        atomic_write(RESULTS / "overlap.json", to_json(record) + "\n")


if __name__ == "__main__":
    main()
