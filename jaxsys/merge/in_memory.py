"""Merge trees of parameters that are in memory, on one device or many."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, path_key, unflatten
from jaxsys.merge.blockwise import merge_leaf
from jaxsys.merge.contract import Method, check_inputs, find_method
from jaxsys.merge.methods import METHODS


def merge_tree(
    method: str | Method,
    models: Sequence[Mapping[str, Any]],
    *,
    base: Mapping[str, Any] | None = None,
    weights: Sequence[float] | Callable[[str], Sequence[float]] | Any = None,
    config: Any = None,
    key: jax.Array | None = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """Merge parameter trees leaf by leaf.

    Leaves in the memory of a host are merged as `jaxsys.merge.files.merge_files` merges them, slice
    by slice, to the same bits. Leaves on accelerators or sharded over devices are merged by one
    jitted program per shape and stay where they are; inside a JAX program the leaf functions run
    as they are, so that weights and options may be traced.

    Args:
      method: a name in `jaxsys.merge.methods.METHODS`, or a `Method`.
      models: N trees with the same paths and shapes.
      base: θ_0, where the method uses one.
      weights: w, [N], or a function from the path to them; ones by default.
      config: the method's options, or a function from the path to them; its defaults by default.
      key: random key; each leaf uses it folded with its path.
      dtype: of the result; that of the base, or else of the first model, by default.

    Returns:
      A tree like the models.

    Raises:
      UserError: if the trees do not fit one another (all differences are listed) or the method.

    >>> a, b = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    >>> merge_tree("linear", [a, b], weights=[3.0, 1.0])["w"].tolist()
    [0.25, 0.25]
    """
    name = method if isinstance(method, str) else getattr(method.leaf, "__name__", "the method")
    method = find_method(METHODS, method) if isinstance(method, str) else method
    check_inputs(name, method, len(models), has_base=base is not None)
    flat_base = None if base is None else flatten(base)
    flats = [flatten(model) for model in models]
    labels = [f"model {i}" for i in range(len(flats))] + ["base"] * (base is not None)
    check_trees(labels, flats + ([] if flat_base is None else [flat_base]))

    config_of = config if callable(config) else _constant(config or method.config())
    weights_of = weights if callable(weights) else _constant(weights)
    if method.pass_ is not None and not callable(config):

        def leaves() -> Any:
            for path in flats[0]:
                yield path, None if flat_base is None else flat_base[path], [f[path] for f in flats]

        config_of = _constant(method.pass_(config_of(""), leaves))
    merged = {}
    for path in flats[0]:
        arrays = [flat[path] for flat in flats]
        own_base = None if flat_base is None else flat_base[path]
        w = weights_of(path)
        w = np.ones(len(arrays), np.float32) if w is None else w
        out = dtype or (arrays[0] if own_base is None else own_base).dtype
        own_key = None if key is None else path_key(key, path)
        merged[path] = _merge_one(method, config_of(path), own_base, arrays, w, own_key, out)
    return unflatten(merged)


def check_trees(labels: Sequence[str], trees: Sequence[Mapping[str, Any]]) -> None:
    """Refuse trees whose paths or shapes differ, naming every difference.

    Raises:
      UserError: with all differences.

    >>> check_trees(["a", "b"], [{"w": np.zeros(2)}, {"w": np.zeros(3)}])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: 1 tensor does not fit: w is [2] in a and [3] in b; ...
    """
    wrong = []
    for path in dict.fromkeys(path for tree in trees for path in tree):
        shapes = {
            label: tuple(tree[path].shape) if path in tree else None
            for label, tree in zip(labels, trees, strict=True)
        }
        if len(set(shapes.values())) > 1:
            told = [
                f"{'missing' if shape is None else list(shape)} in {label}"
                for label, shape in shapes.items()
            ]
            wrong.append(f"{path} is {', '.join(told[:-1])} and {told[-1]}")
    if wrong:
        what = "1 tensor does" if len(wrong) == 1 else f"{len(wrong)} tensors do"
        raise UserError(
            f"{what} not fit: {'; '.join(wrong)}; merge models of one architecture and vocabulary"
        )


def _constant(value: Any) -> Callable[[str], Any]:
    return lambda _: value


def _on_host(leaf: Any) -> bool:
    if isinstance(leaf, Tracer):
        return False
    if isinstance(leaf, jax.Array):
        devices = leaf.devices()
        return len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return True


def _traced(*values: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(values))


def _merge_one(
    method: Method, config: Any, base: Any, arrays: list[Any], weights: Any, key: Any, dtype: Any
) -> Any:
    assert method.leaf is not None
    options = [v for v in vars(config).values() if isinstance(v, jax.Array)]
    if _traced(base, arrays, weights, key, options):
        return method.leaf(config, *_wide(base, arrays), weights, key).astype(dtype)
    weights = np.asarray(weights, np.float32)
    if all(_on_host(x) for x in arrays + ([] if base is None else [base])):
        host = [np.asarray(x) for x in arrays]
        own_base = None if base is None else np.asarray(base)
        return jnp.asarray(merge_leaf(method, config, own_base, host, weights, key, dtype))
    return _whole(method.leaf, config, np.dtype(dtype), base, tuple(arrays), weights, key)


def _wide(base: Any, arrays: Sequence[Any]) -> tuple[Any, jax.Array]:
    stack = jnp.stack([jnp.asarray(x).astype(jnp.float32) for x in arrays])
    return (None if base is None else jnp.asarray(base).astype(jnp.float32)), stack


@partial(jax.jit, static_argnums=(0, 1, 2))
def _whole(
    leaf: Any, config: Any, dtype: Any, base: Any, arrays: Any, weights: Any, key: Any
) -> jax.Array:
    return leaf(config, *_wide(base, arrays), weights, key).astype(dtype)
