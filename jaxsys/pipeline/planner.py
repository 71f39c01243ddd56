"""Make a plan: which devices, in which order, cut where, how compressed."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import groupby

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.graph import Dag
from jaxsys.pipeline.adatopk import adaptive_ratios
from jaxsys.pipeline.chains import make_chains, pipeline_s, wire_of
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import NO_OVERHEADS, Overheads, costs_of
from jaxsys.pipeline.fence import chain_order, communities, op_fence
from jaxsys.pipeline.memory import ADAM, Limits, held_of, lack_of_memory, stage_memory
from jaxsys.pipeline.orders import LOCAL_SEARCH, Make, search
from jaxsys.pipeline.partition import DoesNotFitError, equal_compute, equal_number, exact
from jaxsys.pipeline.plan import CODECS, Plan
from jaxsys.pipeline.schedule import ORDERS
from jaxsys.pipeline.timing import predict_s
from jaxsys.pipeline.work import Work, work_of

METHODS = ("equal-number", "equal-compute", "op-fence", "exact", "search")


def make_plan(
    graph: Dag | Work,
    fleet: Fleet,
    *,
    micro_batches: int,
    method: str = "search",
    order: str = "1f1b",
    chunks: int = 1,
    codec: str = "dense",
    ratio: float | int = 1.0,
    adaptive: bool = True,
    devices: Sequence[int] | None = None,
    limits: Limits = ADAM,
    overheads: Overheads = NO_OVERHEADS,
    dtype: str = "float32",
    seed: int = 0,
    gap: float | int | None = None,
) -> Plan:
    """Plan a pipeline over a fleet.

    - ``equal-number`` and ``equal-compute``: the baselines, devices in the order given.
    - ``op-fence``: communities in a row, cut in proportion to speed where little crosses.
    - ``exact``: the partition with the least closed-form time for OP-Fence's order (or the order
      given).
    - ``search``: that partition for the best devices and orders found, for links of one and of two
      ways at a time, and of these the one that is simulated to be fastest; it may leave devices
      out; ``exact`` and ``op-fence`` are among them.

    Partitions minimise `chains.pipeline_s`; the plan's ``predicted_s`` is the simulated step.

    Args:
        graph: the graph of the loss on one micro-batch, or its summary.
        fleet: devices and links.
        micro_batches: micro-batches m in a step.
        method: one of `METHODS`.
        order: one of `schedule.ORDERS`, or ``auto`` for whichever is predicted to be fastest.
        chunks: stages per device, above 1 only for ``interleaved``.
        codec: ``dense``, ``topk``, ``int8`` or ``int4``.
        ratio: for ``topk``: r of AdaTopK, by how much the slowest boundary's bytes shrink, or of
            every boundary if not adaptive.
        adaptive: AdaTopK rather than uniform top-k.
        devices: order of devices for all methods but ``search``, which takes it as its start.
        limits: what a stage keeps in memory.
        overheads: what stages take beside their nodes; they count in ``predicted_s`` and in
            AdaTopK's ratios, not where a partition is chosen.
        dtype: type of the values on the links.
        seed: for communities and search.
        gap: share of T by which ``exact`` may miss the optimum; 1e-9, or 1e-4 above 20,000 devices
            times nodes and 1e-2 above 100,000.

    Returns:
        The plan.

    Raises:
        UserError: an unknown name, more stages than nodes, a stage that fits no device's memory (by
            how much), links that are not symmetric where communities need it, or no networkx then.

    Reference: arXiv 2410.12707.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> fleet, work = even_fleet([3, 6, 3]), chain_work([1] * 4, [1] * 3)
    >>> plan = make_plan(work, fleet, micro_batches=5, method="exact", devices=(0, 1, 2))
    >>> plan.boundaries, round(plan.predicted_s, 6)
    ((1, 3), 7.0)
    """
    _check(method, order, chunks, codec, micro_batches, fleet, devices)
    work = graph if isinstance(graph, Work) else work_of(graph)
    if order == "auto":
        return _fastest(
            work, fleet, micro_batches=micro_batches, method=method, chunks=chunks, codec=codec,
            ratio=ratio, adaptive=adaptive, devices=devices, limits=limits, seed=seed, gap=gap,
            overheads=overheads, dtype=dtype,
        )  # fmt: skip
    make = partial(
        make_chains, work, fleet, micro_batches=micro_batches, order=order, chunks=chunks,
        limits=limits, wire=wire_of(work, codec=codec, ratio=ratio, adaptive=_ada(codec, adaptive)),
    )  # fmt: skip
    try:
        ways = _choose(make, fleet, work, method, devices, chunks, seed, gap)
    except DoesNotFitError as error:
        row = tuple(range(len(fleet))) if devices is None else tuple(devices)
        held = held_of(order, len(row), micro_batches, chunks)
        raise UserError(lack_of_memory(work, fleet, row * chunks, held, limits)) from error
    plans = []
    for chosen, cuts in ways:
        there, back = _ratios(
            work, fleet, cuts, chosen * chunks, codec, ratio, adaptive, overheads, dtype
        )
        edges = np.array([0, *cuts, work.n_nodes])
        held = np.array(held_of(order, len(chosen), micro_batches, chunks))
        memory = stage_memory(work, edges[:-1], edges[1:], held, limits)
        plan = Plan(
            work.n_nodes, cuts, chosen * chunks, order, micro_batches, codec, there, back,
            memory_bytes=tuple(int(size) for size in memory), method=method,
        )  # fmt: skip
        costs = costs_of(work, fleet, plan, overheads=overheads, dtype=dtype)
        plans.append(dataclasses.replace(plan, predicted_s=predict_s(plan, costs, fleet)))
    return min(plans, key=lambda plan: plan.predicted_s)


def _ada(codec: str, adaptive: bool) -> bool:
    return adaptive and codec == "topk"


def _fastest(work: Work, fleet: Fleet, *, chunks: int, **given) -> Plan:
    plans, trouble = [], None
    for order in ORDERS:
        if (order == "interleaved") != (chunks > 1):
            continue
        try:
            plans.append(make_plan(work, fleet, order=order, chunks=chunks, **given))
        except UserError as error:
            trouble = error
    if not plans:
        raise trouble  # type: ignore[misc]
    return min(plans, key=lambda plan: plan.predicted_s)


def _choose(
    make: Make, fleet: Fleet, work: Work, method: str, devices, chunks: int, seed: int, gap
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Choose devices, in order, and boundaries; several ways where they are worth simulating."""
    row = tuple(range(len(fleet))) if devices is None else tuple(int(d) for d in devices)
    fenced: tuple[int, ...] | None = None
    if method == "op-fence" or (devices is None and not method.startswith("equal")):
        groups = communities(fleet.keep(row), seed=seed)
        label = {row[d]: g for g, group in enumerate(groups) for d in group}
        rows = [row]
        if devices is None:
            message = float(np.median(work.cut_bytes[1:-1])) if work.n_nodes > 1 else 1.0
            chain = chain_order(fleet, groups, message_bytes=message)
            rows = [chain, chain[::-1]]
        try:
            row, fenced = _better_fence(make, rows, label, chunks)
        except UserError:
            if method != "search":
                raise
            row = rows[0]  # fewer devices may do
    large = len(row) * work.n_nodes > LOCAL_SEARCH
    if gap is None:
        gap = 1e-9 if len(row) * work.n_nodes <= 20_000 else 1e-2 if large else 1e-4
    if method == "search":
        most = max(1, work.n_nodes // chunks)
        found = [
            each
            for duplex in ((False,) if large else (False, True))  # the simulation decides
            for each in search(partial(make, duplex=duplex), row, n_nodes=most, seed=seed, gap=gap)
        ]
        ways = [(each.devices, each.boundaries) for each in found]
        if fenced is not None:
            ways += [(row, fenced), (row, exact(make([row]), gap=gap)[0])]
        return ways
    if method == "op-fence" and fenced is not None:
        return [(row, fenced)]
    chains = make([row])
    if method == "exact":
        return [(row, exact(chains, gap=gap)[0])]
    parts = {"equal-number": equal_number, "equal-compute": equal_compute}[method]
    return [(row, parts(chains))]


def _better_fence(make: Make, rows, label: dict[int, int], chunks: int):
    """Take the end of a row from which OP-Fence gets the better time; fits neither, the first."""
    found, trouble = [], None
    for row in rows:
        sizes = [len(list(group)) for _, group in groupby(label[d] for d in row)]
        chains = make([row])
        try:
            cuts = op_fence(chains, sizes * chunks)
        except DoesNotFitError as error:
            trouble = error
            continue
        edges = [[0, *cuts, len(chains.total) - 1]]
        found.append((float(pipeline_s(chains, edges)[0]), row, cuts))
    if not found:
        raise trouble or DoesNotFitError("no row of devices")
    return min(found)[1:]


def _ratios(work, fleet, cuts, devices, codec, ratio, adaptive, overheads, dtype):
    if codec == "dense" or not cuts:
        return ((1.0,) * len(cuts),) * 2
    if _ada(codec, adaptive):
        return tuple(
            adaptive_ratios(
                work, fleet, cuts, devices, ratio, backward=way, overheads=overheads, dtype=dtype
            )
            for way in (False, True)
        )
    uniform = float(ratio) if codec == "topk" else max(2.0, float(ratio))
    return ((uniform,) * len(cuts),) * 2


def _check(method, order, chunks, codec, micro_batches, fleet: Fleet, devices) -> None:
    if method not in METHODS or order not in (*ORDERS, "auto") or codec not in CODECS:
        raise UserError(
            f"method is {method!r}, order {order!r} and codec {codec!r}; they must be one of "
            f"{', '.join(METHODS)}; one of {', '.join((*ORDERS, 'auto'))}; and one of "
            f"{', '.join(CODECS)}; pass these"
        )
    if chunks < 1 or (chunks > 1 and order not in ("interleaved", "auto")):
        raise UserError(
            f"chunks is {chunks} with order {order!r}; only 'interleaved' gives a device several "
            "stages; pass chunks=1 or order='interleaved'"
        )
    if micro_batches < 1:
        raise UserError(
            f"micro_batches is {micro_batches}; a step needs at least 1; pass 1 or more"
        )
    if devices is not None:
        row = [int(d) for d in devices]
        if not row or len(set(row)) < len(row) or not all(0 <= d < len(fleet) for d in row):
            raise UserError(
                f"devices is {row}; it must name some of the {len(fleet)} devices once each, by "
                f"index from 0 to {len(fleet) - 1}; mend the list"
            )
