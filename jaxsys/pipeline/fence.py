"""OP-Fence: communities of devices with good links, in a row, cut where little crosses."""

from collections.abc import Sequence
from itertools import pairwise, permutations

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.pipeline.chains import Chains, pipeline_s
from jaxsys.pipeline.devices import Fleet, check_symmetric
from jaxsys.pipeline.partition import nearest

_NEIGHBOURS = 32  # strongest links kept of each device in large fleets
_SLACKS = (0.0, 0.05, 0.1, 0.2, 0.4)


def communities(
    fleet: Fleet, *, seed: int = 0, resolution: float | int = 1.0
) -> tuple[tuple[int, ...], ...]:
    """Group devices whose links to each other are fast, by Louvain's method.

    Edges are weighted with the rate. Of more than 128 devices each keeps its 32 fastest links only.

    Reconstruction: that the paper groups by Louvain's method is recalled, not read; the weights and
    the thinning are ours.

    Args:
        fleet: the devices; links must be symmetric.
        seed: order in which Louvain visits the devices.
        resolution: above 1 for smaller communities.

    Returns:
        Device indices of each community, ascending, the community of the lowest device first.

    Raises:
        UserError: links that are not symmetric, or networkx is missing.

    Reference: arXiv 2410.12707; Blondel et al. (2008), arXiv 0803.0476.

    >>> from jaxsys.pipeline.devices import Device
    >>> rate = np.where(np.arange(4)[:, None] // 2 == np.arange(4) // 2, 1e9, 1e6)
    >>> devices = tuple(Device(name, 1e9, 1e9) for name in "abcd")
    >>> communities(Fleet(devices, np.zeros((4, 4)), rate))
    ((0, 1), (2, 3))
    """
    check_symmetric(fleet)
    try:
        import networkx
    except ModuleNotFoundError as error:
        raise UserError(
            "networkx is missing; communities of devices need it; run pip install "
            "'jaxsys[pipeline]'"
        ) from error
    n, rate = len(fleet), np.array(fleet.bytes_per_s)
    if n == 1:
        return ((0,),)
    np.fill_diagonal(rate, 0)
    rate = rate / rate.max()
    keep = np.ones((n, n), bool)
    if n > 128:
        weakest_kept = np.partition(rate, -_NEIGHBOURS, axis=1)[:, -_NEIGHBOURS]
        # Ties beyond the 32 are broken by index, or a park of equal links would keep them all.
        best = np.argsort(-rate, axis=1, kind="stable")[:, :_NEIGHBOURS]
        keep = np.zeros((n, n), bool)
        np.put_along_axis(keep, best, weakest_kept[:, None] > 0, axis=1)
        keep |= keep.T
    rows, columns = np.nonzero(np.triu(keep, 1))
    graph = networkx.Graph()
    graph.add_nodes_from(range(n))
    weights = rate[rows, columns]
    graph.add_weighted_edges_from(
        zip(rows.tolist(), columns.tolist(), weights.tolist(), strict=True)
    )
    found = networkx.community.louvain_communities(graph, seed=seed, resolution=resolution)
    return tuple(sorted(tuple(sorted(group)) for group in found))


def chain_order(
    fleet: Fleet, groups: Sequence[Sequence[int]], *, message_bytes: float | int = 2.0**20
) -> tuple[int, ...]:
    """Put communities, and the devices in each, in a row with fast links between neighbours.

    A link's length is ``α + message / rate``. Communities are ordered by the shortest links between
    them (all orders up to 7 communities, beyond that nearest neighbour and reversals); then each
    community is entered and left where its links to the neighbours are shortest, and its devices
    are put in a row the same way.

    Reconstruction: the paper orders devices so that neighbours have good links; how is ours.

    Args:
        fleet: devices and links.
        groups: device indices of each community.
        message_bytes: size of a typical message, which weighs latency against rate.

    Returns:
        All devices of the groups, in order.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> chain_order(even_fleet([1] * 3), [(0, 2), (1,)])
    (2, 0, 1)
    """
    length = _lengths(fleet, message_bytes)
    n = len(groups)
    between = np.zeros((n, n))
    for a in range(n):
        for b in range(n):
            if a != b:
                between[a, b] = length[np.ix_(groups[a], groups[b])].min()
    row = [groups[i] for i in _shortest_row(between)]
    doors: list[list[int | None]] = [[None, None] for _ in row]  # first and last device of each
    for i, (left, right) in enumerate(pairwise(row)):
        links = length[np.ix_(left, right)].copy()
        entered = doors[i][0]
        if len(left) > 1 and entered is not None:
            links[list(left).index(entered)] = np.inf
        a, b = divmod(int(np.argmin(links)), links.shape[1])
        doors[i][1], doors[i + 1][0] = left[a], right[b]
    chain: list[int] = []
    for group, (first, last) in zip(row, doors, strict=True):
        inside = length[np.ix_(group, group)]
        ends = [None if door is None else list(group).index(door) for door in (first, last)]
        chain += [group[i] for i in _shortest_row(inside, *ends)]
    return tuple(chain)


def _lengths(fleet: Fleet, message_bytes: float | int) -> Float[np.ndarray, "P P"]:
    seconds = fleet.latency_s + message_bytes / fleet.bytes_per_s
    np.fill_diagonal(seconds, 0)
    return (seconds + seconds.T) / 2


def _shortest_row(length, first: int | None = None, last: int | None = None) -> list[int]:
    """Find a short path through all points, from ``first`` to ``last`` where they are given."""
    n = len(length)
    if n == 1:
        return [0]
    middle = [i for i in range(n) if i not in (first, last)]
    head, tail = ([] if i is None else [i] for i in (first, last))
    if len(middle) <= 6:
        paths = ([*head, *order, *tail] for order in permutations(middle))
        return min(paths, key=lambda path: sum(length[a, b] for a, b in pairwise(path)))
    left = set(middle)
    path = head or [min(left, key=lambda i: (np.sort(length[i])[1], i))]
    left -= set(path)
    while left:
        points = np.array(sorted(left))
        path.append(int(points[np.argmin(length[path[-1], points])]))
        left.remove(path[-1])
    return _reversals([*path, *tail], length, bool(head), bool(tail))


def _reversals(path: list[int], length, keep_first: bool, keep_last: bool) -> list[int]:
    """Reverse stretches of a path as long as that shortens it."""
    n, scale = len(path), 1e-12 * float(length.max())
    for _ in range(10 * n):
        order = np.array(path)
        i, j = np.triu_indices(n, 1)
        if keep_first:
            i, j = i[i > 0], j[i > 0]
        if keep_last:
            i, j = i[j < n - 1], j[j < n - 1]
        before, after = order[np.maximum(i - 1, 0)], order[np.minimum(j + 1, n - 1)]
        gain = np.where(i > 0, length[before, order[i]] - length[before, order[j]], 0.0)
        gain += np.where(j < n - 1, length[order[j], after] - length[order[i], after], 0.0)
        best = int(np.argmax(gain)) if len(gain) else 0
        if not len(gain) or gain[best] <= scale:
            break
        a, b = int(i[best]), int(j[best])
        path = [*path[:a], *reversed(path[a : b + 1]), *path[b + 1 :]]
    return path


def op_fence(chains: Chains, sizes: Sequence[int]) -> tuple[int, ...]:
    """Cut the nodes among communities in a row, then among the devices of each.

    A community gets FLOPs in proportion to the speed of its devices, ``Σ λ_p S_p``. The fence
    between two stands within a slack of that place where the fewest bytes cross; slacks of 0 to 0.4
    of the smaller neighbour's share are tried and the best by `pipeline_s` stays. Inside a
    community devices get FLOPs in proportion to their speed. Memory moves boundaries as little as
    it can (`nearest`).

    Reconstruction: communities, proportional shares and cheap edges are the paper's as recalled;
    the slacks and the rest are ours.

    Args:
        chains: one order (Q = 1) in which the devices of a community stand together.
        sizes: devices in each community, in order.

    Returns:
        The boundaries.

    Raises:
        UserError: as `nearest`.

    Reference: arXiv 2410.12707, OP-Fence.

    >>> from jaxsys.pipeline.chains import make_chains
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> work = chain_work([1] * 8, [9, 9, 9, 1, 9, 9, 9])
    >>> chains = make_chains(work, even_fleet([1, 1, 1]), [(0, 1, 2)], micro_batches=8)
    >>> op_fence(chains, (1, 2))
    (3, 5)
    """
    n = len(chains.total) - 1
    tried = {_fenced(chains, sizes, slack) for slack in _SLACKS}
    return min(sorted(tried), key=lambda cuts: float(pipeline_s(chains, [[0, *cuts, n]])[0]))


def _fenced(chains: Chains, sizes: Sequence[int], slack: float) -> tuple[int, ...]:
    total, speed = chains.total, chains.speed[0]
    n, ends = len(total) - 1, np.cumsum(sizes)
    starts = ends - np.asarray(sizes)
    share = np.add.reduceat(speed, starts) / speed.sum() * total[-1]
    places = np.cumsum(share)
    n_bytes = chains.wire.forward_bytes + chains.wire.backward_bytes
    fences = [0]
    for c in range(len(sizes) - 1):
        low, high = fences[-1] + sizes[c], n - (ends[-1] - ends[c])
        inside = np.arange(low, high + 1)
        off = np.abs(total[inside] - places[c])
        near = off <= max(slack * min(share[c], share[c + 1]), off.min())
        best = np.lexsort((off[near], n_bytes[inside[near]]))[0]
        fences.append(int(inside[near][best]))
    fences.append(n)
    targets = []
    for c, size in enumerate(sizes):
        flops = total[fences[c + 1]] - total[fences[c]]
        inner = np.cumsum(speed[starts[c] : ends[c]])
        targets += [total[fences[c]] + flops * x / inner[-1] for x in inner[: size - 1]]
        targets.append(total[fences[c + 1]])
    return nearest(chains, total, np.array(targets[:-1]))
