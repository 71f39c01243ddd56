"""Decide, once a router has spoken, what happens to the weights that are not resident."""

from collections.abc import Callable, Sequence
from typing import Literal

from jaxsys.offload.assign import assign, expert_costs
from jaxsys.offload.partition import terms_of, whole
from jaxsys.offload.types import Machine, Plan, Terms, column_bytes

# What is done with the columns of a part that are not resident: as the plan cuts them, all computed
# by the CPU, or all copied over.
Mode = Literal["planned", "cpu", "moved"]
Active = Sequence[tuple[int, int]]  # place in the plan, tokens


def can_move(plan: Plan, i: int) -> bool:
    """Say whether the plan's buffers have room to copy over all that is cold of part i, in turns.

    Two of its pieces (the planned copy and the CPU's columns) must fit at once.

    Args:
        plan: where everything is.
        i: place of the part in it.

    Returns:
        Whether it may be moved.

    >>> from jaxsys.offload.types import Part
    >>> mlp = Part(0, "mlp", n_bytes=600, flops_per_token=300.0, columns=100)
    >>> [can_move(Plan((mlp,), (50,), (0,), ("cpu",), buffer_bytes=n), 0) for n in (599, 600)]
    [False, True]
    """
    pieces = (plan.stream[i], plan.on_cpu(i))
    return plan.buffer_bytes >= 2 * max(column_bytes(plan.parts[i], n) for n in pieces)


def is_cut(plan: Plan, i: int) -> bool:
    """Say whether the plan keeps or copies some columns of part i and not all.

    >>> from jaxsys.offload.types import Part
    >>> is_cut(Plan((Part(0, "mlp", 600, 300.0, 100),), (100,), (0,), ("cpu",)), 0)
    False
    """
    return bool(plan.stream[i]) or 0 < plan.resident[i] < plan.parts[i].columns


def decide(plan: Plan, machine: Machine, active: Active) -> tuple[list[Mode], float, Terms]:
    """Decide about one layer's active parts and predict what they take together.

    Whole experts are given out by `assign.assign`, resident ones staying where they are. MLPs and
    experts that are cut go as planned while few tokens pass; with more tokens the CPU's share takes
    longer and a copy does not, so those with most tokens are moved as a whole, as many as is best.

    Reconstruction: ScheInfer's strategy for prompts is only named in its abstract.

    Args:
        plan: where everything is.
        machine: rates.
        active: of one layer: place in the plan and tokens, at least 1, of each, [A].

    Returns:
        For each the mode, then seconds and the four terms of the layer.

    >>> from jaxsys.offload.types import Part, Processor
    >>> machine = Machine(Processor(1.0, 1.0, 9.0), Processor(9.0, 99.0, 9.0), 0.5)
    >>> plan = Plan((Part(0, "mlp", 4, 1.0, 4),), (0,), (1,), ("accelerator",), buffer_bytes=8)
    >>> decide(plan, machine, [(0, 1)])[0], decide(plan, machine, [(0, 99)])[0]
    (['planned'], ['moved'])
    """
    mine = [i for i, _ in active]
    cut = plan.parts[mine[0]].kind != "expert" or any(is_cut(plan, i) for i in mine)
    if machine.accelerator is None:
        on_cpu: list[Mode] = ["cpu"] * len(mine)
        terms = mode_terms(plan, machine, active, on_cpu)
        return ["planned"] * len(mine), max(terms), terms
    return (_cut if cut else _whole)(plan, machine, active)


def mode_terms(plan: Plan, machine: Machine, active: Active, modes: Sequence[Mode]) -> Terms:
    """Predict the four terms of a layer's parts under given modes.

    Args:
        plan: where everything is.
        machine: rates.
        active: place in the plan and tokens of each part, [A].
        modes: of each, [A].

    Returns:
        The terms, without the crossings of activations that `crossed` adds.

    >>> from jaxsys.offload.types import Part, Processor
    >>> machine = Machine(Processor(1.0, 1.0, 9.0), Processor(9.0, 99.0, 9.0), 0.5)
    >>> plan = Plan((Part(0, "mlp", 4, 1.0, 4),), (0,), (1,), ("accelerator",))
    >>> mode_terms(plan, machine, [(0, 1)], ["cpu"]).cpu_s
    4.0
    """
    modules, cpu, stream, here = [], [], [], []
    for (i, tokens), mode in zip(active, modes, strict=True):
        columns = max(plan.parts[i].columns, 1)
        g, p, c = (n / columns for n in (plan.resident[i], plan.stream[i], plan.on_cpu(i)))
        modules.append(whole(plan.parts[i], machine, tokens))
        cpu.append({"cpu": c + p, "moved": 0.0}.get(mode, c))
        stream.append({"cpu": 0.0, "moved": c + p}.get(mode, p))
        here.append(g)
    return crossed(
        plan, machine, plan.parts[active[0][0]].layer, terms_of(modules, cpu, stream, here)
    )


def crossed(plan: Plan, machine: Machine, layer: int, terms: Terms) -> Terms:
    """Add two crossings of activations to the processor that has not the layer's attention.

    >>> from jaxsys.offload.types import Part, Processor
    >>> machine = Machine(Processor(1.0, 1.0, 9.0), Processor(9.0, 99.0, 9.0), 0.5, 0.25)
    >>> crossed(Plan((Part(0, "norms", 4, 1.0),), (1,), (0,), ("cpu",)), machine, 0, Terms(1, 0, 1))
    Terms(cpu_s=1, link_s=0, accelerator_s=1.5, dram_s=0.0)
    """
    hops = 2 * machine.link_latency_s if machine.accelerator is not None else 0.0
    if plan.cache_on[layer] == "accelerator" and terms.cpu_s:
        return terms._replace(cpu_s=terms.cpu_s + hops)
    if plan.cache_on[layer] == "cpu" and terms.accelerator_s:
        return terms._replace(accelerator_s=terms.accelerator_s + hops)
    return terms


def chooser(
    plan: Plan, machine: Machine
) -> Callable[[int, Sequence[int], Sequence[int]], list[Mode]]:
    """Make what an engine asks in every layer: `decide` for a plan's parts by their names.

    Args:
        plan: where everything is.
        machine: rates.

    Returns:
        (layer, active experts, their tokens) -> the mode of each. A dense MLP is asked for as
        expert -1.

    >>> from jaxsys.offload.types import Part, Processor
    >>> machine = Machine(Processor(1.0, 1.0, 9.0), Processor(9.0, 99.0, 9.0), 0.5)
    >>> parts = tuple(Part(0, "expert", 4, 1.0, 4, e, 0.5) for e in range(3))
    >>> plan = Plan(parts, (4, 0, 0), (0, 0, 0), ("accelerator",), buffer_bytes=8)
    >>> chooser(plan, machine)(0, [0, 1, 2], [1, 1, 99])
    ['planned', 'cpu', 'moved']
    """
    places = {
        (part.layer, part.expert): i
        for i, part in enumerate(plan.parts)
        if part.kind in ("mlp", "expert")
    }

    def choose(layer: int, experts: Sequence[int], counts: Sequence[int]) -> list[Mode]:
        mine = [places[layer, int(e)] for e in experts]
        return decide(plan, machine, list(zip(mine, map(int, counts), strict=True)))[0]

    return choose


def _whole(plan: Plan, machine: Machine, active: Active):
    part = plan.parts[active[0][0]]
    costs, counts = expert_costs(part, machine), [n for _, n in active]
    resident = [bool(plan.resident[i]) for i, _ in active]
    move = all(can_move(plan, i) for i, _ in active)
    found = assign(counts, resident, costs, keep=True, move=move)
    modes: list[Mode] = [
        "planned" if here else "moved" if moved else "cpu"
        for here, moved in zip(resident, found.moved, strict=True)
    ]
    terms = crossed(plan, machine, part.layer, mode_terms(plan, machine, active, modes))
    return modes, max(found.predicted_s, *terms), terms


def _cut(plan: Plan, machine: Machine, active: Active):
    layer = plan.parts[active[0][0]].layer

    def judge(modes: list[Mode]) -> tuple[float, list[Mode], Terms]:
        terms = crossed(plan, machine, layer, mode_terms(plan, machine, active, modes))
        return max(terms), list(modes), terms

    modes: list[Mode] = ["planned"] * len(active)
    best = judge(modes)
    many = any(n > 1 for _, n in active)  # the plan itself was made for one token
    for j in sorted(range(len(active)), key=lambda j: -active[j][1]):
        if many and can_move(plan, active[j][0]):
            modes[j] = "moved"
            best = min(best, judge(modes), key=lambda found: found[0])
    seconds, chosen, terms = best
    return chosen, seconds, terms
