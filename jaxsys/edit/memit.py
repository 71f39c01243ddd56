"""MEMIT: many facts at a time, spread over several layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxsys.edit.contract import Editable, Edited, Request, check_requests
from jaxsys.edit.defaults import settle
from jaxsys.edit.prefixes import MEMIT_SAMPLES
from jaxsys.edit.solves import ridge
from jaxsys.edit.spread import add_keys, keys_of, spread
from jaxsys.edit.stats import Statistics, need
from jaxsys.edit.targets import TargetConfig, Targets, find_targets


@dataclass(frozen=True)
class MemitConfig:
    """Choose how MEMIT edits; None: the default of the model's size.

    Attributes:
      layers: ascending; v* is found at the last.
      weight: λ, the weight of the keys' second moment C against the requests' own keys.
      sequential: keys of earlier batches are kept too: their K Kᵀ is added to λ C.
      target: how v* is found.

    >>> MemitConfig().sequential
    False
    """

    layers: tuple[int, ...] | None = None
    weight: float | None = None
    sequential: bool = False
    target: TargetConfig = field(default_factory=TargetConfig)


def targets(
    model: Editable, config: MemitConfig, params: Any, requests: Sequence[Request]
) -> Targets:
    """Find the values of many requests at a time, for edits that each start from ``params``.

    >>> targets(Editable(None, None), MemitConfig(), {}, [Request("Paris is in", "Rome", "Gaul")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: request 0: the prompt 'Paris is in' does not name ...
    """
    for request in requests:
        check_requests([request])
    chosen = settle(config, "memit", model, params, MEMIT_SAMPLES)
    return find_targets(model, params, requests, chosen.layers[-1], "layer", chosen.target)


def edit(
    model: Editable,
    config: MemitConfig,
    params: Any,
    requests: Sequence[Request],
    stats: Statistics | None = None,
    state: dict[int, Any] | None = None,
    *,
    found: Targets | None = None,
) -> Edited:
    """Write a batch of facts into several layers.

        R = (Z - H) / (layers left),     ΔW_l = R Kᵀ (λ C_l + S_l + K Kᵀ)⁻¹

    for each layer from the lowest up, with keys K and the last layer's outputs H taken anew. S_l,
    the sum of K Kᵀ over earlier batches, is nought unless ``sequential``.

    Args:
      model: the model.
      config: see `MemitConfig`.
      params: its parameters.
      requests: N.
      stats: C of every layer.
      state: layer to S_l, from the batch before; only with ``sequential``.
      found: from `targets`, if it has been called.

    Raises:
      UserError: for requests that contradict one another, missing statistics, or a change that is
        not finite.

    Reference:
      arXiv 2210.07229, equations 14, 19 and 20, algorithm 1.

    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 6, 4, 2, 8, 48, 64), None)
    >>> config = MemitConfig(target=TargetConfig(prefixes=()))
    >>> edit(model, config, {}, [Request("Rome is in", "Rome", "Gaul")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: MEMIT got no statistics of the keys of layers 0 1 2; make them ...
    """
    check_requests(requests)
    chosen = settle(config, "memit", model, params, MEMIT_SAMPLES)
    stats = need(stats, "MEMIT", chosen.layers)
    if found is None:
        found = find_targets(model, params, requests, chosen.layers[-1], "layer", chosen.target)

    def solve(layer: int, k: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moment = chosen.weight * stats.moment(layer).astype(np.float64)
        if chosen.sequential and state is not None:
            return ridge(moment + state[layer], k, r)
        return ridge(moment, k, r, factor=stats.factor(layer))

    prefixes, batch = chosen.target.prefixes, chosen.target.batch
    edited = spread(
        model, params, requests, chosen.layers, ":out", found, prefixes,
        lambda left: left, solve, batch,
    )  # fmt: skip
    if not chosen.sequential:
        return edited._replace(state=state)
    keys = keys_of(model, edited.params, requests, chosen.layers, prefixes, batch)
    return edited._replace(state=add_keys(state, keys))
