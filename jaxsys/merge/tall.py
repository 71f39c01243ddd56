"""TALL masks: which entries of one multi-task vector each task needs; Consensus: drop the selfish.

The same masks serve twice: TALL stores them and serves each task its own part of the vector,
Consensus keeps the entries that several tasks need and gives one merged model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype

from jaxsys.core.errors import UserError
from jaxsys.core.tree import unflatten
from jaxsys.merge.conflict import as_flat, check_family, task_vectors
from jaxsys.merge.routed import Routed
from jaxsys.merge.sparse import Unified, pack_mask


def tall_mask(stack: np.ndarray, merged: np.ndarray, strictness: float | int) -> np.ndarray:
    """Mark what each task needs: mask_n = |τ_n| > λ |τ_mt − τ_n|.

    Args:
      stack: [N, ...] task vectors.
      merged: [...] multi-task vector τ_mt.
      strictness: λ; larger keeps less.

    Returns:
      [N, ...].

    Reference: arXiv 2405.07813, equation 5.

    >>> tall_mask(np.array([[1.0, 0.0], [0.0, 4.0]]), np.array([1.0, 4.0]), 0.5).tolist()
    [[True, False], [False, True]]
    """
    return np.abs(stack) > strictness * np.abs(merged[None] - stack)


def tall(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    strictness: float | int = 0.4,
    scale: float | int = 1.0,
    dtype: Any = None,
) -> Routed:
    """Build TALL masks: task n is served by θ_0 + mask_n ⊙ τ_mt, τ_mt = scale Σ τ_n.

    Args:
      base: θ_0, a tree or a flat checkpoint.
      models: N experts.
      strictness: λ, chosen from 0.2 to 0.6 on validation in the paper.
      scale: of the multi-task vector.
      dtype: stored; the base's by default.

    Returns:
      The family: the base, one vector and N bit masks.

    Raises:
      UserError: if the models are not of one form, or λ is negative.

    Reference: Wang et al., arXiv 2405.07813.

    >>> tall({"w": np.zeros(2)}, [{"w": np.ones(2)}] * 2).parts["w"].vector.tolist()
    [2.0, 2.0]
    """
    if strictness < 0:
        raise UserError(f"strictness is {strictness}; expected at least 0; raise it")
    flat, others = as_flat(base), [as_flat(model) for model in models]
    check_family(flat, others)
    ones = jnp.ones(len(others), jnp.float32)
    shared, parts = {}, {}
    for path, origin, stack in task_vectors(flat, others):
        merged = scale * stack.sum(0)
        masks = tall_mask(stack, merged, strictness).reshape(len(others), -1)
        target = canonicalize_dtype(flat[path].dtype if dtype is None else dtype)
        shared[path] = jnp.asarray(origin).astype(target)
        parts[path] = Unified(jnp.asarray(merged).astype(target), pack_mask(masks), ones)
    return Routed(shared, parts)


def consensus(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    strictness: float | int = 0.4,
    tasks: int = 2,
    scale: float | int = 1.0,
    amount: float | int = 1.0,
) -> dict[str, Any]:
    """Merge with Consensus: θ_0 + α [#{n: mask_n} ≥ k] ⊙ τ_mt.

    Args:
      base: θ_0, a tree or a flat checkpoint.
      models: N experts.
      strictness: λ of the masks.
      tasks: k, how many tasks must need an entry.
      scale: of the multi-task vector Σ τ_n within the masks and the merge.
      amount: α.

    Returns:
      Nested dict, in the dtypes of the base.

    Raises:
      UserError: if the models are not of one form.

    Reference: Wang et al., arXiv 2405.07813.

    >>> consensus({"w": np.zeros(2)}, [{"w": np.array([1.0, 0.0])}] * 2)["w"].tolist()
    [2.0, 0.0]
    """
    flat, others = as_flat(base), [as_flat(model) for model in models]
    check_family(flat, others)
    merged_model = {}
    for path, origin, stack in task_vectors(flat, others):
        merged = scale * stack.sum(0)
        kept = tall_mask(stack, merged, strictness).sum(0) >= tasks
        found = origin + amount * np.where(kept, merged, 0.0)
        merged_model[path] = jnp.asarray(found, canonicalize_dtype(flat[path].dtype))
    return unflatten(merged_model)
