"""Layers: the groups of parameter leaves that partial local SGD synchronises one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxsys.core import traced, tree
from jaxsys.core.tree import Layer


def find_layers(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    *,
    patterns: Sequence[str] | None = None,
    min_bytes: int = 0,
) -> tuple[Layer, ...]:
    """Group a model's leaves into layers, in backward order: layer 0 is nearest the loss.

    Without patterns a layer is one module (the leaves that share a parent path), placed where it is
    first used in the forward pass; runs of modules smaller than ``min_bytes`` are joined to the
    module that follows, since each collective costs a latency of its own.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``; it is traced, not run.
      params: tree of arrays or shapes.
      batch: one batch or its shapes.
      patterns: globs over parameter paths, one per layer, instead of modules.
      min_bytes: smallest layer that is left alone.

    Returns:
      Layers that hold every leaf exactly once.

    Raises:
      UserError: a pattern matches nothing, or leaves match no pattern.

    >>> import jax.numpy as jnp
    >>> p = {"in": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "out": {"w": jnp.ones((2, 1))}}
    >>> def loss(p, x):
    ...     return jnp.sum((x @ p["in"]["w"] + p["in"]["b"][None]) @ p["out"]["w"])
    >>> [layer.name for layer in find_layers(loss, p, jnp.ones((1, 2)))]
    ['out', 'in']
    """
    names = tree.paths(params)
    leaves = jax.tree.leaves(params)
    first = traced.first_use(loss_fn, params, batch)
    if patterns is not None:
        layers = list(tree.group(names, patterns))
    else:
        layers = list(tree.modules(names))
    layers.sort(key=lambda layer: min(first[i] for i in layer.leaves))
    if min_bytes:
        layers = _join_small(layers, [tree.size_bytes(x) for x in leaves], min_bytes)
    return tuple(reversed(layers))


def _join_small(layers: list[Layer], sizes: list[int], min_bytes: int) -> list[Layer]:
    joined: list[Layer] = []
    waiting: tuple[int, ...] = ()
    for layer in layers:
        waiting = (*waiting, *layer.leaves)
        if sum(sizes[i] for i in waiting) >= min_bytes:
            joined.append(Layer(layer.name, waiting))
            waiting = ()
    if waiting:
        last = joined.pop() if joined else Layer(layers[-1].name, ())
        joined.append(Layer(last.name, (*last.leaves, *waiting)))
    return joined


def layer_bytes(params: Any, layers: Sequence[Layer]) -> tuple[int, ...]:
    """Count the bytes of each layer.

    >>> import jax.numpy as jnp
    >>> layer_bytes({"w": jnp.ones((2, 3))}, [Layer("all", (0,))])
    (24,)
    """
    sizes = [tree.size_bytes(x) for x in jax.tree.leaves(params)]
    return tuple(sum(sizes[i] for i in layer.leaves) for layer in layers)
