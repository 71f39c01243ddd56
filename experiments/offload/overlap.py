"""Show that CPU, accelerator and link work at once, on two virtual CPU devices.

    python experiments/offload/overlap.py            about 2 minutes on 2 idle cores
    python experiments/offload/overlap.py --smoke    half a minute: small model, nothing written

Two virtual CPU devices stand for the two processors, each computing with one thread (XLA's
intra-op pool is switched off), so that two cores can run both. Three things are timed in one
interleaved run, for a dense model and a mixture:

- one task at a time (every task is waited for), which also gives each resource's time: their sum;
- the engine as it is, which dispatches without waiting: the makespan;
- the largest of the resources' times, which no order of tasks can beat (the maximum).

Hoped for: the makespan nearer to the maximum than to the sum where two resources have much to do.
**Not shown yet.** The run in results/overlap.md has makespans near the sum or above it. It was
taken before the control was written, and other jobs probably had the second core: a control made by
hand in the same hour gave 1.6 to 2.3. Until a run with a control near 1 exists, it says nothing for
or against the engine.
Copies between virtual devices are memory copies by another thread, so on two cores a copy competes
with computing; the row `cpu + accelerator` has none.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from jaxsys.core.measure import interleaved, machine, ratio, timing
from jaxsys.core.report import atomic_write, format_seconds, markdown_table, to_json
from jaxsys.models import lm
from jaxsys.offload.engine import Engine, forward, init_state, make_engine
from jaxsys.offload.load import place_model
from jaxsys.offload.monitor import Monitor
from jaxsys.offload.parts import parts_of
from jaxsys.offload.place import find_devices
from jaxsys.offload.types import Part, Plan

RESULTS = Path(__file__).parent / "results"
SLOTS = 64


def models(smoke: bool) -> dict[str, lm.LMConfig]:
    """Give a dense model and a mixture of about 200 MB a token in float32."""
    small = {"hidden_size": 64, "num_hidden_layers": 4} if smoke else {}
    common = {"vocab_size": 512, "hidden_size": 512, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip
    dense = {"model_type": "llama", "intermediate_size": 4096}
    sparse = {"model_type": "mixtral", "intermediate_size": 1792, "num_local_experts": 4}
    return {
        "Llama form": lm.config_from_hf(common | dense | small),
        "Mixtral form": lm.config_from_hf(common | sparse | small),
    }


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


def compare(name: str, config: lm.LMConfig, runs: int) -> tuple[list[dict], list[dict]]:
    """Time one model under plans that use two or three resources."""
    params = lm.init(jax.random.key(0), config)
    parts, rows, record = parts_of(config), [], []
    tasks = {"decode": np.ones((1, 1), np.int32), "prompt of 32": np.ones((1, 32), np.int32)}
    shares = {"cpu + accelerator": (0.5, 0.0), "cpu + link + accelerator": (0.3, 0.2),
              "link + accelerator": (0.5, 0.5)}  # fmt: skip
    for plan_name, (resident, stream) in shares.items():
        placed = place_model(
            params, plan_of(parts, resident, stream), find_devices("virtual"), config=config
        )
        for task, tokens in tasks.items():
            monitor = Monitor(blocking=True)
            apart, free = make_engine(placed, monitor=monitor), make_engine(placed)
            one_by_one, together = stepper(apart, tokens), stepper(free, tokens)
            for _ in range(3):
                jax.block_until_ready((one_by_one(), together()))
            terms: list[dict[str, float]] = []

            def serial(run=one_by_one, monitor=monitor, terms=terms):
                monitor.busy_s.clear()
                found = run()
                terms.append(dict(monitor.busy_s))
                return found

            times = interleaved({"serial": serial, "engine": together}, warmup=1, runs=runs)
            counted = terms[1:]
            largest = timing("maximum", [max(t.values()) for t in counted])
            total = timing("sum", [sum(t.values()) for t in counted])
            names = ("cpu", "link", "accelerator")
            busy = {n: float(np.median([t.get(n, 0.0) for t in counted])) for n in names}
            span = times["engine"]
            rows.append({
                "model": name, "task": task, "at work": plan_name,
                **{n: format_seconds(s) for n, s in busy.items()},
                "sum": format_seconds(total.median_s), "maximum": format_seconds(largest.median_s),
                "makespan": format_seconds(span.median_s),
                "makespan / maximum": f"{ratio(span, largest):.2f}",
                "sum / makespan": f"{ratio(total, span):.2f}",
            })  # fmt: skip
            record.append({"model": name, "task": task, "plan": plan_name, "busy_s": busy,
                           "sum_s": total.seconds, "maximum_s": largest.seconds,
                           "makespan_s": span.seconds})  # fmt: skip
    return rows, record


def control(runs: int) -> str:
    """Time two programs that know nothing of each other, one on each device, against one of them.

    2 says that they ran one after the other, 1 that they ran at once: what the machine allows.
    """
    devices = find_devices("virtual")

    def work(weight, x):
        return jax.lax.fori_loop(0, 2000, lambda _, y: 0.001 * (weight @ y), x)

    run = jax.jit(work)
    given = [jax.device_put((np.ones((192, 192)), np.ones((192, 8))), d) for d in devices]
    times = interleaved(
        {"one": lambda: run(*given[0]), "two": lambda: [run(*args) for args in given]}, runs=runs
    )
    return f"{ratio(times['two'], times['one']):.2f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Show the overlap of both processors.")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="small models, nothing written")
    given = parser.parse_args(argv)
    find_devices("virtual")
    rows, record = [], []
    for name, config in models(given.smoke).items():
        found = compare(name, config, 3 if given.smoke else given.runs)
        rows, record = rows + found[0], record + found[1]
        print(markdown_table(found[0]), file=sys.stderr, flush=True)
    alone = control(3 if given.smoke else given.runs)
    text = (
        "# Overlap on two virtual CPU devices\n\n"
        f"{machine(devices=True)}; one thread a device. {given.runs} interleaved rounds; medians, "
        "ratios of pairs with bootstrap intervals. Sum and maximum are of the times that each "
        "resource was busy when every task was waited for. Control: two independent programs, one "
        f"on each device, take {alone} of the time of one (1: the machine runs both at once, 2: it "
        "does not, as when neighbours have the other core).\n\n" + markdown_table(rows)
    )
    print(text)
    if not given.smoke:
        atomic_write(RESULTS / "overlap.md", text)
        atomic_write(RESULTS / "overlap.json", to_json(record) + "\n")


if __name__ == "__main__":
    main()
