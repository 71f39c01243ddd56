"""What a growing number of edits does to a model: the question of arXiv 2410.18785 on SmolLM2-135M.

    python experiments/edit/statistics.py                    first
    python experiments/edit/curve.py                         resumes cell by cell
    python experiments/edit/curve.py --counts 0 1 5 10 20    fewer edits
    python experiments/edit/curve.py --model DIR             any model that `jaxsys lm info` knows
    python experiments/edit/curve.py --smoke                 half a minute, the model tiny, no file
    python experiments/edit/curve.py --report                only table and figure

Needs `JAXSYS_DATA` and the extra `smollm2`. An edit takes 1 to 4 s of one core, a look at the model
about 20 s. Cells go to `results/curve_MODEL/cells.jsonl`; the half-done sequences are kept in
`--work`, so that a run that was stopped goes on without repeating an edit.

Facts: CounterFact from its first record on, one after the other, weights kept (the paper's
protocol). Abilities, chosen for what so small a model can do at all: ARC-Easy by likelihood (the
first 50 questions), the same set answered in writing (the first 16, listed choices; says how often
the model is mute or repeats itself), nats per token on 1,024 tokens of WikiText-2's test text. The
paper's own benchmarks (MMLU, GSM8K, BBH) are at chance for this model before any edit; its safety
sets (TruthfulQA, ToxiGen) are not in the data folder: give them as `--task FILE.jsonl`.

`rome-released` sets C to the identity, as the paper's code does for every size; `rome` has the
statistics of the original. All six closed forms average over 5 sampled prefixes. KN edits towards a
target's first token.

Expected: KN is gone after one edit and MEND after twenty; after fifty GRACE, MEMIT and AlphaEdit
are within 0.02 nats of the unedited model, PMET, R-ROME and ROME within 0.08, FT-L and ROME without
statistics 0.15 above it; ROME loses 0.3 between fifty and a hundred.
"""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from facts import (
    RESULTS,
    data_file,
    read_statistics,
    small_records,
    small_statistics,
)

from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table, print_table, write_jsonl
from jaxsys.edit.curve import Chosen, CurveConfig, Grid
from jaxsys.edit.curve_figure import curve_table, draw_curve
from jaxsys.edit.evaluation import EvaluationConfig
from jaxsys.edit.files import open_for_editing
from jaxsys.edit.methods import METHODS
from jaxsys.edit.prefixes import MEMIT_SAMPLES, sample_prefixes
from jaxsys.edit.records import load_records
from jaxsys.evaluate.choice import Choices
from jaxsys.evaluate.tasks import Task, load_task

ORDER = ("rome-released", "memit", "rome", "alphaedit", "ft-l", "kn", "mend", "r-rome", "pmet")
ORDER += ("grace",)
COUNTS = (0, 1, 5, 10, 20, 50, 100)
PAPER = """\
The paper's figures for its smallest and one larger model (MMLU, sequential edits, CounterFact; from
a machine-read copy of its tables). They stand here for the shape of the curves only: other models,
another benchmark, GPUs and half precision in part.

| model | method | unedited | 10 | 20 | 50 | 100 |
|---|---|---:|---:|---:|---:|---:|
| Pythia-160M | ROME | 0.2435 | 0 | | | |
| Pythia-160M | MEMIT | 0.2435 | | | | 0.2468 |
| Pythia-410M | ROME | 0.2614 | 0 | | | |
| GPT2-XL | PMET | 0.2098 | 0.2104 | 0.1081 | 0 | |
| Llama2-7B-chat | ROME | 0.4516 | | 0.4416 | 0.2700 | 0.0007 |
| Llama2-7B-chat | MEMIT | 0.4516 | | 0.4698 | 0.4682 | 0.4485 |
| Llama2-7B-chat | KN | 0.4516 | 0 | | | |
"""


def chosen(name: str, prefixes: tuple[str, ...], editors: Path | None) -> Chosen:
    """Make a method of the grid ready, or say why it cannot run."""
    key = "rome" if name == "rome-released" else name
    method = METHODS[key]
    if method.trained:
        if editors is None or not (editors / key).exists():
            raise UserError(f"{name} needs an editor trained beforehand in EDITORS/{key}")
        return Chosen(name, method, method.config(editor=str(editors / key)))
    config = method.config(several="first") if name == "kn" else method.config()
    if hasattr(config, "target"):
        config = replace(config, target=replace(config.target, prefixes=prefixes))
    if name == "rome-released":
        config = replace(config, statistics=False)
    return Chosen(name, method, config)


def tasks_of(given: argparse.Namespace) -> list[Task]:
    """Read what the model is asked beside the facts."""
    if given.smoke:
        questions = tuple(Choices.ask(f"{i} and one is", ["two", "six"], i % 2) for i in range(4))
        return [Task("pick", questions, "made up")]
    own = [load_task(path) for path in given.task]
    texts = [load_task("wikitext2")]
    return [
        load_task("arc_easy").head(50),
        load_task("arc_easy_written").head(16),
        *texts,
        *own,
    ]


def at_chance(task: dict[str, Any], before: dict[str, Any]) -> bool:
    """Tell whether an ability is gone: less than a fifth of what it was above chance is left."""
    return task["value"] - task["chance"] < 0.2 * (before["value"] - before["chance"])


def findings(cells: list[dict[str, Any]]) -> list[str]:
    """Take the paper's findings one by one."""
    good = [c for c in cells if "failed" not in c]
    before = next((c for c in good if c["n"] == 0), None)
    if before is None or "arc_easy" not in before["abilities"]:
        return []
    start = before["abilities"]["arc_easy"]
    lines = []
    for name in ORDER:
        own = sorted((c for c in good if c["method"] == name), key=lambda c: c["n"])
        if not own:
            continue
        gone = [c["n"] for c in own if at_chance(c["abilities"]["arc_easy"], start)]
        first = f"gone from {gone[0]} edits on" if gone else f"there up to {own[-1]['n']} edits"
        last = own[-1]["abilities"]
        told = f"- {name}: ARC-Easy {start['value']:.2f} → {last['arc_easy']['value']:.2f} after "
        told += f"{own[-1]['n']} edits, {first}"
        if "wikitext2" in last:
            nats = before["abilities"]["wikitext2"]["value"], last["wikitext2"]["value"]
            told += f"; nats per token {nats[0]:.2f} → {nats[1]:.2f}"
        if "arc_easy_written" in last:
            written = last["arc_easy_written"]
            told += f"; in writing: mute {written['muted']:.2f}, no option named "
            told += f"{written['empty']:.2f}, one answer {written['constant']:.2f}"
        lines.append(told)
    lines += [
        f"- {c['method']} stopped at {c['n']} edits: {c['failed']}" for c in cells if "failed" in c
    ]
    return lines


def report(cells: list[dict[str, Any]], name: str) -> None:
    """Write table and figure; of a cell that two runs made the newer one stands."""
    kept = {(cell["method"], cell["n"]): cell for cell in cells}
    methods = list(dict.fromkeys(method for method, _ in kept))
    cells = [kept[key] for key in sorted(kept, key=lambda key: (methods.index(key[0]), key[1]))]
    text = [
        f"# Abilities of {name} against the number of sequential edits",
        "Values with the columns of `jaxsys.edit.curve_figure.curve_table`: ARC-Easy and the same "
        "in writing as accuracies, WikiText-2 in nats per token; `mute` the share of written "
        "answers that are empty, `same` the share of the commonest answer (the larger of the "
        "tasks); what became of the facts edited so far (at most 20 of them, the newest among "
        f"them). Intervals are in the figure and in `curve_{name}.jsonl`.",
        markdown_table(curve_table(cells)),
        "\n".join(findings(cells)),
        PAPER,
        f"`python experiments/edit/curve.py` on {machine()}.",
    ]
    atomic_write(RESULTS / f"curve_{name}.md", "\n\n".join(text) + "\n")
    write_jsonl(RESULTS / f"curve_{name}.jsonl", cells)
    if any(cell["n"] and "failed" not in cell for cell in cells):
        draw_curve(cells, RESULTS / f"curve_{name}.png", f"{name}, sequential edits")


def main() -> None:
    """Do the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=list(ORDER))
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--stats", type=Path, default=RESULTS / "statistics")
    parser.add_argument("--editors", type=Path, help="folder with trained editors by method")
    parser.add_argument("--task", nargs="*", default=[], help="more abilities, as .jsonl files")
    parser.add_argument("--work", type=Path, default=RESULTS / "work")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    name = "tiny" if given.smoke else Path(given.model).name
    model, params = open_for_editing("tiny" if given.smoke else given.model)
    counts = (0, 1, 2) if given.smoke else tuple(given.counts)
    if given.smoke:
        records, stats = small_records(2), small_statistics(model, params, (0, 1))
    else:
        records = load_records(data_file("edit/counterfact.json"), limit=max(counts)).records
        stats = read_statistics(given.stats, params)
    answer_tokens = 0 if given.smoke else 12
    grid = Grid(
        model,
        params,
        records,
        tasks_of(given),
        CurveConfig(counts, 1, 20, EvaluationConfig(answer_tokens, 0)),
        name=name,
        folder=None if given.smoke else given.work / f"curve_{name}",
        stats=stats,
        options={"window": 256, "most_windows": 4, "rows": 16},
        tell=lambda cell: print(curve_table([cell])[0], flush=True),
    )
    samples = ((4, 5),) if given.smoke else MEMIT_SAMPLES
    prefixes = sample_prefixes(model, params, samples)
    cells: list[dict[str, Any]] = []
    for method in ("rome-released", "ft-l") if given.smoke else given.methods:
        try:
            ready = chosen(method, prefixes, given.editors)
            if given.report:
                found = [c for c in grid.cells if c["method"] in (method, "unedited")]
            else:
                found = grid.run([ready])
        except UserError as error:
            print(f"{method} is left out: {error}", flush=True)
            continue
        cells += [cell for cell in found if cell not in cells]
        if not given.smoke and cells:
            report(cells, name)
    if given.smoke:
        print_table(curve_table(cells))


if __name__ == "__main__":
    main()
