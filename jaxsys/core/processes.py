"""Work that the processes of a job share, and whose results all of them get."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

_WORD = 4


def spread(
    parts: Sequence[str], work: Callable[[str], Any], like: Callable[[str], Any]
) -> dict[str, Any]:
    """Do the parts of a work, each in one process, and give all results to every process.

    Process p does the parts p, p + P, p + 2P, … of P processes. Results travel as their bits, so
    they are the same as in a single process. All processes must call this with the same parts; one
    that fails has to end, which `jaxsys.cluster` makes the end of the others.

    Args:
      parts: their names, in one order everywhere.
      work: part to a tree of arrays.
      like: part to the same tree with shapes and dtypes, known without doing the work.

    Returns:
      Part to its tree of NumPy arrays (in a single process: what `work` gave).

    >>> spread(["a", "b"], lambda part: np.zeros(2), lambda part: np.zeros(2))["b"].tolist()
    [0.0, 0.0]
    """
    count, me = jax.process_count(), jax.process_index()
    own = {part: work(part) for part in parts[me::count]}
    if count == 1:
        return own
    found: dict[str, Any] = {}
    for owner in range(min(count, len(parts))):
        theirs = parts[owner::count]
        shapes = [like(part) for part in theirs]
        n_words = sum(_words(leaf) for leaf in jax.tree.leaves(shapes))
        mine = owner == me
        sent = _pack([own[part] for part in theirs]) if mine else np.zeros(n_words, np.uint32)
        got = _unpack(_broadcast(sent, mine), shapes)
        found |= dict(zip(theirs, got, strict=True))
    return {part: found[part] for part in parts}


def _broadcast(words: np.ndarray, is_source: bool) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(words, is_source)).astype(np.uint32)


def _words(leaf: Any) -> int:
    return -(-int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize // _WORD)


def _pack(trees: Sequence[Any]) -> np.ndarray:
    packed = []
    for leaf in jax.tree.leaves(list(trees)):
        raw = np.frombuffer(np.ascontiguousarray(leaf).tobytes(), np.uint8)
        packed.append(np.pad(raw, (0, -raw.size % _WORD)).view(np.uint32))
    return np.concatenate(packed)


def _unpack(words: np.ndarray, shapes: list[Any]) -> list[Any]:
    leaves, structure = jax.tree.flatten(shapes)
    found, begin = [], 0
    for leaf in leaves:
        end = begin + _words(leaf)
        size = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        raw = words[begin:end].view(np.uint8)[:size]
        found.append(np.frombuffer(raw.tobytes(), leaf.dtype).reshape(leaf.shape))
        begin = end
    return jax.tree.unflatten(structure, found)
