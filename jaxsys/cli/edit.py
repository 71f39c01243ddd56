"""`jaxsys edit`: change facts in a model, and see what that does to the rest of it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsys.cli import edit_study
from jaxsys.cli.edit_options import (
    Chosen,
    read_requests,
    read_stats,
    settings_of,
)
from jaxsys.cli.model_options import ModelName
from jaxsys.cli.options import Common, Output
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ApplyCommand(Chosen, Output):
    """Edit a model and write it as a checkpoint, with what undoes the edit.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder for the checkpoint; the edit itself goes to its subfolder edit/.
      prompt: The text before the answer, with the subject in it, for one fact.
      subject: What that fact is about.
      target: Its new answer.
      undo: Folder of an edit (OUT/edit of an earlier call) to take out of the model instead.
    """

    model: ModelName
    out: Path
    prompt: str | None = None
    subject: str | None = None
    target: str | None = None
    undo: Path | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Chosen, Common):
    """Evaluate an edited model, or a method edit by edit, on facts and their probes.

    Attributes:
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin.
      out: Folder for evaluate.md and a JSON line for each record.
      seed: Seed of the sampled texts.
      base: The unedited model, for locality; only without --method.
      answer_tokens: Length of the answer that is written freely and searched for the target.
      fluency_tokens: Length of the sampled texts whose n-gram entropy is taken; 0 for none.
    """

    model: ModelName
    base: str | None = None
    answer_tokens: int = 16
    fluency_tokens: int = 0


def run_apply(config: ApplyCommand) -> dict[str, Any]:
    """Write the edited checkpoint, or the one from before an edit."""
    from jaxsys.edit.files import edit_checkpoint, undo_checkpoint
    from jaxsys.evaluate.run import progress_bar

    if config.undo is not None:
        if config.method or config.records or config.prompt:
            raise UserError("--undo takes an edit out and makes none; leave the other options away")
        files = undo_checkpoint(config.model, config.undo, config.out)
        if not config.json:
            print(f"{config.out}: {config.model} without the edit in {config.undo}")
        return {"files": [str(file) for file in files]}
    requests = _requests(config)
    name, method, settings = settings_of(config, default="rome")
    with progress_bar(name) as bar:
        done = edit_checkpoint(
            config.model,
            config.out,
            name,
            method,
            settings,
            requests,
            batch=config.batch,
            stats=read_stats(config),
            progress=bar,
        )
    if not config.json:
        for request, answer in zip(requests, done.answers, strict=False):
            print(f"{request.prompt}{answer.splitlines()[0] if answer.strip() else ''}")
        told = f"{len(requests)} facts in {len(done.info.factors)} matrices by {name}"
        print(f"{config.out}: {told}; edit/ beside them undoes it", file=sys.stderr)
    return {
        "method": name,
        "files": [str(file) for file in done.files],
        "matrices": sorted(done.info.factors),
        "answers": list(done.answers),
    }


def _requests(config: ApplyCommand) -> list[Any]:
    from jaxsys.edit.contract import Request, check_requests

    one = (config.prompt, config.subject, config.target)
    if any(x is not None for x in one) == (config.records is not None):
        raise UserError(
            "expected either --records FILE, or --prompt, --subject and --target of one fact; "
            "give one of the two"
        )
    if config.records is not None:
        return [record.request for record in read_requests(config)]
    if config.prompt is None or config.subject is None or config.target is None:
        raise UserError("one fact takes --prompt, --subject and --target; give all three")
    request = Request(config.prompt.replace("{}", config.subject), config.subject, config.target)
    check_requests([request])
    return [request]


def run_evaluate(config: EvaluateCommand) -> dict[str, Any]:
    """Print the metrics with their intervals."""
    from jaxsys.core.report import atomic_write, markdown_table, print_table, write_jsonl
    from jaxsys.edit.contract import Answering
    from jaxsys.edit.evaluation import (
        EvaluationConfig,
        base_of_each,
        base_predictions,
        evaluate_edits,
    )
    from jaxsys.edit.files import open_for_editing
    from jaxsys.edit.protocol import single_edits
    from jaxsys.edit.summary import summarise
    from jaxsys.evaluate.protocol import from_lm
    from jaxsys.evaluate.run import progress_bar

    if config.method and config.base:
        raise UserError("--method edits the model itself; leave --base away")
    records = read_requests(config)
    how = EvaluationConfig(config.answer_tokens, config.fluency_tokens, seed=config.seed)
    chosen = settings_of(config) if config.method else None
    stats = read_stats(config)
    editable, params = open_for_editing(config.model)
    told = from_lm(params, editable.config)
    if chosen is None:
        base = None
        if config.base:
            before, weights = open_for_editing(config.base)
            base = base_predictions(from_lm(weights, before.config), before.tokenizer, records)
        rows = evaluate_edits(Answering(told), editable.tokenizer, records, base, how)
    else:
        _, method, settings = chosen
        bases = base_of_each(told, editable.tokenizer, records)
        rows = []
        with progress_bar(f"{config.method}, one edit at a time") as progress:
            for single in single_edits(
                editable, method, settings, params, records, bases, stats=stats, evaluation=how
            ):
                failed = {} if single.failed is None else {"failed": single.failed}
                rows.append({**single.row, "edit_s": single.seconds, **failed})
                progress(len(rows), len(records))
    asked = [{k: v for k, v in row.items() if k != "failed"} for row in rows]
    found = summarise(asked)
    table = [{"metric": k, **m._asdict()} for k, m in found.items()]
    if config.out is not None:
        lines = [{**r.request._asdict(), **row} for r, row in zip(records, rows, strict=True)]
        write_jsonl(config.out / "evaluate.jsonl", lines)
        atomic_write(config.out / "evaluate.md", markdown_table(table))
    failed = sum("failed" in row for row in rows)
    if not config.json:
        print_table([{k: _short(v) for k, v in row.items()} for row in table])
        if failed:
            print(f"{failed} of {len(rows)} edits were refused; they count as unedited")
    return {"records": len(records), "failed": failed, "metrics": table}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


COMMANDS = {
    "apply": (ApplyCommand, run_apply),
    "evaluate": (EvaluateCommand, run_evaluate),
    **edit_study.COMMANDS,
}
