"""How a method asks for numbers over a whole leaf: sums and order statistics, traced or on a host.

A method writes elementwise functions of a slice, ``terms(flags, numbers, base, stack, place)``, and
asks a view for sums of them over the leaf or for values of given rank. `TracedView` answers inside
a JAX program, on any device and over shards; `HostView` runs the functions slice by slice and sums
in float64, or selects in one scratch array, which on a CPU takes a small part of what sorting does.
Both select exactly; their sums agree to rounding.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.order import kth_smallest, ordered_keys, values_of

SLICE = 1 << 18  # elements: three experts and a base in bfloat16 take 2 MiB, which a core caches
_LANES = 1024
_LEAST = 4096  # elements: small leaves of many sizes share one program
_ZERO = np.zeros(2, np.uint32)
_kept = threading.local()

Terms = Callable[..., tuple[Any, ...]]


@runtime_checkable
class View(Protocol):
    """What a method may ask about the leaf it merges.

    >>> View.__name__
    'View'
    """

    xp: Any  # numpy or jax.numpy, to compute with what the view gives
    n: int  # models
    size: int  # elements of the leaf
    has_base: bool

    def sums(self, terms: Terms, flags: tuple = (), numbers: Any = ()) -> Any:
        """Sum each term over the leaf: an array with one number per term."""
        ...

    def ranked(
        self,
        terms: Terms,
        ranks: Any,
        flags: tuple = (),
        numbers: Any = (),
        of: int | None = None,
    ) -> Any:
        """Give the values of some ranks, 1 for the largest, of the one term (`of` one model)."""
        ...


class TracedView:
    """Answer inside a JAX program, over the whole leaf.

    >>> view = TracedView(None, jnp.array([[1.0, 5.0, 3.0]]))
    >>> view.ranked(lambda f, n, base, stack, place: (stack[0],), [2]).tolist()
    [3.0]
    """

    def __init__(self, base: Any, stack: Any) -> None:
        self.xp, self.n, self.size = jnp, len(stack), stack[0].size
        self.has_base = base is not None
        self._base, self._stack = base, stack

    def sums(self, terms: Terms, flags: tuple = (), numbers: Any = ()) -> jax.Array:
        """Sum each term over the leaf."""
        found = terms(flags, numbers, self._base, self._stack, _ZERO)
        return jnp.stack([jnp.sum(term, dtype=jnp.float32) for term in found])

    def ranked(
        self,
        terms: Terms,
        ranks: Any,
        flags: tuple = (),
        numbers: Any = (),
        of: int | None = None,
    ) -> jax.Array:
        """Give values by rank, bit by bit: the largest t with at least `rank` values ≥ t."""
        stack = self._stack if of is None else self._stack[of : of + 1]
        (values,) = terms(flags, numbers, self._base, stack, _ZERO)
        keys = ordered_keys(values)
        # The rank-th largest, as so many from the small end.
        counts = [jnp.asarray(keys.size + 1 - rank, jnp.int32) for rank in ranks]
        edges = [kth_smallest(lambda at: jnp.sum(keys < at, dtype=jnp.int32), c) for c in counts]
        return values_of(jnp.stack(edges))


class HostView:
    """Answer from arrays in host memory, slice by slice.

    >>> view = HostView(None, [np.array([1.0, 5.0, 3.0], np.float32)])
    >>> view.ranked(lambda f, n, base, stack, place: (stack[0],), [2]).tolist()
    [3.0]
    """

    def __init__(
        self, base: Any, models: Sequence[np.ndarray], unit: str = "elements", prepare: Any = None
    ) -> None:
        self.xp, self.n, self.size = np, len(models), models[0].size
        self.has_base = base is not None
        self._base, self._models, self._unit = base, models, unit
        self._prepare = prepare or (lambda numbers, base, stack: numbers)

    def sums(self, terms: Terms, flags: tuple = (), numbers: Any = ()) -> np.ndarray:
        """Sum each term over the leaf: columns in float32, the rest in float64."""
        total = np.zeros(())
        for base, stack, place, _ in slices(self._base, self._models, self._unit):
            own = self._prepare(numbers, base, stack)
            found = _summed(terms, flags, own, base, stack, place)
            total = total + np.array([np.asarray(part).sum(dtype=np.float64) for part in found])
        return total

    def ranked(
        self,
        terms: Terms,
        ranks: Any,
        flags: tuple = (),
        numbers: Any = (),
        of: int | None = None,
    ) -> np.ndarray:
        """Give values by rank, by selection in one float32 copy of the term."""
        models = self._models if of is None else self._models[of : of + 1]
        scratch = _scratch(self.size)
        start, ready = 0, []
        for base, stack, place, count in slices(self._base, models, self._unit):
            ready.append((term_of(terms, flags, numbers, base, stack, place), count))
            if len(ready) > 1:  # one slice is computed while the one before it is taken
                start = _take(scratch, start, *ready.pop(0))
        for found, count in ready:
            start = _take(scratch, start, found, count)
        ascending = self.size - np.asarray(ranks, np.int64)
        scratch.partition(np.unique(ascending))
        return scratch[ascending]


def slices(
    base: np.ndarray | None, models: Sequence[np.ndarray], unit: str
) -> Iterator[tuple[Any, tuple[Any, ...], np.ndarray, int]]:
    """Cut a leaf into slices of few different shapes, the last one filled up with zeros.

    Args:
      base: the base's leaf or None.
      models: the models' leaves.
      unit: ``elements``, ``rows`` or ``whole``, as in `jaxsys.merge.contract.Blocks`.

    Yields:
      base and models of the slice, the place of its first element, and how many of its elements
      belong to the leaf.

    >>> x = np.arange(5.0, dtype=np.float32)
    >>> [(stack[0].shape, count) for _, stack, _, count in slices(None, [x], "elements")]
    [((4096,), 5)]
    """
    shape, size = models[0].shape, models[0].size
    arrays = [*models] if base is None else [base, *models]
    if unit == "whole" or size == 0:
        whole = [_narrow(a) for a in arrays]
        yield (None if base is None else whole[0]), tuple(whole[base is not None :]), _ZERO, size
        return
    if unit == "rows":
        width = shape[-1] if shape else 1
        flat = [a.reshape(-1, width) for a in arrays]
        most = max(1, 1 << (SLICE // width).bit_length() - 1) if width <= SLICE else 1
        least = min(most, 1 << max(0, _LEAST // max(1, width) - 1).bit_length())
    else:
        width, most, least = 1, SLICE, _LEAST
        flat = [a.reshape(-1) for a in arrays]
    length = flat[0].shape[0]
    for start in range(0, length, most):
        count = min(most, length - start)
        # Two lengths only: a compilation costs more than the zeros at the end of a leaf.
        room = least if count <= least else most
        cut = [_filled(a[start : start + count], room) for a in flat]
        first = start * width
        place = np.array([first >> 32, first & 0xFFFFFFFF], np.uint32)
        yield (
            (None if base is None else cut[0]),
            tuple(cut[base is not None :]),
            place,
            count * width,
        )


def _scratch(size: int) -> np.ndarray:
    """Give room for a term, the same memory again and again: fresh pages cost more than sorting."""
    held = getattr(_kept, "array", None)
    if held is None or held.size < size or held.size > 8 * max(size, SLICE):
        held = _kept.array = np.empty(size, np.float32)
    return held[:size]


def _take(scratch: np.ndarray, start: int, found: jax.Array, count: int) -> int:
    scratch[start : start + count] = np.asarray(found).reshape(-1)[:count]
    return start + count


def _narrow(array: np.ndarray) -> np.ndarray:
    # JAX holds no float64 by default.
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _filled(part: np.ndarray, room: int) -> np.ndarray:
    part = _narrow(part)
    if len(part) == room:
        return part
    filled = np.zeros((room, *part.shape[1:]), part.dtype)
    filled[: len(part)] = part
    return filled


def as_float(base: Any, stack: Sequence[Any]) -> tuple[Any, tuple[jax.Array, ...]]:
    """Turn a slice into float32, which XLA fuses into what follows.

    >>> as_float(None, (np.ones(2, np.float16),))[1][0].dtype
    dtype('float32')
    """
    wide = tuple(jnp.asarray(x).astype(jnp.float32) for x in stack)
    return (None if base is None else jnp.asarray(base).astype(jnp.float32)), wide


@partial(jax.jit, static_argnums=(0, 1))
def term_of(
    terms: Terms, flags: tuple, numbers: Any, base: Any, stack: Any, place: Any
) -> jax.Array:
    """Compute a function's one term of a slice.

    >>> term_of(lambda f, n, base, stack, place: (stack[0] * 2,), (), (), None, (np.ones(1),), None)
    Array([2.], dtype=float32)
    """
    base, stack = as_float(base, stack)
    (found,) = terms(flags, numbers, base, stack, place)
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _summed(
    terms: Terms, flags: tuple, numbers: Any, base: Any, stack: Any, place: Any
) -> tuple[jax.Array, ...]:
    base, stack = as_float(base, stack)
    return tuple(_columns(t) for t in terms(flags, numbers, base, stack, place))


def _columns(term: jax.Array) -> jax.Array:
    """Sum along an axis that is not the last: XLA vectorises that on a CPU."""
    term = term.astype(jnp.float32)
    if term.ndim == 1 and term.size % _LANES == 0:
        depth = min(64, term.size // _LANES)
        return term.reshape(-1, depth, _LANES).sum(axis=1)
    return term.reshape(-1, term.shape[-1] if term.ndim else 1).sum(axis=0)
