"""Merge one leaf in host memory slice by slice: the one path of files and of trees on a CPU."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.merge.contract import Method
from jaxsys.merge.views import HostView, as_float, slices


def merge_leaf(
    method: Method,
    config: Any,
    base: np.ndarray | None,
    models: Sequence[np.ndarray],
    weights: Any,
    key: Any,
    dtype: Any,
) -> np.ndarray:
    """Merge the leaves of N models.

    Args:
      method: what to do.
      config: its options.
      base: [...] or None.
      models: N arrays [...].
      weights: [N].
      key: folded with the leaf's path, or None.
      dtype: of the result.

    Returns:
      The merged leaf in host memory.

    >>> from jaxsys.merge.linear import METHODS, Linear
    >>> x = [np.zeros(2, np.float32), np.ones(2, np.float32)]
    >>> merge_leaf(METHODS["linear"], Linear(), None, x, np.ones(2), None, np.float32).tolist()
    [0.5, 0.5]
    """
    out = np.empty(models[0].size, np.dtype(dtype))
    start = 0
    for part in merge_slices(method, config, base, models, weights, key, dtype):
        out[start : start + part.size] = part
        start += part.size
    return out.reshape(models[0].shape)


def merge_slices(
    method: Method,
    config: Any,
    base: np.ndarray | None,
    models: Sequence[np.ndarray],
    weights: Any,
    key: Any,
    dtype: Any,
) -> Iterator[np.ndarray]:
    """Merge the leaves of N models, giving the flattened result piece by piece in its order.

    Args:
      method: as for `merge_leaf`, like all that follow.
      config: options.
      base: [...] or None.
      models: N arrays [...].
      weights: [N].
      key: folded with the leaf's path, or None.
      dtype: of the result.

    >>> from jaxsys.merge.linear import METHODS, Linear
    >>> x = [np.arange(3.0, dtype=np.float32)]
    >>> [p.tolist() for p in merge_slices(METHODS["linear"], Linear(), None, x, [1.0], None, "f4")]
    [[0.0, 1.0, 2.0]]
    """
    blocks, wanted = method.blocks, np.dtype(dtype)
    # JAX holds no float64 by default: such leaves are merged in float32 and widened again.
    dtype = np.dtype(np.float32) if wanted == np.float64 else wanted
    weights = np.asarray(weights, np.float32)
    if blocks is None:
        found = _leaf(method.leaf, config, dtype, base, tuple(models), weights, key)
        yield np.asarray(found).reshape(-1).astype(wanted, copy=False)
        return
    unit = blocks.unit(config)
    view = HostView(base, models, unit, blocks.prepare)
    numbers = blocks.numbers(config, view, weights.astype(np.float64), key)
    flags = blocks.flags(config)
    # One slice is computed while the one before it is taken.
    ready: tuple[jax.Array, int] | None = None
    for own_base, stack, place, count in slices(base, models, unit):
        own = blocks.prepare(numbers, own_base, stack) if blocks.prepare else numbers
        part = _block(blocks.block, flags, dtype, own, own_base, stack, place)
        if ready is not None:
            yield np.asarray(ready[0]).reshape(-1)[: ready[1]].astype(wanted, copy=False)
        ready = part, count
    if ready is not None:
        yield np.asarray(ready[0]).reshape(-1)[: ready[1]].astype(wanted, copy=False)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _block(
    block: Any, flags: tuple, dtype: Any, numbers: Any, base: Any, stack: Any, place: Any
) -> jax.Array:
    base, stack = as_float(base, stack)
    return block(flags, numbers, base, stack, place).astype(dtype)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _leaf(
    leaf: Any, config: Any, dtype: Any, base: Any, models: Any, weights: Any, key: Any
) -> jax.Array:
    base, stack = as_float(base, models)
    return leaf(config, base, jnp.stack(stack), weights, key).astype(dtype)
