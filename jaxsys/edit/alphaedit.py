"""AlphaEdit: MEMIT's change, kept to the directions that ordinary text does not use."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxsys.edit.closed import prepare
from jaxsys.edit.contract import Editable, Edited, Request
from jaxsys.edit.solves import ridge
from jaxsys.edit.spread import add_keys, keys_of, spread
from jaxsys.edit.stats import Statistics, null_space
from jaxsys.edit.targets import TargetConfig, Targets


@dataclass(frozen=True)
class AlphaEditConfig:
    """Choose how AlphaEdit edits; None: the default of the model's size.

    Attributes:
      layers: ascending; v* is found at the last.
      threshold: eigenvalue of C below which a direction is free.
      relative: the threshold is a share of the mean eigenvalue, which varies with the model; False:
        absolute, as published.
      ridge: η.
      target: how v* is found.

    >>> AlphaEditConfig().ridge
    """

    layers: tuple[int, ...] | None = None
    threshold: float | None = None
    relative: bool | None = None
    ridge: float | None = None
    target: TargetConfig = field(default_factory=TargetConfig)


def project(
    u: np.ndarray, k: np.ndarray, r: np.ndarray, s: np.ndarray | None, eta: float | int
) -> tuple[np.ndarray, np.ndarray]:
    """Give factors of the published solution from a symmetric system in the free directions.

    (P (K Kᵀ + S) + η I) X = P K Rᵀ has X = U y with
    (Uᵀ K Kᵀ U + Uᵀ S U + η I) y = Uᵀ K Rᵀ, because P X = X; ΔW = Xᵀ.

    Args:
      u: U [F, Q], orthonormal; P = U Uᵀ.
      k: K [F, N].
      r: R [D, N].
      s: S [F, F], keys of earlier edits; None for none.
      eta: η.

    Returns:
      (A, B) with ΔW = A Bᵀ.

    >>> a, b = project(np.eye(2), np.eye(2), np.eye(2), None, 1.0)
    >>> (a @ b.T).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """
    u = np.asarray(u, np.float64)
    inner: Any = eta
    if s is not None:
        inner = u.T @ np.asarray(s, np.float64) @ u
        inner = (inner + inner.T) / 2 + eta * np.eye(len(inner))
    a, b = ridge(inner, u.T @ np.asarray(k, np.float64), r)
    return a, (u @ b.astype(np.float64)).astype(np.float32)


def edit(
    model: Editable,
    config: AlphaEditConfig,
    params: Any,
    requests: Sequence[Request],
    stats: Statistics | None = None,
    state: dict[int, Any] | None = None,
    *,
    found: Targets | None = None,
) -> Edited:
    """Write a batch of facts into several layers without disturbing what keys of C give.

        (P (K Kᵀ + S_l) + η I) X = P K Rᵀ,     ΔW_l = Xᵀ

    with P the projection on the directions of C_l whose eigenvalue is below the threshold. When
    all layers are written S_l ← S_l + K Kᵀ, with keys taken anew: that is the state. For an edit
    that has nothing to do with earlier ones pass None, or their keys will hold it back.

    Args:
      model: the model.
      config: see `AlphaEditConfig`.
      params: its parameters.
      requests: N.
      stats: C of every layer.
      state: layer to S_l [F, F], from the batch before.
      found: from `closed.targets`, if it has been called.

    Raises:
      UserError: as MEMIT, and if the threshold leaves no direction.

    Reference:
      arXiv 2410.02355, equation 14.

    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 6, 4, 2, 8, 48, 64), None)
    >>> config = AlphaEditConfig(target=TargetConfig(prefixes=()))
    >>> edit(model, config, {}, [Request("Rome is in", "Rome", "Gaul")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: AlphaEdit got no statistics of the keys of layers 0 1 2; ...
    """
    chosen, stats, found = prepare("alphaedit", model, config, params, requests, stats, found)

    def solve(layer: int, k: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u = stats.derive(
            ("null space", layer, chosen.threshold, chosen.relative),
            lambda: null_space(stats.moment(layer), chosen.threshold, relative=chosen.relative),
        )
        return project(u, k, r, None if state is None else state[layer], chosen.ridge)

    prefixes, batch = chosen.target.prefixes, chosen.target.batch
    edited = spread(
        model, params, requests, chosen.layers, ":out", found, prefixes,
        lambda left: left, solve, batch,
    )  # fmt: skip
    keys = keys_of(model, edited.params, requests, chosen.layers, prefixes, batch)
    return edited._replace(state=add_keys(state, keys))
