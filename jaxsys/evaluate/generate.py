"""Generate tokens with a preallocated cache: many prompts of different lengths at once."""

import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Key

from jaxsys.core.errors import UserError
from jaxsys.evaluate.buckets import bucket
from jaxsys.evaluate.protocol import Model, check_fits
from jaxsys.evaluate.sampling import Sampling, sample
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


class _State(NamedTuple):
    """What goes from step to step, on the device; donated, so that the cache is never copied."""

    cache: Any
    token: Int32[Array, "B"]
    seen: Bool[Array, "B V"] | None
    step: Int32[Array, ""]


def generate(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    end_ids: Collection[int] = (),
    tokenizer: Any = None,
    stop: Sequence[str] = (),
    on_piece: Callable[[Piece], None] | None = None,
    steps_per_call: int = 1,
) -> Generated:
    """Continue every prompt by up to `max_tokens` tokens.

    The draws of row b at its t-th new token depend on (key, b, t) only, so a seed gives one text,
    whatever stands in the other rows.

    Args:
      model: see `Model`.
      prompts: ids of each row; lengths may differ, none may be empty.
      max_tokens: new tokens of a row at most.
      sampling: greedy by default.
      key: random key; `jax.random.key(0)` by default.
      end_ids: tokens that end a row.
      tokenizer: anything with `decode`; needed for `stop` and for texts.
      stop: texts that end a row.
      on_piece: called for every row after every call of the program, while rows are not ended.
      steps_per_call: tokens a program makes before Python looks at them; more saves dispatching
        where a step is shorter than that, and costs up to that many steps of a finished row.

    Returns:
      Tokens, texts, why each row ended, and times.

    Raises:
      UserError: no prompt, an empty one, ids outside the vocabulary, more tokens than the context
        holds, or stop strings without a tokenizer.

    >>> from jaxsys.evaluate.protocol import from_forward
    >>> count = from_forward(lambda p, t: jax.nn.one_hot(t + 1, 8), {}, 8, 16)
    >>> generate(count, [[1], [3, 4]], max_tokens=2).tokens
    ([2, 3], [5, 6])
    """
    sampling = Sampling() if sampling is None else sampling
    rows = [np.asarray(p, np.int32).reshape(-1) for p in prompts]
    _check(model, rows, max_tokens, stop, tokenizer)
    streams = [TextStream(tokenizer, row.tolist(), stop) for row in rows] if tokenizer else []
    book = _Book(len(rows), max_tokens, frozenset(end_ids), streams, on_piece)
    keys = _row_keys(jax.random.key(0) if key is None else key, len(rows))
    run = functools.partial(_decode, model.apply, model.head, sampling, steps_per_call)

    begin_s = time.perf_counter()
    state, tokens = _begin(model, rows, max_tokens + steps_per_call, sampling, keys)
    waiting = np.asarray(tokens)  # waits for the prompt to be read
    first_s = time.perf_counter() - begin_s
    steps = 1
    while True:
        # The next call is under way while Python looks at the tokens of the last one.
        more = steps < max_tokens
        if more:
            state, tokens = run(model.params, state, keys)
            steps += steps_per_call
        book.take(waiting)
        if not more or book.done:
            break
        waiting = np.asarray(tokens)
    return book.close(first_s)


class _Book:
    """Keep count of rows on the host: ends, texts, rate."""

    def __init__(
        self,
        rows: int,
        max_tokens: int,
        end_ids: frozenset[int],
        streams: list[TextStream],
        on_piece: Callable[[Piece], None] | None,
    ):
        self._tokens: list[list[int]] = [[] for _ in range(rows)]
        self._ended: list[Ended | None] = [None] * rows
        self._max_tokens = max_tokens
        self._end_ids = end_ids
        self._streams = streams
        self._on_piece = on_piece
        self._calls = 0
        self._steps = 0
        self._begin_s = self._now_s = 0.0

    @property
    def done(self) -> bool:
        return all(self._ended)

    def take(self, tokens: np.ndarray) -> None:
        """Take `[B, steps]` new tokens."""
        self._now_s = time.perf_counter()
        self._calls += 1
        if self._calls <= 2:  # the prompt's call, and a first one that may have been compiled
            self._begin_s = self._now_s
        else:
            self._steps += tokens.shape[1]
        for row, ended in enumerate(self._ended):
            if ended is None:
                self._take_row(row, tokens[row].tolist())

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
        return self._steps * len(self._ended) / elapsed_s if self._steps else float("nan")

    def close(self, first_s: float) -> Generated:
        return Generated(
            tuple(self._tokens),
            tuple(stream.text for stream in self._streams),
            tuple(ended or "length" for ended in self._ended),
            first_s,
            self._now_s - self._begin_s,
            self._rate(),
        )


def _check(
    model: Model, rows: list[np.ndarray], max_tokens: int, stop: Sequence[str], tokenizer: Any
) -> None:
    if not rows or not all(row.size for row in rows):
        raise UserError("a prompt holds no token; give each at least one, such as the begin token")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1")
    if stop and tokenizer is None:
        raise UserError("stop strings were given without a tokenizer; pass tokenizer=")
    top, low = max(row.max() for row in rows), min(row.min() for row in rows)
    if low < 0 or top >= model.vocab_size:
        raise UserError(
            f"token id {low if low < 0 else top} is outside the model's vocabulary of 0 to "
            f"{model.vocab_size - 1}; use the model's own tokenizer"
        )
    check_fits(model, max(row.size for row in rows) + max_tokens, "a prompt with its new tokens")


def _begin(
    model: Model, rows: list[np.ndarray], extra: int, sampling: Sampling, keys: Key[Array, "B"]
) -> tuple[_State, Int32[Array, "B 1"]]:
    lengths = np.array([row.size for row in rows], np.int32)
    # Widths and cache lengths from a short list, so that a few programs serve all prompts.
    width = min(bucket(int(lengths.max())), model.context)
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : ids.size] = ids
    seen = None
    if sampling.repetition_penalty != 1:
        seen = np.zeros((len(rows), model.vocab_size), bool)
        for row, ids in enumerate(rows):
            seen[row, ids] = True
        seen = jnp.asarray(seen)
    # Padding and steps past the end are written too, so there must be room for them.
    cache = model.init_cache(len(rows), max(width, bucket(int(lengths.max()) + extra)))
    return _prefill(
        model.apply, model.head, sampling, model.params, cache, tokens, lengths, keys, seen
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _prefill(apply, head, sampling, params, cache, tokens, lengths, keys, seen):
    x, cache = apply(params, tokens, cache, lengths)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)[:, 0]
    state = _choose(head(params, last), cache, seen, keys, jnp.int32(0), sampling)
    return state, state.token[:, None]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _decode(apply, head, sampling, steps, params, state, keys):
    def step(state: _State, _: None) -> tuple[_State, Array]:
        x, cache = apply(params, state.token[:, None], state.cache, None)
        logits = head(params, x[:, 0])
        state = _choose(logits, cache, state.seen, keys, state.step, sampling)
        return state, state.token

    if steps == 1:  # no loop: weights keep their layout, and nothing is hoisted out of it
        state, token = step(state, None)
        return state, token[:, None]
    state, tokens = jax.lax.scan(step, state, None, length=steps)
    return state, tokens.T


def _choose(logits, cache, seen, keys, step, sampling) -> _State:
    drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    token = sample(drawn, logits, seen, sampling)
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return _State(cache, token, seen, step + 1)


def _row_keys(key: jax.Array, rows: int) -> Key[Array, "B"]:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
