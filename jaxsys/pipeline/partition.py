"""Where to cut for devices in a given order: equal parts, and the exact optimum of the model."""

import heapq
from itertools import combinations
from math import comb

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.pipeline.chains import SLACK, Chains, both_ways, link_s, pipeline_s, times

_NONE_FITS = (
    "no partition fits the memory of these devices in this order; every stage must; use another "
    "order, fewer micro-batches in flight or more memory"
)


class DoesNotFitError(UserError):
    """Report that no partition fits the devices' memory.

    >>> issubclass(DoesNotFitError, UserError)
    True
    """


def _window_min(values, low, high):
    """Least of ``values[q, low[q, j] : high[q, j]]``; inf where that is empty, [Q, J]."""
    width = high - low
    levels = [values]
    while 2 ** len(levels) <= width.max(initial=1):
        step, last = 2 ** (len(levels) - 1), levels[-1]
        pad = np.full((*last.shape[:-1], step), np.inf)
        levels.append(np.minimum(last, np.concatenate([last[..., step:], pad], axis=-1)))
    level = np.frexp(np.maximum(width, 1))[1] - 1
    flat = np.stack(levels).reshape(-1)
    n_rows, n = values.shape
    row = (level * n_rows + np.arange(n_rows)[:, None]) * n
    first = np.minimum(low, n - 1)
    second = np.clip(high - (1 << level), 0, n - 1)
    return np.where(width > 0, np.minimum(flat[row + first], flat[row + second]), np.inf)


def least_sum(chains: Chains, bound, most=None, tables: list | None = None):
    """Find the least ``Σ(C + R)`` among partitions without a C or R above a bound.

    ``D_k(b) = R_k(b) + min_a D_{k−1}(a) + (W_b − W_a) / v_k`` over the starts a from which the
    stage meets the bound and fits its device. These starts are an interval, so each k costs
    O(N log N) and no N × N table is made.

    Args:
        chains: Q orders.
        bound: seconds, one per order, [Q]; may be infinite.
        most: with AdaTopK, the longest dense R allowed, [Q].
        tables: a list that receives ``D_0 … D_S``, [Q, N + 1] each.

    Returns:
        Sums, inf where there is no such partition, [Q].

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two, work = even_fleet([3, 6]), chain_work([1, 1], [0])
    >>> chains = make_chains(work, two, [(0, 1)], micro_batches=3)
    >>> least_sum(chains, np.array([1.0])).tolist(), least_sum(chains, np.array([0.9])).tolist()
    ([1.5], [inf])
    """
    total, n_stages = chains.total, chains.speed.shape[1]
    bound = np.asarray(bound, np.float64)[:, None]
    most = np.full_like(bound, np.inf) if most is None else np.asarray(most, np.float64)[:, None]
    where = np.arange(len(total))
    reached = np.full((len(bound), len(total)), np.inf)
    reached[:, 0] = 0.0
    if tables is not None:
        tables.append(reached)
    for k in range(n_stages):
        spent = total / chains.speed[:, k, None]
        low = _lowest(chains, k, bound)
        fresh = np.where(chains.allowed[chains.kind[:, k]], reached - spent, np.inf)
        best = _window_min(fresh, low, np.broadcast_to(where, low.shape))
        reached = best + spent
        if k < n_stages - 1:
            links = link_s(chains, k, where, most)
            meets = both_ways(chains, links) <= bound * SLACK
            reached = np.where(meets, reached + links.sum(axis=0), np.inf)
        if tables is not None:
            tables.append(reached)
    return reached[:, -1]


def _lowest(chains: Chains, k: int, bound):
    # W_b − W_a ≤ bound · v, with room for rounding of the prefix sums.
    room = bound * SLACK * chains.speed[:, k, None] + 1e-15 * chains.total[-1]
    by_time = np.searchsorted(chains.total, chains.total - room, side="left")
    return np.maximum(chains.starts[chains.kind[:, k]], by_time)


def _trace(chains: Chains, bound: float, tables) -> tuple[int, ...]:
    """Walk back through the tables of one order: the boundaries of the least sum."""
    column = np.array([[bound]])
    b, cuts = len(chains.total) - 1, []
    for k in reversed(range(1, chains.speed.shape[1])):
        low = int(_lowest(chains, k, column)[0, b])
        left = tables[k][0, low:b] - chains.total[low:b] / chains.speed[0, k]
        left = np.where(chains.allowed[chains.kind[0, k], low:b], left, np.inf)
        b = low + int(np.argmin(left))
        cuts.append(b)
    return tuple(reversed(cuts))


def exact(chains: Chains, *, gap: float | int = 1e-9) -> tuple[tuple[int, ...], float]:
    """Cut for one device order with the least `pipeline_s` there is.

    For a bound B on every C and R the least sum D(B) is a dynamic programme (`least_sum`), and
    ``T = min_B D(B) + (m − 1)·B``. D falls in steps as B grows, so an interval of bounds (l, h)
    holds nothing below ``D(h) + (m − 1)·l``; intervals are halved, the most promising first, until
    none can hold anything better.

    With AdaTopK every R depends on the slowest boundary. Then the programme runs for a ladder of
    limits on the dense R, each pricing messages as if its limit were met, and the best partition by
    `pipeline_s` is kept, the dense optimum among them. That part is not exact.

    Reconstruction: the paper partitions by OP-Fence only.

    Args:
        chains: one order (Q = 1).
        gap: share of T that the answer may lie above the optimum.

    Returns:
        ``(boundaries, T)``: nodes at which stages 1 … S−1 begin, and seconds.

    Raises:
        UserError: no partition fits the devices' memory.

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two, work = even_fleet([3, 6]), chain_work([1, 1, 1], [0, 0])
    >>> exact(make_chains(work, two, [(0, 1)], micro_batches=3))
    ((1,), 4.0)
    """
    n = len(chains.total) - 1
    dense = chains._replace(wire=chains.wire._replace(ratio=0.0))
    best = _bounded(dense, gap, np.inf, np.inf)
    if best is None:
        raise DoesNotFitError(_NONE_FITS)
    seconds = float(pipeline_s(chains, [[0, *best, n]])[0])
    if chains.wire.ratio and best:
        most = times(dense, [[0, *best, n]])[1].max()
        inner = np.arange(1, n)
        links = (link_s(dense, k, inner, np.inf).max(axis=0).min() for k in range(len(best)))
        least = max(*links, 1e-12)
        large = gap > 1e-4
        for longest in np.geomspace(least, max(least, most), 4 if large else 12):
            cuts = _bounded(chains, 2e-2 if large else 3e-3, float(longest), seconds)
            if cuts is not None:
                taken = float(pipeline_s(chains, [[0, *cuts, n]])[0])
                best, seconds = min((best, seconds), (cuts, taken), key=lambda found: found[1])
    return best, seconds


def _bounded(
    chains: Chains, gap: float | int, longest: float, value: float
) -> tuple[int, ...] | None:
    """Halve intervals of bounds until none can hold anything below ``value``."""
    n, most = len(chains.total) - 1, np.array([longest])

    def solve(bound):
        tables: list = []
        total = float(least_sum(chains, np.array([bound]), most, tables)[0])
        if total == np.inf:
            return total, None, np.inf
        cuts = _trace(chains, bound, tables)
        slowest = (np.diff(chains.total[[0, *cuts, n]]) / chains.speed[0]).max()
        for k, b in enumerate(cuts):
            links = link_s(chains, k, np.array([b]), most[:, None])
            slowest = max(slowest, both_ways(chains, links).max())
        return total, cuts, float(slowest)

    low = float(chains.total[-1] / chains.speed[0].sum())
    total, cuts, high = solve(np.inf)
    if cuts is None:
        return None
    best = None
    if total + chains.steps * high < value:
        best, value = cuts, total + chains.steps * high
    queue = [(total + chains.steps * low, low, high, total)]
    while queue:
        least, low, high, above = heapq.heappop(queue)
        middle = (low + high) / 2
        if least >= value * (1 - gap):
            break
        if not low < middle < high:
            continue
        total, cuts, slowest = solve(middle)
        if cuts is not None:
            if total + chains.steps * slowest < value:
                best, value = cuts, total + chains.steps * slowest
            heapq.heappush(queue, (total + chains.steps * low, low, slowest, total))
        heapq.heappush(queue, (above + chains.steps * middle, middle, high, above))
    return best


def brute_force(chains: Chains) -> tuple[tuple[int, ...], float]:
    """Try every partition of one order; for tests and small graphs.

    Args:
        chains: one order (Q = 1).

    Returns:
        ``(boundaries, T)`` of the least `pipeline_s` that fits the memory.

    Raises:
        UserError: more than a million partitions, or none that fits.

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two, work = even_fleet([3, 6]), chain_work([1, 1, 1], [0, 0])
    >>> brute_force(make_chains(work, two, [(0, 1)], micro_batches=3))
    ((1,), 4.0)
    """
    n, n_stages = len(chains.total) - 1, chains.speed.shape[1]
    if comb(n - 1, n_stages - 1) > 1_000_000:
        raise UserError(
            f"{n} nodes have {comb(n - 1, n_stages - 1)} partitions into {n_stages} stages; brute "
            "force tries up to a million; use `exact`"
        )
    best: tuple[tuple[int, ...], float] | None = None
    for cuts in combinations(range(1, n), n_stages - 1):
        edges = np.array([0, *cuts, n])
        if fits(chains, edges):
            seconds = float(pipeline_s(chains, edges[None])[0])
            if best is None or seconds < best[1]:
                best = (cuts, seconds)
    if best is None:
        raise DoesNotFitError(_NONE_FITS)
    return best


def fits(chains: Chains, edges) -> bool:
    """Say whether every stage of a partition fits its device; see `memory.starts_that_fit`.

    Args:
        chains: one order (Q = 1).
        edges: positions 0 … N at which the stages begin and end, [S + 1].

    Returns:
        True if all fit.

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> one, work = even_fleet([1], memory_bytes=9), chain_work([1, 1], [0], leaf_bytes=[1, 2])
    >>> fits(make_chains(work, one, [(0,)], micro_batches=1), np.array([0, 2]))
    False
    """
    edges = np.asarray(edges)
    after_first = chains.starts[chains.kind[0], edges[1:]] <= edges[:-1]
    return bool(np.all(after_first & chains.allowed[chains.kind[0], edges[:-1]]))


def nearest(chains: Chains, position, targets) -> tuple[int, ...]:
    """Cut as near to wanted places as memory and one node a stage allow.

    Minimises ``Σ_k |x(b_k) − t_k|``.

    Args:
        chains: one order (Q = 1); links and speeds do not matter.
        position: x, the place of each position on the scale of the targets, ascending, [N + 1].
        targets: t, the wanted places of the boundaries, [S − 1].

    Returns:
        The boundaries.

    Raises:
        UserError: no partition fits the devices' memory.

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two, work = even_fleet([3, 6]), chain_work([1, 1, 1], [0, 0])
    >>> nearest(make_chains(work, two, [(0, 1)], micro_batches=1), np.arange(4), [1.8])
    (2,)
    """
    n, n_stages = len(chains.total) - 1, chains.speed.shape[1]
    where = np.arange(n + 1)
    reached = np.full((1, n + 1), np.inf)
    reached[:, 0] = 0.0
    tables = [reached]
    for k in range(n_stages):
        low = chains.starts[chains.kind[:, k]]
        fresh = np.where(chains.allowed[chains.kind[:, k]], reached, np.inf)
        reached = _window_min(fresh, low, where[None])
        if k < n_stages - 1:
            reached = reached + np.abs(np.asarray(position, np.float64) - targets[k])
        tables.append(reached)
    if reached[0, n] == np.inf:
        raise DoesNotFitError(_NONE_FITS)
    b, cuts = n, []
    for k in reversed(range(1, n_stages)):
        low = int(chains.starts[chains.kind[0, k], b])
        allowed = chains.allowed[chains.kind[0, k], low:b]
        b = low + int(np.argmin(np.where(allowed, tables[k][0, low:b], np.inf)))
        cuts.append(b)
    return tuple(reversed(cuts))


def equal_number(chains: Chains) -> tuple[int, ...]:
    """Give every device the same number of nodes, as far as memory allows: the first baseline.

    Args:
        chains: one order (Q = 1).

    Returns:
        The boundaries.

    Raises:
        UserError: as `nearest`.

    Reference: arXiv 2410.12707. Reconstruction: its baselines are known by name only.

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two, work = even_fleet([3, 6]), chain_work([1] * 4, [0] * 3)
    >>> equal_number(make_chains(work, two, [(0, 1)], micro_batches=1))
    (2,)
    """
    n, n_stages = len(chains.total) - 1, chains.speed.shape[1]
    return nearest(chains, np.arange(n + 1), n * np.arange(1, n_stages) / n_stages)


def equal_compute(chains: Chains) -> tuple[int, ...]:
    """Give every device the same FLOPs, as far as nodes and memory allow: the second baseline.

    Args:
        chains: one order (Q = 1).

    Returns:
        The boundaries.

    Raises:
        UserError: as `nearest`.

    Reference: arXiv 2410.12707. Reconstruction: its baselines are known by name only.

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two, work = even_fleet([3, 6]), chain_work([5, 1, 1, 1], [0] * 3)
    >>> equal_compute(make_chains(work, two, [(0, 1)], micro_batches=1))
    (1,)
    """
    n_stages = chains.speed.shape[1]
    return nearest(chains, chains.total, chains.total[-1] * np.arange(1, n_stages) / n_stages)
