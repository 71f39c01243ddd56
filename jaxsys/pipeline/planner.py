"""Make a plan: which devices, in which order, cut where, how compressed."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import groupby

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.graph import Dag
from jaxsys.pipeline.adatopk import adaptive_ratios
from jaxsys.pipeline.chains import make_chains, wire_of
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import costs_of
from jaxsys.pipeline.fence import chain_order, communities, op_fence
from jaxsys.pipeline.memory import ADAM, Limits, held_of, lack_of_memory, stage_memory
from jaxsys.pipeline.orders import Make, search
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
    codec_s_per_byte: float | int = 0.0,
    dtype: str = "float32",
    seed: int = 0,
    gap: float | int | None = None,
) -> Plan:
    """Plan a pipeline over a fleet.

    - ``equal-number`` and ``equal-compute``: the baselines, devices in the order given.
    - ``op-fence``: communities in a row, cut in proportion to speed where little crosses.
    - ``exact``: the partition with the least closed-form time for OP-Fence's order (or the order
      given).
    - ``search``: that partition for the best devices and order found; it may leave devices out, and
      is never worse than ``exact`` and ``op-fence`` by the closed form.

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
        codec_s_per_byte: seconds that each end of a compressed message takes per dense byte.
        dtype: type of the values on the links.
        seed: for communities and search.
        gap: share of T by which ``exact`` may miss the optimum; 1e-9, or 1e-3 in large cases.

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
            codec_s_per_byte=codec_s_per_byte, dtype=dtype,
        )  # fmt: skip
    make = partial(
        make_chains, work, fleet, micro_batches=micro_batches, order=order, chunks=chunks,
        limits=limits, wire=wire_of(work, codec=codec, ratio=ratio, adaptive=_ada(codec, adaptive)),
    )  # fmt: skip
    try:
        chosen, cuts = _choose(make, fleet, work, method, devices, chunks, seed, gap)
    except DoesNotFitError as error:
        row = tuple(range(len(fleet))) if devices is None else tuple(devices)
        held = held_of(order, len(row), micro_batches, chunks)
        raise UserError(lack_of_memory(work, fleet, row * chunks, held, limits)) from error
    r = _ratios(work, fleet, cuts, chosen * chunks, codec, ratio, adaptive, dtype)
    n_stages = len(cuts) + 1
    edges = np.array([0, *cuts, work.n_nodes])
    held = held_of(order, n_stages // chunks, micro_batches, chunks)
    plan = Plan(
        n_nodes=work.n_nodes,
        boundaries=cuts,
        devices=chosen * chunks,
        order=order,
        micro_batches=micro_batches,
        codec=codec,
        ratios_forward=r[0],
        ratios_backward=r[1],
        memory_bytes=tuple(
            int(x) for x in stage_memory(work, edges[:-1], edges[1:], np.array(held), limits)
        ),
        method=method,
    )
    costs = costs_of(work, fleet, plan, codec_s_per_byte=codec_s_per_byte, dtype=dtype)
    return dataclasses.replace(plan, predicted_s=predict_s(plan, costs, fleet))


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
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose devices, in order, and boundaries."""
    labels: dict[int, int] = {}
    row = tuple(range(len(fleet))) if devices is None else tuple(int(d) for d in devices)
    if method == "op-fence" or (devices is None and not method.startswith("equal")):
        groups = communities(fleet.keep(row), seed=seed)
        labels = {row[d]: g for g, group in enumerate(groups) for d in group}
        if devices is None:
            message = float(np.median(work.cut_bytes[1:-1])) if work.n_nodes > 1 else 1.0
            row = chain_order(fleet, groups, message_bytes=message)
    if gap is None:
        gap = 1e-9 if len(row) * work.n_nodes <= 20_000 else 1e-3
    if method == "search":
        most = max(1, work.n_nodes // chunks)
        found = search(make, row, n_nodes=most, seed=seed, gap=gap)
        if len(row) > most:
            return found.devices, found.boundaries
        cuts, seconds = exact(make([row]), gap=gap)
        return (row, cuts) if seconds < found.seconds else (found.devices, found.boundaries)
    chains = make([row])
    if method == "exact":
        return row, exact(chains, gap=gap)[0]
    if method == "op-fence":
        sizes = [len(list(group)) for _, group in groupby(labels[d] for d in row)]
        return row, op_fence(chains, sizes * chunks)
    return row, {"equal-number": equal_number, "equal-compute": equal_compute}[method](chains)


def _ratios(work, fleet, cuts, devices, codec, ratio, adaptive, dtype):
    if codec == "dense" or not cuts:
        return ((1.0,) * len(cuts),) * 2
    if _ada(codec, adaptive):
        return tuple(
            adaptive_ratios(work, fleet, cuts, devices, ratio, backward=way, dtype=dtype)
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
