"""Continuous generation: rows are decoded together, and a row that ends makes place for a prompt.

Prompts of any length are read in chunks; a short last chunk is padded to one of a few lengths, so
that a handful of compiled programs serves all.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.evaluate.buckets import bucket
from jaxsys.evaluate.rows import Book, Generated, Piece, check_prompts, row_keys
from jaxsys.evaluate.sampling import Sampling, sample
from jaxsys.evaluate.stream import TextStream
from jaxsys.offload.engine import Engine, State, forward, init_state


class DeviceLost(UserError):
    """Report that a device failed while text was generated, and keep that text.

    Attributes:
        generated: what was there before.

    >>> issubclass(DeviceLost, UserError)
    True
    """

    def __init__(self, message: str, generated: Generated):
        super().__init__(message)
        self.generated = generated


class _Row(NamedTuple):
    """What stands in a row of the cache."""

    prompt: int
    made: int


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    end_ids: Collection[int] = (),
    tokenizer: Any = None,
    stop: Sequence[str] = (),
    on_piece: Callable[[Piece], None] | None = None,
    batch: int = 8,
    chunk: int = 256,
) -> Generated:
    """Continue every prompt by up to `max_tokens` tokens.

    The draws of a prompt's t-th new token depend on (key, the prompt's number, t) only. Times and
    counts beyond those of the result are in ``engine.monitor``.

    Args:
        engine: from `make_engine`.
        prompts: ids of each; lengths may differ, none may be empty.
        max_tokens: new tokens of a prompt at most.
        sampling: greedy by default.
        key: random key; `jax.random.key(0)` by default.
        end_ids: tokens that end a row.
        tokenizer: anything with `decode`; needed for `stop` and for texts.
        stop: texts that end a row.
        on_piece: called for every new token of a row.
        batch: rows that are decoded together at most.
        chunk: tokens of a prompt that are read at once at most.

    Returns:
        Tokens, texts, why each row ended, and times.

    Raises:
        UserError: for prompts as `evaluate.generate`, one that with its new tokens is longer than
            the model's context, a batch or chunk below 1, or a file that was cut.
        DeviceLost: when a device fails; what was generated is in it.

    >>> from jaxsys.models import lm
    >>> from jaxsys.offload.engine import make_engine
    >>> from jaxsys.offload.load import place_model
    >>> from jaxsys.offload.parts import parts_of
    >>> from jaxsys.offload.place import cpu_plan, find_devices
    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> params = lm.init(jax.random.key(0), config)
    >>> placed = place_model(params, cpu_plan(parts_of(config)), find_devices("none"),
    ...                      config=config)
    >>> [len(ids) for ids in generate(make_engine(placed), [[1, 2], [3]], max_tokens=2).tokens]
    [2, 2]
    """
    config = engine.placed.config
    rows = [np.asarray(p, np.int32).reshape(-1) for p in prompts]
    check_prompts(config.vocab_size, rows, max_tokens, stop, tokenizer)
    longest = max(row.size for row in rows)
    if longest + max_tokens > config.max_positions:
        raise UserError(
            f"a prompt of {longest} tokens with {max_tokens} new ones is longer than the cache can "
            f"be, {config.max_positions} tokens, for which the model was made; shorten either"
        )
    if batch < 1 or chunk < 1:
        raise UserError(f"batch is {batch} and chunk {chunk}; both must be at least 1")
    streams = [TextStream(tokenizer, row.tolist(), stop) for row in rows] if tokenizer else []
    book = Book(len(rows), max_tokens, frozenset(end_ids), streams, on_piece)
    slots = min(bucket(longest + max_tokens), config.max_positions)
    keys = row_keys(jax.random.key(0) if key is None else key, len(rows))
    batch = min(batch, len(rows))
    run = _Run(engine, rows, book, sampling or Sampling(), keys, chunk, batch, slots)
    begin_s = time.perf_counter()
    try:
        run.admit()
        first_s = time.perf_counter() - begin_s
        while run.busy:
            run.step()
            run.admit()
    except jax.errors.JaxRuntimeError as error:
        kept = book.close(time.perf_counter() - begin_s)
        n_kept = sum(map(len, kept.tokens))
        raise DeviceLost(
            f"a device failed while text was generated ({str(error).splitlines()[0][:200]}); "
            f"{n_kept} new tokens of {len(rows)} prompts are kept; start again, on the CPU alone "
            "if the accelerator is gone",
            kept,
        ) from error
    return book.close(first_s)


class _Run:
    """Rows of the cache and the prompts that wait for one."""

    def __init__(self, engine: Engine, prompts, book: Book, sampling, keys, chunk, batch, slots):
        self.engine, self.book, self.sampling = engine, book, sampling
        self.prompts, self.chunk = prompts, chunk
        # On the host, for it is not known here on which device the logits will be.
        self.keys = np.asarray(jax.random.key_data(keys))
        self.kind = str(jax.random.key_impl(keys))
        self.waiting = deque(range(len(prompts)))
        self.rows: list[_Row | None] = [None] * batch
        self.tokens = np.zeros((batch, 1), np.int32)
        self.seen = None
        if sampling.repetition_penalty != 1:
            self.seen = np.zeros((batch, engine.placed.config.vocab_size), bool)
        self.state: State = init_state(engine.placed, batch, slots)

    @property
    def busy(self) -> bool:
        return any(row is not None for row in self.rows)

    def admit(self) -> None:
        """Read prompts into free rows until none is free or none waits."""
        taken: list[int] = []
        for b, row in enumerate(self.rows):
            while row is None and self.waiting:
                prompt = self.waiting.popleft()
                begin_s = time.perf_counter()
                token = self._read(b, prompt)
                self.engine.monitor.prefill_s += time.perf_counter() - begin_s
                self._hold(b, prompt, token)
                taken.append(prompt)
                self.book.take(np.array([[token]]), [prompt])
                row = None if self.book.has_ended(prompt) else _Row(prompt, 1)
                self.rows[b] = row

    def _hold(self, b: int, prompt: int, token: int) -> None:
        self.tokens[b, 0] = token
        if self.seen is not None:
            self.seen[b] = False
            self.seen[b, self.prompts[prompt]] = True
            self.seen[b, token] = True

    def _read(self, b: int, prompt: int) -> int:
        """Read a prompt into row b of the cache, and choose its first new token."""
        ids, state, row = self.prompts[prompt], self.state, b
        lengths = state.lengths.copy()
        lengths[b] = 0
        self.state = State(state.stores, lengths)
        logits = None
        for here in range(0, ids.size, self.chunk):
            part = ids[here : here + self.chunk]
            width = min(bucket(part.size), self.chunk, self.state.slots - here)
            padded = np.zeros((1, width), np.int32)
            padded[0, : part.size] = part
            count, own = np.array([part.size]), np.array([prompt])
            logits, self.state = forward(
                self.engine, self.state, padded, counts=count, row=row, sequences=own
            )
        self.engine.monitor.prompt_tokens += ids.size
        seen = None
        if self.seen is not None:
            seen = np.zeros((1, self.seen.shape[1]), bool)
            seen[0, ids] = True
        return int(self._choose(logits, seen, [_Row(prompt, 0)])[0])

    def _choose(self, logits: Any, seen: np.ndarray | None, rows: Sequence[_Row]) -> np.ndarray:
        if self.sampling.temperature == 0 and seen is None:
            return np.asarray(logits).argmax(-1)
        where = np.array([row.prompt for row in rows])
        made = np.array([row.made for row in rows], np.uint32)
        return np.asarray(_draw(logits, self.keys[where], made, seen, self.kind, self.sampling))

    def step(self) -> None:
        """Decode one token of every row; free rows are run along and not looked at."""
        begin_s = time.perf_counter()
        live = [(b, row) for b, row in enumerate(self.rows) if row is not None]
        # A free row stays at length 0, so that it never outgrows the cache.
        counts = np.array([int(row is not None) for row in self.rows], np.int32)
        named = [row or _Row(0, 0) for row in self.rows]
        own = np.array([row.prompt for row in named])
        logits, self.state = forward(
            self.engine, self.state, self.tokens, counts=counts, sequences=own
        )
        chosen = self._choose(logits, self.seen, named)
        monitor = self.engine.monitor
        monitor.decode_s += time.perf_counter() - begin_s
        monitor.steps += 1
        for b, _ in live:
            self.tokens[b, 0] = chosen[b]
            if self.seen is not None:
                self.seen[b, chosen[b]] = True
        prompts = [row.prompt for _, row in live]
        self.book.take(np.array([[chosen[b]] for b, _ in live]), prompts)
        for b, row in live:
            ended = self.book.has_ended(row.prompt)
            self.rows[b] = None if ended else _Row(row.prompt, row.made + 1)
            if ended:
                self.state.lengths[b] = 0


@functools.partial(jax.jit, static_argnums=(4, 5))
def _draw(logits, keys, made, seen, kind: str, sampling: Sampling):
    drawn = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys, impl=kind), made)
    return sample(drawn, logits, None if seen is None else jnp.asarray(seen), sampling)
