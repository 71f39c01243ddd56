"""Give one layer's active experts to the CPU or the accelerator at best; exact search as oracle.

Everything here is a function of (tokens of each active expert, which are resident, costs), pure and
in NumPy or plain Python: an engine calls it between the router and the experts.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.offload.types import Assignment, Machine, Part, Where

MOST_EXACT = 16  # 2^16 cases at once


class ExpertCosts(NamedTuple):
    """Hold what an expert with n tokens takes: ``launch + max(floor, per token · n)``, and a move.

    Attributes:
        cpu_floor_s: seconds in which the CPU reads an expert's weights.
        cpu_token_s: seconds of a token's arithmetic on the CPU.
        move_s: seconds in which an expert's weights cross the link.
        accelerator_floor_s: as for the CPU.
        accelerator_token_s: as for the CPU.
        cpu_launch_s: of each expert on the CPU.
        accelerator_launch_s: of each expert on the accelerator.
        cpu_first_s: once, before the CPU's first expert (activations crossing over and back).

    >>> ExpertCosts(2.0, 0.5, 4.0, 0.5, 0.0).cpu_s(8)
    4.0
    """

    cpu_floor_s: float | int
    cpu_token_s: float | int
    move_s: float | int
    accelerator_floor_s: float | int
    accelerator_token_s: float | int
    cpu_launch_s: float | int = 0.0
    accelerator_launch_s: float | int = 0.0
    cpu_first_s: float | int = 0.0

    def cpu_s(self, tokens: float | int) -> float:
        """Predict the CPU's seconds for an expert.

        >>> ExpertCosts(2.0, 0.5, 4.0, 0.5, 0.0, cpu_launch_s=1.0).cpu_s(1)
        3.0
        """
        return self.cpu_launch_s + max(self.cpu_floor_s, self.cpu_token_s * tokens)

    def accelerator_s(self, tokens: float | int) -> float:
        """Predict the accelerator's seconds for an expert whose weights are there.

        >>> ExpertCosts(2.0, 0.5, 4.0, 0.5, 0.25).accelerator_s(4)
        1.0
        """
        floor, per = self.accelerator_floor_s, self.accelerator_token_s
        return self.accelerator_launch_s + max(floor, per * tokens)

    def of_each(self, counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Predict both for each of several experts, [A] each.

        >>> [s.tolist() for s in ExpertCosts(2.0, 0.5, 4.0, 0.5, 0.25).of_each([1, 8])]
        [[2.0, 4.0], [0.5, 2.0]]
        """
        cpu, accelerator = map(self.cpu_s, counts), map(self.accelerator_s, counts)
        return np.array(list(cpu)), np.array(list(accelerator))


def expert_costs(part: Part, machine: Machine) -> ExpertCosts:
    """Give the costs of a layer's experts on a machine.

    Args:
        part: one of the experts; all of a layer are alike.
        machine: with an accelerator.

    Returns:
        Costs; the CPU's first expert waits for two crossings of the link's latency.

    Raises:
        UserError: a machine without an accelerator.

    >>> from jaxsys.offload.types import Processor
    >>> machine = Machine(Processor(50.0, 1e3, 9.0), Processor(200.0, 1e5, 9.0), 25.0)
    >>> expert_costs(Part(0, "expert", 100, 100.0, 4, 0), machine)[:4]
    (2.0, 0.1, 4.0, 0.5)
    """
    if machine.accelerator is None:
        raise UserError(
            f"the machine {machine.name!r} has no accelerator; expected one to share experts with; "
            "run every expert on the CPU"
        )
    cpu, accelerator = machine.cpu.rates(part.kind), machine.accelerator.rates(part.kind)
    return ExpertCosts(
        part.n_bytes / cpu.bytes_per_s,
        part.flops_per_token / cpu.flops_s,
        machine.link_latency_s + part.n_bytes / machine.link_bytes_per_s,
        part.n_bytes / accelerator.bytes_per_s,
        part.flops_per_token / accelerator.flops_s,
        cpu.launch_s,
        accelerator.launch_s,
        2 * machine.link_latency_s,
    )


def makespan(
    assignment: Assignment, counts: Sequence[int], resident: Sequence[bool], costs: ExpertCosts
) -> float:
    """Predict the seconds of an assignment with CPU, link and accelerator at work together.

    The CPU runs its experts one after another, the link copies in the given order, and the
    accelerator runs each expert when it is free and the weights have come.

    Args:
        assignment: to judge.
        counts: tokens of each active expert, [A].
        resident: whether its weights are on the accelerator, [A].
        costs: of an expert.

    Returns:
        Seconds until the last expert has run.

    Raises:
        UserError: lengths that differ, a count below 1, an order that is none, or an expert on the
            accelerator that is neither resident nor moved.

    >>> costs = ExpertCosts(2.0, 0.0, 3.0, 1.0, 0.0)
    >>> two = Assignment(("accelerator", "accelerator"), (0, 1), (False, True))
    >>> makespan(two, [1, 1], [True, False], costs)
    4.0
    """
    counts, resident = check_counts(counts, resident)
    places = assignment.device
    lengths = {len(places), len(assignment.moved), len(counts)}
    if len(lengths) > 1 or sorted(assignment.order) != list(range(len(counts))):
        raise UserError(
            f"the assignment of {len(counts)} experts has {len(places)} places and the order "
            f"{assignment.order}; expected each expert once; make it again"
        )
    cpu = link = accelerator = 0.0
    for e in assignment.order:
        moved = assignment.moved[e]
        if places[e] == "cpu":
            cpu += costs.cpu_s(counts[e]) + (costs.cpu_first_s if cpu == 0 else 0.0)
            continue
        if resident[e] == moved:
            raise UserError(
                f"expert {e} runs on the accelerator and is {'' if moved else 'neither '}resident "
                f"{'and' if moved else 'nor'} moved; expected exactly one; mend the assignment"
            )
        if moved:
            link += costs.move_s
            accelerator = max(accelerator, link)
        accelerator += costs.accelerator_s(counts[e])
    return max(cpu, accelerator)


def exact(counts: Sequence[int], resident: Sequence[bool], costs: ExpertCosts) -> Assignment:
    """Find the assignment with the least makespan among all 2^A.

    For given places the best order is known: resident experts first, then the moved ones by tokens,
    most first (Johnson's rule for equal copies), so only places need be searched.

    Args:
        counts: tokens of each active expert, at least 1, [A] with A up to `MOST_EXACT`.
        resident: whether its weights are on the accelerator, [A].
        costs: of an expert.

    Returns:
        The assignment.

    Raises:
        UserError: lengths that differ, a count below 1, or too many experts.

    >>> exact([1, 1, 9], [False, False, True], ExpertCosts(1.0, 0.1, 5.0, 0.5, 0.0)).predicted_s
    2.0
    """
    counts, resident = check_counts(counts, resident)
    masks = choices(len(counts))
    best = int(np.argmin(_makespans(masks, counts, resident, costs)))
    return in_order(counts, resident, masks[best].tolist(), costs)


def assign(
    counts: Sequence[int],
    resident: Sequence[bool],
    costs: ExpertCosts,
    *,
    keep: bool = False,
    move: bool = True,
) -> Assignment:
    """Find the best assignment in a time that decoding can spare.

    Exact for up to 10 active experts. For more, the CPU takes the misses with fewest tokens and the
    resident experts with fewest, and all pairs of how many are tried. Equal questions (while one
    token decodes, only which experts are resident differs) are answered from memory.

    Args:
        counts: tokens of each active expert, at least 1, [A].
        resident: whether its weights are on the accelerator, [A].
        costs: of an expert.
        keep: resident experts never run on the CPU, for engines without a second copy of them.
        move: experts may cross the link.

    Returns:
        The assignment.

    Raises:
        UserError: lengths that differ, or a count below 1.

    >>> assign([1, 1], [True, False], ExpertCosts(1.0, 0.1, 5.0, 0.5, 0.0)).device
    ('accelerator', 'cpu')
    """
    counts, resident = check_counts(counts, resident)
    return _assign(tuple(counts), tuple(resident), costs, keep, move)


@lru_cache(maxsize=4096)
def _assign(counts, resident, costs: ExpertCosts, keep: bool, move: bool) -> Assignment:
    masks = choices(len(counts)) if len(counts) <= 10 else _threshold_masks(counts, resident)
    here = np.array(resident, bool)
    seconds = _makespans(masks, counts, resident, costs)
    allowed = ~(keep & masks[:, here].any(1)) & (move | masks[:, ~here].all(1))
    best = int(np.argmin(np.where(allowed, seconds, np.inf)))
    return in_order(list(counts), list(resident), masks[best].tolist(), costs)


def _threshold_masks(counts: Sequence[int], resident: Sequence[bool]) -> np.ndarray:
    """The CPU takes the c misses and the r resident experts with fewest tokens, all (c, r)."""
    rank = np.zeros(len(counts), int)
    here = np.array(resident)
    for group in (here, ~here):
        members = np.flatnonzero(group)
        rank[members[np.argsort(np.array(counts)[members], kind="stable")]] = range(len(members))
    n_misses, n_here = int((~here).sum()), int(here.sum())
    c, r = np.meshgrid(np.arange(n_misses + 1), np.arange(n_here + 1), indexing="ij")
    least = np.where(here, r.reshape(-1, 1), c.reshape(-1, 1))
    return rank < least


def _makespans(
    masks: np.ndarray, counts: Sequence[int], resident: Sequence[bool], costs: ExpertCosts
) -> np.ndarray:
    """Seconds of every choice of the CPU's experts, in the best order, [cases]."""
    here = np.array(resident, bool)
    cpu_each, accelerator_each = costs.of_each(counts)
    cpu = masks @ cpu_each + costs.cpu_first_s * masks.any(1)
    link, clock = np.zeros(len(masks)), ~masks[:, here] @ accelerator_each[here]
    for e in sorted(np.flatnonzero(~here).tolist(), key=lambda e: -counts[e]):
        moved = ~masks[:, e]
        link = link + costs.move_s * moved
        clock = np.where(moved, np.maximum(clock, link) + accelerator_each[e], clock)
    return np.maximum(cpu, clock)


def check_counts(counts: Sequence[int], resident: Sequence[bool]) -> tuple[list[int], list[bool]]:
    """Turn both lists into plain numbers, checked.

    Raises:
        UserError: lengths that differ, or a count below 1.

    >>> check_counts([2, 1], [True, False])
    ([2, 1], [True, False])
    """
    counts, resident = [int(n) for n in counts], [bool(here) for here in resident]
    if len(counts) != len(resident) or min(counts, default=1) < 1:
        raise UserError(
            f"the experts have the token counts {counts} and {len(resident)} entries of residency; "
            "expected one of each per active expert, with at least one token; pass active ones only"
        )
    return counts, resident


@lru_cache(maxsize=32)
def choices(n: int) -> np.ndarray:
    """List every choice of which of n experts the CPU runs, [2^n, n].

    Raises:
        UserError: more than `MOST_EXACT` experts.

    >>> choices(2).astype(int).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    if n > MOST_EXACT:
        raise UserError(
            f"{n} experts are active; an exhaustive search takes at most {MOST_EXACT}; use "
            "list_schedule or assign"
        )
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def in_order(
    counts: list[int], resident: list[bool], on_cpu: Sequence[bool], costs: ExpertCosts
) -> Assignment:
    """Order an assignment at best: resident experts first, then by tokens, most first.

    Args:
        counts: tokens of each active expert, [A].
        resident: whether its weights are on the accelerator, [A].
        on_cpu: whether the CPU runs it, [A].
        costs: of an expert.

    Returns:
        The assignment with its makespan.

    >>> in_order([1, 1], [False, True], [True, False], ExpertCosts(2.0, 0.0, 3.0, 1.0, 0.0)).order
    (1, 0)
    """
    places: tuple[Where, ...] = tuple("cpu" if c else "accelerator" for c in on_cpu)
    order = sorted(range(len(counts)), key=lambda e: (not resident[e], -counts[e]))
    moved = tuple(not c and not here for c, here in zip(on_cpu, resident, strict=True))
    found = Assignment(places, tuple(order), moved)
    return found._replace(predicted_s=float(makespan(found, counts, resident, costs)))
