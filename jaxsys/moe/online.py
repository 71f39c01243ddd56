"""Let measurements decide between the best predicted plans, and say when to plan anew.

The state is a value: time a step with `current(state)`, hand the seconds to `observe`, go on with
the state that it returns.
"""

from collections.abc import Sequence
from math import isfinite
from statistics import median
from typing import NamedTuple

from jaxsys.core.errors import UserError
from jaxsys.moe.contract import MoEPlan


class Online(NamedTuple):
    """Hold the candidates and what was measured of them.

    Attributes:
        plans: candidates, the best predicted first.
        seconds: per candidate its measured steps, oldest first.
        trials: steps of each candidate before one is chosen.
        winner: index of the chosen one; None while trying.
        baseline_s: the winner's median over its trials; 0 while trying.
        recent: seconds of the last steps since.
        window: how many of them are kept.
        tolerance: share by which their median may leave the baseline.
        skip: steps of each candidate not counted, in which it compiles.

    >>> Online._fields[:2]
    ('plans', 'seconds')
    """

    plans: tuple[MoEPlan, ...]
    seconds: tuple[tuple[float, ...], ...]
    trials: int
    winner: int | None
    baseline_s: float
    recent: tuple[float, ...]
    window: int
    tolerance: float
    skip: int


def start(
    plans: Sequence[MoEPlan],
    *,
    trials: int = 5,
    window: int = 20,
    tolerance: float | int = 0.2,
    skip: int = 1,
) -> Online:
    """Begin with the candidates, for example three of `planner.rivals`.

    Args:
        plans: the best predicted first.
        trials: steps to time each.
        window: steps whose median is watched afterwards.
        tolerance: relative change of that median which calls for a new plan.
        skip: steps of each candidate not counted.

    Returns:
        The state.

    Raises:
        UserError: for no plan, a plan twice, or counts below 1.

    >>> current(start([MoEPlan()])) == MoEPlan()
    True
    """
    if not plans or len(set(plans)) < len(plans):
        raise UserError(
            f"there are {len(plans)} plans, {len(set(plans))} of them different; expected one or "
            "more different ones; take those of `rivals`"
        )
    for name, value, least in (("trials", trials, 1), ("window", window, 1), ("skip", skip, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; expected a whole number from {least} up; raise it")
    if not tolerance > 0:
        raise UserError(f"tolerance is {tolerance}; expected a number above 0, such as 0.2")
    empty = ((),) * len(plans)
    return Online(tuple(plans), empty, trials, None, 0.0, (), window, float(tolerance), skip)


def current_index(state: Online) -> int:
    """Return the number of the plan to run next: the winner, or the least tried.

    Candidates take turns, so that a slow minute of the machine hits them all alike; on a tie the
    better predicted goes first.

    >>> current_index(start([MoEPlan()]))
    0
    """
    if state.winner is not None:
        return state.winner
    counts = [len(times) for times in state.seconds]
    return counts.index(min(counts))


def current(state: Online) -> MoEPlan:
    """Return the plan to run next.

    >>> current(start([MoEPlan()])).layers[0].forward
    1
    """
    return state.plans[current_index(state)]


def observe(state: Online, seconds: float | int) -> Online:
    """Record the measured seconds of a step under `current`.

    Args:
        state: before.
        seconds: of the step.

    Returns:
        The state after; once every candidate has its trials the one with the least median wins.

    Raises:
        UserError: for a time that is not positive.

    >>> state = start([MoEPlan(), MoEPlan(predicted_s=1.0)], trials=1, skip=0)
    >>> for seconds in (2.0, 1.5):
    ...     state = observe(state, seconds)
    >>> state.winner, state.baseline_s
    (1, 1.5)
    """
    if not (isfinite(seconds) and seconds > 0):
        raise UserError(f"a step took {seconds} s; expected a positive time; measure again")
    if state.winner is not None:
        return state._replace(recent=(*state.recent, float(seconds))[-state.window :])
    index = current_index(state)
    times = list(state.seconds)
    times[index] = (*times[index], float(seconds))
    state = state._replace(seconds=tuple(times))
    if min(map(len, times)) < state.trials + state.skip:
        return state
    medians = [median(t[state.skip :]) for t in times]
    winner = medians.index(min(medians))
    return state._replace(winner=winner, baseline_s=medians[winner])


def drifted(state: Online) -> bool:
    """Tell whether the machine has changed so much that profiling and planning again is due.

    Returns:
        Whether the median of the last ``window`` steps differs from the winner's trials by more
        than the tolerance, up or down; False until there are that many.

    >>> state = start([MoEPlan()], trials=1, skip=0, window=2)
    >>> for seconds in (1.0, 1.1, 1.5, 1.6):
    ...     state = observe(state, seconds)
    >>> drifted(state)
    True
    """
    if len(state.recent) < state.window:
        return False
    return abs(median(state.recent) / state.baseline_s - 1.0) > state.tolerance
