"""Multiple choice by likelihood: plain and length-normalised, each a figure of its own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.evaluate.metrics import Accuracy, accuracy
from jaxsys.evaluate.protocol import Model
from jaxsys.evaluate.score import encode_pair, score


class Choices(NamedTuple):
    """Hold one question.

    Attributes:
      contexts: what stands before each choice, mostly the same text; may differ, as in WinoGrande.
      continuations: the choices, as they follow their context (with a leading space, as a rule).
      answer: index of the right one.

    >>> Choices.ask("2 + 2 =", ["3", "4"], 1).continuations
    (' 3', ' 4')
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int

    @classmethod
    def ask(cls, context: str, choices: Sequence[str], answer: int) -> "Choices":
        """Put each choice after one context, with a space between.

        Args:
          context: the question.
          choices: without leading space.
          answer: index of the right choice.

        >>> Choices.ask("Q", ["a", "b"], 0).contexts
        ('Q', 'Q')
        """
        return cls((context,) * len(choices), tuple(f" {c}" for c in choices), answer)


class Judged(NamedTuple):
    """Hold what a model makes of one question.

    Attributes:
      log_likelihoods: of each choice.
      plain: index of the most likely choice; None if all are impossible or empty.
      normalised: index of the most likely one per character; None likewise.

    >>> judge((-4.0, -6.0), (" a", " abcd"))
    Judged(log_likelihoods=(-4.0, -6.0), plain=0, normalised=1)
    """

    log_likelihoods: tuple[float, ...]
    plain: int | None
    normalised: int | None


def judge(log_likelihoods: Sequence[float], continuations: Sequence[str]) -> Judged:
    """Pick a choice in both ways.

    The length is that of the choice in characters without its leading space, as lm-eval has it. A
    tie goes to the first.

    Args:
      log_likelihoods: of each choice; nan or minus infinity for one that cannot be.
      continuations: the choices.

    >>> judge((float("-inf"), float("nan")), (" a", " b")).plain is None
    True
    """
    values = np.asarray(log_likelihoods, np.float64)
    values = np.where(np.isnan(values), -np.inf, values)
    sizes = np.array([max(1, len(c.removeprefix(" "))) for c in continuations], np.float64)
    possible = bool(np.isfinite(values).any())
    return Judged(
        tuple(float(v) for v in log_likelihoods),
        int(values.argmax()) if possible else None,
        int((values / sizes).argmax()) if possible else None,
    )


def multiple_choice(
    model: Model,
    tokenizer: Any,
    questions: Sequence[Choices],
    *,
    task: str = "choice",
    tokens_per_batch: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[Accuracy, Accuracy], list[Judged]]:
    """Answer questions by the likelihood of their choices.

    Args:
      model: see `Model`.
      tokenizer: with `encode`.
      questions: see `Choices`.
      task: name in the report.
      tokens_per_batch: rows times length of one program.
      progress: called with (choices done, choices in all).

    Returns:
      Plain accuracy (`acc`) and length-normalised accuracy (`acc_norm`), and what was made of each
      question.

    Raises:
      UserError: no question, or one with fewer than two choices or an answer that is not there.

    >>> import jax.numpy as jnp
    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.evaluate.protocol import from_forward
    >>> often_b = from_forward(
    ...     lambda p, t: jnp.zeros((*t.shape, 256)).at[..., ord("b")].set(9.0), {}, 256, 64)
    >>> (acc, norm), _ = multiple_choice(
    ...     often_b, ByteTokenizer(), [Choices.ask("Q:", ["a", "b"], 1)])
    >>> acc.value, acc.chance
    (1.0, 0.5)
    """
    _check(questions)
    requests = [
        encode_pair(tokenizer, context, continuation)
        for q in questions
        for context, continuation in zip(q.contexts, q.continuations, strict=True)
    ]
    scores = score(model, requests, tokens_per_batch=tokens_per_batch, progress=progress)
    # A choice without a token has likelihood 1 and would win; it is no answer.
    values = np.where(scores.tokens > 0, scores.log_likelihood, -np.inf)
    judged, start = [], 0
    for q in questions:
        end = start + len(q.continuations)
        judged.append(judge(values[start:end].tolist(), q.continuations))
        start = end
    right = [q.answer for q in questions]
    chance = float(np.mean([1 / len(q.continuations) for q in questions]))
    plain = accuracy(task, "acc", [j.plain for j in judged], right, chance=chance)
    norm = accuracy(task, "acc_norm", [j.normalised for j in judged], right, chance=chance)
    return (plain, norm), judged


def _check(questions: Sequence[Choices]) -> None:
    if not questions:
        raise UserError("there is no question; give at least one")
    for i, q in enumerate(questions):
        if len(q.continuations) < 2 or len(q.contexts) != len(q.continuations):
            raise UserError(
                f"question {i} has {len(q.continuations)} choices and {len(q.contexts)} contexts; "
                "it needs at least two choices, and a context for each"
            )
        if not 0 <= q.answer < len(q.continuations):
            raise UserError(
                f"question {i} says that choice {q.answer} is right and has "
                f"{len(q.continuations)}; count from 0"
            )
