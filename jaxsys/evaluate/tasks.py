"""Questions with answers: built-in tasks read from `JAXSYS_DATA/eval`, and one's own JSON lines.

Every task says in words how its questions are put, since a figure without that says nothing.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError
from jaxsys.evaluate.choice import Choices
from jaxsys.evaluate.exact import Prompt

_LISTED = re.compile(r"\s*(?:Answer|Option)(\d): ")


class Task(NamedTuple):
    """Hold a set of questions, and how they are put.

    Attributes:
      name: of the task.
      questions: all `Choices`, all `Prompt`, or all texts (for perplexity).
      protocol: in words.
      max_tokens: of a written answer.
      stop: texts that end a written answer.

    >>> Task("mine", (Prompt("1 + 1 =", "2"),), "as written").kind
    'prompt'
    """

    name: str
    questions: tuple[Choices | Prompt | str, ...]
    protocol: str
    max_tokens: int = 32
    stop: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Say how it is answered: choice, prompt or text.

        >>> Task("t", ("some text",), "").kind
        'text'
        """
        return {Choices: "choice", Prompt: "prompt", str: "text"}[type(self.questions[0])]

    def head(self, limit: int | None) -> "Task":
        """Keep the first questions only, and say so.

        Args:
          limit: how many; None keeps all.

        >>> Task("t", ("a", "b"), "whole").head(1).protocol
        'whole; the first 1 of 2'
        """
        if limit is None or limit >= len(self.questions):
            return self
        if limit < 1:
            raise UserError(f"limit is {limit}; it must be at least 1")
        part = f"{self.protocol}; the first {limit} of {len(self.questions)}"
        return self._replace(questions=self.questions[:limit], protocol=part)


class _Source(NamedTuple):
    """Where a built-in task comes from."""

    file: str
    read: Callable[[Mapping[str, Any]], Choices | Prompt]
    protocol: str
    max_tokens: int = 32
    stop: tuple[str, ...] = ()


def split_listed(instruction: str) -> tuple[str, list[str]]:
    """Take a question apart that lists its choices as `Answer1: … Answer2: …`.

    Args:
      instruction: as in the files of the commonsense sets.

    Returns:
      The question, and the choices.

    Raises:
      UserError: if no two choices are listed in order.

    >>> split_listed("Please choose: Why?\\n\\nAnswer1: a Answer2: b\\n\\nAnswer format: answer1")
    ('Why?', ['a', 'b'])
    """
    body = instruction.split("Answer format:")[0]
    parts = _LISTED.split(body)
    if len(parts) < 5 or parts[1::2] != [str(i) for i in range(1, len(parts[1::2]) + 1)]:
        raise UserError(
            f"the question {instruction[:60]!r} lists no choices; expected Answer1: … Answer2: …"
        )
    return parts[0].split(": ", 1)[-1].strip(), [p.strip() for p in parts[2::2]]


def _question(row: Mapping[str, Any], ask: str) -> Choices:
    question, choices = split_listed(row["instruction"])
    return Choices.ask(ask.format(question), choices, int(row["answer"][-1]) - 1)


def _boolq(row: Mapping[str, Any]) -> Choices:
    asked = row["instruction"].split("question: ", 1)[1].split("\n\nAnswer format")[0].strip()
    answer = ("no", "yes")
    right = {"false": 0, "true": 1}[row["answer"]]
    return Choices.ask(f"Question: {asked.rstrip('?')}?\nAnswer:", answer, right)


def _winogrande(row: Mapping[str, Any]) -> Choices:
    sentence, options = split_listed(row["instruction"])
    before, after = sentence.split("_", 1)
    contexts = tuple(before + option for option in options)
    return Choices(contexts, (f" {after.strip()}",) * 2, int(row["answer"][-1]) - 1)


def _mmlu(row: Mapping[str, Any]) -> Choices:
    return Choices.ask(row["input"], list("ABCD"), "ABCD".index(row["output"].strip()))


def _gsm8k(row: Mapping[str, Any]) -> Prompt:
    answer = row["answer"].rsplit("#### ", 1)[1].strip()
    return Prompt(f"Question: {row['question']}\nAnswer:", answer.replace(",", ""))


def _written(row: Mapping[str, Any]) -> Prompt:
    given = row["instruction"].rsplit("Answer format:", 1)[1].strip()
    return Prompt(f"{row['instruction']}\n", row["answer"], tuple(given.split("/")))


_CLOZE = "zero-shot; context 'Question: …\\nAnswer:', each choice's text scored after a space"
_WRITE = (
    "zero-shot; the file's instruction (choices listed) and a line feed, greedy text of up to 16 "
    "tokens, the first choice named in it is the answer"
)

SOURCES: dict[str, _Source] = {
    "arc_easy": _Source(
        "ARC-Easy_test.json",
        functools.partial(_question, ask="Question: {}\nAnswer:"),
        _CLOZE,
    ),
    "arc_challenge": _Source(
        "ARC-Challenge_test.json",
        functools.partial(_question, ask="Question: {}\nAnswer:"),
        _CLOZE,
    ),
    "openbookqa": _Source(
        "openbookqa_test.json",
        functools.partial(_question, ask="{}"),
        "zero-shot; the stem alone is the context, each choice's text scored after a space",
    ),
    "boolq": _Source(
        "boolq_test.json",
        _boolq,
        "zero-shot, without the passage (the file has none): 'Question: …?\\nAnswer:', no or yes",
    ),
    "winogrande": _Source(
        "winogrande_test.json",
        _winogrande,
        "zero-shot, partial scoring: the text after the blank, once after each option",
    ),
    "mmlu": _Source(
        "mmlu_val.jsonl",
        _mmlu,
        "zero-shot, validation set: the file's prompt with listed choices, scored A, B, C, D",
    ),
    "gsm8k": _Source(
        "gsm8k_test.jsonl",
        _gsm8k,
        "zero-shot; greedy text of up to 256 tokens, its last number is the answer",
        256,
        ("Question:", "\n\n"),
    ),
} | {
    f"{name}_written": _Source(file, _written, _WRITE, 16, ("\n\n",))
    for name, file in (
        ("arc_easy", "ARC-Easy_test.json"),
        ("arc_challenge", "ARC-Challenge_test.json"),
        ("openbookqa", "openbookqa_test.json"),
        ("boolq", "boolq_test.json"),
        ("winogrande", "winogrande_test.json"),
    )
}
TEXTS = {"wikitext2": "wikitext2_test.txt", "wikitext2_valid": "wikitext2_valid.txt"}


def task_names() -> tuple[str, ...]:
    """List the built-in tasks.

    >>> "arc_easy" in task_names(), "wikitext2" in task_names()
    (True, True)
    """
    return (*SOURCES, *TEXTS)


def load_task(name: str | os.PathLike[str], data: str | os.PathLike[str] | None = None) -> Task:
    """Read a task: a built-in one by name, or one's own file.

    One's own file has one JSON object a line: `{"context", "choices", "answer": index}` for
    multiple choice, `{"prompt", "answer"}` (and perhaps `"choices"`) for a written answer, or
    `{"text"}` for perplexity. A file that ends in `.txt` is one text.

    Args:
      name: one of `task_names()`, or a path.
      data: folder with `eval/` and `text/`; the environment's `JAXSYS_DATA` by default.

    Raises:
      UserError: if there is no such task or file, or a line is not of that form.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "mine.jsonl")
    >>> _ = path.write_text('{"prompt": "1 + 1 =", "answer": "2"}')
    >>> load_task(path).questions
    (Prompt(text='1 + 1 =', answer='2', choices=()),)
    """
    key = os.fspath(name)
    if key in SOURCES:
        return _built_in(key, SOURCES[key], _data(data, key))
    if key in TEXTS:
        file = _data(data, key) / "text" / TEXTS[key]
        return Task(key, (_read(file),), f"the whole file {TEXTS[key]} as one text")
    path = Path(key)
    if not path.suffix:
        raise UserError(
            f"there is no task {key!r}; expected one of {', '.join(task_names())}, or the path of "
            "a .jsonl or .txt file"
        )
    if path.suffix == ".txt":
        return Task(path.stem, (_read(path),), f"the whole file {path.name} as one text")
    rows = list(_json_lines(path))
    questions = tuple(_own(row, place) for place, row in rows)
    kinds = {type(q) for q in questions}
    if len(kinds) != 1:
        raise UserError(
            f"{path} holds {len(kinds)} kinds of questions; a task needs lines of one kind"
        )
    return Task(path.stem, questions, f"{len(rows)} lines of {path.name}, as they are written")


def _built_in(name: str, source: _Source, data: Path) -> Task:
    file = data / "eval" / source.file
    if file.suffix == ".jsonl":
        rows = [row for _, row in _json_lines(file)]
    else:
        rows = _parse(_read(file), str(file))
    try:
        questions = tuple(source.read(row) for row in rows)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not in the form that task {name} reads ({error!r}); use the original file"
        ) from None
    if not questions:
        raise UserError(f"{file} holds no question; use the original file")
    return Task(name, questions, source.protocol, source.max_tokens, source.stop)


def _own(row: Any, place: str) -> Choices | Prompt | str:
    if isinstance(row, dict):
        choices = row.get("choices", ())
        listed = isinstance(choices, list | tuple) and all(isinstance(c, str) for c in choices)
        answer = row.get("answer")
        if listed and isinstance(row.get("context"), str) and type(answer) is int and choices:
            return Choices.ask(row["context"], choices, answer)
        if listed and isinstance(row.get("prompt"), str) and isinstance(answer, str):
            return Prompt(row["prompt"], answer, tuple(choices))
        if isinstance(row.get("text"), str):
            return row["text"]
    raise UserError(
        f"{place} is no question; expected an object with context, choices and answer (an index), "
        "with prompt and answer (a text), or with text"
    )


def _data(data: str | os.PathLike[str] | None, task: str) -> Path:
    folder = data or os.environ.get("JAXSYS_DATA")
    if not folder:
        raise UserError(
            f"task {task} reads the data folder, and none is known; set JAXSYS_DATA or pass --data"
        )
    return Path(folder)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{file} cannot be read ({reason}); check the path") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}); mend it") from None


def _json_lines(path: Path) -> Iterable[tuple[str, Any]]:
    found = False
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if line.strip():
            found = True
            place = f"{path} line {number}"
            yield place, _parse(line, place)
    if not found:
        raise UserError(f"{path} holds no line; give it at least one question")
