"""Order statistics over all tensors of a model, streamed: two passes of counting, exact.

A float's magnitude orders as its bits do. The first pass counts the upper 16 of the 31 bits, which
is a histogram with 128 bins for each power of two; the second counts the lower 15 bits of what
fell into the bin that holds the rank. No value is kept, and the result is an entry of the model.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.merge.sparsify import kept_ranks, magnitude
from jaxsys.merge.views import HostView, slices, term_of

Leaves = Callable[[], Iterable[tuple[str, Any, list[Any]]]]
_LOW_BITS = 15


def largest(leaves: Leaves, density: Any) -> tuple[float, ...]:
    """Find, for each model, the smallest magnitude among the largest differences over all tensors.

    Args:
      leaves: iterates (path, base, [models]) anew at each call.
      density: share of entries that stay, or one for each model.

    Returns:
      One threshold for each model: ⌊density · entries⌋ differences are at least as large.

    >>> base, model = np.zeros(4, np.float32), np.array([1.0, -4.0, 2.0, 3.0], np.float32)
    >>> largest(lambda: [("w", base, [model])], 0.5)
    (3.0,)
    """
    counts: list[np.ndarray] = []
    for i, bits in _magnitudes(leaves):
        while len(counts) <= i:
            counts.append(np.zeros(1 << (31 - _LOW_BITS), np.int64))
        counts[i] += np.bincount(bits >> _LOW_BITS, minlength=len(counts[i]))
    total = int(counts[0].sum())
    shares = density if isinstance(density, tuple) else (density,) * len(counts)
    if len(shares) != len(counts):
        raise UserError(
            f"{len(shares)} densities were given for {len(counts)} models; give one each"
        )
    ranks = [kept_ranks(total, share)[1] for share in shares]
    bins, rest = zip(*map(_bin_of, counts, ranks), strict=True)
    fine = [np.zeros(1 << _LOW_BITS, np.int64) for _ in counts]
    for i, bits in _magnitudes(leaves):
        inside = bits[bits >> _LOW_BITS == bins[i]] & ((1 << _LOW_BITS) - 1)
        fine[i] += np.bincount(inside, minlength=len(fine[i]))
    found = []
    for i in range(len(counts)):
        low, _ = _bin_of(fine[i], rest[i])
        pattern = np.uint32((bins[i] << _LOW_BITS) | low)
        found.append(float(pattern.view(np.float32)))
    return tuple(found)


def majority_sign(leaves: Leaves, thresholds: tuple[float, ...] | None) -> float:
    """Find the sign of most entries of the sum of (trimmed) differences over all tensors.

    Args:
      leaves: as for `largest`.
      thresholds: smallest magnitude that counts, for each model.

    Returns:
      1 or −1.

    >>> base, model = np.zeros(3, np.float32), np.array([1.0, -4.0, -2.0], np.float32)
    >>> majority_sign(lambda: [("w", base, [model])], None)
    -1.0
    """
    total = 0.0
    for _, base, models in leaves():
        hosts = [np.asarray(x) for x in models]
        low = np.zeros(len(hosts)) if thresholds is None else np.asarray(thresholds)
        view = HostView(np.asarray(base), hosts)
        total += float(view.sums(_signs, (), low.astype(np.float32))[0])
    return 1.0 if total >= 0 else -1.0


def _signs(flags: tuple, low: Any, base: Any, stack: Any, place: Any) -> tuple[Any]:
    taus = [x - base for x in stack]
    xp = jax.numpy
    return (xp.sign(sum(xp.where(xp.abs(t) >= low[i], t, 0.0) for i, t in enumerate(taus))),)


def _magnitudes(leaves: Leaves) -> Iterator[tuple[int, np.ndarray]]:
    """Give the bits of |τ| slice by slice with the number of the model."""
    for _, base, models in leaves():
        for i, model in enumerate(models):
            for own, stack, place, count in slices(
                np.asarray(base), [np.asarray(model)], "elements"
            ):
                found = np.asarray(term_of(magnitude, (), (), own, stack, place))
                yield i, found.reshape(-1)[:count].view(np.uint32)


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """Find the bin that holds a rank from above, and the rank within it."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
