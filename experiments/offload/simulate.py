"""Model decoding and prompts on five assumed machines, and compare rules, caches and schedulers.

    python experiments/offload/simulate.py            3 minutes on an idle core
    python experiments/offload/simulate.py --smoke    seconds, nothing written

Every time here is **modelled**: the machines' rates are assumed, routing is drawn (popular experts,
topics of sequences, locality between tokens; no routing of a trained model was at hand), and each
pass is simulated task by task. Only hit rates and gaps of schedulers do not depend on the rates.

- Machines: Mixtral-8x7B (46.7 billion parameters) on the machines of the limits' table, the
  experts in 16 or 4.5 bits; tokens per second of every strategy beside the limits. Arithmetic is
  assumed at 1 TFLOP/s (CPU) and 70 TFLOP/s (accelerator), the link's latency at 15 µs, launches at
  10 µs.
- Caches: hit rates of each policy by number of slots, every miss entering; plans' profiles come
  from other sequences than those they are judged by.
- Schedulers: makespans over the optimum (exhaustive) for random token counts and residency.

Expected: the limits to two digits as in the table (1.39, 3.01, 3.54, 35.3 on the first machine);
column cuts within a few percent of the limit or above it, since the limit lets the accelerator wait
for the CPU; the list scheduler a few percent from the optimum on average.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.core.measure import bootstrap_ci, machine
from jaxsys.core.report import (
    atomic_write,
    figure,
    markdown_table,
    save_figure,
    write_jsonl,
)
from jaxsys.core.timeline import gantt
from jaxsys.models.lm.config import LMConfig
from jaxsys.offload.assign import ExpertCosts, assign, exact, makespan
from jaxsys.offload.cache import (
    count_matrices,
    frequency,
    hits,
    lru,
    nearest_trace,
    score,
)
from jaxsys.offload.limit import limit
from jaxsys.offload.parts import cache_bytes, parts_of, workspace_bytes
from jaxsys.offload.plan import make_plan
from jaxsys.offload.predict import predicted_prefill_s
from jaxsys.offload.rules import RELEASED, by_tokens, fiddler, list_schedule, on_cpu
from jaxsys.offload.simulate import STRATEGIES, simulate_run
from jaxsys.offload.traces import Trace, synthetic_trace
from jaxsys.offload.types import Machine, Processor

RESULTS = Path(__file__).parent / "results"
MIXTRAL = LMConfig(
    "mixtral", 32000, 4096, 32, 32, 8, 128, 14336, 32768,
    experts=8, experts_per_token=2, expert_width=14336,
)  # fmt: skip
SMALL = LMConfig(
    "mixtral", 4096, 512, 4, 8, 2, 64, 1792, 4096,
    experts=8, experts_per_token=2, expert_width=1792,
)  # fmt: skip
# Name, GB/s (accelerator's memory, link, CPU, CPU's memory), GB of the accelerator, bits of the
# experts, experts resident in the limits' table.
MACHINES = (
    ("24 GB, 900 GB/s", (900, 25, 55, 65), 24, 16, 54),
    ("24 GB, 900 GB/s, 4.5 bits", (900, 25, 55, 65), 24, 4.5, 194),
    ("24 GB, 550 GB/s", (550, 12, 80, 100), 24, 16, 54),
    ("48 GB, 700 GB/s", (700, 25, 130, 160), 48, 16, 122),
    ("16 GB T4", (280, 12, 60, 75), 16, 16, 32),
)
TRACES = {
    "popular experts": {"zipf": 1.0, "locality": 0.0, "topic": 0.0},
    "topics": {"zipf": 0.2, "locality": 0.0, "topic": 1.5},
    "locality": {"zipf": 0.2, "locality": 0.6, "topic": 0.3},
    "nearly uniform": {"zipf": 0.1, "locality": 0.0, "topic": 0.1},
}
CONTEXT = 4096
NAMED = {strategy.name: strategy for strategy in STRATEGIES}
CPU_ONLY, OURS = NAMED["misses on the CPU"], NAMED["ours, whole experts"]


def make_machine(name: str, rates: tuple, memory_gb: float) -> Machine:
    """Describe a machine from assumed rates."""
    hbm, link, cpu, dram = (r * 1e9 for r in rates)
    return Machine(
        Processor(cpu, 1e12, 1.28e11, launch_s=1e-5),
        Processor(hbm, 7e13, memory_gb * 1e9, launch_s=1e-5),
        link_bytes_per_s=link,
        link_latency_s=1.5e-5,
        dram_bytes_per_s=dram,
        name=name,
    )


def run_machine(name, rates, memory_gb, bits, resident, config, trace, share=1.0, tokens=64):
    """Limits, plans and simulated strategies of one machine."""
    device = make_machine(name, rates, memory_gb)
    profile, judged = trace.split(1 - tokens / len(trace))
    judged = Trace(
        judged.experts[:tokens], judged.sequence[:tokens], judged.n_experts,
        judged.scores[:tokens], judged.early[:tokens],
    )  # fmt: skip
    form = {"weight_bytes": 2, "ffn_weight_bytes": bits / 8}
    even = parts_of(config, **form)
    parts = parts_of(config, **form, frequency=profile.frequency())
    total = config.layers * config.experts
    bounds = {
        way: limit(even, device, hit=resident / total, way=way)
        for way in ("link", "cpu", "split", "resident")
    }
    rows: list[dict[str, Any]] = []
    sizes = {
        "cache_bytes": cache_bytes(config, CONTEXT, number_bytes=2),
        "workspace_bytes": workspace_bytes(config, 512, CONTEXT, number_bytes=2),
        "prompt_tokens": 0,
    }
    budget = share * memory_gb * 1e9
    for cut in (False, True):
        plan = make_plan(parts, device, budget, cut_experts=cut, **sizes)
        whole_copies = make_plan(
            parts, device, budget, cut_experts=cut, **{**sizes, "prompt_tokens": 2048}
        )
        strategies = (None,) if cut else STRATEGIES
        for strategy in strategies:
            # Strategies that copy need buffers, so they get the plan that has some.
            used = (
                plan if cut or (strategy and strategy.name == "misses on the CPU") else whole_copies
            )
            run = simulate_run(used, device, judged, strategy)
            own = limit(parts, device, resident=used.resident)
            rows.append(
                {
                    "machine": name,
                    "strategy": "ours, cut columns" if cut else run.name,
                    "tokens/s": run.tokens_per_s,
                    "interval": bootstrap_ci(1 / run.pass_s, statistic=_harmonic),
                    "% of limit": own.percent(run.tokens_per_s),
                    "makespan / bound": float(run.pass_s.sum() / run.bound_s.sum()),
                    "hit rate": run.hit_rate,
                    "GB copied a token": run.copied_bytes / run.tokens / 1e9,
                    "predicted": 1 / used.predicted_s if cut else None,
                    "timeline": run.first,
                }
            )
    plan = make_plan(parts, device, budget, **{**sizes, "prompt_tokens": 2048})
    prompts = {n: n / predicted_prefill_s(plan, device, n) for n in (128, 512, 2048)}
    return bounds, rows, prompts


def _harmonic(speeds) -> float:
    return float(1 / np.mean(1 / np.asarray(speeds)))


def machines(smoke: bool, tokens: int):
    """All machines; their limits, strategies and prompts."""
    config = SMALL if smoke else MIXTRAL
    trace = synthetic_trace(
        (4 if smoke else 24) * tokens, config.layers, config.experts, config.experts_per_token,
        sequence_tokens=max(tokens // 4, 1), seed=1,
    )  # fmt: skip
    limits, found = [], []
    for name, rates, memory, bits, resident in MACHINES[:1] if smoke else MACHINES:
        total = config.layers * config.experts
        here = resident if not smoke else total // 5
        share = 1.0 if not smoke else 0.003
        bounds, rows, prompts = run_machine(
            name, rates, memory, bits, here, config, trace, share, tokens
        )
        limits.append(
            {
                "machine": name,
                "bits": bits,
                "resident": f"{here}/{total}",
                "link only": bounds["link"].tokens_per_s,
                "CPU only": bounds["cpu"].tokens_per_s,
                "best split": bounds["split"].tokens_per_s,
                "CPU's share": bounds["split"].cpu_share,
                "all resident": bounds["resident"].tokens_per_s,
                **{f"prompt of {n}, tokens/s": speed for n, speed in prompts.items()},
            }
        )
        found += rows
        for row in rows:
            print(f"{name:>26} {row['strategy']:>22}: {row['tokens/s']:.3g} tokens/s modelled")
    return limits, found


def caches(n_tokens: int, slots=(1, 2, 3, 4, 5, 6)):
    """Hit rates of each policy by slots, on routing of each kind."""
    found = []
    for kind, shape in TRACES.items():
        trace = synthetic_trace(2 * n_tokens, 4, 8, 2, seed=2, sequence_tokens=64, **shape)
        profile, judged = trace.split(0.5)
        policies = (
            lru(), frequency(), frequency(0.99), score(), nearest_trace(count_matrices(profile)),
        )  # fmt: skip
        names = ("LRU", "frequency", "frequency, fading", "HybriMoE score", "nearest trace")
        for n in slots:
            # Experts by use in the other sequences.
            order = np.argsort(-profile.frequency(), axis=1, kind="stable")[:, :n]
            own = judged.frequency()
            static = float(np.take_along_axis(own, order, 1).sum() / own.sum())
            row = {"routing": kind, "slots": n, "static profile": static}
            row |= {name: hits(p, judged, n) for name, p in zip(names, policies, strict=True)}
            found.append(row)
    return found


def schedulers(n_draws: int):
    """Makespan over the optimum, over random counts, residency and costs."""
    rng = np.random.default_rng(3)
    rules = {
        "list scheduler": list_schedule,
        "break-even count": by_tokens,
        "misses on the CPU": on_cpu,
        "Fiddler, sum, overlapped": lambda c, r, k: fiddler(c, r, k),
        "Fiddler, max, overlapped": lambda c, r, k: fiddler(c, r, k, "max"),
        "ours": assign,
    }
    settings: dict[str, Any] = {f"released, {name}": costs for name, costs in RELEASED.items()}
    settings["drawn"] = None
    found = []
    for setting, fixed in settings.items():
        gaps: dict[str, list[float]] = {name: [] for name in rules}
        for _ in range(n_draws):
            n = int(rng.integers(2, 9))
            counts = (1 + rng.geometric(0.08, n)).tolist() if rng.random() < 0.7 else [1] * n
            resident = (rng.random(n) < rng.random()).tolist()
            costs = fixed or ExpertCosts(*rng.lognormal(0, 1, 5).tolist(), 0.0, 0.0, 0.1)
            best = exact(counts, resident, costs).predicted_s
            for name, rule in rules.items():
                given = rule(counts, resident, costs)
                if name.startswith("Fiddler"):
                    seconds = _overlapped(given, counts, resident, costs)
                else:
                    seconds = given.predicted_s
                gaps[name].append(100 * (seconds / best - 1))
        for name, values in gaps.items():
            found.append(
                {
                    "costs": setting,
                    "rule": name,
                    "mean gap, %": float(np.mean(values)),
                    "interval": bootstrap_ci(values, statistic=np.mean),
                    "99th percentile, %": float(np.quantile(values, 0.99)),
                    "largest, %": float(np.max(values)),
                    "optimal, %": float(100 * np.mean(np.array(values) < 1e-7)),
                }
            )
    return found


def _overlapped(given, counts, resident, costs) -> float:
    return makespan(given, counts, resident, costs)


def picture(limits, rows, cache_rows):
    """Strategies per machine beside the limits, and hit rates by slots."""
    fig, axes = figure(1, 2, width=7.0, height=3.8)
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    spots = list(dict.fromkeys(row["machine"] for row in rows))
    for j, name in enumerate(names):
        mine = {row["machine"]: row for row in rows if row["strategy"] == name}
        x = np.arange(len(spots)) + (j - (len(names) - 1) / 2) * 0.8 / len(names)
        best = np.array([limit_row["best split"] for limit_row in limits])
        speeds = np.array([mine[m]["tokens/s"] for m in spots])
        axes[0, 0].bar(x, speeds / best, 0.8 / len(names), label=name)
    axes[0, 0].axhline(1.0, color="black", lw=0.8)
    axes[0, 0].set_xticks(range(len(spots)), spots, fontsize=6)
    axes[0, 0].set_ylabel("decode speed / limit of the best split")
    axes[0, 0].set_title("Mixtral-8x7B on assumed machines; modelled")
    axes[0, 0].legend(fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    kind = cache_rows[-1]["routing"] if len(cache_rows) < 8 else "topics"
    mine = [row for row in cache_rows if row["routing"] == kind]
    for name in [key for key in mine[0] if key not in ("routing", "slots")]:
        line = [row[name] for row in mine]
        axes[0, 1].plot([row["slots"] for row in mine], line, marker="o", ms=3, label=name)
    axes[0, 1].set_xlabel("slots of 8 experts")
    axes[0, 1].set_ylabel("hits per activation")
    axes[0, 1].set_title(f"caches on drawn routing: {kind}")
    axes[0, 1].legend(fontsize=6)
    return fig


def schedule_picture(rows):
    """The first pass of two strategies on the first machine."""
    spot = rows[0]["machine"]
    wanted = [r for r in rows if r["machine"] == spot and r["strategy"] in
              ("Fiddler", "ours, cut columns")]  # fmt: skip
    fig, axes = figure(len(wanted), 1, width=9.0, height=2.0)
    for axis, row in zip(axes[:, 0], wanted, strict=True):
        spans = [s for s in row["timeline"].spans if _early(s, row["timeline"])]
        gantt(axis, spans, labels=False)
        axis.set_title(f"{row['strategy']}: the first layers of one token, {spot}; modelled")
    return fig


def _early(span, timeline) -> bool:
    return span.start_s < 0.2 * timeline.makespan_s


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Model inference on assumed machines.")
    parser.add_argument("--tokens", type=int, default=128, help="tokens decoded per strategy")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a small model, nothing written")
    given = parser.parse_args(argv)
    tokens = 6 if given.smoke else given.tokens
    limits, rows = machines(given.smoke, tokens)
    cache_rows = caches(64 if given.smoke else 512, (2, 4) if given.smoke else range(1, 8))
    gaps = schedulers(20 if given.smoke else 2000)
    hidden = ("timeline", "machine")
    sections = []
    for spot in dict.fromkeys(row["machine"] for row in rows):
        shown = [
            {k: v for k, v in row.items() if k not in hidden} | {"interval": _text(row["interval"])}
            for row in rows
            if row["machine"] == spot
        ]
        sections.append(f"### {spot}\n\n{markdown_table(shown)}")
    gap_rows = [row | {"interval": _text(row["interval"])} for row in gaps]
    text = (
        f"# Inference with CPU and accelerator: modelled\n\nComputed on {machine()}. Nothing here "
        "was timed on the machines that are named: their rates are assumed, routing is drawn, and "
        f"passes are simulated task by task. {tokens} tokens decoded per strategy; intervals are "
        "bootstraps over tokens.\n\n## Limits, and prompts under our plan\n\n"
        f"{markdown_table(limits)}\n## Decoding\n\n`% of limit`: of the limit at that plan's own "
        "residency, in which the accelerator's reads are added to the misses; `makespan / bound`: "
        "over the linear programme's lower bound.\n\n" + "\n".join(sections) +
        f"\n## Caches: hits per activation, 8 experts, 2 per token\n\n{markdown_table(cache_rows)}"
        "\n## Schedulers: time over the optimum, 2 to 8 active experts\n\n"
        f"{markdown_table(gap_rows)}"
    )  # fmt: skip
    print(text)
    if given.smoke:
        return
    atomic_write(given.out / "simulate.md", text)
    plain = [{k: v for k, v in row.items() if k != "timeline"} for row in rows]
    write_jsonl(given.out / "simulate.jsonl", [*limits, *plain, *cache_rows, *gaps])
    save_figure(picture(limits, rows, cache_rows), given.out / "simulate.png")
    save_figure(schedule_picture(rows), given.out / "simulate_schedule.png")


def _text(interval) -> str:
    return f"{interval[0]:.3g} … {interval[1]:.3g}"


if __name__ == "__main__":
    main()
