"""What a stage keeps in its device's memory, and which stages fit."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxsys.core.report import format_bytes
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.schedule import in_flight
from jaxsys.pipeline.work import Work


class Limits(NamedTuple):
    """Say what a stage keeps in memory.

    Attributes:
        copies: bytes kept per byte of parameters; 4 for the parameter, its gradient and Adam's two
            moments.
        remat: whether the stage keeps only its inputs and computes the rest again.

    >>> Limits().copies
    4.0
    """

    copies: float | int = 4.0
    remat: bool = False


ADAM = Limits()


def stage_memory(work: Work, start, end, held, limits: Limits = ADAM):
    """Estimate the bytes that stages need, for arrays of stages at once.

    ``copies · parameters + held · residuals``, or with remat ``copies · parameters +
    held · inputs + residuals``: then only inputs are held, and one micro-batch's residuals while
    they are needed. A parameter read by several nodes of a stage counts once, one read by two
    stages in both.

    Reconstruction: the formula is ours.

    Args:
        work: the graph's costs.
        start: first positions a, integers.
        end: last positions b > a, of the same shape.
        held: micro-batches whose residuals are held, broadcast against them.
        limits: what is kept.

    Returns:
        Bytes, of that shape.

    >>> from jaxsys.pipeline.work import chain_work
    >>> work = chain_work([1, 1], [0], leaf_bytes=[100, 100], saved_bytes=[8, 8])
    >>> work = work._replace(ties=np.array([[0.0, 1.0, 100.0]]))
    >>> stage_memory(work, np.array([0, 1]), np.array([2, 2]), 3).tolist()
    [448.0, 424.0]
    """
    start, end = np.asarray(start), np.asarray(end)
    inputs = work.cut_bytes[start] if limits.remat else None
    return _bytes(work, start, end, held, limits, inputs)


def _bytes(work: Work, start, end, held, limits: Limits, inputs):
    params = work.params[end] - work.params[start]
    for before, after, n_bytes in work.ties:
        params = params - n_bytes * ((start <= before) & (after < end))
    saved = work.saved[end] - work.saved[start]
    if inputs is None:
        return limits.copies * params + held * saved
    return limits.copies * params + held * inputs + saved


def _range_max(x):
    """Prepare ``max(x[start:end])`` for arrays of starts and ends; 0 where empty."""
    levels = [x]
    while 2 ** len(levels) <= len(x):
        step, last = 2 ** (len(levels) - 1), levels[-1]
        levels.append(np.maximum(last, np.concatenate([last[step:], np.zeros(step)])))
    table = np.stack(levels)

    def most(start, end):
        level = np.frexp(np.maximum(end - start, 1))[1] - 1
        last = np.maximum(end - (1 << level), start)
        return np.where(end > start, np.maximum(table[level, start], table[level, last]), 0.0)

    return most


class Starts(NamedTuple):
    """Which stages fit into a memory: those from an allowed start that is not before the first.

    Attributes:
        first: earliest start for each end, [N + 1].
        allowed: whether a stage may start at a position, [N + 1].

    >>> Starts(np.array([0, 0]), np.array([True, True])).first.tolist()
    [0, 0]
    """

    first: Int[np.ndarray, "M"]
    allowed: Bool[np.ndarray, "M"]


def starts_that_fit(
    work: Work, memory_bytes: float | int, held: float | int, limits: Limits
) -> Starts:
    """Find where stages may start so that they fit into a memory.

    Without remat the starts that fit are those from the first one on, since a longer stage never
    needs less. With remat the inputs matter, which grow and shrink along the graph: then a start
    where held inputs alone fill more than half of the memory is not allowed, and a stage counts
    with the largest inputs of all its allowed positions. It may need less, never more.

    Args:
        work: the graph's costs.
        memory_bytes: what there is.
        held: micro-batches whose residuals are held.
        limits: what is kept.

    Returns:
        For each end b the least start, and b where not even the last node fits.

    >>> from jaxsys.pipeline.work import chain_work
    >>> work = chain_work([1, 1, 1], [0, 0], leaf_bytes=[1, 1, 1])
    >>> starts_that_fit(work, 2.0, 0, Limits(copies=1)).first.tolist()
    [0, 0, 0, 1]
    """
    end = np.arange(work.n_nodes + 1)
    allowed = np.full(len(end), True)
    most = None
    if limits.remat:
        allowed = held * work.cut_bytes <= memory_bytes / 2
        most = _range_max(np.where(allowed, work.cut_bytes, 0.0))
    low, high = np.zeros_like(end), end.copy()  # a stage from `high` on fits or is empty
    while np.any(low < high):
        middle = (low + high) // 2
        inputs = None if most is None else most(middle, end)
        fits = _bytes(work, middle, end, held, limits, inputs) <= memory_bytes
        high = np.where(fits, middle, high)
        low = np.where(fits, low, np.minimum(middle + 1, high))
    return Starts(high, allowed)


def held_of(order: str, n_workers: int, micro_batches: int, chunks: int = 1) -> tuple[int, ...]:
    """Count for every stage the micro-batches that it holds at most; see `schedule.in_flight`.

    >>> held_of("1f1b", 3, 8)
    (3, 2, 1)
    """
    if order == "gpipe":
        return (micro_batches,) * n_workers
    by_worker = [in_flight(order, p, n_workers, micro_batches, chunks) for p in range(n_workers)]
    return tuple(by_worker[p][c] for c in range(chunks) for p in range(n_workers))


def lack_of_memory(work: Work, fleet: Fleet, order: Sequence[int], held, limits: Limits) -> str:
    """Say in one sentence why no partition fits into the devices, and by how much.

    Args:
        work: the graph's costs.
        fleet: the devices.
        order: devices of the stages.
        held: micro-batches held by each stage.
        limits: what a stage keeps.

    Returns:
        The sentence.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> work = chain_work([1, 1], [0], leaf_bytes=[5, 5])
    >>> lack_of_memory(work, even_fleet([1], memory_bytes=2), (0,), (0,), Limits(copies=1))
    "node 'node 0' alone needs 5 B, 3 B more than device 'device 0' has...
    """
    memory, nodes = fleet.memory_bytes[list(order)], np.arange(work.n_nodes)
    alone = np.array([stage_memory(work, nodes, nodes + 1, h, limits) for h in held])
    over = alone - memory[:, None]
    least = over.min(axis=0)
    worst = int(np.argmax(least))
    if least[worst] > 0:
        k = int(np.argmin(over[:, worst]))
        return (
            f"node {work.names[worst]!r} alone needs {format_bytes(alone[k, worst])}, "
            f"{format_bytes(least[worst])} more than device {fleet.devices[order[k]].name!r} has, "
            "which comes nearest; a stage must fit its device; use smaller micro-batches, remat, a "
            "larger device or a finer graph"
        )
    reached = 0
    for k, h in enumerate(held):
        starts = starts_that_fit(work, memory[k], h, limits)
        ends = np.arange(work.n_nodes + 1)
        fitting = np.flatnonzero((starts.first <= reached) & (ends > reached))
        reached = int(fitting[-1]) if fitting.size and starts.allowed[reached] else reached
    if reached == work.n_nodes:
        return (
            f"{work.n_nodes} nodes could be held by fewer than {len(order)} devices, but not with "
            "one on each; every device needs a node that fits it; leave out the smallest device, "
            "or the search method find which"
        )
    rest = float(stage_memory(work, reached, work.n_nodes, min(held), limits))
    last = work.names[reached - 1] if reached else "none"
    return (
        f"in this order {len(order)} devices with {format_bytes(memory.sum())} hold the nodes up "
        f"to {last!r} and {format_bytes(rest)} are left over; all must fit; use fewer "
        "micro-batches in flight, remat, another order or more memory"
    )
