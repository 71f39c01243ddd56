"""Take a small Llama-form model apart on a CPU: all that `jaxsys bench` measures, in one grid.

    python experiments/bench/cpu.py            under 20 minutes on 2 cores, idle
    python experiments/bench/cpu.py --smoke    under a minute: tiny shapes, nothing kept
    python experiments/bench/cpu.py --parts ops modules     these alone

Training and fine-tuning over techniques, serving under a burst and under Poisson arrivals, a step's
parts by the profiler and each alone, operators under the roofline, copies and collectives with
fitted lines, and the static report. Every part is a process of its own; two virtual devices carry
what is split. Written are results/<part>.jsonl, report.md, report.html and the figures.

The processes keep freed memory (MALLOC_*), as every step would otherwise ask the system for all of
its buffers again; what that is worth is measured too (part ``memory``).

Expected: parts of the step add up to it within 10 % both ways; what the paper found, line by line,
is in README.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PARTS = ("comm", "static", "train", "finetune", "serve", "modules", "memory", "ops")
TWO_DEVICES = ("static", "comm", "train", "finetune")
# glibc gives buffers above 128 KiB back to the system, and touching them anew costs a page fault
# for every 4 KiB.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_ARENA_MAX": "1",
}
MODEL, BATCH, TOKENS = "small", 4, 256


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Take a small model apart on a CPU.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, nothing kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        run_part(given)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if given.smoke:
            given.out = Path(scratch)
        run_all(given)


def run_all(given: argparse.Namespace) -> None:
    """Run each part in a process of its own, then write the report."""
    from jaxsys.bench.records import read_all
    from jaxsys.bench.report import write

    for part in given.parts:
        start = time.perf_counter()
        settings = {} if part == "memory" else KEEP_MEMORY
        command = [sys.executable, __file__, "--child", part, "--out", str(given.out)]
        command += ["--seed", str(given.seed), *(["--smoke"] if given.smoke else [])]
        (given.out / f"{part}.jsonl").unlink(missing_ok=True)
        subprocess.run(command, check=True, env={**os.environ, **settings})
        tell(f"{part}: {time.perf_counter() - start:.0f} s")
    files = write(read_all(given.out), given.out, title="A small Llama on a CPU")
    tell(f"wrote {', '.join(path.name for path in files)}")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_part(given: argparse.Namespace) -> None:
    """Measure one part and keep its rows."""
    import jax

    from jaxsys.core.report import append_jsonl

    jax.config.update("jax_platforms", "cpu")
    if given.child in TWO_DEVICES:
        jax.config.update("jax_num_cpu_devices", 2)
    makers = {
        "static": static, "comm": comm, "train": train, "finetune": finetune, "serve": serve,
        "modules": modules, "memory": modules, "ops": ops,
    }  # fmt: skip
    file = given.out / f"{given.child}.jsonl"
    given.keep = partial(append_jsonl, file)
    rows = makers[given.child](given)
    if given.child in ("static", "ops", "comm"):  # the others keep each row as soon as it is there
        for row in rows:
            given.keep(row)


def task_of(given: argparse.Namespace, method: str = "pretrain") -> Any:
    from jaxsys.bench.step import Task

    size = (2, 16) if given.smoke else (BATCH, TOKENS)
    return Task(method, *size, seed=given.seed)


def techniques_of(given: argparse.Namespace, method: str = "pretrain") -> tuple[Any, ...]:
    """The naive step, every single technique, and pairs that a user would think of."""
    from jaxsys.bench.techniques import CHOICES, Technique, combinations

    if given.smoke:
        return (Technique(), Technique(zero=2))
    choices = dict(CHOICES)
    if method in ("pretrain", "full"):
        del choices["weights"]  # codes cannot be trained
    pairs = (
        {"recompute": "full", "attention": "xla"},
        {"recompute": "full", "layers": "scan"},
        {"recompute": "full", "donate": True},
        {"zero": 2, "offload": "optimizer"},
        {"zero": 3, "recompute": "full"},
        {"zero": 3, "offload": "parameters"},
        {"attention": "xla", "dtype": "mixed"},
        {"donate": True, "layers": "scan", "accumulate": 4},
    )
    found = [*combinations(choices, most=1), *(replace(Technique(), **pair) for pair in pairs)]
    return tuple(dict.fromkeys(found))


def static(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench import shapes, static

    chosen = techniques_of(given)
    return static.measure(
        MODEL, shapes.shape(MODEL), chosen, task_of(given), lines=lines_of(given), on_event=tell
    )


def train(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench import shapes
    from jaxsys.bench.train import measure

    chosen = techniques_of(given)
    return measure(MODEL, shapes.shape(MODEL), chosen, task_of(given), **options_of(given))


def finetune(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench import shapes
    from jaxsys.bench.finetune import METHODS, measure
    from jaxsys.bench.techniques import Technique

    methods = ("lora",) if given.smoke else tuple(METHODS)
    chosen = [Technique(), Technique(recompute="full"), Technique(zero=2)]
    chosen = chosen[:1] if given.smoke else chosen
    config = shapes.shape(MODEL)
    return measure(MODEL, config, methods, chosen, task_of(given), **options_of(given))


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "runs": 2 if given.smoke else 10,
        "memory": not given.smoke,
        "lines": lines_of(given),
        "on_event": tell,
        "on_row": given.keep,
    }


def lines_of(given: argparse.Namespace) -> dict[str, Any] | None:
    """Lines of collectives that the part ``comm`` has fitted, by kind."""
    from jaxsys.bench.records import read
    from jaxsys.core.cost import LinearCost

    file = given.out / "comm.jsonl"
    rows = read(file) if file.exists() else []
    return {
        row["flags"]["operator"]: LinearCost.from_dict(row["line"]) for row in rows if "line" in row
    } or None


def serve(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench.serving.load import synthetic_prompts
    from jaxsys.bench.serving.run import Load, layout_for, measure, open_served

    count, length, answer = (4, 8, 4) if given.smoke else (64, 64, 32)
    slots = 2 if given.smoke else 16
    served = open_served("tiny" if given.smoke else "smollm2", layout_for(256, slots=slots))
    prompts = synthetic_prompts(count, length, answer, served.tokenizer, given.seed)
    loads = [Load(ignore_eos=True, seed=given.seed)]
    if not given.smoke:
        loads.append(Load(rate=1.0, ignore_eos=True, seed=given.seed))
        loads.append(Load(rate=1.0, burstiness=0.25, ignore_eos=True, seed=given.seed))
    slo = {"ttft_s": 2.0, "tpot_s": 0.5}
    rows = []
    for load in loads:
        rows.append(measure(served, prompts, load, slo=slo))
        given.keep(rows[-1])
    return rows


def modules(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench import shapes
    from jaxsys.bench.dissect import measure
    from jaxsys.bench.techniques import Technique

    task, rows, config = task_of(given), [], shapes.shape(MODEL)
    wide = replace(config, width=768, head_width=64, heads=12, kv_heads=6, ffn_width=2064)
    cells = {
        "naive": (config, Technique()),
        "recompute full": (config, Technique(recompute="full")),
        "dtype bf16": (config, Technique(dtype="bf16")),
        "naive, width 768": (wide, Technique()),
    }
    for name, (model, technique) in cells.items():
        alone = given.smoke or given.child == "memory"
        if alone and name != "naive":
            continue
        flags = {"model": MODEL, "batch": task.batch, "tokens": task.tokens, "technique": name}
        if given.child == "memory":
            flags["freed memory"] = "given back"
        rounds = 2 if given.smoke else 10 if model is wide else 20
        rows.append(measure(model, technique, task, flags, rounds=rounds, on_event=tell))
        given.keep(rows[-1])
    return rows


def ops(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench.ops import SMOKE, Sweep, measure

    if given.smoke:
        return measure(SMOKE, runs=2, on_event=tell)
    return measure(Sweep(), runs=15, on_event=tell)


def comm(given: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxsys.bench.comm import SIZES, measure

    if given.smoke:
        return measure(SIZES[:3], runs=2, on_event=tell)
    return measure(runs=20, on_event=tell)


if __name__ == "__main__":
    main()
