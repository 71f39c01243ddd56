"""MEMIT: many facts at a time, spread over several layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxsys.edit.closed import prepare
from jaxsys.edit.contract import Editable, Edited, Request
from jaxsys.edit.solves import ridge
from jaxsys.edit.spread import add_keys, keys_of, spread
from jaxsys.edit.stats import Statistics
from jaxsys.edit.targets import TargetConfig, Targets


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
      found: from `closed.targets`, if it has been called.

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
    chosen, stats, found = prepare("memit", model, config, params, requests, stats, found)

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
