"""Exact match of generated answers."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.evaluate.generate import generate
from jaxsys.evaluate.metrics import Accuracy, accuracy
from jaxsys.evaluate.protocol import Model

_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*\.?\d*|\.\d+)")


class Prompt(NamedTuple):
    """Hold one question that is answered by writing.

    Attributes:
      text: what the model continues.
      answer: what must come out, after `extract` and `normalise`.
      choices: answers that may be chosen from; empty for a free answer, whose chance level is 0.

    >>> Prompt("Is ice cold? true/false:", "true", ("true", "false")).answer
    'true'
    """

    text: str
    answer: str
    choices: tuple[str, ...] = ()


def normalise(text: str) -> str:
    """Make answers comparable: lower case, single spaces, without punctuation at the ends.

    >>> normalise("  The  Cat. ")
    'the cat'
    """
    return " ".join(text.lower().split()).strip(".,;:!?\"' ")


def last_number(text: str) -> str | None:
    """Find the last number in a text, without thousands separators, currency or trailing zeros.

    >>> last_number("He has 3 + 4 = 1,007.50 dollars.")
    '1007.5'
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace("$", "").replace(",", "").rstrip(".")
    return number.rstrip("0").rstrip(".") if "." in number else number


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """Find the choice that a text names first, as a whole word in any case.

    >>> first_choice("the correct answer is Answer2, not answer1", ["answer1", "answer2"])
    'answer2'
    """
    places = [
        (match.start(), choice)
        for choice in choices
        if (match := re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text, re.IGNORECASE))
    ]
    return min(places)[1] if places else None


def extract(text: str, prompt: Prompt) -> str | None:
    """Find the answer in what was generated: a choice, a number, or the normalised text.

    Args:
      text: generated.
      prompt: a free answer that is a number is looked for as the last number.

    Returns:
      The answer, or None if there is none.

    >>> extract("so it is 12.", Prompt("3 * 4 =", "12")), extract("  ", Prompt("Q", "yes"))
    ('12', None)
    """
    if prompt.choices:
        return first_choice(text, prompt.choices)
    if _NUMBER.fullmatch(prompt.answer):
        return last_number(text)
    return normalise(text) or None


def exact_match(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    task: str = "exact",
    rows: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Accuracy, list[str]]:
    """Let the model write answers, greedily, and count those that match.

    Args:
      model: see `Model`.
      tokenizer: with `encode`, `decode` and, where it has one, `eos_id`.
      prompts: see `Prompt`.
      max_tokens: of an answer.
      stop: texts that end an answer.
      task: name in the report.
      rows: prompts that are answered together; those of similar length are.
      progress: called with (prompts done, prompts in all).

    Returns:
      The share of matches, and what was written for each prompt.

    Raises:
      UserError: without prompts, or as `generate` does.

    >>> import jax
    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.evaluate.protocol import from_forward
    >>> count = from_forward(lambda p, t: jax.nn.one_hot(t + 1, 256), {}, 256, 64)
    >>> exact_match(count, ByteTokenizer(), [Prompt("a", "bcd")], max_tokens=3)[0].value
    1.0
    """
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    eos = getattr(tokenizer, "eos_id", None)
    encoded = [tokenizer.encode(p.text) for p in prompts]
    written = [""] * len(prompts)
    # The largest first, so that a program that does not fit fails at once.
    order = np.argsort([-len(ids) for ids in encoded], kind="stable")
    for start in range(0, len(order), rows):
        members = order[start : start + rows]
        found = generate(
            model,
            [encoded[i] for i in members],
            max_tokens=max_tokens,
            end_ids=() if eos is None else (eos,),
            tokenizer=tokenizer,
            stop=stop,
        )
        for i, text in zip(members, found.texts, strict=True):
            written[i] = text
        if progress is not None:
            progress(min(start + rows, len(order)), len(order))
    answers = [extract(text, p) for text, p in zip(written, prompts, strict=True)]
    right = [p.answer if p.choices else extract(p.answer, p) for p in prompts]
    chance = float(np.mean([1 / len(p.choices) if p.choices else 0.0 for p in prompts]))
    return accuracy(task, "exact_match", answers, right, chance=chance), written
