"""Mediator beside other merges: held-out score against stored bytes, on two families of experts.

    python experiments/merge/family.py                      first: trains the experts, resumes
    python experiments/merge/mediator.py                    about 15 minutes on 2 cores; resumes
    python experiments/merge/mediator.py --family smollm2   about 15 minutes on 2 cores; resumes
    python experiments/merge/mediator.py --smoke            half a minute, nothing kept
    python experiments/merge/mediator.py --report           only tables and figures

Four experts of one base: Shakespeare, Python source, reversing letters, sorting letters. The score
is the share of held-out tokens that the model puts first (of the continuation of 32 given tokens,
or of the answer), averaged over tasks; nats per token stand beside it. Three seeds for stories260K
(order of the training data; the base is one). All settings of all merges are chosen on a validation
split. Stored bytes are counted in 16 bits for every method, relative to one model.

Expected: plain merges lose most of what the experts learned, routed ones keep it in proportion to
the bytes that they store; see `results/mediator.md`.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import baselines
import jax
import jax.numpy as jnp
import numpy as np
from baselines import BF16, Entry
from family import (
    FAMILIES,
    PROMPT,
    Batch,
    data_folder,
    default_work,
    text_rows,
    tokens_of,
    train_expert,
)
from report import write_report
from scoring import (
    LEVELS,
    RESULTS,
    Bench,
    Records,
    Routing,
    head_routing,
    ideal,
    make_params,
    mean,
    own_routing,
    weights_of,
)

from jaxsys.core.tree import flatten
from jaxsys.merge.conflict import Conflicts, conflicts, layer_name
from jaxsys.merge.mediator import (
    LayerChoice,
    Mediated,
    MediatorConfig,
    choose_layers,
    mediate,
)
from jaxsys.merge.routed import Routed
from jaxsys.merge.router import BlendConfig, HeadConfig, blend
from jaxsys.merge.sparse import predicted_bytes

MAIN = ("shakespeare", "code", "reverse", "sort")
BUDGETS = (1.25, 1.5, 2.0)  # of one model, router included
ALL = LayerChoice("absolute", -1.0)
ROWS = {
    "stories": {
        "train": {"text": 256, "rule": 256},
        "valid": {"text": 8, "rule": 48},
        "test": {"text": 24, "rule": 192},
    },
    "smollm2": {
        "train": {"text": 24, "rule": 24},
        "valid": {"text": 2, "rule": 8},
        "test": {"text": 6, "rule": 32},
    },
    "smoke": {split: {"text": 4, "rule": 8} for split in ("train", "valid", "test")},
}


def density_for(bench: Bench, layers: tuple[str, ...], extra_bytes: float, bits: Any) -> float:
    """Find the largest density of these layers' parts that fits into the bytes, to 0.1 %."""
    sizes = [x.size for p, x in flatten(bench.base).items() if layer_name(p) in layers]

    def taken(density: float) -> int:
        return sum(predicted_bytes(n, bench.n, density, bits) for n in sizes)

    fitting = [d for d in np.arange(0.002, 1.0005, 0.001) if taken(float(d)) <= extra_bytes]
    return float(round(fitting[-1], 3)) if fitting else 0.0


def record(entry: Entry, seconds: float) -> dict[str, Any]:
    """Lay an entry out for the records."""
    total = mean(entry.tasks)
    return {
        "accuracy": total.accuracy,
        "nats": total.nats,
        "ratio": entry.ratio,
        "chosen": entry.chosen,
        "tasks": {task: score._asdict() for task, score in entry.tasks.items()},
        "seconds": round(seconds, 1),
    }


class Run:
    """One family and seed: what was measured goes to the records at once."""

    def __init__(self, bench: Bench, records: Records, name: str):
        self.bench, self.records, self.name = bench, records, name

    def conflict(self) -> Conflicts:
        """Measure conflict, or take the layers' figures from the records."""

        def measure() -> dict[str, Any]:
            found = conflicts(self.bench.base, self.bench.experts)
            return {"layers": found.layers, "sizes": found.sizes}

        kept = self.records.get(f"{self.name}/conflict", measure)
        return Conflicts({}, kept["layers"], kept["sizes"])

    def keep(self, label: str, make: Callable[[], Entry]) -> dict[str, Any]:
        """Measure an entry if it is not there."""

        def timed() -> dict[str, Any]:
            start_s = time.perf_counter()
            found = record(make(), time.perf_counter() - start_s)
            told = f"{found['accuracy']:.4f} {found['nats']:.3f} x{found['ratio']:.2f}"
            print(f"{self.name} {label}: {told} {found['seconds']} s", flush=True)
            return found

        return self.records.get(f"{self.name}/{label}", timed)

    def build(self, config: MediatorConfig, **options: Any) -> Mediated:
        """Build Mediator, measuring conflict once for each denoising."""
        bench = self.bench
        known = self.conflict() if config.quantile == 0.8 else None
        key = jax.random.key(bench.seed)
        return mediate(
            bench.base, bench.experts, config, key=key, dtype=BF16, found=known, **options
        )

    def served(
        self, made: Mediated, routing: Routing | None, config: BlendConfig, **chosen: Any
    ) -> Entry:
        """Score a build with a router, or with an ideal one."""
        bench = self.bench
        if not made.routed.parts:
            params = make_params(made.routed, jnp.ones(1))
            return Entry(bench.scores(params), made.cost.ratio, chosen)
        weights, right = ideal(bench), 1.0
        stored = made.cost.stored_bytes
        if routing is not None:
            weights, right = weights_of(bench, routing, config)
            stored += routing.stored_bytes
        chosen |= {"layers": made.layers, "right": right, "fraction": made.cost.routed_fraction}
        scores = bench.routed_scores(made.routed, weights)
        return Entry(scores, stored / made.cost.model_bytes, chosen)

    def routing(self, made: Mediated, head: HeadConfig = HeadConfig()) -> Routing:  # noqa: B008
        """Train a head on the shared leaves of a build."""
        shared = make_params(Routed(made.routed.shared, {}), jnp.ones(1))
        return head_routing(self.bench, shared, head)


def budget_entry(run: Run, budget: float, small: bool) -> Entry:
    """Build Mediator for a budget: layers and bits chosen on validation, density what fits."""
    bench = run.bench
    found = run.conflict()
    d, leaves = found.of_layers("pairwise_sign"), flatten(bench.base)
    model_bytes = 2 * sum(x.size for x in leaves.values())
    router_bytes = 4 * (2 * bench.config.width + bench.n * (bench.config.width + 1) + 1)
    extra = (budget - 1) * model_bytes - router_bytes
    grid = [(k, bits) for k in (2, 4, len(d)) for bits in (2, 4, 16)]
    first = run.records.found.get(f"0/Mediator, {budget:g}x")
    if small:  # nothing is tried: all layers where their masks leave room for values, else half
        grid = [(len(d) if budget >= 1.5 else len(d) // 2, 2)]
    elif run.name != "0" and first is not None:  # what seed 0 chose holds for the others
        grid = [(first["chosen"]["k"], first["chosen"]["bits"])]
    candidates = []
    for k, bits in grid:
        choice = LayerChoice("topk", k)
        density = density_for(bench, choose_layers(d, choice), extra, bits)
        if density:
            candidates.append(MediatorConfig(choice=choice, density=density, bits=bits))
    best: tuple[float, Any, Any] | None = None
    for config in candidates:
        made = run.build(config)
        scores = (
            bench.routed_scores(made.routed, ideal(bench, "valid"), "valid")
            if len(candidates) > 1
            else {}
        )
        right = mean(scores).accuracy if scores else 0.0
        if best is None or right > best[0]:
            best = (right, made, config)
    assert best is not None
    _, made, config = best
    chosen = {"k": int(config.choice.value), "density": config.density, "bits": config.bits}
    return run.served(made, run.routing(made), BlendConfig(), **chosen)


SLOW = ("PCB", "Consensus", "Fisher", "RegMean", "AdaMerging", "TALL masks", "Twin, 20 %", "WEMoE")


def main_table(run: Run, small: bool, slow: bool) -> None:
    """Measure the methods of the main table that are quick, or those that are slow."""
    bench = run.bench
    listed = {**dict(baselines.plain(bench, small)), **dict(baselines.routed(bench, small))}

    def reading() -> Entry:
        made = run.build(MediatorConfig())
        routing = run.routing(made) if made.routed.parts else None
        return run.served(made, routing, BlendConfig())

    for budget in (1.5, 2.0, 1.25):
        listed[f"Mediator, {budget:g}x"] = functools.partial(budget_entry, run, budget, small)
    listed["Mediator, as read (μ+σ, ρ 0.1)"] = reading
    if small:  # what matters most goes first
        first = ("ideal routing", "Mediator, 1.5x", "Mediator, 2x", "EMR")
        listed = {label: listed[label] for label in first} | listed
    for label, make in listed.items():
        if (label in SLOW) == slow:
            run.keep(label, make)


def ablation(run: Run) -> None:
    """Change one choice at a time, near 1.5 times one model's bytes."""
    bench = run.bench
    usual = {"density": 0.45, "bits": 2}
    choices = {
        "all layers": LayerChoice("absolute", -1.0),
        "gaussian 1": LayerChoice("gaussian", 1.0),
        "gaussian 0": LayerChoice("gaussian", 0.0),
        "quantile 0.5": LayerChoice("quantile", 0.5),
        "topk 3": LayerChoice("topk", 3),
        "absolute 0.45": LayerChoice("absolute", 0.45),
    }
    for name, choice in choices.items():
        for measure in ("pairwise_sign", "any_sign", "magnitude"):
            if name not in ("all layers", "absolute 0.45") or measure == "pairwise_sign":
                config = MediatorConfig(choice=choice, conflict=measure, **usual)
                run.keep(f"layers: {name}, {measure}", lambda c=config: ideally(run, c))
    config = MediatorConfig(quantile=0.0, choice=choices["topk 3"], **usual)
    run.keep("denoising: none, topk 3", lambda: ideally(run, config))
    for bits, densities in (
        (16, (0.05, 0.1, 0.25)),
        (8, (0.25,)),
        (4, (0.1, 0.25, 0.5)),
        (2, (0.25, 0.45, 1.0)),
    ):
        for density in densities:
            config = MediatorConfig(choice=ALL, density=density, bits=bits)
            run.keep(f"sparsity: {density:g} at {bits} bits", lambda c=config: ideally(run, c))
    for word in ({"sparsify": "dare"}, {"dense": "base"}):
        config = MediatorConfig(choice=ALL, **usual, **word)
        run.keep(f"sparsity: {next(iter(word.values()))}", lambda c=config: ideally(run, c))
    made = run.build(MediatorConfig(choice=ALL, **usual))
    routers = {
        "ideal": lambda: None,
        "linear head": lambda: run.routing(made),
        "head with 32 hidden": lambda: run.routing(made, HeadConfig(32)),
        "entropy": lambda: own_routing(bench, made.routed, "entropy"),
        "nll": lambda: own_routing(bench, made.routed, "nll"),
    }
    for name, make in routers.items():
        for threshold in (0.0, 0.5, 1.1):
            if name != "ideal" or threshold == 0.5:
                run.keep(
                    f"router: {name}, U0 {threshold:g}",
                    lambda m=make, t=threshold: run.served(made, m(), BlendConfig(t)),
                )


def ideally(run: Run, config: MediatorConfig) -> Entry:
    """Build and score with a router that is never wrong."""
    return run.served(run.build(config), None, BlendConfig())


def foreign(run: Run, rows: int = 12) -> None:
    """Score input that mixes two tasks, and input of no task: select, blend, average."""
    bench = run.bench
    made = run.build(MediatorConfig(choice=ALL, density=0.45, bits=2))
    routing = run.routing(made)

    def measure(batch: Batch) -> dict[str, Any]:
        p = routing.posterior(batch)
        found: dict[str, Any] = {"rows": len(batch.tokens)}
        for name, threshold in (("select", 1.1), ("blend", 0.0), ("threshold", 0.5)):
            w, unsure = blend(p, BlendConfig(threshold))
            score = bench.served(made.routed, np.asarray(w), batch)
            found[name] = score._asdict() | {"weights": np.asarray(w).mean(0)}
            found["uncertainty"] = float(unsure.mean())
        plain = {"base": bench.base, "average": make_params(made.routed, jnp.zeros(bench.n))}
        even = np.full((len(batch.tokens), bench.n), 1 / bench.n)
        found["even blend"] = bench.served(made.routed, even, batch)._asdict()
        for name, params in plain.items():
            sums = [float(np.sum(s)) for s in bench.score_rows(params, *batch)]
            found[name] = {"nats": sums[0] / sums[2], "accuracy": sums[1] / sums[2]}
        singles = [
            bench.served(made.routed, np.tile(np.eye(bench.n)[i], (len(batch.tokens), 1)), batch)
            for i in range(bench.n)
        ]
        found["best expert"] = min(singles, key=lambda s: s.nats)._asdict()
        return found

    for name, batch in foreign_batches(bench, rows).items():
        run.records.get(f"{run.name}/foreign {name}", lambda b=batch: measure(b))


def foreign_batches(bench: Bench, rows: int) -> dict[str, Batch]:
    """Make mixed rows, and rows of tasks that no expert has seen."""
    family, bos = bench.family, bench.config.bos_id
    length = family.length
    ids = {
        task: tokens_of(family, task, "test")[: rows * length].reshape(rows, length)
        for task in ("shakespeare", "code", "wikitext")
    }
    half = PROMPT // 2
    first = np.concatenate([ids["code"][:, :half], ids["shakespeare"][:, : length - half]], 1)
    other = np.concatenate([ids["shakespeare"][:, :half], ids["code"][:, : length - half]], 1)
    found = {
        "code then Shakespeare": text_rows(first, bos),
        "Shakespeare then code": text_rows(other, bos),
        "Wikipedia": text_rows(ids["wikitext"], bos),
    }
    stories = (data_folder() / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")
    told = bench.tokenizer.encode(stories[:40_000])[1 : rows * length + 1].reshape(rows, length)
    found["TinyStories"] = text_rows(told, bos)
    sums = bench.rows["test"]["rule"]
    bench.rows["test"]["rule"] = 4 * rows
    found["addition"] = bench.batch("add", "test")
    bench.rows["test"]["rule"] = sums
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=sorted(FAMILIES), default="stories")
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        return smoke(options.work / "smoke")
    if not options.report:
        family = FAMILIES[options.family]
        records = Records(RESULTS / f"mediator_{family.name}.json")
        small = family.name != "stories"
        runs = []
        for seed in range(options.seeds or family.seeds):
            bench = Bench(family, MAIN, seed, options.work, ROWS[family.name])
            runs.append(Run(bench, records, f"{seed}"))
        for run in runs:
            main_table(run, small, slow=False)
        if not small:
            foreign(runs[0])
            ablation(runs[0])
            bench = Bench(family, family.tasks, 0, options.work, ROWS[family.name])
            six(Run(bench, records, "six"))
        for run in runs:
            main_table(run, small, slow=True)
    return write_report(BUDGETS)


def six(run: Run) -> None:
    """Measure a few methods with six experts."""
    names = ("average", "task arithmetic", "TIES", "EMR", "Twin, 10 %", "ideal routing")
    listed = [*baselines.plain(run.bench, True), *baselines.routed(run.bench, True)]
    for label, make in listed:
        if label in names:
            run.keep(label, make)
    for budget in (1.5, 2.0):
        make = functools.partial(budget_entry, run, budget, True)
        run.keep(f"Mediator, {budget:g}x", make)


def smoke(work: Path) -> None:
    """Go through the main parts with experts of a few steps; keep nothing."""
    import tempfile

    family = FAMILIES["stories"]
    tasks = ("shakespeare", "reverse")
    for task in tasks:
        train_expert(family, task, 0, work, 0.005)
    bench = Bench(family, tasks, 0, work, ROWS["smoke"])
    run = Run(bench, Records(Path(tempfile.mkdtemp()) / "records.json"), "smoke")
    for label, make in baselines.plain(bench, True):
        if label in ("base", "average", "TIES"):
            run.keep(label, make)
    run.keep("Mediator, 1.5x", lambda: budget_entry(run, 1.5, True))
    assert run.records.found["smoke/Mediator, 1.5x"]["ratio"] <= 1.5
    print(f"levels {LEVELS}: passed")


if __name__ == "__main__":
    main()
