"""Cut a layer's feed-forward work between CPU, link and accelerator: closed form, bisection."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from jaxsys.offload.cost import accelerator_s, cpu_s, dram_s, link_s
from jaxsys.offload.types import Machine, Part, Terms


class Whole(NamedTuple):
    """Hold what a whole module would take on each resource: a launch and a time per share.

    Attributes:
        cpu_s: T_c, seconds on the CPU.
        link_s: T_p, seconds over the link.
        accelerator_s: T_g, seconds on the accelerator.
        dram_s: seconds in which the CPU's memory delivers it.
        cpu_launch_s: a_c.
        link_launch_s: a_p.
        accelerator_launch_s: a_g.

    >>> Whole(4.0, 12.0, 1.0).cpu_launch_s
    0.0
    """

    cpu_s: float | int
    link_s: float | int
    accelerator_s: float | int
    dram_s: float | int = 0.0
    cpu_launch_s: float | int = 0.0
    link_launch_s: float | int = 0.0
    accelerator_launch_s: float | int = 0.0


class Split(NamedTuple):
    """Hold the shares of a module's columns and what they take.

    Attributes:
        cpu: x_c, computed by the CPU.
        stream: x_p, copied over and computed by the accelerator.
        predicted_s: T, the slowest of the four terms.
        terms: the four.

    >>> Split(0.75, 0.25, 3.0, Terms(3.0, 3.0, 0.25)).cpu
    0.75
    """

    cpu: float
    stream: float
    predicted_s: float
    terms: Terms


def whole(part: Part, machine: Machine, tokens: float | int = 1) -> Whole:
    """Give what a part takes on each resource for a number of tokens.

    Args:
        part: an MLP or expert.
        machine: without an accelerator, only the CPU's times are not 0.
        tokens: n.

    Returns:
        Launches and times of the whole part.

    >>> from jaxsys.offload.types import Processor
    >>> machine = Machine(Processor(1.0, 9.0, 9.0, 0.5), Processor(4.0, 9.0, 9.0), 2.0)
    >>> whole(Part(0, "mlp", 8, 0.0, 4), machine)[:3]
    (8.0, 4.0, 2.0)
    """
    cpu = machine.cpu.rates(part.kind).launch_s
    if machine.accelerator is None:
        return Whole(cpu_s(part, machine, 1.0, tokens) - cpu, 0.0, 0.0, 0.0, cpu)
    accelerator = machine.accelerator.rates(part.kind).launch_s
    return Whole(
        cpu_s(part, machine, 1.0, tokens) - cpu,
        link_s(part, machine) - machine.link_latency_s,
        accelerator_s(part, machine, 1.0, tokens) - accelerator,
        dram_s(part, machine),
        cpu,
        machine.link_latency_s,
        accelerator,
    )


def terms_of(
    modules: Sequence[Whole], cpu: Sequence[float], stream: Sequence[float],
    resident: Sequence[float],
) -> Terms:  # fmt: skip
    """Give what one layer's modules take on each resource, all shares being run at once.

    ``t_cpu = Σ (a_c + x_c·T_c)``, ``t_link = Σ (a_p + x_p·T_p)``, ``t_accelerator = Σ (a_g +
    (x_g + x_p)·T_g)``, ``t_dram = Σ (x_c + x_p)·T_d``; launches count where a share is not 0.

    Args:
        modules: active in the layer, M of them.
        cpu: x_c of each, [M].
        stream: x_p of each, [M].
        resident: x_g of each, [M].

    Returns:
        The four terms; the layer takes their maximum.

    >>> terms_of([Whole(4.0, 12.0, 1.0, 2.0)], [0.5], [0.25], [0.25])
    Terms(cpu_s=2.0, link_s=3.0, accelerator_s=0.5, dram_s=1.5)
    """
    t = [0.0] * 4
    for w, c, p, g in zip(modules, cpu, stream, resident, strict=True):
        t[0] += (w.cpu_launch_s + c * w.cpu_s) if c > 0 else 0.0
        t[1] += (w.link_launch_s + p * w.link_s) if p > 0 else 0.0
        t[2] += (w.accelerator_launch_s + (g + p) * w.accelerator_s) if g + p > 0 else 0.0
        t[3] += (c + p) * w.dram_s
    return Terms(*t)


def split(module: Whole, resident: float | int = 0.0) -> Split:
    """Share out what of a module is not resident, in closed form.

    With m = 1 − x_g, the CPU and the link finish together at ``x_c = (m·T_p + a_p − a_c) /
    (T_c + T_p)``, the CPU and the accelerator at ``x_c = (T_g + a_g − a_c) / (T_c + T_g)``; the
    larger of the two, clipped to [0, m], balances what grows with x_c against what falls. Giving
    the CPU all or nothing saves a launch and is compared. The memory's term does not depend on x_c.

    Reconstruction: ScheInfer's adaptive partition is described by its aim only, to balance CPU,
    accelerator and link.

    Args:
        module: what it takes as a whole.
        resident: x_g.

    Returns:
        The shares with the least maximum of the four terms; of equals, the one with most on the
        CPU.

    >>> split(Whole(4.0, 12.0, 1.0))[:3]
    (0.75, 0.25, 3.0)
    >>> split(Whole(4.0, 12.0, 1.0), resident=0.5)[:3]
    (0.375, 0.125, 1.5)
    """
    w, m = module, 1.0 - resident
    with_link = (m * w.link_s + w.link_launch_s - w.cpu_launch_s) / max(w.cpu_s + w.link_s, 1e-300)
    with_accelerator = (w.accelerator_s + w.accelerator_launch_s - w.cpu_launch_s) / max(
        w.cpu_s + w.accelerator_s, 1e-300
    )
    balanced = min(max(with_link, with_accelerator, 0.0), m)
    return min(
        (_split(w, x, resident) for x in (m, balanced, 0.0)), key=lambda found: found.predicted_s
    )


def _split(module: Whole, cpu: float, resident: float | int) -> Split:
    stream = max(0.0, 1.0 - resident - cpu)
    terms = terms_of([module], [cpu], [stream], [resident])
    return Split(cpu, stream, max(terms), terms)


def split_layer(
    modules: Sequence[Whole], resident: Sequence[float], *, rounds: int = 60
) -> tuple[list[Split], Terms]:
    """Share out several modules that run at once, by bisection on the layer's time.

    In time T the CPU takes shares until it is full, first of those modules that it computes
    cheaply compared with what they cost on the link and the accelerator; the rest is streamed. The
    load left to the link and the accelerator falls as T grows, so the least feasible T is found by
    halving. Launches count for every module that is shared at all, so the result is exact without
    launches and where the ratios order the modules alike, and a good plan otherwise.

    Reconstruction: as `split`.

    Args:
        modules: active in the layer, M of them.
        resident: x_g of each, [M].
        rounds: halvings.

    Returns:
        A split for each module (its own four terms), and the layer's terms.

    >>> splits, terms = split_layer([Whole(4.0, 12.0, 1.0)] * 2, [0.0, 0.0])
    >>> round(max(terms), 6), round(sum(s.cpu for s in splits), 6)
    (6.0, 1.5)
    """
    cold = [1.0 - g for g in resident]
    order = sorted(
        range(len(modules)),
        key=lambda i: modules[i].cpu_s / max(modules[i].link_s, modules[i].accelerator_s, 1e-300),
    )

    def fill(budget_s: float) -> list[float]:
        shares = [0.0] * len(modules)
        for i in order:
            room = budget_s - modules[i].cpu_launch_s
            if room <= 0 or cold[i] <= 0:
                continue
            per = modules[i].cpu_s
            shares[i] = min(cold[i], room / per) if per else cold[i]
            budget_s -= modules[i].cpu_launch_s + shares[i] * per
        return shares

    def judge(shares: list[float]) -> Terms:
        streams = [max(0.0, m - x) for m, x in zip(cold, shares, strict=True)]
        return terms_of(modules, shares, streams, resident)

    low, high = 0.0, sum(w.cpu_launch_s + w.cpu_s for w in modules)
    for _ in range(rounds):
        middle = (low + high) / 2
        terms = judge(fill(middle))
        if max(terms.link_s, terms.accelerator_s) <= middle:
            high = middle
        else:
            low = middle
    best = min((fill(high), [0.0] * len(modules), cold), key=lambda x: max(judge(x)))
    return [_split(w, x, g) for w, x, g in zip(modules, best, resident, strict=True)], judge(best)


def brute_force(
    modules: Sequence[Whole], resident: Sequence[float], steps: int = 8
) -> tuple[tuple[float, ...], float]:
    """Try every share of the CPU on a grid; what the other two are tested against.

    Args:
        modules: active in the layer, M of them; (steps + 1)^M cases are tried.
        resident: x_g of each, [M].
        steps: of the grid.

    Returns:
        The best x_c of each and the layer's seconds.

    >>> brute_force([Whole(4.0, 12.0, 1.0)], [0.0])
    ((0.75,), 3.0)
    """
    cold = [1.0 - g for g in resident]
    best: tuple[tuple[float, ...], float] = ((), float("inf"))
    for counts in product(range(steps + 1), repeat=len(modules)):
        shares = tuple(m * c / steps for m, c in zip(cold, counts, strict=True))
        streams = [m - x for m, x in zip(cold, shares, strict=True)]
        seconds = max(terms_of(modules, shares, streams, resident))
        if seconds < best[1]:
            best = shares, seconds
    return best
