"""A pipelined layer with real overlap on CPU: the host schedules experts and all-to-alls.

One XLA:CPU program runs its collectives in line with its compute. Here experts run on the compute
device and all-to-alls on the lane (`jaxsys.core.lane`), in the order of the recurrence: all
dispatches, then each combine as soon as its experts are done. On accelerators use `pipelined`.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.core.lane import Carried, Lane
from jaxsys.core.mesh import REPLICA
from jaxsys.core.timeline import Span
from jaxsys.moe.contract import Axes, LayerPlan, MoESpec
from jaxsys.moe.pipelined import check_degrees
from jaxsys.moe.recurrence import COMPUTE, INTER


class HostInfo(NamedTuple):
    """What one run of a layer took.

    Attributes:
        layer_s: seconds from the start until the output was there.
        spans: what ran when, seconds since the start.

    >>> HostInfo(0.5, ()).layer_s
    0.5
    """

    layer_s: float
    spans: tuple[Span, ...]


class HostLayer(NamedTuple):
    """The programs of a layer between order and inverse order.

    Attributes:
        run: ``(params, buffer [E, C, D], degree) -> (y [E, C, D], HostInfo)``.
        dispatch: what the lane runs on a chunk: ``(chunk,) -> rows``; for profiling.
        experts: ``(params, rows [E/W, W·c, D]) -> rows`` on the compute device; for profiling.

    >>> HostLayer._fields
    ('run', 'dispatch', 'experts')
    """

    run: Callable[..., tuple[Array, HostInfo]]
    dispatch: Callable[[Any], Any]
    experts: Callable[[Any, Any], Any]


def host_layer(
    spec: MoESpec, lane: Lane, hold_s: Callable[[int], float] | None = None
) -> HostLayer:
    """Make the forward pass of a layer's experts, spread over the processes of a lane.

    Args:
        spec: its dispatch, combine, experts and inner hooks are used; on a single device's mesh
            every process holds E / W experts.
        lane: of these processes.
        hold_s: emulated link: elements of a chunk to seconds for which the lane is held.

    Returns:
        The programs; the result is that of `pipelined` with the same degree.

    >>> from jaxsys.core.mesh import device_pair, replica_mesh
    >>> from jaxsys.moe.contract import Dims, Gate, Order
    >>> from jaxsys.moe.dispatch import TRANSPORTS
    >>> from jaxsys.moe.experts import swiglu
    >>> spec = MoESpec(Gate(None, None, 1), Order(None, None), swiglu(), *TRANSPORTS["flat"])
    >>> first = jax.devices()[:1]
    >>> lane = Lane(device_pair()._replace(comm=first[0], comm_mesh=replica_mesh(first)))
    >>> params = spec.experts.init(jax.random.key(0), Dims(4, 8, 2))
    >>> y, info = host_layer(spec, lane).run(params, jnp.ones((2, 6, 4)), 3)
    >>> y.shape, [span.name for span in info.spans][-1]
    ((2, 6, 4), 'combine 3')
    """
    axes, hooks = Axes(expert=REPLICA), spec.hooks

    def dispatch(chunk: Array) -> Array:
        return hooks.after_dispatch(spec.dispatch(hooks.before_dispatch(chunk), axes))

    def combine(rows: Array) -> Array:
        return hooks.after_combine(spec.combine(hooks.before_combine(rows), axes))

    experts = jax.jit(spec.experts.apply)

    def run(
        params: Any, buffer: Float[Array, "E C D"], degree: int
    ) -> tuple[Float[Array, "E C D"], HostInfo]:
        check_degrees(LayerPlan(degree, degree), buffer.shape[1])
        hold = 0.0 if hold_s is None else hold_s(buffer.size // degree)
        began, spans = time.perf_counter(), []

        def mark(name: str, stream: str, start_s: float, end_s: float) -> None:
            spans.append(Span(name, stream, start_s - began, end_s - began))

        sent = [lane.submit(dispatch, (c,), hold_s=hold) for c in _cut(buffer, degree)]
        back = []
        for j, future in enumerate(sent):
            moved: Carried = future.result()
            mark(f"dispatch {j + 1}", INTER, moved.start_s, moved.end_s)
            start_s = time.perf_counter()
            out = jax.block_until_ready(experts(params, moved.value))
            mark(f"expert {j + 1}", COMPUTE, start_s, time.perf_counter())
            back.append(lane.submit(combine, (out,), hold_s=hold))
        done: list[Carried] = [future.result() for future in back]
        for j, carried in enumerate(done):
            mark(f"combine {j + 1}", INTER, carried.start_s, carried.end_s)
        y = jax.block_until_ready(_join([carried.value for carried in done]))
        return y, HostInfo(time.perf_counter() - began, tuple(spans))

    return HostLayer(run, dispatch, experts)


@partial(jax.jit, static_argnums=1)
def _cut(buffer: Array, degree: int) -> list[Array]:
    return jnp.split(buffer, degree, axis=1)


@jax.jit
def _join(chunks: list[Array]) -> Array:
    return jnp.concatenate(chunks, axis=1)


class Pace(NamedTuple):
    """Seconds of one chunk's all-to-all and experts, alone and while the other is at work.

    Attributes:
        a: an all-to-all while no expert runs.
        e: experts while no all-to-all is under way.
        busy_a: an all-to-all while experts run.
        busy_e: experts while an all-to-all is under way.

    >>> Pace(1.0, 2.0, 1.5, 2.5).busy_a
    1.5
    """

    a: float
    e: float
    busy_a: float
    busy_e: float


def shared_makespan_s(pace: Pace, degree: int) -> float:
    """Predict the seconds of `host_layer` where compute and communication share processor cores.

    The recurrence with g = s = y = 0, but each stream goes at its busy pace whenever the other is
    at work. Equal paces give `recurrence.makespan_s`.

    Reconstruction: ours; the paper's machines overlap for free.

    Args:
        pace: of one of r chunks.
        degree: r.

    Returns:
        Seconds from the first dispatch to the last combine.

    >>> shared_makespan_s(Pace(1.0, 4.0, 1.0, 4.0), 2)
    10.0
    >>> round(shared_makespan_s(Pace(1.0, 4.0, 2.0, 6.0), 2), 3)
    11.333
    """
    moved = computed = 0  # messages of 2r and products of r that are done
    left_link = left_compute = 1.0  # of the ones that are next
    now_s = 0.0
    while moved < 2 * degree:
        on_link = moved < degree or computed > moved - degree
        on_compute = computed < degree and min(moved, degree) > computed
        link_s = left_link * (pace.busy_a if on_compute else pace.a) if on_link else math.inf
        compute_s = left_compute * (pace.busy_e if on_link else pace.e) if on_compute else math.inf
        step_s = min(link_s, compute_s)
        now_s += step_s
        left_link -= left_link * step_s / link_s if link_s > 0 else left_link
        left_compute -= left_compute * step_s / compute_s if compute_s > 0 else left_compute
        if link_s <= step_s:
            moved, left_link = moved + 1, 1.0
        if compute_s <= step_s:
            computed, left_compute = computed + 1, 1.0
    return now_s
