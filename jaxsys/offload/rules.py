"""Published rules that give a layer's experts out, and simple ones, to hold `assign` against."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxsys.offload.assign import ExpertCosts, check_counts, choices, in_order
from jaxsys.offload.types import Assignment

# Constants left in HybriMoE's released code, set by hand for each model; their unit is not stated.
RELEASED = {
    "deepseek": ExpertCosts(0.0, 1.0, 0.418, 0.5, 0.0, cpu_first_s=0.79),
    "mixtral": ExpertCosts(0.0, 0.2, 0.418, 0.5, 0.0, cpu_first_s=0.79),
    "qwen2": ExpertCosts(0.0, 0.8, 0.418, 0.5, 0.0, cpu_first_s=0.79),
}
# Constants of Fiddler's released code: 7 for a token on the CPU, 70 for a copy, nothing else.
FIDDLER = ExpertCosts(0.0, 7.0, 70.0, 0.0, 0.0)


def list_schedule(
    counts: Sequence[int], resident: Sequence[bool], costs: ExpertCosts
) -> Assignment:
    """Schedule as HybriMoE's released code does, from both ends of one list.

    1. Resident experts by tokens, most first, then the others likewise.
    2. Clocks G (accelerator), C (CPU), P (copies). The front costs the accelerator ``t_g(n)`` and,
       if it is a miss, the wait ``max(0, P + t_move − G)``; the back costs the CPU ``t_c(n)``, and
       something once for its first.
    3. If ``G + cost ≤ C + cost`` the accelerator takes the front, else the CPU the back; repeat.

    Args:
        counts: tokens of each active expert, at least 1, [A].
        resident: whether its weights are on the accelerator, [A].
        costs: of an expert; `RELEASED` holds the constants of the released code.

    Returns:
        Who runs what in which order.

    Raises:
        UserError: lengths that differ, or a count below 1.

    Reference: HybriMoE (arXiv 2504.05897), released code.

    >>> from jaxsys.offload.assign import ExpertCosts
    >>> found = list_schedule([1, 1, 9], [False, False, True], ExpertCosts(1.0, 0.1, 5.0, 0.5, 0.0))
    >>> found.device, found.predicted_s
    (('cpu', 'cpu', 'accelerator'), 2.0)
    """
    counts, resident = check_counts(counts, resident)
    queue = sorted(range(len(counts)), key=lambda e: (not resident[e], -counts[e]))
    order, places, moved = [], ["cpu"] * len(counts), [False] * len(counts)
    g = c = p = 0.0
    while queue:
        front, back = queue[0], queue[-1]
        cost = costs.accelerator_s(counts[front])
        if not resident[front]:
            cost += max(0.0, p + costs.move_s - g)
        work = costs.cpu_s(counts[back]) + (costs.cpu_first_s if c == 0 else 0.0)
        if g + cost <= c + work:
            e, g = queue.pop(0), g + cost
            places[e], moved[e] = "accelerator", not resident[e]
            p += costs.move_s * moved[e]
        else:
            e, c = queue.pop(), c + work
        order.append(e)
    return Assignment(tuple(places), tuple(order), tuple(moved), float(max(c, g)))  # type: ignore[arg-type]


def by_tokens(counts: Sequence[int], resident: Sequence[bool], costs: ExpertCosts) -> Assignment:
    """Assign by the break-even count: resident experts stay, of the others those with few tokens.

    An expert that is not resident runs on the CPU if that takes less than its copy, ``n < n*``, and
    is moved otherwise.

    Reconstruction: ScheInfer's token assignment is only named in its abstract.

    Args:
        counts: tokens of each active expert, at least 1, [A].
        resident: whether its weights are on the accelerator, [A].
        costs: of an expert.

    Returns:
        The assignment.

    Raises:
        UserError: lengths that differ, or a count below 1.

    >>> from jaxsys.offload.assign import ExpertCosts
    >>> by_tokens([1, 99], [False, False], ExpertCosts(2.0, 0.1, 5.0, 0.5, 0.0)).device
    ('cpu', 'accelerator')
    """
    counts, resident = check_counts(counts, resident)
    on_cpu = [
        not here and costs.cpu_s(n) < costs.move_s for n, here in zip(counts, resident, strict=True)
    ]
    return in_order(counts, resident, on_cpu, costs)


def on_cpu(counts: Sequence[int], resident: Sequence[bool], costs: ExpertCosts) -> Assignment:
    """Run every miss on the CPU: what llama.cpp does with experts that it keeps there.

    >>> from jaxsys.offload.assign import ExpertCosts
    >>> on_cpu([1, 9], [True, False], ExpertCosts(2.0, 0.0, 0.5, 1.0, 0.0)).device
    ('accelerator', 'cpu')
    """
    counts, resident = check_counts(counts, resident)
    return in_order(counts, resident, [not here for here in resident], costs)


def all_moved(counts: Sequence[int], resident: Sequence[bool], costs: ExpertCosts) -> Assignment:
    """Copy every miss over: what systems do that compute nothing on the CPU.

    >>> from jaxsys.offload.assign import ExpertCosts
    >>> all_moved([1, 9], [True, False], ExpertCosts(2.0, 0.0, 9.0, 1.0, 0.0)).moved
    (False, True)
    """
    counts, resident = check_counts(counts, resident)
    return in_order(counts, resident, [False] * len(counts), costs)


def fiddler(
    counts: Sequence[int], resident: Sequence[bool], costs: ExpertCosts,
    minimise: Literal["sum", "max"] = "sum",
) -> Assignment:  # fmt: skip
    """Assign as Fiddler does, by an exhaustive search over CPU or accelerator for each expert.

    A miss costs the accelerator its copy. The released code's comment says that the search
    minimises the longer of both; the code minimises their sum, and runs the accelerator's experts
    before the CPU's, so nothing overlaps and the prediction is the sum either way.

    Args:
        counts: tokens of each active expert, at least 1, [A].
        resident: whether its weights are on the accelerator, [A].
        costs: of an expert; `FIDDLER` holds the constants of the released code.
        minimise: ``sum`` as the code does or ``max`` as its comment says.

    Returns:
        The assignment, its prediction without any overlap.

    Raises:
        UserError: lengths that differ, a count below 1, or more than `MOST_EXACT` experts for max.

    Reference: Fiddler (arXiv 2402.07033), released code.

    >>> fiddler([1, 11], [False, False], FIDDLER).device
    ('cpu', 'accelerator')
    >>> fiddler([9, 9], [False, False], FIDDLER).device, FIDDLER.cpu_s(9)
    (('cpu', 'cpu'), 63.0)
    """
    counts, resident = check_counts(counts, resident)
    cpu, accelerator = costs.of_each(counts)
    accelerator += costs.move_s * ~np.array(resident)
    if minimise == "sum":
        masks = (cpu < accelerator)[None]
    else:
        masks = choices(len(counts))
    total = np.stack([masks @ cpu + costs.cpu_first_s * masks.any(1), ~masks @ accelerator])
    judged = total.sum(0) if minimise == "sum" else total.max(0)
    best = int(np.argmin(judged))
    found = in_order(counts, resident, masks[best].tolist(), costs)
    return found._replace(predicted_s=float(total[:, best].sum()))
