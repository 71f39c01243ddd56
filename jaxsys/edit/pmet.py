"""PMET: as MEMIT, but attention may move too while v* is sought, and only the matrix is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxsys.edit.closed import prepare
from jaxsys.edit.contract import Editable, Edited, Request
from jaxsys.edit.editable import down_name
from jaxsys.edit.solves import ridge
from jaxsys.edit.spread import spread
from jaxsys.edit.stats import Statistics
from jaxsys.edit.targets import TargetConfig, Targets


@dataclass(frozen=True)
class PmetConfig:
    """Choose how PMET edits; None: the default of the model's size.

    Attributes:
      layers: ascending; v* is found at the last.
      weight: λ, the weight of the keys' second moment.
      target: how v* is found.

    >>> PmetConfig().layers
    """

    layers: tuple[int, ...] | None = None
    weight: float | None = None
    target: TargetConfig = field(default_factory=TargetConfig)


def edit(
    model: Editable,
    config: PmetConfig,
    params: Any,
    requests: Sequence[Request],
    stats: Statistics | None = None,
    state: Any = None,
    *,
    found: Targets | None = None,
) -> Edited:
    """Write a batch of facts into several layers.

        R = (V* - V) / √(layers left),     ΔW_l = R Kᵀ (λ C_l + K Kᵀ)⁻¹

    V is what the last layer's edited matrix writes at the bare prompts, V* what it should write
    beside an offset of the attention's output, which is then dropped.

    Args:
      model: the model.
      config: see `PmetConfig`.
      params: its parameters.
      requests: N.
      stats: C of every layer.
      state: passed on; PMET keeps none.
      found: from `closed.targets`, if it has been called.

    Raises:
      UserError: as MEMIT.

    Reference:
      arXiv 2308.08742, section 4.

    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 6, 4, 2, 8, 48, 64), None)
    >>> config = PmetConfig(target=TargetConfig(prefixes=()))
    >>> edit(model, config, {}, [Request("Rome is in", "Rome", "Gaul")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: PMET got no statistics of the keys of layers 0 1 2; make them ...
    """
    chosen, stats, found = prepare("pmet", model, config, params, requests, stats, found)

    def solve(layer: int, k: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moment = chosen.weight * stats.moment(layer).astype(np.float64)
        return ridge(moment, k, r, factor=stats.factor(layer))

    point = f"{down_name(model.config, chosen.layers[-1])}:out"
    edited = spread(
        model, params, requests, chosen.layers, point, found, chosen.target.prefixes,
        np.sqrt, solve, chosen.target.batch,
    )  # fmt: skip
    return edited._replace(state=state)
