"""Put a task to a model, and write down what came out."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxsys.core.report import atomic_write, markdown_table, to_json, write_jsonl
from jaxsys.evaluate.choice import Choices, multiple_choice
from jaxsys.evaluate.exact import Prompt, exact_match
from jaxsys.evaluate.perplexity import perplexity
from jaxsys.evaluate.protocol import Model
from jaxsys.evaluate.tasks import Task

Progress = Callable[[int, int], None]


class Report(NamedTuple):
    """Hold what a task gave.

    Attributes:
      task: its name.
      protocol: how the questions were put.
      rows: one for each metric.
      answers: one for each question, in order.
      seconds: for all of it.

    >>> Report("t", "as written", ({"value": 0.5},), (), 1.0).rows[0]["value"]
    0.5
    """

    task: str
    protocol: str
    rows: tuple[dict[str, Any], ...]
    answers: tuple[dict[str, Any], ...]
    seconds: float

    def rounded(self) -> list[dict[str, Any]]:
        """Give the rows with four digits, for people.

        >>> Report("t", "", ({"value": 0.123456},), (), 1.0).rounded()
        [{'value': 0.1235}]
        """
        return [
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
            for row in self.rows
        ]


def run_task(
    model: Model,
    tokenizer: Any,
    task: Task,
    *,
    window: int | None = None,
    stride: int | None = None,
    most_windows: int | None = None,
    tokens_per_batch: int = 2048,
    rows: int = 8,
    progress: Progress | None = None,
) -> Report:
    """Put a task to a model.

    Args:
      model: see `Model`.
      tokenizer: its own.
      task: see `load_task`.
      window: input tokens of a window, for texts; the model's context by default.
      stride: tokens from window to window; disjoint windows by default.
      most_windows: of each text, take so many windows only.
      tokens_per_batch: rows times length of one scoring program.
      rows: prompts that are answered together.
      progress: called with (done, in all).

    >>> import jax
    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.evaluate import Prompt, from_forward
    >>> count = from_forward(lambda p, t: jax.nn.one_hot(t + 1, 256), {}, 256, 64)
    >>> task = Task("t", (Prompt("a", "bc"),), "as written", max_tokens=2)
    >>> run_task(count, ByteTokenizer(), task).rows[0]["value"]
    1.0
    """
    begin_s = time.perf_counter()
    protocol = task.protocol
    answers: list[dict[str, Any]] = []
    if task.kind == "text":
        found = perplexity(
            model,
            tokenizer,
            [str(text) for text in task.questions],
            length=window,
            stride=stride,
            most_windows=most_windows,
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )
        table = [found.row(task.name)]
        protocol = f"{protocol}; {found.protocol}"
    elif task.kind == "choice":
        questions = [q for q in task.questions if isinstance(q, Choices)]
        metrics, judged = multiple_choice(
            model,
            tokenizer,
            questions,
            task=task.name,
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )
        table = [m.row() for m in metrics]
        answers = [
            {**j._asdict(), "answer": q.answer} for j, q in zip(judged, questions, strict=True)
        ]
    else:
        prompts = [q for q in task.questions if isinstance(q, Prompt)]
        metric, written = exact_match(
            model,
            tokenizer,
            prompts,
            max_tokens=task.max_tokens,
            stop=task.stop,
            task=task.name,
            rows=rows,
            progress=progress,
        )
        table = [metric.row()]
        answers = [
            {"written": text, "answer": p.answer} for text, p in zip(written, prompts, strict=True)
        ]
    return Report(task.name, protocol, tuple(table), tuple(answers), time.perf_counter() - begin_s)


def write_reports(out: str | Path, reports: list[Report], title: str) -> None:
    """Write `eval.json`, `eval.md`, and the answers of each task as JSON lines.

    Args:
      out: folder.
      reports: of the tasks.
      title: of the Markdown page.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_reports(folder, [Report("t", "as written", ({"value": 0.5},), (), 1.0)], "mine")
    >>> sorted(path.name for path in folder.iterdir())
    ['eval.json', 'eval.md']
    """
    out = Path(out)
    plain = [{**r._asdict(), "answers": len(r.answers)} for r in reports]
    atomic_write(out / "eval.json", to_json({"title": title, "reports": plain}) + "\n")
    parts = [f"# {title}\n"]
    for r in reports:
        parts.append(f"\n## {r.task}\n\n{r.protocol}; {r.seconds:.0f} s\n\n")
        parts.append(markdown_table(r.rounded()))
        if r.answers:
            write_jsonl(out / f"{r.task}.jsonl", r.answers)
    atomic_write(out / "eval.md", "".join(parts))


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Show a bar with rate and remaining time on standard error, if that is a terminal.

    Args:
      what: is being done.

    >>> with progress_bar("scoring") as progress:
    ...     progress(1, 2)
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        Remaining(),
    )
    begin_s = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task(what, total=None, rate="")

        def update(done: int, total: int) -> None:
            rate = done / max(time.perf_counter() - begin_s, 1e-9)
            bar.update(row, completed=done, total=total, rate=f"{rate:.1f}/s")

        yield update
