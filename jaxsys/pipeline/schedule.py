"""The order in which each worker of a pipeline runs its forwards and backwards."""

from itertools import pairwise
from typing import NamedTuple

from jaxsys.core.errors import UserError

ORDERS = ("gpipe", "1f1b", "eager-1f1b", "interleaved", "zero-bubble")


class Action(NamedTuple):
    """Say what a worker does next.

    Attributes:
        kind: ``forward``, ``backward`` or ``weight``. Under ``zero-bubble`` a backward makes the
            cotangents of the stage's inputs and ``weight`` the gradients of its parameters, later;
            under the other orders a backward makes both.
        micro_batch: index of the micro-batch, from 0.
        stage: the stage that runs it.

    >>> Action("forward", 0, 2).stage
    2
    """

    kind: str
    micro_batch: int
    stage: int


def actions(
    order: str, worker: int, n_workers: int, micro_batches: int, chunks: int = 1
) -> tuple[Action, ...]:
    """List what one worker runs in one step, first to last.

    With P workers, m micro-batches and stage s of the worker, ``w = min(P − s − 1, m)``:

    - ``gpipe``: all forwards, then all backwards, last micro-batch first.
    - ``1f1b``: w forwards, then a forward and a backward in turn, then w backwards; at most
      ``P − s`` micro-batches are in flight.
    - ``eager-1f1b``: the same with ``w = min(2(P − s − 1), m)``: twice the micro-batches in flight
      cover links that take up to half as long as a stage.
    - ``zero-bubble``: 1F1B whose backward is cut in two; the parameters' part of micro-batch i
      follows the backward of micro-batch ``i + s``, so that every stage holds at most P
      micro-batches and the last parts fill the bubble at the end (the schedule named ZB-H1).
    - ``interleaved``: worker p has the stages ``p, p + P, …`` (``chunks`` of them). Micro-batches
      go in groups of g ≥ P through all stages; ``2(P − p − 1) + (chunks − 1)·g`` forwards come
      first. With fewer micro-batches than workers all forwards come first.

    One order of all workers together never waits in a circle.

    Args:
        order: one of `ORDERS`.
        worker: index of the worker, which is its stage unless ``chunks`` is above 1.
        n_workers: number of workers P.
        micro_batches: micro-batches m in a step.
        chunks: stages that each worker has; above 1 only for ``interleaved``.

    Returns:
        ``chunks · m`` forwards and as many backwards (and, for ``zero-bubble``, weights).

    Raises:
        UserError: an unknown order, a worker that does not exist, no micro-batch, several chunks
            for an order that has one.

    Reference: arXiv 1811.06965 (GPipe), 2104.04473 (1F1B, interleaved), 2401.10241 (zero
    bubble), 2211.05322 (eager 1F1B).

    >>> [f"{a.kind[0]}{a.micro_batch}" for a in actions("1f1b", 0, 2, 3)]
    ['f0', 'f1', 'b0', 'f2', 'b1', 'b2']
    """
    _check(order, worker, n_workers, micro_batches, chunks)
    if order == "interleaved":
        return _interleaved(worker, n_workers, micro_batches, chunks)
    m, s = micro_batches, worker
    if order == "gpipe":
        return tuple(
            [Action("forward", i, s) for i in range(m)]
            + [Action("backward", i, s) for i in reversed(range(m))]
        )
    warm = min((n_workers - s - 1) * (2 if order == "eager-1f1b" else 1), m)
    split = order == "zero-bubble"
    ran = [Action("forward", i, s) for i in range(warm)]
    for i in range(m):
        if warm + i < m:
            ran.append(Action("forward", warm + i, s))
        ran.append(Action("backward", i, s))
        if split and i >= s:
            ran.append(Action("weight", i - s, s))
    if split:
        ran += [Action("weight", i, s) for i in range(max(0, m - s), m)]
    return tuple(ran)


def _interleaved(worker: int, n_workers: int, m: int, chunks: int) -> tuple[Action, ...]:
    n_groups = max(1, m // n_workers)
    # Groups of at least P micro-batches: with smaller ones the next chunk's first forward would be
    # asked for before the last worker has made it, and the workers would wait in a circle.
    edges = [g * m // n_groups for g in range(n_groups + 1)]
    groups = [range(a, b) for a, b in pairwise(edges)]
    forwards = [
        Action("forward", i, c * n_workers + worker)
        for group in groups
        for c in range(chunks)
        for i in group
    ]
    backwards = [
        Action("backward", i, c * n_workers + worker)
        for group in groups
        for c in reversed(range(chunks))
        for i in group
    ]
    warm = 2 * (n_workers - worker - 1) + (chunks - 1) * max(len(group) for group in groups)
    if m < n_workers:
        warm = len(forwards)
    warm = min(warm, len(forwards))
    ran = forwards[:warm]
    for k, backward in enumerate(backwards):
        if warm + k < len(forwards):
            ran.append(forwards[warm + k])
        ran.append(backward)
    return tuple(ran)


def in_flight(order: str, worker: int, n_workers: int, micro_batches: int, chunks: int = 1):
    """Count the micro-batches whose residuals a worker holds at most, per chunk.

    A residual is held from its forward to its backward, or to its ``weight`` where there is one.

    Args:
        order: one of `ORDERS`.
        worker: index of the worker.
        n_workers: number of workers P.
        micro_batches: micro-batches m in a step.
        chunks: stages that each worker has.

    Returns:
        For each of the worker's stages, how many of its micro-batches are held while the worker
        holds most in all; a tuple of ``chunks`` integers.

    Raises:
        UserError: as `actions`.

    >>> [in_flight("1f1b", s, 4, 8) for s in range(4)]
    [(4,), (3,), (2,), (1,)]
    """
    _check(order, worker, n_workers, micro_batches, chunks)
    if order == "gpipe":
        return (micro_batches,)
    if order != "interleaved":
        bound = {
            "1f1b": n_workers - worker,
            "eager-1f1b": 2 * (n_workers - worker - 1) + 1,
            "zero-bubble": n_workers,
        }[order]
        return (min(bound, micro_batches),)
    held, most = [0] * chunks, [0] * chunks
    for action in _interleaved(worker, n_workers, micro_batches, chunks):
        held[action.stage // n_workers] += 1 if action.kind == "forward" else -1
        if sum(held) > sum(most):
            most = list(held)
    return tuple(most)


def _check(order: str, worker: int, n_workers: int, micro_batches: int, chunks: int) -> None:
    if order not in ORDERS:
        raise UserError(
            f"order is {order!r}; it must be one of {', '.join(ORDERS)}; pass one of them"
        )
    if not 0 <= worker < n_workers:
        raise UserError(
            f"worker is {worker} of {n_workers}; it must be from 0 to {n_workers - 1}; pass a "
            "worker that exists"
        )
    if micro_batches < 1:
        raise UserError(
            f"micro_batches is {micro_batches}; a step needs at least 1; pass 1 or more"
        )
    if chunks < 1 or (chunks > 1 and order != "interleaved"):
        raise UserError(
            f"chunks is {chunks} with order {order!r}; only 'interleaved' gives a worker several "
            "stages; pass chunks=1 or order='interleaved'"
        )
