"""Keep count of rows that grow token by token, whoever makes the tokens."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxsys.core.errors import UserError
from jaxsys.evaluate.stream import TextStream

Ended = Literal["end", "stop", "length"]


class Piece(NamedTuple):
    """Say what has just been generated.

    Attributes:
      row: of the prompt.
      text: what is newly certain; may be empty.
      tokens: ids generated for this row so far.
      tokens_per_s: of all rows together, from the third token on (see `Generated`); nan before.

    >>> Piece(0, " Paris", 1, float("nan")).text
    ' Paris'
    """

    row: int
    text: str
    tokens: int
    tokens_per_s: float


class Generated(NamedTuple):
    """Hold what was generated.

    Attributes:
      tokens: ids of each row, without prompt and end token, with those that form a stop string.
      texts: of each row, without stop string; empty without a tokenizer.
      ended: why each row ended: an end token, a stop string, or the length asked for.
      first_s: seconds until the first token of all rows was there, compiling included.
      decode_s: seconds from the end of the first call of the decode program, which may have had to
        be compiled, to the end.
      tokens_per_s: decode steps in that time times rows, by `decode_s`; nan if there was none.

    >>> Generated(([5],), (" Paris",), ("end",), 0.1, 0.0, float("nan")).texts
    (' Paris',)
    """

    tokens: tuple[list[int], ...]
    texts: tuple[str, ...]
    ended: tuple[Ended, ...]
    first_s: float
    decode_s: float
    tokens_per_s: float


class Book:
    """Keep count of rows on the host: tokens, ends, texts, rate.

    Args:
      rows: how many there are.
      max_tokens: new tokens of a row at most.
      end_ids: tokens that end a row.
      streams: the rows' texts, or none.
      on_piece: called for every row that took tokens.

    >>> book = Book(1, 2, frozenset(), [], None)
    >>> book.take(np.array([[5]]))
    >>> book.done, book.close(0.0).tokens
    (False, ([5],))
    """

    def __init__(
        self,
        rows: int,
        max_tokens: int,
        end_ids: frozenset[int],
        streams: Sequence[TextStream],
        on_piece: Callable[[Piece], None] | None,
    ):
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._ended: list[Ended | None] = [None] * rows
        self._max_tokens = max_tokens
        self._end_ids = end_ids
        self._streams = streams
        self._on_piece = on_piece
        self._calls = 0
        self._made = 0
        self._begin_s = self._now_s = 0.0

    @property
    def done(self) -> bool:
        """Say whether all rows have ended."""
        return all(self._ended)

    def has_ended(self, row: int) -> bool:
        """Say whether a row has ended."""
        return self._ended[row] is not None

    def take(self, tokens: np.ndarray, rows: Sequence[int] | None = None) -> None:
        """Take `[rows, steps]` new tokens; of all rows, where they are not named."""
        self._now_s = time.perf_counter()
        self._calls += 1
        if self._calls <= 2:  # the prompt's call, and a first one that may have been compiled
            self._begin_s = self._now_s
        else:
            self._made += tokens.size
        for new, row in zip(tokens, range(len(tokens)) if rows is None else rows, strict=True):
            if self._ended[row] is None:
                self._take_row(row, new.tolist())

    def _take_row(self, row: int, new: list[int]) -> None:
        held, text = self._tokens[row], ""
        for token in new:
            if token in self._end_ids:
                self._ended[row] = "end"
            else:
                held.append(token)
                if self._streams:
                    text += self._streams[row].push([token])
                    if self._streams[row].stopped:
                        self._ended[row] = "stop"
            if self._ended[row] is None and len(held) >= self._max_tokens:
                self._ended[row] = "length"
            if self._ended[row]:
                break
        if self._streams and self._ended[row]:
            text += self._streams[row].finish()
        if self._on_piece is not None:
            self._on_piece(Piece(row, text, len(held), self._rate()))

    def _rate(self) -> float:
        elapsed_s = self._now_s - self._begin_s
        return self._made / elapsed_s if self._made and elapsed_s else float("nan")

    def close(self, first_s: float) -> Generated:
        """Give all that was taken; rows that have not ended count as cut by their length."""
        return Generated(
            tuple(self._tokens),
            tuple(stream.text for stream in self._streams),
            tuple(ended or "length" for ended in self._ended),
            first_s,
            self._now_s - self._begin_s,
            self._rate(),
        )


def check_prompts(
    vocab_size: int,
    rows: Sequence[np.ndarray],
    max_tokens: int,
    stop: Sequence[str],
    tokenizer: Any,
) -> None:
    """Refuse what cannot be continued.

    Args:
      vocab_size: V.
      rows: ids of each prompt.
      max_tokens: new tokens of a row at most.
      stop: texts that end a row.
      tokenizer: needed for these.

    Raises:
      UserError: no prompt, an empty one, ids outside the vocabulary, no token asked for, or stop
        strings without a tokenizer.

    >>> check_prompts(9, [np.array([9])], 1, (), None)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: token id 9 is outside the model's vocabulary of 0 to 8; ...
    """
    if not rows or not all(row.size for row in rows):
        raise UserError("a prompt holds no token; give each at least one, such as the begin token")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1")
    if stop and tokenizer is None:
        raise UserError("stop strings were given without a tokenizer; pass tokenizer=")
    top, low = max(row.max() for row in rows), min(row.min() for row in rows)
    if low < 0 or top >= vocab_size:
        raise UserError(
            f"token id {low if low < 0 else top} is outside the model's vocabulary of 0 to "
            f"{vocab_size - 1}; use the model's own tokenizer"
        )


def row_keys(key: jax.Array, rows: int) -> Key[Array, "B"]:
    """Fold a random key with each row's number.

    >>> row_keys(jax.random.key(0), 3).shape
    (3,)
    """
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
