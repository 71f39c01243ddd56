"""Instructions and answers to fine-tune on: JSON lines, of which only the answers are learned."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jaxsys.core.errors import UserError
from jaxsys.data.stream import shuffled
from jaxsys.data.text import read_text
from jaxsys.data.tokens import Tokenizer

Template = Callable[[list[dict[str, str]]], str]


class Example(NamedTuple):
    """Hold what is read and what is to be answered.

    >>> Example("2 + 2 =", " 4").answer
    ' 4'
    """

    prompt: str
    answer: str


class Encoded(NamedTuple):
    """Hold an example in tokens.

    Attributes:
      tokens: `[N]` prompt and answer.
      prompt_tokens: how many of them the prompt takes.

    >>> Encoded(np.array([5, 6, 7]), 2).prompt_tokens
    2
    """

    tokens: np.ndarray
    prompt_tokens: int


def read_instructions(
    path: str | os.PathLike[str], template: Template | None = None
) -> tuple[Example, ...]:
    """Read instructions from JSON lines, one object each, in any of three forms.

    ``{"prompt", "completion"}`` is taken as it is. ``{"instruction", "input"?, "output"}`` becomes
    a user's message if there is a template, else instruction and input on lines of their own.
    ``{"messages": [{"role", "content"}, …]}`` needs a template; the last message, an assistant's,
    is the answer.

    Args:
      path: the file.
      template: messages to prompt, such as a tokenizer's ``apply_chat_template``.

    Raises:
      UserError: naming the line that is not of one of these forms.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp(), "a.jsonl")
    >>> _ = path.write_text('{"instruction": "Add.", "input": "2 2", "output": "4"}')
    >>> read_instructions(path)
    (Example(prompt='Add.\\n2 2\\n', answer='4'),)
    """
    examples = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            where = f"line {number} of {path}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                raise UserError(f"{where} is not JSON; write one object on each line") from None
            examples.append(_example(row, where, template))
    return tuple(examples)


def _example(row: Any, where: str, template: Template | None) -> Example:
    row = row if isinstance(row, Mapping) else {}
    if _has_text(row, "prompt", "completion"):
        return Example(row["prompt"], row["completion"])
    if _has_text(row, "instruction", "output"):
        parts = [row["instruction"], row.get("input") or ""]
        text = "\n".join(str(part) for part in parts if part)
        if template is None:
            return Example(f"{text}\n", row["output"])
        return Example(template([{"role": "user", "content": text}]), row["output"])
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or not _is_chat(messages):
        raise UserError(
            f"{where} is of no known form; expected the texts prompt and completion, instruction "
            "and output, or messages with role and content that end with the assistant's"
        )
    if template is None:
        raise UserError(
            f"{where} holds messages and the tokenizer has no chat template; use prompt and "
            "completion, or a model with a template"
        )
    return Example(template(messages[:-1]), messages[-1]["content"])


def _has_text(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names) and bool(row[names[-1]])


def _is_chat(messages: list[Any]) -> bool:
    texts = (isinstance(m, Mapping) and _has_text(m, "role", "content") for m in messages)
    return all(texts) and messages[-1]["role"] == "assistant"


def encode_example(example: Example, tokenizer: Tokenizer, end_id: int | None = None) -> Encoded:
    """Turn an example into tokens: prompt and answer together, split where the prompt's own end.

    Args:
      example: the texts.
      tokenizer: of the model.
      end_id: token put after the answer, so that stopping is learned too.

    >>> from jaxsys.data.tokens import ByteTokenizer
    >>> encode_example(Example("ab", "c"), ByteTokenizer(), 0)
    Encoded(tokens=array([97, 98, 99,  0], dtype=int32), prompt_tokens=2)
    """
    alone = tokenizer.encode(example.prompt)
    whole = tokenizer.encode(example.prompt + example.answer)
    # Merges across the border change the prompt's last tokens: those then belong to the answer.
    n = min(alone.size, whole.size)
    same = np.flatnonzero(alone[:n] != whole[:n])
    prompt_tokens = int(same[0]) if same.size else n
    end = [] if end_id is None else [end_id]
    return Encoded(np.concatenate([whole, np.array(end, np.int32)]), prompt_tokens)


@dataclass(frozen=True)
class InstructionStream:
    """Deal examples out in batches, every one once an epoch; a function of (seed, step).

    Examples are filled up on the right. One that is too long loses the start of its prompt.

    Attributes:
      examples: in tokens.
      batch: examples a step (B).
      length: tokens to predict in a row (T).
      seed: of the order.

    Raises:
      UserError: without enough examples, or naming one whose answer alone is too long.

    >>> stream = InstructionStream((Encoded(np.array([5, 6, 7]), 2),), batch=1, length=4)
    >>> tokens, mask = stream.batch_at(0)
    >>> tokens.tolist(), mask.astype(int).tolist()
    ([[5, 6, 7, 0, 0]], [[0, 0, 1, 0, 0]])
    """

    examples: Sequence[Encoded] = field(repr=False)
    batch: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1 or len(self.examples) < self.batch:
            raise UserError(
                f"batch is {self.batch}, length {self.length} and there are {len(self.examples)} "
                "examples; both must be positive, and one batch must find enough examples"
            )
        for i, example in enumerate(self.examples):
            answer = example.tokens.size - example.prompt_tokens
            if answer > self.length:
                raise UserError(
                    f"the answer of example {i} has {answer} tokens and length is {self.length}; "
                    "raise length or shorten the answer"
                )

    def batch_at(
        self, step: int
    ) -> tuple[
        Int32[np.ndarray, "{self.batch} {self.length+1}"],
        Bool[np.ndarray, "{self.batch} {self.length+1}"],
    ]:
        """Read the batch of a step.

        Args:
          step: from 0, without end.

        Returns:
          `[B, T + 1]` tokens and a mask of the answers' tokens, whose prediction counts.
        """
        tokens = np.zeros((self.batch, self.length + 1), np.int32)
        mask = np.zeros(tokens.shape, bool)
        chosen = shuffled(len(self.examples), step * self.batch, self.batch, self.seed)
        for row, index in enumerate(chosen):
            ids, prompt_tokens = self.examples[int(index)]
            cut = max(ids.size - self.length - 1, 0)
            tokens[row, : ids.size - cut] = ids[cut:]
            mask[row, max(prompt_tokens - cut, 0) : ids.size - cut] = True
        return tokens, mask
