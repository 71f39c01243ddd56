"""How long a step of a plan takes: simulated task by task, by a closed form, and at the least."""

import numpy as np

from jaxsys.core.timeline import Task, Timeline, simulate, simulate_shared
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import Costs, Message
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.schedule import actions

MOST_TASKS = 300_000  # more are not simulated; the closed form stands in
WEIGHT_SHARE = 0.5  # of a backward's FLOPs that make gradients of parameters in a dense layer


def tasks(
    plan: Plan,
    costs: Costs,
    fleet: Fleet | None = None,
    *,
    weight_share: float | int = WEIGHT_SHARE,
) -> tuple[Task, ...]:
    """Write one step as tasks, one stream per device and one per direction of each link.

    A device runs its actions in their order (`schedule.actions`). A message starts when the action
    that makes it has ended and its link is free, and the action that needs it waits for its end.
    Where the fleet names sites, `predict` lets the links from one site to another share one.

    Args:
        plan: the plan; its first chain.
        costs: what one micro-batch takes.
        fleet: for the names of devices, and its sites.
        weight_share: part of a backward that ``zero-bubble`` runs later.

    Returns:
        Tasks ``forward s.i``, ``backward s.i`` and ``weight s.i`` of stage s and micro-batch i on
        the devices (``sum s.i`` for what of a backward follows its message), ``send s-t.i``
        (activations) and ``return s-t.i`` (cotangents) on the links; ``update s`` last where the
        costs have it.

    >>> costs = Costs((1.0, 1.0), (2.0, 2.0), (Message(0, 1, 8, 8, 0.5, 0.5),), (0, 1))
    >>> found = tasks(Plan(2, (1,), (0, 1), micro_batches=2), costs)
    >>> len(found), found[0].stream, simulate(found).makespan_s
    (12, 'device 0', 10.0)
    """
    into: dict[tuple[str, int], list[Message]] = {}
    out: dict[tuple[str, int], list[Message]] = {}
    for message in costs.messages:
        into.setdefault(("forward", message.target), []).append(message)
        out.setdefault(("forward", message.source), []).append(message)
        if message.backward_bytes:
            into.setdefault(("backward", message.source), []).append(message)
            out.setdefault(("backward", message.target), []).append(message)
    own = [[t for t in range(plan.n_stages) if plan.devices[t] == d] for d in plan.devices]
    split = plan.order == "zero-bubble"
    late = 0.0 if split else costs.late_share
    found: list[Task] = []
    for worker in range(plan.n_workers):
        name = _device(fleet, plan.devices[worker])
        ran = actions(plan.order, worker, plan.n_workers, plan.micro_batches, plan.chunks)
        for kind, i, s in ran:
            seconds = {
                "forward": costs.forward_s[s],
                "backward": costs.backward_s[s] * (1 - weight_share * split - late),
                "weight": costs.backward_s[s] * weight_share,
            }[kind]
            after = [_message_name(kind, m, i) for m in into.get((kind, s), ())]
            if kind == "forward" and own[s][0] < s:  # an earlier stage of the same device
                after += [f"forward {t}.{i}" for t in own[s] if t < s]
            if kind == "backward" and own[s][-1] > s:
                after += [f"backward {t}.{i}" for t in own[s] if t > s]
            found.append(Task(f"{kind} {s}.{i}", name, seconds, tuple(after)))
            if kind == "backward" and late:
                found.append(Task(f"sum {s}.{i}", name, costs.backward_s[s] * late))
            for m in out.get((kind, s), ()):
                ends = (m.source, m.target) if kind == "forward" else (m.target, m.source)
                link = " → ".join(_device(fleet, plan.devices[t]) for t in ends)
                taken = m.forward_s if kind == "forward" else m.backward_s
                found.append(Task(_message_name(kind, m, i), link, taken, (f"{kind} {s}.{i}",)))
        if costs.update_s:
            found += [Task(f"update {s}", name, costs.update_s[s]) for s in _own(plan, worker)]
    return tuple(found)


def _own(plan: Plan, worker: int) -> range:
    return range(worker, plan.n_stages, plan.n_workers)


def _device(fleet: Fleet | None, index: int) -> str:
    return f"device {index}" if fleet is None else fleet.devices[index].name


def _message_name(kind: str, message: Message, i: int) -> str:
    word = "send" if kind == "forward" else "return"
    return f"{word} {message.source}-{message.target}.{i}"


def shared_links(plan: Plan, fleet: Fleet | None) -> dict[str, str]:
    """Say which links of a plan are one: those from one site to another.

    Args:
        plan: the plan.
        fleet: with its sites, if it has any.

    Returns:
        Stream of a pair of devices, as in `tasks`, to that of their sites.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> shared_links(Plan(2, (1,), (0, 1)), even_fleet([1, 1]))
    {}
    """
    if fleet is None or not fleet.sites:
        return {}
    pairs = [(p, q) for p in plan.devices for q in plan.devices if fleet.sites[p] != fleet.sites[q]]
    return {
        f"{_device(fleet, p)} → {_device(fleet, q)}": (
            f"site {fleet.sites[p]} → site {fleet.sites[q]}"
        )
        for p, q in pairs
    }


def predict(
    plan: Plan,
    costs: Costs,
    fleet: Fleet | None = None,
    *,
    weight_share: float | int = WEIGHT_SHARE,
) -> Timeline:
    """Simulate one step of a plan; see `tasks`.

    Messages between two sites take their link one after the other, first come, first served: its
    queue holds whole messages. (Those that last longer than the queue share it more evenly.)

    Args:
        plan: the plan.
        costs: what one micro-batch takes.
        fleet: for names and sites.
        weight_share: as in `tasks`.

    Returns:
        The timeline, whose makespan is the predicted time of the step.

    >>> costs = Costs((1.0, 1.0), (2.0, 2.0), (Message(0, 1, 8, 8, 0.5, 0.5),), (0, 1))
    >>> predict(Plan(2, (1,), (0, 1), micro_batches=1), costs).makespan_s
    7.0
    """
    found, links = tasks(plan, costs, fleet, weight_share=weight_share), shared_links(plan, fleet)
    return simulate_shared(found, links) if links else simulate(found)


def predict_s(plan: Plan, costs: Costs, fleet: Fleet | None = None) -> float:
    """Predict the seconds of a step: by simulation, or by the closed form where that is too large.

    Args:
        plan: the plan.
        costs: what one micro-batch takes.
        fleet: for sites.

    Returns:
        Seconds.

    >>> costs = Costs((1.0, 1.0), (2.0, 2.0), (Message(0, 1, 8, 8, 0.0, 0.0),), (0, 1))
    >>> predict_s(Plan(2, (1,), (0, 1), micro_batches=4), costs)
    15.0
    """
    count = 2 * (plan.n_stages + len(costs.messages)) * plan.micro_batches
    if count > MOST_TASKS:
        return closed_form_s(plan, costs, fleet)
    return predict(plan, costs, fleet).makespan_s


def loads(
    plan: Plan, costs: Costs, fleet: Fleet | None = None
) -> tuple[list[float], dict[tuple[str, str], float]]:
    """Add up what each device and each direction of a link works for one micro-batch.

    Args:
        plan: the plan.
        costs: what one micro-batch takes.
        fleet: for sites, whose links are shared.

    Returns:
        Seconds of every device in use, and of every direction of a link by its two ends.

    >>> costs = Costs((1.0, 1.0), (2.0, 2.0), (Message(0, 1, 8, 8, 0.5, 0.25),), (0, 1))
    >>> loads(Plan(2, (1,), (0, 1)), costs)
    ([3.0, 3.0], {('device 0', 'device 1'): 0.5, ('device 1', 'device 0'): 0.25})
    """
    device: dict[int, float] = {}
    for s, d in enumerate(plan.devices):
        device[d] = device.get(d, 0.0) + costs.forward_s[s] + costs.backward_s[s]
    link: dict[tuple[str, str], float] = {}
    for m in costs.messages:
        p, q = plan.devices[m.source], plan.devices[m.target]
        for a, b, seconds in ((p, q, m.forward_s), (q, p, m.backward_s)):
            key = (f"device {a}", f"device {b}")
            if fleet is not None and fleet.sites and fleet.sites[a] != fleet.sites[b]:
                key = (f"site {fleet.sites[a]}", f"site {fleet.sites[b]}")
            link[key] = link.get(key, 0.0) + seconds
    return list(device.values()), link


def closed_form_s(plan: Plan, costs: Costs, fleet: Fleet | None = None) -> float:
    """Predict the seconds of a step by ``T ≈ Σ_s (C_s + R_s) + (m − 1) · max(C, R)``.

    C is a device's forward and backward of one micro-batch, R both directions of a link.

    Reconstruction: as `chains.pipeline_s`, which it equals where no value skips a stage. `predict`
    is shorter where both directions of a link work at once, and longer where an order such as 1F1B
    holds too few micro-batches in flight to cover slow links.

    Args:
        plan: the plan.
        costs: what one micro-batch takes.
        fleet: for sites.

    Returns:
        Seconds.

    Reference: arXiv 2410.12707.

    >>> closed_form_s(Plan(2, (1,), (0, 1), micro_batches=4), Costs((1, 1), (2, 2), (), (0, 1)))
    15.0
    """
    devices, links = loads(plan, costs, fleet)
    once = sum(devices) + sum(m.forward_s + m.backward_s for m in costs.messages)
    both = {(a, b): there + links.get((b, a), 0.0) for (a, b), there in links.items()}
    return float(once + (plan.micro_batches - 1) * max([*devices, *both.values()]))


def lower_bound_s(plan: Plan, costs: Costs, fleet: Fleet) -> float:
    """Say what no order of the plan's actions can beat.

    ``m · max(Σ FLOPs / Σ speed, C of the busiest device, R of the busiest link)``

    Args:
        plan: the plan.
        costs: what one micro-batch takes.
        fleet: speeds of the devices, and sites.

    Returns:
        Seconds.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> costs = Costs((1, 1), (2, 2), (), (0, 1))
    >>> lower_bound_s(Plan(2, (1,), (0, 1), micro_batches=4), costs, even_fleet([1, 1]))
    12.0
    """
    devices, links = loads(plan, costs, fleet)
    speed = fleet.speed_flops_s[list(plan.devices)]
    stage = np.array(costs.forward_s) + np.array(costs.backward_s)
    spread = float((stage * speed).sum() / speed[: plan.n_workers].sum())
    return plan.micro_batches * max([spread, *devices, *links.values()])
