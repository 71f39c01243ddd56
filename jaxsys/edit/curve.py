"""Abilities against the number of edits: the protocol of arXiv 2410.18785.

A cell is one method after n edits of one model: how well the facts edited so far are known, and how
well the model still answers what was never edited. Cells are JSON lines, written as they are done;
a run that was stopped goes on with the next cell, from the edits that are kept beside the lines.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.report import append_jsonl, to_json
from jaxsys.edit.contract import Answering, Editable, Method, Record
from jaxsys.edit.evaluation import (
    Base,
    EvaluationConfig,
    base_predictions,
    digest,
    evaluate_edits,
)
from jaxsys.edit.keep import keep, restore
from jaxsys.edit.protocol import answering_of
from jaxsys.edit.summary import summarise
from jaxsys.edit.turns import edit_all, settle
from jaxsys.evaluate.choice import Choices
from jaxsys.evaluate.exact import Prompt
from jaxsys.evaluate.protocol import from_lm
from jaxsys.evaluate.run import Report, run_task
from jaxsys.evaluate.tasks import Task

UNEDITED = "unedited"
COUNTS = (0, 1, 5, 10, 20, 50, 100, 500, 1000)  # of the paper's section 4.1


@dataclass(frozen=True)
class CurveConfig:
    """Say when a sequence of edits is looked at, and how.

    Attributes:
      counts: edits after which the model is evaluated.
      batch: requests of one edit: 1 is the paper's protocol, 0 makes all n edits at once from the
        unedited model, for each n.
      probed: most of the facts edited so far that are asked about, spread evenly.
      evaluation: see `EvaluationConfig`.

    >>> CurveConfig(counts=(0, 2)).batch
    1
    """

    counts: tuple[int, ...] = COUNTS
    batch: int = 1
    probed: int = 50
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(answer_tokens=16, fluency_tokens=0)
    )

    def __post_init__(self):
        if self.batch < 0 or self.probed < 1 or not self.counts or min(self.counts) < 0:
            raise UserError(
                f"batch is {self.batch}, probed {self.probed}, counts {self.counts}; expected a "
                "batch of 0 or more, at least 1 probed record and counts of 0 or more; correct them"
            )


class Chosen(NamedTuple):
    """Hold a method with its settings.

    >>> Chosen("none", Method(None, dict), {}).name
    'none'
    """

    name: str
    method: Method
    config: Any


def spread(n: int, most: int) -> list[int]:
    """Choose at most `most` of n facts, evenly, the newest among them.

    >>> spread(3, 5), spread(10, 4)
    ([0, 1, 2], [1, 4, 6, 9])
    """
    return sorted({(i + 1) * n // min(most, n) - 1 for i in range(min(most, n))})


def abilities(
    answering: Answering, tokenizer: Any, tasks: Sequence[Task], **options: Any
) -> dict[str, Any]:
    """Put tasks to a model, and say how often it was mute or said the same.

    Args:
      answering: the edited model; what it puts before prompts stands before questions too.
      tokenizer: its own.
      tasks: multiple choice, written answers, or texts.
      **options: of `run_task`.

    Returns:
      For each task a dict: ``value``, ``low``, ``high``, and of questions ``n``, ``chance``,
      ``majority``, ``empty`` (no answer found), ``constant`` (share of the commonest answer) and,
      where answers are written, ``muted`` (nothing was written at all). Of multiple choice the
      value is the plain accuracy, of a text the nats per token.

    >>> import jax
    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.evaluate import Prompt
    >>> from jaxsys.evaluate.protocol import from_forward
    >>> count = from_forward(lambda p, t: jax.nn.one_hot(t + 1, 256), {}, 256, 64)
    >>> task = Task("t", (Prompt("a", "bc"),), "as written", max_tokens=2)
    >>> abilities(Answering(count), ByteTokenizer(), [task])["t"]["muted"]
    0.0
    """
    found = {}
    for task in tasks:
        put = task if answering.rewrite is None else _rewritten(task, answering.rewrite)
        report = run_task(answering.model, tokenizer, put, **options)
        found[task.name] = _row(report)
    return found


def _rewritten(task: Task, rewrite: Callable[[str], str]) -> Task:
    def put(question: Choices | Prompt | str) -> Choices | Prompt | str:
        if isinstance(question, Choices):
            return question._replace(contexts=tuple(rewrite(c) for c in question.contexts))
        return (
            question._replace(text=rewrite(question.text))
            if isinstance(question, Prompt)
            else question
        )

    return task._replace(questions=tuple(put(q) for q in task.questions))


def _row(report: Report) -> dict[str, Any]:
    row = {k: v for k, v in report.rows[0].items() if k not in ("task", "metric", "above chance")}
    if "nats/token" in row:
        return {"value": row["nats/token"], "low": row["low"], "high": row["high"]}
    written = [a["written"] for a in report.answers if "written" in a]
    if written:
        row["muted"] = float(np.mean([not text.strip() for text in written]))
    return row


class Grid:
    """Run cells of one model, keeping what is done in a folder.

    Args:
      model: see `Editable`.
      params: unedited.
      records: in the order in which they are edited.
      tasks: abilities, and whatever else should not change.
      config: see `CurveConfig`.
      name: of the model, in the cells.
      folder: for `cells.jsonl` and the kept edits; None keeps nothing.
      stats: second moments, for methods that need them.
      options: of `run_task`, for all tasks.
      tell: called with each new cell.

    Raises:
      UserError: for more edits than records.

    >>> Grid(Editable(None, None), {}, [], [], CurveConfig(counts=(1,)))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: 1 edits were asked for, and there are 0 records; ...
    """

    def __init__(
        self,
        model: Editable,
        params: Any,
        records: Sequence[Record],
        tasks: Sequence[Task],
        config: CurveConfig,
        *,
        name: str = "model",
        folder: Path | None = None,
        stats: Any = None,
        options: Mapping[str, Any] | None = None,
        tell: Callable[[dict[str, Any]], None] | None = None,
    ):
        most = max(config.counts)
        if most > len(records):
            raise UserError(
                f"{most} edits were asked for, and there are {len(records)} records; expected at "
                "least as many records; lower the counts"
            )
        self.model, self.params, self.records, self.tasks = model, params, records[:most], tasks
        self.config, self.name, self.folder, self.stats = config, name, folder, stats
        self._tell, self._options = tell, dict(options or {})
        self._bases: dict[int, Base] = {}
        self._print = digest(params) if params else ""
        self.cells = self._read()

    def _read(self) -> list[dict[str, Any]]:
        file = None if self.folder is None else self.folder / "cells.jsonl"
        if file is None or not file.exists():
            return []
        found = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the line that a kill cut short: its cell is done again
                continue
        return found

    def run(self, methods: Sequence[Chosen]) -> list[dict[str, Any]]:
        """Do the cells that are missing, method by method.

        Args:
          methods: with their settings; the unedited model is a cell of its own.

        Returns:
          The cells of these methods under these settings, the unedited model's first.
        """
        self._prepare()
        wanted = []
        if 0 in self.config.counts:
            settings = self._settings(None, 0)
            if self._known(UNEDITED, 0, settings) is None:
                told = Answering(from_lm(self.params, self.model.config))
                self._add(UNEDITED, 0, settings, self._look(told, 0))
            wanted.append((UNEDITED, 0, settings))
        for chosen in methods:
            self._sequence(chosen)
            wanted += [(chosen.name, n, self._settings(chosen, n)) for n in self._counts()]
        cells = (self._known(*key) for key in wanted)
        return [cell for cell in cells if cell is not None]

    def _counts(self) -> list[int]:
        return sorted({n for n in self.config.counts if n > 0})

    def _prepare(self) -> None:
        """Ask the unedited model all there is to ask, before the first edit."""
        told = from_lm(self.params, self.model.config)
        for n in self._counts():
            self._bases[n] = base_predictions(told, self.model.tokenizer, self._probed(n))

    def _probed(self, n: int) -> list[Record]:
        return [self.records[i] for i in spread(n, self.config.probed)]

    def _settings(self, chosen: Chosen | None, n: int) -> str:
        tasks = [[t.name, t.protocol, len(t.questions)] for t in self.tasks]
        requests = [list(r.request) for r in self.records[:n]]
        how = repr(None if chosen is None else chosen.config)
        rest = [self.config.batch, self.config.probed, asdict(self.config.evaluation)]
        rest += [sorted(self._options.items())]
        return digest([self._print, tasks, requests, how, *rest])

    def _known(self, method: str, n: int, settings: str) -> dict[str, Any] | None:
        for cell in reversed(self.cells):
            if (cell["method"], cell["n"], cell["settings"]) == (method, n, settings):
                return cell
        return None

    def _add(self, method: str, n: int, settings: str, found: Mapping[str, Any]) -> None:
        cell = {"model": self.name, "method": method, "batch": self.config.batch, "n": n}
        cell = json.loads(to_json({**cell, **found, "settings": settings}))
        self.cells.append(cell)
        if self.folder is not None:
            append_jsonl(self.folder / "cells.jsonl", cell)
        if self._tell is not None:
            self._tell(cell)

    def _look(self, told: Answering, n: int) -> dict[str, Any]:
        begin_s = time.perf_counter()
        found: dict[str, Any] = {"edit": {}}
        if n:
            tokenizer, how = self.model.tokenizer, self.config.evaluation
            rows = evaluate_edits(told, tokenizer, self._probed(n), self._bases[n], how)
            found["edit"] = {name: m._asdict() for name, m in summarise(rows).items()}
        found["abilities"] = abilities(told, self.model.tokenizer, self.tasks, **self._options)
        return {**found, "evaluation_s": time.perf_counter() - begin_s}

    def _sequence(self, chosen: Chosen) -> None:
        counts = self._counts()
        missing = [
            n for n in counts if self._known(chosen.name, n, self._settings(chosen, n)) is None
        ]
        failed = next((c for n in counts if (c := self._failed(chosen, n))), None)
        if not missing or failed:
            return
        params, state, done, spent_s = self._begin(chosen, missing[0])
        # By the unedited parameters: what is sampled must not change on the way.
        config = settle(chosen.method, self.model, chosen.config, self.params)
        for n in counts:
            if n < missing[0]:
                continue
            if self.config.batch == 0:
                params, state, done, spent_s = self.params, None, 0, 0.0
            begin_s = time.perf_counter()
            try:
                while done < n:
                    step = self.config.batch or n
                    part = [r.request for r in self.records[done : min(done + step, n)]]
                    params, state, _ = edit_all(
                        chosen.method, self.model, config, params, part, self.stats, state
                    )
                    done += len(part)
                told = answering_of(self.model, chosen.method, config, params, state)
            except UserError as error:
                self._add(chosen.name, n, self._settings(chosen, n), {"failed": str(error)})
                return
            spent_s += time.perf_counter() - begin_s
            found = {"edit_s": spent_s, **self._look(told, n)}
            self._keep(chosen, params, state, n, spent_s)
            self._add(chosen.name, n, self._settings(chosen, n), found)

    def _failed(self, chosen: Chosen, n: int) -> bool:
        cell = self._known(chosen.name, n, self._settings(chosen, n))
        return cell is not None and "failed" in cell

    def _begin(self, chosen: Chosen, first: int) -> tuple[Any, Any, int, float]:
        """Take up the kept edits if they lie before the first missing cell."""
        folder = self._folder(chosen)
        if folder is not None and self.config.batch and (folder / "model.safetensors").exists():
            kept = restore(folder, self.params)
            n = int(kept.notes.get("n", 0))
            if n <= first and kept.notes.get("settings") == self._settings(chosen, n):
                return kept.params, kept.state, n, float(kept.notes["edit_s"])
        return self.params, None, 0, 0.0

    def _keep(self, chosen: Chosen, params: Any, state: Any, n: int, spent_s: float) -> None:
        folder = self._folder(chosen)
        if folder is not None and self.config.batch:  # the last too: a later run may go further
            notes = {"n": n, "settings": self._settings(chosen, n), "edit_s": spent_s}
            keep(folder, params, self.params, state, notes)

    def _folder(self, chosen: Chosen) -> Path | None:
        return None if self.folder is None else self.folder / "kept" / chosen.name
