"""A plan for what is left of a fleet: a lost device's stages elsewhere, a slow device's fewer.

Device indices always mean the whole fleet, whoever of it is left.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import costs_of
from jaxsys.pipeline.memory import Limits, held_of, stage_memory
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.work import Work


class Planner(NamedTuple):
    """How plans are made and judged; see `planner_of`.

    Attributes:
      make: ``make(fleet) -> plan``, with indices in that fleet.
      predict: ``predict(plan, fleet) -> seconds`` of a step.
      work: costs of the graph.
      limits: what a stage keeps in memory.

    >>> Planner._fields
    ('make', 'predict', 'work', 'limits')
    """

    make: Callable[[Fleet], Plan]
    predict: Callable[[Plan, Fleet], float]
    work: Work
    limits: Limits = Limits()

    def over(self, fleet: Fleet, devices: Sequence[int]) -> Plan:
        """Plan for some devices of a fleet.

        Args:
          fleet: the whole fleet.
          devices: indices of those to use.

        Returns:
          The plan, with indices in the whole fleet.

        Raises:
          UserError: no plan fits on them.
        """
        return _renamed(self.make(fleet.keep(devices)), devices)


def _renamed(plan: Plan, devices: Sequence[int]) -> Plan:
    return dataclasses.replace(
        plan,
        devices=tuple(devices[i] for i in plan.devices),
        replicas=tuple(tuple(devices[i] for i in chain) for chain in plan.replicas),
    )


def after_loss(
    plan: Plan,
    fleet: Fleet,
    lost: Collection[int],
    planner: Planner,
    spares: Sequence[int] = (),
) -> Plan:
    """Plan again without some devices: onto a standby in their place, or over all that are left.

    Every way is predicted and the fastest is taken; of equal ones the standby, which leaves the
    other devices' stages, and so their compiled programs, as they were.

    Reconstruction: the paper's broker replaces a lost node from a backup pool; that re-planning
    competes with it by predicted time is ours.

    Args:
      plan: in which the devices were lost.
      fleet: the whole fleet.
      lost: all devices that are gone, earlier ones included.
      planner: makes and judges plans.
      spares: devices that stood by, besides those of the plan.

    Returns:
      The new plan.

    Raises:
      UserError: nothing is left, or no plan fits on what is.

    Reference: arXiv 2309.01172 (the broker's backup pool), 2410.12707.

    >>> from jaxsys.pipeline.choice import Choice, planner_of
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> planner = planner_of(chain_work([1] * 4, [1] * 3), Choice("exact"))
    >>> fleet, plan = even_fleet([3, 3, 3]), Plan(4, (2,), (0, 1), method="exact")
    >>> found = after_loss(plan, fleet, {1}, planner, spares=[2])
    >>> found.devices, found.method
    ((0, 2), 'exact, standby')
    """
    used = [device for chain in plan.chains for device in dict.fromkeys(chain)]
    rest = [device for device in used if device not in lost]
    spares = [device for device in spares if device not in lost and device not in rest]
    names = ", ".join(fleet.devices[device].name for device in sorted(lost))
    if not rest and not spares:
        raise UserError(
            f"devices {names} are lost and no other is left; a plan needs at least one; start some "
            "again"
        )
    found = _swaps(plan, fleet, [device for device in used if device in lost], spares, planner)
    trouble = ""
    for devices in dict.fromkeys((tuple(sorted(rest)), tuple(sorted([*rest, *spares])))):
        if devices:
            try:
                found.append(planner.over(fleet, devices))
            except UserError as error:
                trouble = str(error)
    if not found:
        raise UserError(f"devices {names} are lost and the rest cannot take over: {trouble}")
    times = [planner.predict(each, fleet) for each in found]
    best = found[int(np.argmin(np.array(times) * (1 + 1e-9 * np.arange(len(times)))))]
    return dataclasses.replace(best, predicted_s=planner.predict(best, fleet))


def _swaps(
    plan: Plan, fleet: Fleet, gone: Sequence[int], spares: Sequence[int], planner: Planner
) -> list[Plan]:
    """Put standbys in the places of lost devices where they have the memory, each in turn."""
    if len(gone) > len(spares):
        return []
    found = []
    for shift in range(len(spares) if len(gone) == 1 else 1):
        taken = dict(zip(gone, [*spares[shift:], *spares[:shift]], strict=False))
        chains = [tuple(taken.get(d, d) for d in chain) for chain in plan.chains]
        swapped = dataclasses.replace(
            plan, devices=chains[0], replicas=tuple(chains[1:]), method=f"{plan.method}, standby"
        )
        if fits(swapped, fleet, planner):
            found.append(swapped)
    return found


def fits(plan: Plan, fleet: Fleet, planner: Planner) -> bool:
    """Tell whether every stage of a plan fits the memory of its device.

    Args:
      plan: the plan.
      fleet: the whole fleet.
      planner: has the graph's costs and the limits.

    >>> from jaxsys.pipeline.choice import Choice, planner_of
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> planner = planner_of(chain_work([1] * 4, [1] * 3, leaf_bytes=[8] * 4), Choice("exact"))
    >>> [fits(Plan(4, (2,), (0, 1)), even_fleet([3, 3], memory_bytes=m), planner) for m in (1, 999)]
    [False, True]
    """
    edges = np.array([0, *plan.boundaries, plan.n_nodes])
    held = np.array(held_of(plan.order, plan.n_workers, plan.micro_batches, plan.chunks))
    needed = stage_memory(planner.work, edges[:-1], edges[1:], held, planner.limits)
    for chain in plan.chains:
        for device in set(chain):
            mine = sum(n for n, d in zip(needed, chain, strict=True) if d == device)
            if mine > fleet.devices[device].memory_bytes:
                return False
    return True


def observed(fleet: Fleet, plan: Plan, work: Work, busy_s: Sequence[float]) -> Fleet:
    """Correct the speeds of a plan's devices by what their stages took.

    λ·S ← λ·S · predicted / measured, for each device of the first chain.

    Args:
      fleet: the whole fleet.
      plan: that ran.
      work: the graph's costs.
      busy_s: seconds that each stage computed in a step, all micro-batches, [S].

    Returns:
      The fleet as it was seen to be.

    Raises:
      UserError: not one time for each stage.

    >>> from jaxsys.pipeline.devices import Device
    >>> two = Fleet((Device("a", 3, 9), Device("b", 6, 9)), np.zeros((2, 2)), np.full((2, 2), 4.0))
    >>> sums = [np.array(x) for x in ([0.0, 3, 6], [0.0, 9, 18], [0.0, 0, 0], [0.0, 0, 0])]
    >>> work = Work(("a", "b"), *sums, np.zeros((0, 3)), (), np.zeros(3))
    >>> observed(two, Plan(2, (1,), (0, 1)), work, [3.0, 6.0]).speed_flops_s.tolist()
    [3.0, 1.5]
    """
    if len(busy_s) != plan.n_stages:
        raise UserError(
            f"{len(busy_s)} measured times for {plan.n_stages} stages; expected one each; pass "
            "those of one step"
        )
    costs = costs_of(work, fleet, plan)
    predicted, measured = np.zeros(len(fleet)), np.zeros(len(fleet))
    for stage, device in enumerate(plan.devices):
        stage_s = costs.forward_s[stage] + costs.backward_s[stage]
        predicted[device] += plan.micro_batches * stage_s
        measured[device] += busy_s[stage]
    devices = [
        dataclasses.replace(each, speed_flops_s=float(each.speed_flops_s * p / m))
        if p > 0 and m > 0
        else each
        for each, p, m in zip(fleet.devices, predicted, measured, strict=True)
    ]
    return Fleet(tuple(devices), fleet.latency_s, fleet.bytes_per_s)


class Remade(NamedTuple):
    """A plan that is worth changing to.

    Attributes:
      plan: the new plan.
      gain: predicted seconds of a step as planned over those of the new plan, at the speeds seen.
      slowest: device that fell behind its prediction most.
      factor: by how much.

    >>> Remade(Plan(1, (), (0,)), 1.5, 0, 2.0).gain
    1.5
    """

    plan: Plan
    gain: float
    slowest: int
    factor: float


def after_slowdown(
    plan: Plan,
    fleet: Fleet,
    busy_s: Sequence[float],
    planner: Planner,
    devices: Sequence[int],
    threshold: float | int = 1.2,
) -> Remade | None:
    """Look for a plan that is faster at the speeds seen than the present one.

    Reconstruction: that a straggler is found by measured over predicted stage times, and what gain
    is worth a restart, are ours.

    Args:
      plan: that is running.
      fleet: as it was believed to be.
      busy_s: seconds that each stage computed in a step, [S].
      planner: makes and judges plans.
      devices: that may be used, standbys included.
      threshold: least gain that is worth a restart.

    Returns:
      The new plan, or None where the present one is good enough.

    >>> from jaxsys.pipeline.choice import Choice, planner_of
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> planner = planner_of(chain_work([1] * 4, [1] * 3), Choice("exact"))
    >>> fleet = even_fleet([1, 1, 1])
    >>> plan = planner.over(fleet, [0, 1])
    >>> busy_s = [6.0 * plan.micro_batches] * 2  # as predicted
    >>> after_slowdown(plan, fleet, busy_s, planner, [0, 1]) is None
    True
    >>> found = after_slowdown(plan, fleet, [busy_s[0], 10 * busy_s[1]], planner, [0, 1, 2])
    >>> found.slowest, round(found.factor)
    (1, 10)
    """
    seen = observed(fleet, plan, planner.work, busy_s)
    factors = fleet.speed_flops_s / seen.speed_flops_s
    slowest = int(np.argmax(factors))
    try:
        best = planner.over(seen, devices)
    except UserError:
        return None
    best_s = planner.predict(best, seen)
    gain = planner.predict(plan, seen) / best_s
    if gain < threshold:
        return None
    best = dataclasses.replace(best, predicted_s=best_s)
    return Remade(best, float(gain), slowest, float(factors[slowest]))
