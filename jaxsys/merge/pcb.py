"""PCB-Merging: weigh each entry by its importance in its task and its agreement with others."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype

from jaxsys.core.errors import UserError
from jaxsys.core.tree import unflatten
from jaxsys.merge.conflict import as_flat, check_family, task_vectors

_CLAMPED = 1e-4  # share of magnitudes cut at either end before they are put on one scale


def pcb(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    ratio: float | int = 0.1,
    scale: float | int = 1.0,
) -> dict[str, Any]:
    """Merge with PCB: θ_0 + λ Σ β_n τ_n / Σ β_n, over all parameters as one vector.

    a = |τ| cut at its extremes; self = exp(N minmax(a)²); cross = tanh(τ ⊙ Σ_n τ_n);
    β = self ⊙ cross, raised to its (1 − ratio)-quantile and put on [0, 1], per task.

    Args:
      base: θ_0, a tree or a flat checkpoint; the whole family is held in memory.
      models: N experts.
      ratio: share of entries that keep a weight above 0.
      scale: λ; the paper's is near 1.2.

    Returns:
      Nested dict, in the dtypes of the base.

    Raises:
      UserError: if the models are not of one form, or the ratio is outside (0, 1].

    Reference: Du et al., arXiv 2410.02396.

    >>> base, expert = {"w": np.zeros(3)}, {"w": np.array([0.0, 1.0, 4.0])}
    >>> pcb(base, [expert] * 2, ratio=0.5)["w"].tolist()
    [0.0, 0.0, 4.0]
    """
    if not 0 < ratio <= 1:
        raise UserError(f"ratio is {ratio}; expected a share in (0, 1]; change it")
    flat, others = as_flat(base), [as_flat(model) for model in models]
    check_family(flat, others)
    leaves = list(task_vectors(flat, others))
    stack = np.concatenate([tau.reshape(len(others), -1) for _, _, tau in leaves], axis=1)
    weights = balance(stack, ratio)
    total = np.maximum(weights.sum(0), 1e-12)
    merged = (stack * weights).sum(0) / total
    found, start = {}, 0
    for path, origin, _ in leaves:
        part = merged[start : start + origin.size].reshape(origin.shape)
        found[path] = jnp.asarray(origin + scale * part, canonicalize_dtype(flat[path].dtype))
        start += origin.size
    return unflatten(found)


def balance(stack: np.ndarray, ratio: float | int) -> np.ndarray:
    """Compute β of every entry of every task, between 0 and 1.

    Args:
      stack: [N, n] task vectors of the whole model.
      ratio: share of entries that keep a weight above 0.

    Returns:
      [N, n].

    >>> balance(np.array([[1.0, 2.0, 4.0]] * 2), 0.4).argmax(1).tolist()
    [2, 2]
    """
    size = _cut(np.abs(stack), _CLAMPED, _CLAMPED)
    own = np.exp(len(stack) * _unit(size) ** 2)
    agreed = np.tanh(stack * stack.sum(0, keepdims=True))
    return _unit(_cut(own * agreed, 1 - ratio, 0.0))


def _cut(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clip each row at the value of rank ⌊n low⌋ and at that of rank ⌊n (1 − high)⌋ − 1."""
    n = x.shape[1]
    first, last = min(int(n * low), n - 1), max(int(n * (1 - high)) - 1, 0)
    ranked = np.partition(x, (first, last), axis=1)
    return np.clip(x, ranked[:, first : first + 1], ranked[:, last : last + 1])


def _unit(x: np.ndarray) -> np.ndarray:
    least, most = x.min(1, keepdims=True), x.max(1, keepdims=True)
    return (x - least) / np.where(most > least, most - least, 1.0)
