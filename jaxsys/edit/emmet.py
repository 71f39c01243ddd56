"""EMMET: ROME's equality for a batch of facts, and MEMIT's batch in one layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxsys.edit.closed import prepare
from jaxsys.edit.contract import Editable, Edited, Request
from jaxsys.edit.solves import ridge
from jaxsys.edit.spread import spread
from jaxsys.edit.stats import Statistics
from jaxsys.edit.targets import TargetConfig, Targets


@dataclass(frozen=True)
class EmmetConfig:
    """Choose how EMMET edits; None: the default of the model's size.

    Attributes:
      layers: ascending; one by default.
      weight: λ, the weight of the keys' second moment.
      identity: μ, added to the diagonal of λ C.
      slack: λ_e, added to the diagonal of Kᵀ C̃⁻¹ K; 0 demands equality.
      target: how v* is found.

    >>> EmmetConfig().slack
    0.1
    """

    layers: tuple[int, ...] | None = None
    weight: float | None = None
    identity: float = 0.0
    slack: float = 0.1
    target: TargetConfig = field(default_factory=TargetConfig)


def edit(
    model: Editable,
    config: EmmetConfig,
    params: Any,
    requests: Sequence[Request],
    stats: Statistics | None = None,
    state: Any = None,
    *,
    found: Targets | None = None,
) -> Edited:
    """Write a batch of facts under equality constraints.

        ΔW = R (Kᵀ C̃⁻¹ K + λ_e I)⁻¹ Kᵀ C̃⁻¹,     C̃ = λ C + μ I

    With one request and λ_e = 0 this is ROME's update.

    Args:
      model: the model.
      config: see `EmmetConfig`.
      params: its parameters.
      requests: N.
      stats: C of every layer.
      state: passed on; EMMET keeps none.
      found: from `closed.targets`, if it has been called.

    Raises:
      UserError: as MEMIT; without slack also for more requests than the matrix has inputs.

    Reference:
      arXiv 2403.14236, equation 13.

    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 6, 4, 2, 8, 48, 64), None)
    >>> config = EmmetConfig(target=TargetConfig(prefixes=()))
    >>> edit(model, config, {}, [Request("Rome is in", "Rome", "Gaul")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: EMMET got no statistics of the keys of layers 1; make them ...
    """
    chosen, stats, found = prepare("emmet", model, config, params, requests, stats, found)

    def solve(layer: int, k: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moment = chosen.weight * stats.moment(layer).astype(np.float64)
        moment[np.diag_indices_from(moment)] += chosen.identity
        factor = None if chosen.identity else stats.factor(layer)
        return ridge(moment, k, r, chosen.slack, factor)

    edited = spread(
        model, params, requests, chosen.layers, ":out", found, chosen.target.prefixes,
        lambda left: left, solve, chosen.target.batch,
    )  # fmt: skip
    return edited._replace(state=state)
