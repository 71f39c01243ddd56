"""Edit one by one, in batches, or in sequence, and ask the edited model."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Answering, Editable, Edited, Info, Method, Record, Request
from jaxsys.edit.evaluation import Base, EvaluationConfig, evaluate_edits
from jaxsys.evaluate.protocol import from_lm


def answering_of(
    model: Editable, method: Method | None, config: Any, params: Any, state: Any = None
) -> Answering:
    """Make what answers for an edited model.

    Args:
      model: see `Editable`.
      method: that edited it; None for an unedited model.
      config: of the method.
      params: edited.
      state: of the method, after the last edit.

    >>> from jaxsys.models import lm
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = lm.init(jax.random.key(0), config)
    >>> answering_of(Editable(config, None), None, None, params).model.context
    64
    """
    if method is None or method.answering is None:
        return Answering(from_lm(params, model.config))
    return method.answering(model, config, params, state)


def edit_batch(
    model: Editable,
    method: Method,
    config: Any,
    params: Any,
    requests: Sequence[Request],
    stats: Any = None,
    state: Any = None,
) -> Edited:
    """Edit a batch at once, or request by request where the method takes one at a time.

    Args:
      model: see `Editable`.
      method: see `Method`.
      config: of the method.
      params: to edit.
      requests: the batch.
      stats: second moments, for methods that need them.
      state: of the edit before.

    Returns:
      As `Method.edit`; ``info`` is that of the last call.

    >>> def edit(model, config, params, requests, stats=None, state=None):
    ...     return Edited(params, (state or 0) + len(requests), Info({}, {}))
    >>> requests = [Request("a b", "a", "c"), Request("d b", "d", "c")]
    >>> edit_batch(Editable(None, None), Method(edit, dict, single=True), {}, {}, requests).state
    2
    """
    assert method.edit is not None
    done = Edited(params, state, Info({}, {}))
    parts = [[r] for r in requests] if method.single else [list(requests)]
    for part in parts:
        done = method.edit(model, config, done.params, part, stats=stats, state=done.state)
    return done


class Single(NamedTuple):
    """Hold what one edit of an unedited model gave.

    Attributes:
      row: metrics of `evaluate_edits`.
      seconds: of the edit, compiling included where it happened.
      failed: why there was no edit, or None.

    >>> Single({"efficacy": 1.0}, 0.5).failed
    """

    row: dict[str, float]
    seconds: float
    failed: str | None = None


def single_edits(
    model: Editable,
    method: Method,
    config: Any,
    params: Any,
    records: Sequence[Record],
    bases: Sequence[Base],
    *,
    stats: Any = None,
    evaluation: EvaluationConfig | None = None,
    before: Callable[[Record], None] | None = None,
) -> Iterator[Single]:
    """Edit an unedited model by each record alone, and evaluate it.

    Args:
      model: see `Editable`.
      method: see `Method`.
      config: of the method.
      params: unedited, for every record.
      records: facts with probes.
      bases: from `base_predictions`, of each record alone.
      stats: second moments, for methods that need them.
      evaluation: see `EvaluationConfig`.
      before: called with each record before its edit.

    Yields:
      One `Single` for each record; an edit that the method refuses scores as the unedited model.

    >>> def edit(model, config, params, requests, stats=None, state=None):
    ...     return Edited(params, None, Info({}, {}))
    >>> list(single_edits(Editable(None, None), Method(edit, dict), {}, {}, [], []))
    []
    """
    assert method.edit is not None
    for record, base in zip(records, bases, strict=True):
        if before is not None:
            before(record)
        begin_s, failed = time.perf_counter(), None
        try:
            edited = method.edit(model, config, params, [record.request], stats=stats)
            jax.block_until_ready((edited.params, edited.state))
            told = answering_of(model, method, config, edited.params, edited.state)
        except UserError as error:
            failed, told = str(error), answering_of(model, None, None, params)
        seconds = time.perf_counter() - begin_s
        [row] = evaluate_edits(told, model.tokenizer, [record], base, evaluation)
        yield Single(row, seconds, failed)
