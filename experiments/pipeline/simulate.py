"""Plan for fleets that nobody owns: 48 devices as in the paper, and 1,000 on a synthetic internet.

    python experiments/pipeline/simulate.py                  3 fleets of 48, 4 minutes on a core
    python experiments/pipeline/simulate.py --part resnet50  the same for ResNet-50, 2 minutes;
                                                             or resnet101
    python experiments/pipeline/simulate.py --part internet --seed 0   fleet 0 of 1,000, 2 minutes;
                                                                       rows of others are kept
    python experiments/pipeline/simulate.py --smoke          seconds, nothing written

Everything that is a time of a step is **modelled**: devices, links and speeds are drawn, a step is
simulated task by task (`pipeline.timing.predict`; above 300,000 tasks the closed form), and no
message was ever sent. Only the planner's own seconds are measured.

The model is GPT-2 of 1.5 billion parameters in the published form (48 blocks; of the 1,000 devices
340 blocks, 10 billion), one sequence of 1024 tokens a micro-batch, remat, Adam in float32, 1F1B;
the ResNets have 16 images of 224 × 224. Baselines put devices in the order in which they joined.
Expected: OP-Fence many times faster than equal-number, the search ten times faster again because it
leaves most devices out; AdaTopK several times on top of each. The exact partition is never above
OP-Fence's by the closed form that both are judged by; simulated with 1F1B and compressed links it
may be, since the closed form does not know how few micro-batches 1F1B holds in flight.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.graph import dag
from jaxsys.core.measure import bootstrap_ci, machine
from jaxsys.core.report import (
    atomic_write,
    figure,
    format_seconds,
    markdown_table,
    save_figure,
    write_jsonl,
)
from jaxsys.models import gpt2
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import costs_of
from jaxsys.pipeline.fence import communities
from jaxsys.pipeline.figures import fleet_figure, plan_figure
from jaxsys.pipeline.fleets import internet_fleet, paper_fleet
from jaxsys.pipeline.memory import Limits
from jaxsys.pipeline.planner import METHODS, make_plan
from jaxsys.pipeline.timing import closed_form_s, lower_bound_s
from jaxsys.pipeline.work import Work, work_of

RESULTS = Path(__file__).parent / "results"
RATIO = 100.0
PARTS = ("paper", "resnet50", "resnet101", "internet")
WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "uniform top-k": {"codec": "topk", "ratio": RATIO, "adaptive": False},
    "AdaTopK": {"codec": "topk", "ratio": RATIO, "adaptive": True},
}
REMAT = Limits(remat=True)
RECOMPUTED = 3.0  # FLOPs of a backward per FLOP of its forward, the recomputed forward included


def gpt2_work(n_layer: int, n_embd: int = 1600, n_head: int = 25, n_tokens: int = 1024) -> Work:
    """Trace GPT-2's loss on one sequence, shapes only."""
    config = gpt2.GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=n_tokens)
    shapes = jax.eval_shape(lambda key: gpt2.init(key, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, n_tokens + 1), jnp.int32)
    graph = dag(lambda params, batch: gpt2.loss(params, config, batch), shapes, tokens)
    return work_of(graph, backward_ratio=RECOMPUTED)


def resnet_work(name: str) -> Work:
    """Trace a ResNet's loss on 16 images, shapes only."""
    from jaxsys.models import resnet

    graphdef, init = resnet.named(name)
    shapes = jax.eval_shape(init, jax.random.key(0))
    batch = (
        jax.ShapeDtypeStruct((16, 224, 224, 3), jnp.float32),
        jax.ShapeDtypeStruct((16,), jnp.int32),
    )
    graph = dag(lambda params, batch: resnet.loss(graphdef, params, batch), shapes, batch)
    return work_of(graph, backward_ratio=RECOMPUTED)


def one(work: Work, fleet: Fleet, micro_batches: int, method: str, way: str, order: str):
    """Make one plan and say what it promises."""
    begun = time.perf_counter()
    plan = make_plan(
        work, fleet, micro_batches=micro_batches, method=method, order=order, limits=REMAT,
        **WAYS[way],
    )  # fmt: skip
    took = time.perf_counter() - begun
    costs = costs_of(work, fleet, plan)
    row = {
        "method": method if order == "1f1b" else f"{method}, {order}",
        "values": way,
        "stages": plan.n_stages,
        "order": plan.order,
        "step_s": plan.predicted_s,
        "closed_form_s": closed_form_s(plan, costs, fleet),
        "lower_bound_s": lower_bound_s(plan, costs, fleet),
        "planner_s": took,
        "throughput": micro_batches / plan.predicted_s,
    }
    return row, plan, costs


def collect(work: Work, fleets: dict[int, Fleet], micro_batches: int, ways, best_order: bool):
    """Plan with every method and way of compressing for every drawn fleet."""
    rows, plans = [], {}
    for seed, fleet in fleets.items():
        wanted = [(method, way, "1f1b") for way in ways for method in METHODS]
        if best_order:
            wanted += [("search", way, "eager-1f1b") for way in ways if way != "uniform top-k"]
        for method, way, order in wanted:
            row, plan, costs = one(work, fleet, micro_batches, method, way, order)
            rows.append({"seed": seed, **row})
            plans[seed, row["method"], way] = plan, costs
            print(
                f"seed {seed} {row['method']:>22} {way:>13}: {plan.n_stages} stages, "
                f"{plan.predicted_s:.4g} s modelled, planned in {format_seconds(row['planner_s'])}",
                flush=True,
            )
    return rows, plans


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reduce the seeds to medians, ratios to equal-number dense paired by seed."""
    base = {row["seed"]: row["throughput"] for row in rows
            if (row["method"], row["values"]) == ("equal-number", "dense")}  # fmt: skip
    keys = dict.fromkeys((row["method"], row["values"]) for row in rows)
    found = []
    for method, way in keys:
        mine = [row for row in rows if (row["method"], row["values"]) == (method, way)]
        gains = [row["throughput"] / base[row["seed"]] for row in mine]
        low, high = bootstrap_ci(gains)
        found.append(
            {
                "method": method,
                "values": way,
                "stages": _span([row["stages"] for row in mine]),
                "step, modelled": format_seconds(float(np.median([r["step_s"] for r in mine]))),
                "micro-batches/s": float(np.median([row["throughput"] for row in mine])),
                "× equal-number dense": f"{np.median(gains):.3g} ({low:.3g} … {high:.3g})",
                "÷ lower bound": float(
                    np.median([row["step_s"] / row["lower_bound_s"] for row in mine])
                ),
                "planner, measured": format_seconds(
                    float(np.median([row["planner_s"] for row in mine]))
                ),
                "gain": float(np.median(gains)),
                "interval": (low, high),
            }
        )
    return found


def _span(values) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def picture(table, title: str):
    """Draw gains over equal-number dense, one bar per method and way."""
    fig, axes = figure(width=7.5, height=3.4)
    methods = list(dict.fromkeys(row["method"] for row in table))
    ways = list(dict.fromkeys(row["values"] for row in table))
    for w, way in enumerate(ways):
        mine = {row["method"]: row for row in table if row["values"] == way}
        x = np.arange(len(methods)) + (w - (len(ways) - 1) / 2) * 0.8 / len(ways)
        gains = np.array([mine[m]["gain"] if m in mine else np.nan for m in methods])
        ends = np.array([mine[m]["interval"] if m in mine else (np.nan,) * 2 for m in methods])
        errors = np.abs(ends.T - gains)
        axes[0, 0].bar(x, gains, 0.8 / len(ways), yerr=errors, label=way, error_kw={"lw": 0.8})
    axes[0, 0].set_xticks(range(len(methods)), methods, fontsize=8)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("throughput over equal-number dense")
    axes[0, 0].set_title(f"{title}; modelled")
    axes[0, 0].legend(fontsize=7)
    return fig


def parts(given) -> tuple[str, Work, dict[int, Fleet], int, list[str], bool]:
    """Choose what to simulate."""
    seeds = range(given.seeds) if given.seed is None else [given.seed]
    if given.smoke:
        fleets = {0: paper_fleet(0, n_devices=8)}
        return "smoke", gpt2_work(2, 64, 4, 64), fleets, 8, ["dense", "AdaTopK"], True
    if given.part == "paper":
        fleets = {seed: paper_fleet(seed) for seed in seeds}
        return "48 devices, GPT-2 XL", gpt2_work(48), fleets, 48, list(WAYS), True
    if given.part in ("resnet50", "resnet101"):
        fleets = {seed: paper_fleet(seed) for seed in seeds}
        title = f"48 devices, ResNet-{given.part.removeprefix('resnet')}"
        return title, resnet_work(given.part), fleets, 48, list(WAYS), True
    fleets = {seed: internet_fleet(1000, seed) for seed in seeds}
    title = "1,000 devices, 340 blocks of GPT-2 XL"
    return title, gpt2_work(340), fleets, 512, ["dense", "AdaTopK"], False


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plan for simulated fleets.")
    parser.add_argument("--part", choices=PARTS, default="paper")
    parser.add_argument("--seeds", type=int, default=None, help="fleets drawn")
    parser.add_argument("--seed", type=int, default=None, help="this fleet alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="8 devices, nothing written")
    given = parser.parse_args(argv)
    given.seeds = given.seeds or (1 if given.part == "internet" else 3)
    title, work, fleets, micro_batches, ways, best_order = parts(given)
    rows, plans = collect(work, fleets, micro_batches, ways, best_order)
    name = given.out / f"simulate_{given.part}"
    record = Path(f"{name}.jsonl")
    if given.seed is not None and record.exists():
        kept = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        rows += [row for row in kept if row["seed"] != given.seed]
        rows.sort(key=lambda row: row["seed"])
    table = summary(rows)
    shown = [{k: v for k, v in row.items() if k not in ("gain", "interval")} for row in table]
    one_fleet = next(iter(fleets.values()))
    rate = 8 * one_fleet.bytes_per_s[~np.eye(len(one_fleet), dtype=bool)]
    count = len({row["seed"] for row in rows})
    text = (
        f"# {title}: modelled\n\nPlanned on {machine()}. {count} fleets drawn (number "
        f"{next(iter(fleets))} has links of {rate.min() / 1e6:.3g} Mbit/s to "
        f"{rate.max() / 1e9:.3g} Gbit/s), "
        f"{work.n_nodes} nodes, {work.total[-1] / 1e12:.3g} TFLOPs a micro-batch with "
        f"recomputation, {micro_batches} micro-batches a step, ratio {RATIO:g} for top-k. Medians "
        "over the fleets; gains are paired by fleet, with bootstrap intervals. **Steps are "
        "modelled**, by simulation or, where a plan has too many tasks, by the closed form; no "
        "message was sent. Baselines take devices in the order in which they joined; 1F1B unless "
        "named. The lower bound is that of the plan's "
        f"own devices and links.\n\n{markdown_table(shown)}"
    )
    print(text)
    if given.smoke:
        return
    atomic_write(f"{name}.md", text)
    write_jsonl(record, rows)
    save_figure(picture(table, title), f"{name}.png")
    if given.part == "paper" and 0 in fleets:
        plan, costs = plans[0, "search", "dense"]
        save_figure(plan_figure(plan, costs, fleets[0]), f"{name}_plan.png")
        groups = communities(fleets[0])
        save_figure(fleet_figure(fleets[0], groups, plan.devices), f"{name}_fleet.png")


if __name__ == "__main__":
    main()
