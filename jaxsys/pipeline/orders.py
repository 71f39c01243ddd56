"""Which devices to use, and in which order they stand in the pipeline."""

from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsys.pipeline.chains import Chains, both_ways, thinned
from jaxsys.pipeline.partition import DoesNotFitError, exact, least_sum

ALL_ORDERS = 5  # devices up to which all orders of all subsets are tried
LOCAL_SEARCH = 100_000  # devices × nodes up to which orders are improved step by step
FINALISTS = 8  # orders that a search returns
_STRETCHES = 8  # of one length
_GRID = np.array([0.4, 0.55, 0.7, 0.8, 0.87, 0.93, 0.97, 1.0])

Make = Callable[..., Chains]


class Found(NamedTuple):
    """Hold an order that a search found, its partition and its `chains.pipeline_s`.

    >>> Found((1, 0), (2,), 3.0).devices
    (1, 0)
    """

    devices: tuple[int, ...]
    boundaries: tuple[int, ...]
    seconds: float


def score(chains: Chains, bounds) -> tuple[Float[np.ndarray, "Q"], Float[np.ndarray, "Q"]]:
    """Find for each order a time that some partition of it reaches.

    ``min_B D(B) + (m − 1)·B`` over the given bounds B on every C and R (`partition.least_sum`). It
    is never below the best partition's time, and equal to it where B is that one's slowest part.
    With AdaTopK of ratio r a bound B on what messages take allows ``r·B`` for dense ones, or a
    fifth of it.

    Args:
        chains: Q orders.
        bounds: seconds, [Q, G].

    Returns:
        The times, and the bound that gave each, [Q]; infinite where no bound could be met.

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two, work = even_fleet([3, 6]), chain_work([1] * 3, [0, 0])
    >>> chains = make_chains(work, two, [(0, 1), (1, 0)], micro_batches=3)
    >>> score(chains, np.array([[0.9, 1.0], [0.9, 1.0]]))[0].tolist()
    [4.0, 4.0]
    """
    best = np.full(len(chains.speed), np.inf)
    at = best.copy()
    shares = (1.0, 0.2) if chains.wire.ratio else (np.inf,)
    for bound in np.asarray(bounds).T:
        for share in shares:
            most = bound * share * (chains.wire.ratio or 1.0)
            seconds = least_sum(chains, bound, most) + chains.steps * bound
            at = np.where(seconds < best, bound, at)
            best = np.minimum(seconds, best)
    return best, at


def first_scores(
    chains: Chains, halvings: int = 10
) -> tuple[Float[np.ndarray, "Q"], Float[np.ndarray, "Q"], Float[np.ndarray, "Q"]]:
    """Score orders of which nothing is known: find each one's least bound, then try larger ones.

    Args:
        chains: Q orders.
        halvings: steps of the bisection, in the logarithm.

    Returns:
        As `score`, and what no partition of the order can be faster than, ``D(∞) + (m − 1)·B`` with
        the largest B found that none meets (not known with AdaTopK: then 0), [Q].

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two, work = even_fleet([3, 6]), chain_work([1] * 3, [0, 0])
    >>> chains = make_chains(work, two, [(0, 1)], micro_batches=3)
    >>> first_scores(chains)[0].round(1).tolist()
    [4.0]
    """
    low = chains.total[-1] / chains.speed.sum(axis=1)
    high = np.maximum(chains.total[-1] / chains.speed.min(axis=1), low)
    if chains.latency.size:
        largest = max(chains.wire.forward_bytes.max(), chains.wire.backward_bytes.max())
        links = chains.latency + largest * chains.s_per_byte
        high = np.maximum(high, both_ways(chains, links).max(axis=1))
    low, high = low * 0.999, high * 1.001
    for _ in range(halvings):
        middle = np.sqrt(low * high)
        met = np.isfinite(score(chains, middle[:, None])[0])
        low, high = np.where(met, low, middle), np.where(met, middle, high)
    grid = high[:, None] * np.array([1.0, 1.1, 1.3, 1.7, 3.0, 10.0])
    least = least_sum(chains, np.full(len(low), np.inf)) + chains.steps * low
    return *score(chains, grid), np.zeros_like(least) if chains.wire.ratio else least


def search(
    make: Make,
    start: Sequence[int],
    *,
    n_nodes: int,
    seed: int = 0,
    rounds: int = 60,
    batch: int = 48,
    gap: float | int = 1e-6,
) -> list[Found]:
    """Look for the devices and the order with the least time of their best partition.

    Up to `ALL_ORDERS` devices all orders of all subsets are compared, and the answer is the best of
    them (dense or uniformly compressed; with AdaTopK, of four). Beyond that the search begins with
    stretches of ``start`` of several lengths, and then moves, swaps, drops and adds devices and
    reverses stretches, always going to the best of a batch of random changes as long as there is a
    better one.

    Reconstruction: the paper's order comes from OP-Fence only.

    Args:
        make: prepares orders of equal length (`chains.make_chains`).
        start: all devices in a good order, as from `fence.chain_order`.
        n_nodes: nodes of the graph, which no order may exceed.
        seed: of the random changes.
        rounds: batches of changes at most.
        batch: changes compared at a time.
        gap: as in `partition.exact`, for the last partitions.

    Returns:
        Up to `FINALISTS` orders with their exact partitions, the best first.

    Raises:
        UserError: no order fits the memory.

    >>> from functools import partial
    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> fleet, work = even_fleet([3, 6, 0.1]), chain_work([1] * 3, [0, 0])
    >>> make = partial(make_chains, work, fleet, micro_batches=9)
    >>> found = search(make, (0, 1, 2), n_nodes=3)[0]
    >>> sorted(found.devices), found.seconds
    ([0, 1], 10.0)
    """
    start = tuple(int(d) for d in start)
    if len(start) <= ALL_ORDERS:
        ranked = _ranked(
            make,
            [
                order
                for size in range(1, min(len(start), n_nodes) + 1)
                for chosen in combinations(start, size)
                for order in permutations(chosen)
            ],
        )
        if not make([start[:1]]).wire.ratio:
            ranked.sort(key=lambda order: order.least_s)
    else:
        ranked = _ranked(make, _stretches(start, n_nodes))
        lengths: dict[int, _Ranked] = {}
        for order in ranked:
            lengths.setdefault(len(order.devices), order)
        if len(start) * n_nodes <= LOCAL_SEARCH and np.isfinite(ranked[0].seconds):
            ranked = [_improve(make, start, ranked[0], n_nodes, seed, rounds, batch)]
            ranked += lengths.values()
    adaptive = bool(make([start[:1]]).wire.ratio)
    everything = len(start) <= ALL_ORDERS and not adaptive
    large = len(start) * n_nodes > LOCAL_SEARCH
    finalists = 1 if large else FINALISTS // 2 if adaptive else FINALISTS
    found: list[Found] = []
    for order in ranked if everything else ranked[:finalists]:
        if found and order.least_s >= found[0].seconds * (1 - gap):
            continue
        if np.isfinite(order.seconds):
            found.append(Found(order.devices, *exact(make([order.devices]), gap=gap)))
            found = sorted(found, key=lambda each: each.seconds)[:FINALISTS]
    if not found:
        raise DoesNotFitError("no order of these devices has a partition that fits their memory")
    return found


class _Ranked(NamedTuple):
    seconds: float  # some partition of the order reaches it
    bound: float  # the slowest part at which it does
    least_s: float  # no partition of the order is faster
    devices: tuple[int, ...]


def _ranked(
    make: Make, orders: Sequence[tuple[int, ...]], around: float | None = None
) -> list[_Ranked]:
    """Score orders, those of a length together; the best first."""
    found: list[_Ranked] = []
    for length in sorted({len(order) for order in orders}):
        alike = [order for order in orders if len(order) == length]
        for k in range(0, len(alike), 256):
            some = alike[k : k + 256]
            chains = thinned(make(some), max(8 * length, 400))
            if around is None:
                seconds, bound, least = first_scores(chains)
            else:
                seconds, bound = score(chains, np.tile(around * _GRID, (len(some), 1)))
                least = np.zeros_like(seconds)
            rows = zip(seconds.tolist(), bound.tolist(), least.tolist(), some, strict=True)
            found += [_Ranked(*row) for row in rows]
    return sorted(found)


def _stretches(start: tuple[int, ...], n_nodes: int) -> list[tuple[int, ...]]:
    """All devices where the nodes suffice, and stretches of half, a quarter … as many."""
    found, length = [], min(len(start), n_nodes)
    while length >= 1:
        count = min(_STRETCHES, len(start) // length)
        places = np.linspace(0, len(start) - length, count)
        found += [start[i : i + length] for i in places.astype(int)]
        length //= 2
    return list(dict.fromkeys(found))


def _improve(
    make: Make, start: tuple[int, ...], best: _Ranked, n_nodes: int, seed: int, rounds: int,
    batch: int,
) -> _Ranked:  # fmt: skip
    rng = np.random.default_rng(seed)
    idle = 0
    for _ in range(rounds):
        changed = {_change(rng, best.devices, start, n_nodes) for _ in range(batch)}
        changed.discard(best.devices)
        if not changed or idle == 8:
            break
        found = _ranked(make, sorted(changed), around=best.bound * 1.02)[0]
        better = found.seconds < best.seconds * (1 - 1e-9)
        best, idle = (found, 0) if better else (best, idle + 1)
    return best


def _change(rng, order: tuple[int, ...], start: tuple[int, ...], n_nodes: int) -> tuple[int, ...]:
    spare = [d for d in start if d not in order]
    now, n = list(order), len(order)
    kind = rng.integers(6)
    i, j = (int(x) for x in rng.integers(n, size=2))
    if kind == 0:
        now[i], now[j] = now[j], now[i]
    elif kind == 1:
        now.insert(j, now.pop(i))
    elif kind == 2:
        low, high = min(i, j), max(i, j) + 1
        now[low:high] = now[low:high][::-1]
    elif kind == 3 and n > 1:
        now.pop(i)
    elif kind == 4 and spare and n < n_nodes:
        now.insert(int(rng.integers(n + 1)), spare[rng.integers(len(spare))])
    elif spare:
        now[i] = spare[rng.integers(len(spare))]
    return tuple(now)
