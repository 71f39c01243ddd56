"""Edit an unedited model fact by fact and ask it, and what makes a method ready for that."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Answering, Editable, Edited, Info, Method, Record, Request
from jaxsys.edit.evaluation import Base, EvaluationConfig, evaluate_edits, evaluate_texts
from jaxsys.edit.stacked import stack_models, stacked_bytes
from jaxsys.edit.turns import edit_each, settle
from jaxsys.evaluate.protocol import from_lm

_STACK_BYTES = 1 << 29


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


class Single(NamedTuple):
    """Hold what one edit of an unedited model gave.

    Attributes:
      row: metrics of `evaluate_edits`.
      seconds: of the edit, compiling included where it happened; where values are found for many
        edits at a time, the first of them has that time, and only a mean says something.
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

    Yields:
      One `Single` for each record, a group at a time (what is written freely is written by several
      edited models at once); an edit that the method refuses scores as the unedited model.

    >>> list(single_edits(Editable(None, None), Method(edit=print, config=dict), {}, {}, [], []))
    []
    """
    config = settle(method, model, config, params)
    edits = _edits(model, method, config, params, [r.request for r in records], stats)
    evaluation = EvaluationConfig() if evaluation is None else evaluation
    scored = replace(evaluation, answer_tokens=0, fluency_tokens=0)
    group: list[tuple[Single, Answering, Any, Record]] = []
    for record, base in zip(records, bases, strict=True):
        begin_s = time.perf_counter()
        edited, failed = next(edits), None
        if isinstance(edited, str):
            edited, failed = Edited(params, None, Info({}, {})), edited
        jax.block_until_ready((edited.params, edited.state))
        used = None if failed else method
        told = answering_of(model, used, config, edited.params, edited.state)
        seconds = time.perf_counter() - begin_s
        [row] = evaluate_edits(told, model.tokenizer, [record], base, scored)
        group.append((Single(row, seconds, failed), told, edited.params, record))
        if len(group) >= _group_size(params, group, method, evaluation):
            yield from _written(model, params, group, evaluation)
            group = []
    if group:
        yield from _written(model, params, group, evaluation)


def _group_size(params: Any, group: Sequence[Any], method: Method, how: EvaluationConfig) -> int:
    """Say how many edited models write together; those with a memory write alone."""
    if method.answering is not None or group[-1][-1].generation:
        return 1
    most = max(stacked_bytes(params, edited) for _, _, edited, _ in group)
    return max(1, min(how.rows, _STACK_BYTES // max(most, 1)))


def _written(
    model: Editable, params: Any, group: Sequence[Any], how: EvaluationConfig
) -> Iterator[Single]:
    singles, told, edited, records = zip(*group, strict=True)
    if len(group) == 1:
        answering = told[0]
    else:
        answering = Answering(stack_models(model.config, params, edited))
    texts = evaluate_texts(answering, model.tokenizer, records, how)
    for single, more in zip(singles, texts, strict=True):
        yield single._replace(row=single.row | more)


def _edits(
    model: Editable,
    method: Method,
    config: Any,
    params: Any,
    requests: Sequence[Request],
    stats: Any,
) -> Iterator[Edited | str]:
    """Give each edit, or why there is none; what is found for many at a time stays so."""
    edits = edit_each(method, model, config, params, requests, stats)
    for i, request in enumerate(requests):
        try:
            edited: Edited | str = next(edits)
        except UserError:
            # Another request of its group may be at fault: this one is tried alone.
            edited = _alone(model, method, config, params, request, stats)
            edits = edit_each(method, model, config, params, requests[i + 1 :], stats)
        yield edited


def _alone(
    model: Editable, method: Method, config: Any, params: Any, request: Request, stats: Any
) -> Edited | str:
    try:
        return next(edit_each(method, model, config, params, [request], stats))
    except UserError as error:
        return str(error)


def configure(name: str, method: Method, options: Mapping[str, Any]) -> Any:
    """Make a method's configuration from named options, such as those of a JSON file.

    Args:
      name: of the method, for errors.
      method: see `Method`.
      options: fields of its configuration; ``layers`` sets ``layer`` where a method has one.

    Raises:
      UserError: for a field that the method does not have, or a value that it refuses.

    >>> from jaxsys.edit.evaluation import EvaluationConfig
    >>> configure("it", Method(None, EvaluationConfig), {"rows": 2}).rows
    2
    """
    known = {f.name: f for f in dataclasses.fields(method.config)}
    given = dict(options)
    if "layers" in given and "layers" not in known and "layer" in known:
        layers = given.pop("layers")
        if not isinstance(layers, tuple | list) or len(layers) != 1:
            raise UserError(f"{name} edits one layer; got {layers}; name one")
        given["layer"] = layers[0]
    for key, value in given.items():
        if key not in known:
            raise UserError(
                f"{name} has no setting {key!r}; expected some of {', '.join(known)}; correct it"
            )
        given[key] = tuple(value) if isinstance(value, list) else value
        if isinstance(value, Mapping):
            inner = Method(None, type(getattr(method.config(), key)))
            if not dataclasses.is_dataclass(inner.config):
                raise UserError(f"{name}'s setting {key!r} takes no further settings; give a value")
            given[key] = configure(f"{name}'s {key}", inner, value)
    try:
        return method.config(**given)
    except TypeError as error:
        raise UserError(
            f"{name} cannot be set to {given} ({error}); correct the settings"
        ) from None
