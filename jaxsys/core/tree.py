"""Addresses inside pytrees: dotted paths, globs, groups of leaves, per-path keys, fingerprints.

A path is the dotted form of a leaf's key path, so a nested dict read from a checkpoint has the
checkpoint's own tensor names: ``{"h": {"0": {"ln": w}}}`` holds ``h.0.ln``.
"""

import fnmatch
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.core.errors import UserError


class Layer(NamedTuple):
    """A named group of leaves that are synchronised, timed or placed together.

    >>> Layer("head", (3, 4)).name
    'head'
    """

    name: str
    leaves: tuple[int, ...]  # indices in flattening order


def _part(key: Any) -> str:
    for field in ("key", "idx", "name"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def paths(tree: Any) -> tuple[str, ...]:
    """List the dotted path of every leaf, in flattening order.

    >>> paths({"h": [{"w": 1}, {"w": 2}], "b": 3})
    ('b', 'h.0.w', 'h.1.w')
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return tuple(".".join(_part(k) for k in key_path) for key_path, _ in leaves)


def flatten(tree: Any) -> dict[str, Any]:
    """Turn a tree into a flat dict from dotted path to leaf.

    >>> flatten({"h": {"0": {"w": 1}}})
    {'h.0.w': 1}
    """
    return dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a flat dict with dotted paths into nested dicts, the inverse of `flatten` for dicts.

    Raises:
      UserError: if one path runs through the leaf of another, as ``a.b`` through ``a``.

    >>> unflatten({"h.0.w": 1, "b": 2})
    {'h': {'0': {'w': 1}}, 'b': 2}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(_through(path))
        if last in node:
            raise UserError(_through(path))
        node[last] = leaf
    return tree


def _through(path: str) -> str:
    return f"{path[:80]!r} names both a leaf and a branch of one tree, or lies in a leaf; rename it"


def match(names: Sequence[str], pattern: str) -> tuple[int, ...]:
    """Find the indices of the names that a shell-style glob matches.

    >>> match(("h.0.w", "h.1.w", "ln.b"), "h.*")
    (0, 1)
    """
    return tuple(i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern))


def group(names: Sequence[str], patterns: Sequence[str]) -> tuple[Layer, ...]:
    """Group leaves by globs; a leaf goes to the first pattern that matches it.

    Args:
      names: leaf paths in flattening order.
      patterns: one glob per layer, in the order wanted.

    Returns:
      One `Layer` per pattern, together holding every leaf exactly once.

    Raises:
      UserError: a pattern matches nothing new, or a leaf is matched by no pattern.

    >>> group(("h.0.w", "h.1.w", "ln"), ("h.0.*", "*"))
    (Layer(name='h.0.*', leaves=(0,)), Layer(name='*', leaves=(1, 2)))
    """
    free = dict.fromkeys(range(len(names)))
    layers = []
    for pattern in patterns:
        leaves = tuple(i for i in match(names, pattern) if i in free)
        if not leaves:
            raise UserError(
                f"layer pattern {pattern!r} matches no parameter that is still free; expected a "
                f"glob over paths such as {names[0]!r}; correct the pattern or its place"
            )
        for i in leaves:
            del free[i]
        layers.append(Layer(pattern, leaves))
    if free:
        missing = names[next(iter(free))]
        raise UserError(
            f"parameter {missing!r} and {len(free) - 1} others belong to no layer; expected the "
            'patterns to cover every parameter; add a last pattern "*"'
        )
    return tuple(layers)


def modules(names: Sequence[str]) -> tuple[Layer, ...]:
    """Group leaves by module: those that share a parent path belong together.

    Args:
      names: leaf paths in flattening order.

    Returns:
      Layers named by the parent path, in the order of their first leaves.

    >>> modules(("h.0.b", "h.0.w", "ln"))
    (Layer(name='h.0', leaves=(0, 1)), Layer(name='ln', leaves=(2,)))
    """
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(name.rpartition(".")[0] or name, []).append(i)
    return tuple(Layer(name, tuple(leaves)) for name, leaves in found.items())


def path_key(key: jax.Array, path: str) -> jax.Array:
    """Derive the random key of a path, the same on every process and in every Python run.

    >>> k = jax.random.key(0)
    >>> bool((path_key(k, "h.0.w") == path_key(k, "h.0.w")).all())
    True
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def size_bytes(leaf: Any) -> int:
    """Count the bytes of one leaf.

    >>> size_bytes(np.zeros((2, 3), np.float32))
    24
    """
    return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize


def fingerprint(tree: Any) -> dict[str, str]:
    """Hash shape, dtype and bytes of every leaf, to compare trees between processes.

    >>> a = fingerprint({"w": np.zeros(2)})
    >>> a == fingerprint({"w": np.zeros(2)}), a == fingerprint({"w": np.ones(2)})
    (True, False)
    """
    result = {}
    for path, leaf in flatten(tree).items():
        array = np.ascontiguousarray(leaf)
        digest = hashlib.blake2b(f"{array.shape}{array.dtype}".encode(), digest_size=8)
        digest.update(array.tobytes())
        result[path] = digest.hexdigest()
    return result
