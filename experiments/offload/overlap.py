"""Show that CPU, accelerator and link work at once, on two virtual CPU devices.

    python experiments/offload/overlap.py            about a minute on 2 idle cores
    python experiments/offload/overlap.py --smoke    half a minute: small model, nothing written

Two virtual CPU devices stand for the two processors. Three things are timed in one interleaved run:

- one task at a time (every task is waited for), which also gives each resource's time: their sum;
- the engine as it is, which dispatches without waiting: the makespan;
- the largest of the resources' times, which no order of tasks can beat (the maximum).

What can overlap here is limited by the two cores. XLA:CPU gives one product to both of them,
whatever its flags say, so two devices that multiply at once share what one had to itself, and their
sum is the best that there is. Two settings get round that:

- **An emulated link**, rows `link`: a copy takes its bytes over a given rate and no core, and what
  it brings has been put on the accelerator beforehand. CPU and accelerator really compute.
- **Products that keep to one core**, rows `int8`: one-row products of codes are loops that XLA cuts
  for as many cores as the compiling thread may use. That thread is held to one core while it
  compiles; while the clock runs no thread is.

Before and after each comparison a control is timed: two programs that know nothing of each other,
one on each device, over one of them alone. 1 says that the machine ran both at once, 2 that it did
not, as where neighbours have the other core; above 1.3 a row in which both processors compute
says nothing. (A link that takes no core does not depend on it.)
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from jaxsys.core.measure import interleaved, machine, ratio, timing
from jaxsys.core.report import atomic_write, format_seconds, markdown_table, to_json
from jaxsys.models import lm
from jaxsys.models.rows import row_product
from jaxsys.offload.engine import Engine, forward, init_state, make_engine
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
    width = 64 if smoke else 1024
    common = {"vocab_size": 512, "hidden_size": width, "num_hidden_layers": 2 if smoke else 3,
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


# Name; int8; resident and streamed shares; GB/s of the emulated link (0: a memory copy).
CASES = (
    ("cpu + accelerator", False, 0.5, 0.0, 0.0),
    ("cpu + accelerator, int8", True, 0.5, 0.0, 0.0),
    ("link + accelerator", False, 0.5, 0.5, 16.0),
    ("cpu + link", False, 0.0, 0.25, 8.0),
    ("cpu + link + accelerator, int8", True, 0.4, 0.2, 3.0),
)


def compare(name: str, config: lm.LMConfig, runs: int) -> tuple[list[dict], list[dict]]:
    """Time a decode step of one model under plans that use two or three resources."""
    params = lm.init(jax.random.key(0), config)
    parts, rows, record = parts_of(config), [], []
    tokens = np.ones((1, 1), np.int32)
    for at_work, int8, resident, stream, rate in CASES:
        hold()
        plan, devices = plan_of(parts, resident, stream), find_devices("virtual")
        placed = place_model(params, plan, devices, config=config, int8=int8)
        monitor = Monitor(blocking=True)
        apart, free = make_engine(placed, monitor=monitor), make_engine(placed)
        if rate:
            held: dict[int, Any] = {}
            link = [EmulatedLink(devices.accelerator, 2, rate * 1e9, held) for _ in range(2)]
            apart, free = (e._replace(ring=r) for e, r in zip((apart, free), link, strict=True))
        one_by_one, together = stepper(apart, tokens), stepper(free, tokens)
        for _ in range(3):
            jax.block_until_ready((one_by_one(), together()))
        terms: list[dict[str, float]] = []

        def serial(run=one_by_one, monitor=monitor, terms=terms):
            monitor.busy_s.clear()
            found = run()
            terms.append(dict(monitor.busy_s))
            return found

        spread()
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


_CONTROL: list[Any] = []


def control(runs: int) -> float:
    """Time two programs that know nothing of each other, one on each device, over one of them."""
    if not _CONTROL:
        devices = find_devices("virtual")

        @jax.jit
        def work(weights, x):
            for weight in weights:
                x = 0.001 * row_product(weight, x)
            return x

        given = [np.ones((1024, 1024), np.int8)] * 8, np.ones(1024, np.float32)
        _CONTROL.extend((work, [jax.device_put(given, device) for device in devices]))
    work, given = _CONTROL
    calls = {"one": lambda: work(*given[0]), "two": lambda: [work(*args) for args in given]}
    times = interleaved(calls, runs=runs)
    return times["two"].median_s / times["one"].median_s


CORES = os.sched_getaffinity(0)


def hold() -> None:
    """Hold this thread, which compiles, to one core, so that loops are not cut for more."""
    os.sched_setaffinity(0, {min(CORES)})


def spread() -> None:
    """Give all threads, also those that were started by the one held, every core."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), CORES)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Show the overlap of the resources.")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--smoke", action="store_true", help="small models, nothing written")
    given = parser.parse_args(argv)
    # Programs compiled elsewhere, for more cores, are of no use here.
    jax.config.update("jax_enable_compilation_cache", False)
    told = machine()
    hold()
    find_devices("virtual")
    control(1)
    rows, record = [], []
    for name, config in models(given.smoke).items():
        found = compare(name, config, 3 if given.smoke else given.runs)
        rows, record = rows + found[0], record + found[1]
        print(markdown_table(found[0]), file=sys.stderr, flush=True)
    text = (
        "# Overlap on two virtual CPU devices\n\n"
        f"{told}; a decode step. {given.runs} interleaved rounds; medians, ratios "
        "of pairs with bootstrap intervals. Sum and maximum are of the times that each resource "
        "was busy when every task was waited for. The link is emulated: 3 to 16 GB/s and no core. "
        "Products in float32 take both cores whichever device runs them, those of int8 codes one. "
        "Control: two independent programs, one on each device, over one of them, before and after "
        "(1: the machine runs both at once; above 1.3 a row with both processors says nothing).\n\n"
        + markdown_table(rows)
    )
    print(text)
    if not given.smoke:
        atomic_write(RESULTS / "overlap.md", text)
        atomic_write(RESULTS / "overlap.json", to_json(record) + "\n")


if __name__ == "__main__":
    main()
