"""Log-likelihood of given continuations, in compiled programs of a few lengths."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.evaluate.buckets import Batch, batches
from jaxsys.evaluate.protocol import Model

_CHUNK = 256  # positions whose logits exist at one time


class Request(NamedTuple):
    """Ask for the log-likelihood of a continuation after a context, both in token ids.

    >>> Request((1, 2), (3,)).continuation
    (3,)
    """

    context: Sequence[int]
    continuation: Sequence[int]


class Scores(NamedTuple):
    """Hold one entry for each request.

    Attributes:
      log_likelihood: of the continuation, summed over its tokens, in nats.
      greedy: whether greedy decoding would give the continuation.
      tokens: how many tokens were scored.
      truncated: whether context had to be cut on the left.
      hits: how many of the tokens are the likeliest ones after what stands before them.

    >>> one = np.array([1])
    >>> Scores(np.array([-2.0]), np.array([False]), 2 * one, np.array([False]), one).hits / 2
    array([0.5])
    """

    log_likelihood: Float[np.ndarray, "N"]
    greedy: Bool[np.ndarray, "N"]
    tokens: Int[np.ndarray, "N"]
    truncated: Bool[np.ndarray, "N"]
    hits: Int[np.ndarray, "N"]


class _Rows(NamedTuple):
    """Distinct inputs, and for every request its input and the place of its first target."""

    inputs: list[tuple[int, ...]]
    row: list[int]
    targets: list[tuple[int, ...]]
    truncated: list[bool]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Request:
    """Encode a context and what follows, so that together they are the encoding of the whole text.

    White space at the end of the context is counted to the continuation, because most tokenizers
    join it to the next word. An empty context becomes the tokenizer's begin token, or its end token
    if there is none.

    Args:
      tokenizer: with `encode`, `bos_id` and `eos_id`.
      context: may be empty.
      continuation: what is scored.

    Raises:
      UserError: for an empty context, if the tokenizer has neither token.

    >>> from jaxsys.data import ByteTokenizer
    >>> encode_pair(ByteTokenizer(), "a ", "b")
    Request(context=(97,), continuation=(32, 98))
    """
    stem = context.rstrip()
    whole = tuple(int(i) for i in tokenizer.encode(context + continuation))
    if not stem:
        prefix = prefix_id(tokenizer)
        return Request((prefix,), whole[1:] if whole[:1] == (prefix,) else whole)
    split = len(tokenizer.encode(stem))
    return Request(whole[:split], whole[split:])


def prefix_id(tokenizer: Any) -> int:
    """Find the token that stands before a text: the begin token, or else the end token.

    Raises:
      UserError: if the tokenizer has neither.

    >>> import types
    >>> prefix_id(types.SimpleNamespace(bos_id=None, eos_id=2))
    2
    """
    for name in ("bos_id", "eos_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    raise UserError(
        "the tokenizer has neither a begin nor an end token, and the context is empty; "
        "give a context"
    )


def score(
    model: Model,
    requests: Sequence[Request],
    *,
    max_length: int | None = None,
    tokens_per_batch: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score continuations: log p(continuation | context), the sum over its tokens.

    Requests whose inputs are the same (choices of one token after one question) are run once.

    Args:
      model: see `Model`.
      requests: contexts and continuations; a context must not be empty.
      max_length: input tokens at most, by default the model's context; longer contexts are cut on
        the left, and of a longer continuation only the end is scored.
      tokens_per_batch: rows times length of one program.
      progress: called with (requests done, requests in all).

    Returns:
      One entry for each request, in order.

    Raises:
      UserError: for a request without context, or ids outside the vocabulary.

    >>> from jaxsys.evaluate.protocol import from_forward
    >>> table = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))
    >>> model = from_forward(lambda p, t: p[t], table, 3, 8)
    >>> score(model, [Request([0], [1, 1])]).log_likelihood.round(4) == np.log(0.25 * 0.8).round(4)
    array([ True])
    """
    most = model.context if max_length is None else min(max_length, model.context)
    work = _rows(requests, most, model.vocab_size)
    asked: list[list[int]] = [[] for _ in work.inputs]
    for request, row in enumerate(work.row):
        asked[row].append(request)
    found = Scores(
        np.zeros(len(requests)),
        np.ones(len(requests), bool),
        np.array([len(t) for t in work.targets], np.int64),
        np.array(work.truncated, bool),
        np.zeros(len(requests), np.int64),
    )
    done = 0
    for batch in batches([len(i) for i in work.inputs], tokens_per_batch, most):
        x = _hidden(model, batch, work.inputs)
        members = [(place, q) for place, row in enumerate(batch.members) for q in asked[row]]
        _score_batch(model, x, members, work, found)
        done += len(members)
        if progress is not None:
            progress(done, len(requests))
    return found


def _rows(requests: Sequence[Request], most: int, vocab_size: int) -> _Rows:
    places: dict[tuple[int, ...], int] = {}
    work = _Rows([], [], [], [])
    for context, continuation in requests:
        if len(context) == 0:
            raise UserError("a request has an empty context; put the begin token there")
        whole = (*map(int, context), *map(int, continuation))
        if min(whole) < 0 or max(whole) >= vocab_size:
            raise UserError(
                f"a request holds the token id {max(whole)}, outside the vocabulary of 0 to "
                f"{vocab_size - 1}; use the model's own tokenizer"
            )
        ids = whole[-(most + 1) :]
        count = min(len(continuation), len(ids) - 1)
        row = ids[:-1] or ids
        if row not in places:
            places[row] = len(work.inputs)
            work.inputs.append(row)
        work.row.append(places[row])
        work.targets.append(ids[len(ids) - count :] if count else ())
        work.truncated.append(len(ids) < len(whole))
    return work


def _hidden(model: Model, batch: Batch, inputs: list[tuple[int, ...]]) -> Array:
    tokens = np.zeros((batch.rows, batch.length), np.int32)
    for place, row in enumerate(batch.members):
        tokens[place, : len(inputs[row])] = inputs[row]
    return _trunk(model.apply, model.params, tokens)


def _score_batch(
    model: Model, x: Array, members: list[tuple[int, int]], work: _Rows, found: Scores
) -> None:
    at, target, owner = [], [], []
    for place, q in members:
        goal = work.targets[q]
        first = len(work.inputs[work.row[q]]) - len(goal)
        at += [(place, first + i) for i in range(len(goal))]
        target += goal
        owner += [q] * len(goal)
    for start in range(0, len(owner), _CHUNK):
        part = slice(start, start + _CHUNK)
        rows, columns = np.array(at[part], np.int32).T
        # Padded to one size, so that the head is compiled once for each shape of x.
        pad = (0, _CHUNK - rows.size)
        values, greedy = _token_scores(
            model.head,
            model.params,
            x,
            np.pad(rows, pad),
            np.pad(columns, pad),
            np.pad(np.array(target[part], np.int32), pad),
        )
        np.add.at(found.log_likelihood, owner[part], np.asarray(values, np.float64)[: rows.size])
        hits = np.asarray(greedy)[: rows.size]
        np.logical_and.at(found.greedy, owner[part], hits)
        np.add.at(found.hits, owner[part], hits.astype(np.int64))


@functools.partial(jax.jit, static_argnums=0)
def _trunk(apply, params, tokens):
    return apply(params, tokens, None, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _token_scores(head, params, x, rows, columns, targets):
    logits = head(params, x[rows, columns]).astype(jnp.float32)
    values = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    greedy = logits.argmax(axis=-1) == targets
    return values - jax.nn.logsumexp(logits, axis=-1), greedy
