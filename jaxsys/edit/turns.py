"""Edits one after the other, all at once, or each from the same parameters, with any method."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxsys.edit.contract import Editable, Edited, Info, Method, Request, check_requests
from jaxsys.edit.factors import compose


def settle(method: Method, model: Editable, config: Any, params: Any) -> Any:
    """Fill a method's config for a model and sample its prefixes, before any edit.

    >>> settle(Method(None, dict), Editable(None, None), {}, {})
    {}
    """
    return config if method.settle is None else method.settle(model, config, params)


def edit_all(
    method: Method,
    model: Editable,
    config: Any,
    params: Any,
    requests: Sequence[Request],
    stats: Any = None,
    state: Any = None,
) -> Edited:
    """Edit a batch: at once where the method can, else one request after the other.

    Args:
      method: of `METHODS`.
      model: the model.
      config: the method's.
      params: to start from.
      requests: N, none of which may contradict another.
      stats: see `Method`.
      state: of the edit before.

    Returns:
      `Edited` with the factors of all.

    Raises:
      UserError: as the method does.

    >>> def edit(model, config, params, requests, stats=None, state=None):
    ...     return Edited(params + len(requests), state, Info({}, {}))
    >>> two = [Request("Rome is in", "Rome", "x"), Request("Paris is in", "Paris", "y")]
    >>> edit_all(Method(edit, dict, single=True), Editable(None, None), {}, 0, two).params
    2
    """
    check_requests(requests)
    assert method.edit is not None
    config = settle(method, model, config, params)
    if not method.single:
        return method.edit(model, config, params, requests, stats, state)
    infos = []
    for request in requests:
        params, state, info = method.edit(model, config, params, [request], stats, state)
        infos.append(info)
    return Edited(params, state, Info(compose(infos).factors, {"edits": len(infos)}))


def edit_each(
    method: Method,
    model: Editable,
    config: Any,
    params: Any,
    requests: Sequence[Request],
    stats: Any = None,
) -> Iterator[Edited]:
    """Edit each request from the same parameters, as tables of single edits do.

    What can be found for many requests at a time is: target values are. Each edit starts without
    state.

    Args:
      method: of `METHODS`.
      model: the model.
      config: the method's.
      params: that every edit starts from.
      requests: N; the same prompt may be there twice.
      stats: see `Method`.

    Yields:
      `Edited` for each request in turn.

    Raises:
      UserError: as the method does.

    >>> def edit(model, config, params, requests, stats=None, state=None):
    ...     return Edited(params + 1, state, Info({}, {}))
    >>> two = [Request("Rome is in", "Rome", "x"), Request("Paris is in", "Paris", "y")]
    >>> [e.params for e in edit_each(Method(edit, dict), Editable(None, None), {}, 0, two)]
    [1, 1]
    """
    for request in requests:
        check_requests([request])
    assert method.edit is not None
    config = settle(method, model, config, params)
    # Several times what runs together, so that requests of like length can be put together.
    size = 4 * getattr(getattr(config, "target", None), "batch", len(requests))
    for first in range(0, len(requests), size):
        part = requests[first : first + size]
        found = method.targets(model, config, params, part) if method.targets else None
        for i, request in enumerate(part):
            if found is None:
                yield method.edit(model, config, params, [request], stats)
                continue
            own = jax.tree.map(lambda x, i=i: np.asarray(x)[i : i + 1], found)
            yield method.edit(model, config, params, [request], stats, found=own)
