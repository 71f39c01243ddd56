"""What predictors are given: statistics of layers, scaled, beside the operations of the cell."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.nas import space


def node_features(
    nodes: Mapping[str, Float[np.ndarray, "N S"]],
    *,
    scale: Literal["network", "table"] = "table",
    order: Integer[np.ndarray, "S"] | None = None,
) -> Float[np.ndarray, "N F"]:
    """Scale node-wise statistics and put those of all proxies side by side.

    Args:
      nodes: proxy -> statistics, 0 where there is no layer.
      scale: `network` maps each network's own smallest and largest value to 0 and 1, as the
        released code of ParZC does; networks then differ in shape only. `table` takes mean and
        deviation of each slot over all networks and keeps their sizes apart.
      order: of the slots; `slots.packed_order` moves empty ones to the end, as released.

    Returns:
      float32, F = S times the number of proxies.

    Raises:
      UserError: for a statistic that is not finite.

    >>> node_features({"snip": np.array([[1.0, 3.0, 2.0]])}, scale="network").tolist()
    [[0.0, 1.0, 0.5]]
    """
    parts = []
    for name, values in nodes.items():
        v = np.asarray(values, np.float64)
        wrong = np.flatnonzero(~np.isfinite(v).all(1))
        if wrong.size:
            raise UserError(
                f"statistics of {name!r} are not finite for {wrong.size} networks, the first "
                f"number {int(wrong[0])}; expected numbers; drop these networks or the proxy"
            )
        if order is not None:
            v = _packed(v[:, order])
        if scale == "network":
            low, span = v.min(1, keepdims=True), np.ptp(v, axis=1, keepdims=True)
        else:
            low, span = v.mean(0, keepdims=True), v.std(0, keepdims=True)
        parts.append((v - low) / np.where(span > 0, span, 1.0))
    return np.concatenate(parts, 1).astype(np.float32)


def _packed(v: np.ndarray) -> np.ndarray:
    """Move each row's zeros to its end and keep the order of the rest."""
    return np.take_along_axis(v, np.argsort(v == 0, axis=1, kind="stable"), 1)


def predictor_inputs(
    cells: Integer[np.ndarray, "N 6"],
    nodes: Mapping[str, Float[np.ndarray, "N S"]],
    **options: Any,
) -> dict[str, np.ndarray]:
    """Make the inputs of every predictor: `nodes` `[N, F]` and `ops` `[N, 6]`.

    Operations that nothing flows through become `none`, so that cells which compute the same are
    the same.

    Args:
      cells: operations.
      nodes: see `node_features`, as are the options.
      **options: of `node_features`.

    >>> found = predictor_inputs(np.array([[2, 1, 1, 1, 1, 3]]), {"snip": np.ones((1, 2))})
    >>> found["ops"].tolist()
    [[1, 1, 1, 1, 1, 1]]
    """
    return {"nodes": node_features(nodes, **options), "ops": space.canonical(cells)}


def flat_features(inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "N F"]:
    """Join statistics and operations in 0/1 form, for learners that know no graph.

    >>> flat_features({"nodes": np.ones((1, 2), np.float32), "ops": np.zeros((1, 6), int)}).shape
    (1, 32)
    """
    return np.concatenate([inputs["nodes"], space.one_hot(inputs["ops"])], 1)
