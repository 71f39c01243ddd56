"""EMR-Merging: elect one vector, mask it for each task, rescale; nothing is trained."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype

from jaxsys.merge.conflict import as_flat, check_family, task_vectors
from jaxsys.merge.routed import Routed
from jaxsys.merge.sparse import Part, Unified, pack_mask


def elect(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Elect a sign and the largest magnitude that agrees with it, and each task's mask.

    γ = sign Σ_n τ_n, a zero sum counting as −; τ_uni = γ · max over agreeing |τ_n|;
    mask_n = τ_n γ > 0.

    Args:
      stack: [N, ...] task vectors of one tensor.

    Returns:
      τ_uni, and masks [N, ...].

    Reference: arXiv 2405.17461.

    >>> vector, masks = elect(np.array([[1.0, -2.0], [3.0, 1.0]]))
    >>> vector.tolist(), masks.tolist()
    ([3.0, -2.0], [[True, True], [True, False]])
    """
    sign = np.where(stack.sum(0) > 0, 1.0, -1.0).astype(stack.dtype)
    masks = stack * sign[None] > 0
    return sign * np.where(masks, np.abs(stack), 0.0).max(0).astype(stack.dtype), masks


def emr(
    base: Mapping[str, Any], models: Sequence[Mapping[str, Any]], *, dtype: Any = None
) -> Routed:
    """Build EMR-Merging: task n is served by θ_0 + λ_n mask_n ⊙ τ_uni, with one-hot weights.

    λ_n = Σ mean|τ_n| / Σ mean|mask_n ⊙ τ_uni|, the sums over tensors.

    Args:
      base: θ_0, a tree or a flat checkpoint.
      models: N experts.
      dtype: stored; the base's by default.

    Returns:
      The family: the base, one vector, N bit masks and N scales.

    Raises:
      UserError: if the models are not of one form.

    Reference: Huang et al., arXiv 2405.17461.

    >>> routed = emr({"w": np.zeros(2)}, [{"w": np.array([2.0, 2.0])}, {"w": -np.ones(2)}])
    >>> routed.parts["w"].vector.tolist()
    [2.0, 2.0]
    """
    flat, others = as_flat(base), [as_flat(model) for model in models]
    check_family(flat, others)
    own, united = np.zeros(len(others)), np.zeros(len(others))
    shared: dict[str, Any] = {}
    found: dict[str, tuple[Any, Any]] = {}
    for path, origin, stack in task_vectors(flat, others):
        vector, masks = elect(stack)
        rows, flat_masks = np.abs(stack).reshape(len(others), -1), masks.reshape(len(others), -1)
        own += rows.mean(1, dtype=np.float64)
        united += (flat_masks * np.abs(vector).reshape(1, -1)).mean(1, dtype=np.float64)
        target = canonicalize_dtype(flat[path].dtype if dtype is None else dtype)
        shared[path] = jnp.asarray(origin).astype(target)
        found[path] = (jnp.asarray(vector).astype(target), pack_mask(flat_masks))
    # Where nothing of a task was elected there is nothing to scale.
    scale = jnp.asarray(own / np.where(united == 0, 1.0, united), jnp.float32)
    parts: dict[str, Part] = {path: Unified(*own, scale) for path, own in found.items()}
    return Routed(shared, parts)
