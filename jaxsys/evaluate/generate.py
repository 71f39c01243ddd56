"""Generate tokens with a preallocated cache: many prompts of different lengths at once."""

import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Key

from jaxsys.evaluate.buckets import bucket
from jaxsys.evaluate.protocol import Model, check_fits
from jaxsys.evaluate.rows import Book, Generated, Piece, check_prompts, row_keys
from jaxsys.evaluate.sampling import Sampling, sample
from jaxsys.evaluate.stream import TextStream


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
    check_prompts(model.vocab_size, rows, max_tokens, stop, tokenizer)
    check_fits(model, max(r.size for r in rows) + max_tokens, "a prompt with its new tokens")
    streams = [TextStream(tokenizer, row.tolist(), stop) for row in rows] if tokenizer else []
    book = Book(len(rows), max_tokens, frozenset(end_ids), streams, on_piece)
    keys = row_keys(jax.random.key(0) if key is None else key, len(rows))
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
