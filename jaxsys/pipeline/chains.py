"""Devices in a row: what a cut of the graph would cost on each, and the closed form of a step."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.memory import ADAM, Limits, held_of, starts_that_fit
from jaxsys.pipeline.wire import wire_bytes
from jaxsys.pipeline.work import Work, crossing

SLACK = 1 + 1e-12  # what rounding may do to a bound that is met exactly


class Wire(NamedTuple):
    """Say what crossing values weigh on the wire.

    Attributes:
        forward_bytes: at each position, [N + 1].
        backward_bytes: of their cotangents, [N + 1].
        ratio: 0, or by how much AdaTopK shortens the slowest boundary: then the bytes are dense and
            every boundary's data take ``min(1, R_max / (ratio · R_i))`` of their dense time.

    >>> Wire(np.zeros(3), np.zeros(3)).ratio
    0.0
    """

    forward_bytes: Float[np.ndarray, "M"]
    backward_bytes: Float[np.ndarray, "M"]
    ratio: float | int = 0.0


def wire_of(
    work: Work, *, codec: str = "dense", ratio: float | int = 1.0, adaptive: bool = False
) -> Wire:
    """Say what crosses each position under a way of compressing.

    Args:
        work: the graph's costs.
        codec: how values are encoded.
        ratio: for top-k, the ratio r of every boundary; adaptive, by how much AdaTopK shortens the
            slowest boundary.
        adaptive: whether the ratios follow the boundaries' times (top-k only).

    Returns:
        The bytes.

    Raises:
        UserError: a ratio below 1 or an unknown codec.

    >>> from jaxsys.pipeline.work import chain_work
    >>> wire_of(chain_work([1, 1], [4096]), codec="topk", ratio=32).forward_bytes.tolist()
    [0.0, 168.0, 0.0]
    """
    r, kind = (1.0, "dense") if adaptive else (float(ratio), codec)
    if codec in ("int8", "int4"):
        r = max(r, 2.0)  # only whether it is above 1 matters
    forward, backward = (
        crossing(work.values, [wire_bytes(v, r, kind, way) for v in work.values], work.n_nodes)
        for way in (False, True)
    )
    return Wire(forward, backward, float(ratio) if adaptive and ratio > 1 else 0.0)


class Chains(NamedTuple):
    """Hold Q device orders of equal length S with what a partition of each would cost.

    Attributes:
        total: FLOPs of forward and backward before each position, [N + 1].
        wire: what crosses each position.
        speed: FLOPs per second of each stage's device, [Q, S].
        latency: α of each boundary, forward and backward, [2, Q, S − 1].
        s_per_byte: β of each boundary, [2, Q, S − 1].
        starts: earliest starts that fit into a memory, one row per kind of memory, [U, N + 1].
        allowed: whether a stage may start at a position, likewise, [U, N + 1].
        kind: row of ``starts`` for each stage, [Q, S].
        steps: ``(m − 1) · chunks``, how often the slowest resource is waited for.
        duplex: whether R counts the longer direction only in the maximum, not both.

    >>> Chains._fields[0]
    'total'
    """

    total: Float[np.ndarray, "M"]
    wire: Wire
    speed: Float[np.ndarray, "Q S"]
    latency: Float[np.ndarray, "2 Q S_1"]
    s_per_byte: Float[np.ndarray, "2 Q S_1"]
    starts: Int[np.ndarray, "U M"]
    allowed: Bool[np.ndarray, "U M"]
    kind: Int[np.ndarray, "Q S"]
    steps: int
    duplex: bool = False

    def one(self, q: int) -> "Chains":
        """Keep one order.

        >>> from jaxsys.pipeline.fleets import even_fleet
        >>> from jaxsys.pipeline.work import chain_work
        >>> two, orders = even_fleet([3, 6]), [(0, 1), (1, 0)]
        >>> make_chains(chain_work([1, 1], [8]), two, orders, micro_batches=4).one(1).speed.tolist()
        [[6.0, 3.0]]
        """
        some = slice(q, q + 1)
        return self._replace(
            speed=self.speed[some],
            latency=self.latency[:, some],
            s_per_byte=self.s_per_byte[:, some],
            kind=self.kind[some],
        )


def thinned(chains: Chains, n_most: int) -> Chains:
    """Allow cuts at some positions only: of each block of neighbours where the fewest bytes cross.

    Args:
        chains: Q orders.
        n_most: about how many positions to keep.

    Returns:
        The same orders over a coarser graph; what it can be cut into, the first one can.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> work = chain_work([1] * 4, [9, 1, 9])
    >>> thinned(make_chains(work, even_fleet([3]), [(0,)], micro_batches=1), 2).total.tolist()
    [0.0, 6.0, 12.0]
    """
    n = len(chains.total) - 1
    if n <= n_most:
        return chains
    edges = np.unique(np.linspace(1, n, n_most).astype(int))
    kept = [a + int(np.argmin(chains.wire.forward_bytes[a:b])) for a, b in pairwise(edges)]
    kept = np.array([0, *kept, n])
    wire = chains.wire._replace(
        forward_bytes=chains.wire.forward_bytes[kept],
        backward_bytes=chains.wire.backward_bytes[kept],
    )
    return chains._replace(
        total=chains.total[kept],
        wire=wire,
        starts=np.searchsorted(kept, chains.starts[:, kept]),
        allowed=chains.allowed[:, kept],
    )


def make_chains(
    work: Work,
    fleet: Fleet,
    orders: Sequence[Sequence[int]],
    *,
    micro_batches: int,
    order: str = "1f1b",
    chunks: int = 1,
    limits: Limits = ADAM,
    wire: Wire | None = None,
    duplex: bool = False,
) -> Chains:
    """Prepare device orders for partitioning.

    Args:
        work: the graph's costs.
        fleet: devices and links.
        orders: device orders of equal length, [Q][P].
        micro_batches: micro-batches m of a step.
        order: schedule, which sets how many micro-batches a stage holds.
        chunks: stages per device (``interleaved``); a stage may then use that share of its memory.
        limits: what a stage keeps in memory.
        wire: what crosses each position; dense if left out.
        duplex: whether both directions of a link work at once all the time.

    Returns:
        The chains.

    Raises:
        UserError: more stages than nodes.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> work = chain_work([1, 1], [8])
    >>> make_chains(work, even_fleet([3, 6]), [(0, 1), (1, 0)], micro_batches=4).speed.tolist()
    [[3.0, 6.0], [6.0, 3.0]]
    """
    index = np.tile(np.asarray(orders, int), (1, chunks))
    n_stages = index.shape[1]
    if n_stages > work.n_nodes:
        raise UserError(
            f"the graph has {work.n_nodes} nodes and the plan {n_stages} stages; every stage needs "
            "a node; use fewer devices or a finer graph"
        )
    held = held_of(order, n_stages // chunks, micro_batches, chunks)
    memory = fleet.memory_bytes[index] / chunks
    pairs = np.stack([memory, np.broadcast_to(np.asarray(held, np.float64), memory.shape)], -1)
    kinds, kind = np.unique(pairs.reshape(-1, 2), axis=0, return_inverse=True)
    starts = [starts_that_fit(work, size, h, limits) for size, h in kinds]
    here, there = index[:, :-1], index[:, 1:]
    ends = ((here, there), (there, here))
    apart = here != there
    return Chains(
        total=work.total,
        wire=wire or wire_of(work),
        speed=fleet.speed_flops_s[index],
        latency=np.stack([np.where(apart, fleet.latency_s[pair], 0.0) for pair in ends]),
        s_per_byte=np.stack([np.where(apart, 1 / fleet.bytes_per_s[pair], 0.0) for pair in ends]),
        starts=np.stack([each.first for each in starts]),
        allowed=np.stack([each.allowed for each in starts]),
        kind=kind.reshape(memory.shape),
        steps=(micro_batches - 1) * chunks,
        duplex=duplex,
    )


def link_s(chains: Chains, k: int, where, most):
    """Say what boundary k takes at some positions.

    Args:
        chains: Q orders.
        k: the boundary, after stage k.
        where: positions, [J].
        most: with AdaTopK, the longest dense R there may be, [Q, 1]; it sets the ratios.

    Returns:
        Seconds forward and backward, [2, Q, J]; inf where a dense R is longer than ``most``.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two = even_fleet([3, 6], bytes_per_s=4)
    >>> chains = make_chains(chain_work([1, 1], [2]), two, [(0, 1)], micro_batches=3)
    >>> link_s(chains, 0, np.array([1]), np.array([[np.inf]])).ravel().tolist()
    [0.5, 0.5]
    """
    seconds = []
    for way, n_bytes in enumerate((chains.wire.forward_bytes, chains.wire.backward_bytes)):
        latency = chains.latency[way, :, k, None]
        data = n_bytes[where] * chains.s_per_byte[way, :, k, None]
        if chains.wire.ratio:
            dense = latency + data
            with np.errstate(divide="ignore", invalid="ignore"):
                share = np.where(dense > 0, most / (chains.wire.ratio * dense), 1.0)
            taken = latency + data * np.minimum(1.0, share)
            seconds.append(np.where(dense <= most * SLACK, taken, np.inf))
        else:
            seconds.append(latency + data)
    return np.stack(seconds)


def times(chains: Chains, edges) -> tuple[Float[np.ndarray, "Q S"], Float[np.ndarray, "2 Q S_1"]]:
    """Say what stages and boundaries of given partitions take for one micro-batch.

    Args:
        chains: Q orders.
        edges: positions 0 … N at which the stages begin and end, [Q, S + 1].

    Returns:
        Seconds C of every stage, [Q, S], and R of every boundary, forward and backward,
        [2, Q, S − 1].

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two = even_fleet([3, 6], bytes_per_s=4)
    >>> chains = make_chains(chain_work([1, 1], [2]), two, [(0, 1)], micro_batches=3)
    >>> [x.tolist() for x in times(chains, [[0, 1, 2]])]
    [[[1.0, 0.5]], [[[0.5]], [[0.5]]]]
    """
    edges = np.asarray(edges)
    compute = np.diff(chains.total[edges], axis=1) / chains.speed
    inner = edges[:, 1:-1]
    n_bytes = np.stack([chains.wire.forward_bytes[inner], chains.wire.backward_bytes[inner]])
    data = n_bytes * chains.s_per_byte
    if chains.wire.ratio and inner.size:
        dense = chains.latency + data
        most = dense.max(axis=(0, 2), keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(dense > 0, most / (chains.wire.ratio * dense), 1.0)
        data = data * np.minimum(1.0, share)
    return compute, chains.latency + data


def both_ways(chains: Chains, links):
    """Join the two directions of boundaries into one R for the slowest part.

    Args:
        chains: Q orders.
        links: seconds forward and backward, [2, ...].

    Returns:
        Their sum, or the longer one if links are duplex.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> chains = make_chains(chain_work([1], []), even_fleet([3]), [(0,)], micro_batches=1)
    >>> both_ways(chains, np.array([[1.0], [2.0]])).tolist()
    [3.0]
    """
    return links.max(axis=0) if chains.duplex else links.sum(axis=0)


def pipeline_s(chains: Chains, edges) -> Float[np.ndarray, "Q"]:
    """Predict the seconds of a step by the closed form of a pipeline.

    ``T = Σ_s (C_s + R_s) + (m − 1) · max_s max(C_s, R_s)``

    Reconstruction: C is a stage's forward and backward and R both directions of a boundary, as in a
    pipeline that runs all forwards before all backwards. Where an order keeps both directions busy
    at once (`Chains.duplex`), R is the longer one in the maximum. What crosses a boundary is
    counted on its link, also where a value skips stages.

    Args:
        chains: Q orders.
        edges: positions 0 … N at which the stages begin and end, [Q, S + 1].

    Returns:
        Seconds, [Q].

    Reference: arXiv 2410.12707, objective of OP-Fence.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> two = even_fleet([3, 6], bytes_per_s=4)
    >>> chains = make_chains(chain_work([1, 1], [2]), two, [(0, 1)], micro_batches=3)
    >>> pipeline_s(chains, [[0, 1, 2]]).tolist()
    [4.5]
    """
    compute, links = times(chains, edges)
    slowest = compute.max(axis=1)
    if links.size:
        slowest = np.maximum(slowest, both_ways(chains, links).max(axis=1))
    return compute.sum(axis=1) + links.sum(axis=(0, 2)) + chains.steps * slowest
