"""Plan which layers are synchronised in which iteration of a period."""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise

import jax
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.fields import check_fields, read_object, reading
from jaxsys.localsgd.plan_dp import plan_runs
from jaxsys.localsgd.plan_search import best_assignment, dfs_search
from jaxsys.localsgd.plan_time import (
    check_launch,
    check_layers,
    check_times,
    fill_bubbles,
    phase_wait_s,
    release_s,
    wait_s,
)

__all__ = ["METHODS", "SyncPlan", "plan_sync", "wait_s"]

METHODS = ("dreamddp", "dfs", "equal", "full", "best")


@dataclass(frozen=True)
class SyncPlan:
    """Say which layers each iteration of a period synchronises, and what that should cost.

    Attributes:
        method: what made the plan, a `Method` or the name of a fixed schedule.
        launch: when a layer's communication may start; ``after`` for ``full``.
        fill: whether hidden extra synchronisations were added.
        n_layers: number of layers L.
        phases: per iteration of the period, ascending layer indices in backward order (index 0 is
            nearest the loss).
        wait_s: per iteration, predicted seconds beyond the compute.
        comm_s: per iteration, seconds of communication, hidden or not.
        compute_s: forward + backward + tail seconds of one iteration.

    >>> SyncPlan("full", "after", False, 2, ((), (0, 1)), (0.0, 3.0), (0.0, 3.0), 1.0).predicted_s
    2.5
    """

    method: str
    launch: str
    fill: bool
    n_layers: int
    phases: tuple[tuple[int, ...], ...]
    wait_s: tuple[float, ...]
    comm_s: tuple[float, ...]
    compute_s: float

    @property
    def period(self) -> int:
        """Iterations H in a period."""
        return len(self.phases)

    @property
    def predicted_s(self) -> float:
        """Mean seconds of an iteration: compute plus mean wait."""
        return self.compute_s + sum(self.wait_s) / self.period

    @property
    def hidden_share(self) -> float:
        """Share of the communication that runs behind compute, ``1 − Σ wait / Σ comm``."""
        total = sum(self.comm_s)
        return max(0.0, 1.0 - sum(self.wait_s) / total) if total > 0 else 1.0

    def to_json(self) -> str:
        """Write the plan as one JSON object, with its prediction for readers.

        Returns:
            JSON text that `from_json` reads back.

        >>> plan = plan_sync([1, 1], [2, 2], 2)
        >>> SyncPlan.from_json(plan.to_json()) == plan
        True
        """
        derived = {"period": self.period, "predicted_s": self.predicted_s}
        return json.dumps({**asdict(self), **derived, "hidden_share": self.hidden_share})

    @classmethod
    def from_json(cls, text: str) -> "SyncPlan":
        """Read a plan, checking it as a foreign file.

        Args:
            text: what `to_json` wrote.

        Returns:
            The plan.

        Raises:
            UserError: no JSON object, a field missing, unknown or of the wrong kind, a layer in no
                iteration or one that does not exist.

        >>> SyncPlan.from_json("[]")
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: the plan is a list; ...
        """
        found = read_object(text, "plan")
        for derived in ("period", "predicted_s", "hidden_share"):
            found.pop(derived, None)
        return _checked_plan(cls, found)


def _checked_plan(cls, found: dict) -> SyncPlan:
    found = check_fields(found, cls, "plan")
    with reading("plan"):
        plan = SyncPlan(
            method=found["method"],
            launch=found["launch"],
            fill=bool(found["fill"]),
            n_layers=int(found["n_layers"]),
            phases=tuple(tuple(int(i) for i in layers) for layers in found["phases"]),
            wait_s=tuple(float(seconds) for seconds in found["wait_s"]),
            comm_s=tuple(float(seconds) for seconds in found["comm_s"]),
            compute_s=float(found["compute_s"]),
        )
    _check_period(plan.period)
    check_launch(plan.launch)
    times = [*plan.wait_s, *plan.comm_s, plan.compute_s]
    if not (len(plan.wait_s) == len(plan.comm_s) == plan.period) or not all(
        np.isfinite(seconds) and seconds >= 0 for seconds in times
    ):
        raise UserError(
            f"the plan has {plan.period} phases, {len(plan.wait_s)} waits and {len(plan.comm_s)} "
            "communication times; it must have one finite, not negative time per phase; make the "
            "plan again"
        )
    covered = {i for layers in plan.phases for i in check_layers(layers, plan.n_layers)}
    if len(covered) < plan.n_layers:
        raise UserError(
            f"the plan synchronises {len(covered)} of {plan.n_layers} layers; every layer must be "
            "in some phase; make the plan again"
        )
    return plan


def _check_method(method: str, period: int) -> None:
    if method not in METHODS:
        raise UserError(
            f"method is {method!r}; it must be one of {', '.join(METHODS)}; pass one of these"
        )
    _check_period(period)


def _check_period(period: int) -> None:
    if period < 1:
        raise UserError(
            f"period is {period}; it must be at least 1; pass the number of iterations in which "
            "every layer is to be synchronised once"
        )


def plan_sync(
    backward_s,
    comm_s,
    period: int,
    *,
    forward_s: int | float = 0.0,
    tail_s: int | float = 0.0,
    method: str = "dreamddp",
    launch: str = "gated",
    fill: bool = False,
    fill_margin: int | float = 0.0,
) -> SyncPlan:
    """Choose in which iteration of a period each layer is synchronised.

    The plan minimises ``Σ_h wait(S_h)`` (see `plan_time.wait_s`) over the assignments that its
    method allows:

    - ``dreamddp``: one contiguous run of layers per iteration, exact (see `plan_dp.schedule`). No
      iteration is empty while layers suffice.
    - ``dfs``: what the released search finds by its own accounting (`plan_search.dfs_search`).
    - ``equal``: runs of ⌈L/H⌉ layers from the output side, the last ones shorter or empty, as in
      the artifact's time model (its training code puts ⌊L/H⌋ + 1 into a run).
    - ``full``: local SGD; all layers in the last iteration once its compute is done, so its
      launch is ``after`` whatever was asked and it waits for all communication.
    - ``best``: any assignment; exact up to 12 layers, local search beyond, never worse than
      ``dreamddp`` (see `plan_search.best_assignment`).

    Args:
        backward_s: backward seconds per layer, backward order (index 0 is nearest the loss), [L].
        comm_s: communication seconds per layer, same order, [L].
        period: iterations H in which every layer is synchronised once.
        forward_s: seconds of the forward pass.
        tail_s: seconds of compute after the last backward (the optimiser's update), behind which
            communication still hides.
        method: as above.
        launch: ``gated``, ``eager`` or ``after``, as in `plan_time.wait_s`.
        fill: add synchronisations that cost no wait (see `plan_time.fill_bubbles`).
        fill_margin: share by which every communication is taken to be longer while filling, since a
            bubble filled to the brim turns any jitter into waiting; 0 as in the paper.

    Returns:
        The plan with its prediction, from float64 arithmetic.

    Raises:
        UserError: period below 1, unknown method or launch, bad times or lengths that differ.

    Reference: arXiv 2502.11058.

    >>> plan = plan_sync([1] * 6, [2, 1, 1, 3, 1, 1], 3)
    >>> plan.phases, plan.wait_s, round(plan.predicted_s, 3)
    (((0, 1, 2), (3,), (4, 5)), (0.0, 1.0, 1.0), 6.667)
    """
    _check_method(method, period)
    check_launch(launch)
    backward_s, comm_s = check_times(backward_s, comm_s, forward_s, tail_s)
    if method == "full":
        launch = "after"
    release, end = release_s(backward_s, launch, forward_s, tail_s)
    n = len(comm_s)
    if method == "dfs":
        phases = dfs_search(backward_s, comm_s, period)[0]
    elif method == "equal":
        size = -(-n // period)
        phases = tuple(tuple(range(n)[h * size : (h + 1) * size]) for h in range(period))
    elif method == "full":
        phases = ((),) * (period - 1) + (tuple(range(n)),)
    else:
        phases = _runs(backward_s, comm_s, period, launch, forward_s, tail_s)
        if method == "best":
            phases = best_assignment(phases, period, release, end, comm_s)
    if fill:
        longer = comm_s * (1.0 + fill_margin)
        phases = tuple(fill_bubbles(layers, release, end, longer) for layers in phases)
    return SyncPlan(
        method=method,
        launch=launch,
        fill=fill,
        n_layers=n,
        phases=phases,
        wait_s=tuple(phase_wait_s(layers, release, end, comm_s) for layers in phases),
        comm_s=tuple(float(comm_s[list(layers)].sum()) for layers in phases),
        compute_s=float(forward_s + end),
    )


def _runs(backward_s, comm_s, period, launch, forward_s, tail_s) -> tuple[tuple[int, ...], ...]:
    """Run the exact programme in float64, padded so that similar sizes share a compilation."""
    n = len(comm_s)
    padded = np.zeros((2, _round_up(n, 8 if n <= 64 else 64)))
    padded[:, :n] = backward_s, comm_s
    used = min(period, n)  # with more iterations than layers the rest stays empty
    with jax.enable_x64(True):
        ends, _ = plan_runs(
            padded[0],
            padded[1],
            n,
            used,
            max_period=_round_up(used, 4),
            launch=launch,
            forward_s=float(forward_s),
            tail_s=float(tail_s),
        )
    cuts = [0, *np.asarray(ends)[:used].tolist()]
    runs = [tuple(range(s, e)) for s, e in pairwise(cuts)]
    return (*runs, *((),) * (period - used))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
