"""The exact planner over contiguous runs of layers, as one compiled, batchable programme."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.localsgd.plan_time import check_launch


def schedule(
    backward_s: Float[Array, "L"],
    comm_s: Float[Array, "L"],
    period: int | Int[Array, ""],
    *,
    max_period: int,
    launch: str = "gated",
    forward_s: int | float | Float[Array, ""] = 0.0,
    tail_s: int | float | Float[Array, ""] = 0.0,
) -> tuple[Int[Array, "H"], Float[Array, "H"]]:
    """Cut the layers into at most ``period`` contiguous runs with the least total wait.

    With releases ``r_i`` (see `plan_time.release_s`), prefix sums ``C_i = Σ_{j<i} c_j`` and the end
    of the compute T, the run of layers s … e−1 waits

        w(s, e) = max(0, C_e − T + max_{s≤i<e} (r_i − C_i)),   w(e, e) = 0,

    and ``F_h(e) = min_{s≤e} F_{h−1}(s) + w(s, e)``. All h advance together while e grows: time is
    O(period · L²) and memory O(period · L), for no L × L table is stored.

    Cutting a run in two never adds wait, so a plan without empty runs is among the best whenever
    there are at least ``period`` layers, and that is the one returned. Ties go to the longest
    earlier runs, the paper's property 1 (what can be hidden now is communicated now).

    It may be jitted and vmapped, over ``comm_s`` (bandwidths), ``period`` or anything else; for
    thousands of bandwidths `schedule_many` keeps the work in cache.

    Args:
        backward_s: backward seconds per layer, backward order (index 0 is nearest the loss), [L].
        comm_s: communication seconds per layer, [L].
        period: iterations H in which every layer is synchronised once; may be traced; at most
            ``max_period``.
        max_period: the static bound, length of the results.
        launch: ``gated``, ``eager`` or ``after``, as in `plan_time.wait_s`; static.
        forward_s: seconds of the forward pass.
        tail_s: seconds of compute after the last backward.

    Returns:
        ``(ends, waits)``: iteration h synchronises layers ``ends[h−1] … ends[h]−1`` (from 0 for
        h = 0) and waits ``waits[h]`` seconds; iterations from ``period`` on are empty.

    Raises:
        UserError: a period (if it is a plain number) outside 1 … ``max_period``, unknown launch.

    Reference: arXiv 2502.11058, section on the scheduling algorithm. Reconstruction: the paper
    searches this space depth first with pruning; this is an exact programme over the same runs.

    >>> times = jnp.ones(6), jnp.array([2.0, 1, 1, 3, 1, 1])
    >>> ends, waits = schedule(*times, 3, max_period=4)
    >>> ends.tolist(), waits.tolist()
    ([3, 4, 6, 6], [0.0, 1.0, 1.0, 0.0])
    """
    _check_bound(period, max_period)
    return plan_runs(
        backward_s,
        comm_s,
        comm_s.shape[0],
        period,
        max_period=max_period,
        launch=launch,
        forward_s=forward_s,
        tail_s=tail_s,
    )


def schedule_many(
    backward_s: Float[Array, "L"],
    comm_s: Float[Array, "N L"],
    period: int | Int[Array, ""],
    *,
    max_period: int,
    launch: str = "gated",
    forward_s: int | float = 0.0,
    tail_s: int | float = 0.0,
    chunk: int = 250,
) -> tuple[Int[Array, "N H"], Float[Array, "N H"]]:
    """Plan for many bandwidths (or worker counts) at once.

    It is ``vmap`` of `schedule` over ``comm_s``, run in chunks that stay in a core's cache.

    Args:
        backward_s: backward seconds per layer, backward order, [L].
        comm_s: communication seconds per layer for each of N networks, [N, L].
        period: iterations H; one for all.
        max_period: static bound of the period.
        launch: as in `schedule`.
        forward_s: seconds of the forward pass.
        tail_s: seconds of compute after the last backward.
        chunk: networks planned together.

    Returns:
        ``(ends, waits)`` of `schedule`, each with a leading axis N.

    >>> comm_s = jnp.array([[2.0, 1, 1, 3, 1, 1], [0.2, 0.1, 0.1, 0.3, 0.1, 0.1]])
    >>> ends, waits = schedule_many(jnp.ones(6), comm_s, 3, max_period=3)
    >>> waits.sum(axis=1).round(3).tolist()
    [2.0, 0.1...]
    """
    _check_bound(period, max_period)
    return _schedule_many(
        backward_s,
        comm_s,
        period,
        forward_s,
        tail_s,
        max_period=max_period,
        launch=launch,
        chunk=chunk,
    )


@partial(jax.jit, static_argnames=("max_period", "launch", "chunk"))
def _schedule_many(backward_s, comm_s, period, forward_s, tail_s, *, max_period, launch, chunk):
    def plan(comm_s):
        return plan_runs(
            backward_s,
            comm_s,
            comm_s.shape[0],
            period,
            max_period=max_period,
            launch=launch,
            forward_s=forward_s,
            tail_s=tail_s,
        )

    return lax.map(plan, comm_s, batch_size=min(chunk, comm_s.shape[0]))


@partial(jax.jit, static_argnames=("max_period", "launch"))
def plan_runs(
    backward_s, comm_s, n_layers, period, *, max_period, launch="gated", forward_s=0.0, tail_s=0.0
):
    """Do the work of `schedule` on vectors that may be padded with zero-time layers at the end.

    Padding lets plans of many sizes share one compilation.

    Args:
        backward_s: backward seconds, padded with zeros, [L].
        comm_s: communication seconds, padded with zeros, [L].
        n_layers: how many layers are real; may be traced.
        period: iterations H; may be traced.
        max_period: static bound of the period.
        launch: as in `schedule`.
        forward_s: seconds of the forward pass.
        tail_s: seconds of compute after the last backward.

    Returns:
        ``(ends, waits)`` of `schedule`.

    Raises:
        UserError: unknown launch.

    >>> ends, waits = plan_runs(jnp.array([1.0, 1, 0]), jnp.array([1.0, 1, 0]), 2, 2, max_period=2)
    >>> ends.tolist(), waits.tolist()
    ([1, 2], [0.0, 1.0])
    """
    check_launch(launch)
    dtype = jnp.result_type(backward_s, comm_s, jnp.float32)
    backward_s, comm_s = backward_s.astype(dtype), comm_s.astype(dtype)
    ends = jnp.cumsum(backward_s)
    compute_end = ends[-1] + tail_s
    if launch == "gated":
        release = ends
    else:
        release = jnp.full_like(ends, -forward_s if launch == "eager" else compute_end)
    prefix = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(comm_s)])
    least = _least_wait(release - prefix[:-1], prefix - compute_end, max_period)
    return _trace_back(
        release - prefix[:-1], prefix - compute_end, least, n_layers, period, max_period
    )


def _check_bound(period, max_period):
    if isinstance(period, int) and not 1 <= period <= max_period:
        raise UserError(
            f"period is {period}; it must be from 1 to max_period = {max_period}; change one"
        )


def _least_wait(slack, over, max_period):
    """Tabulate F_h(e); slack is r_i − C_i [L], over is C_e − T [L+1]; returns [H+1, L+1]."""
    n = slack.shape[0]
    least = jnp.full((max_period + 1, n + 1), jnp.inf, slack.dtype).at[:, 0].set(0)
    worst = jnp.full(n + 1, -jnp.inf, slack.dtype)  # worst[s] = max over s ≤ i ≤ e of slack_i
    # A run that ends at e starts at or before it, so early ends look at part of the table only.
    marks = [n * quarter // 4 for quarter in range(5)] if n >= 64 else [0, n]
    for low, high in pairwise(marks):
        index = jnp.arange(high + 1)

        def add_layer(e, carry, index=index, high=high):
            worst, least = carry
            worst = jnp.where(index <= e, jnp.maximum(worst, slack[e]), -jnp.inf)
            wait = jnp.maximum(worst + over[e + 1], 0)
            column = jnp.min(least[:-1, : high + 1] + wait[None], axis=1)
            return worst, lax.dynamic_update_slice(least, column[:, None], (1, e + 1))

        carry = lax.fori_loop(low, high, add_layer, (worst[: high + 1], least))
        worst, least = jnp.pad(carry[0], (0, n - high), constant_values=-jnp.inf), carry[1]
    return least


def _trace_back(slack, over, least, n_layers, period, max_period):
    """Find cuts and waits [H] that attain F_period(n_layers), no run empty while layers suffice."""
    n = slack.shape[0]
    index = jnp.arange(n + 1)

    def step(end, h):  # h counts the runs used so far, from max_period down to 1
        inside = jnp.where(index[:-1] < end, slack, -jnp.inf)
        worst = lax.cummax(inside, reverse=True)
        wait = jnp.append(jnp.maximum(worst + over[end], 0), 0)
        cost = least[h - 1] + wait
        # Each of the h − 1 earlier runs needs a layer, and so does this one.
        lowest = jnp.minimum(h - 1, end)
        highest = jnp.where(end >= h, end - 1, end)
        cost = jnp.where((index >= lowest) & (index <= highest), cost, jnp.inf)
        start = n - jnp.argmin(cost[::-1])  # the last of equals
        unused = h > period
        return jnp.where(unused, end, start), (end, jnp.where(unused, 0, wait[start]))

    _, (ends, waits) = lax.scan(step, jnp.asarray(n_layers), jnp.arange(max_period, 0, -1))
    return ends[::-1], waits[::-1]
