"""The time of a pipelined layer as a max-plus recurrence over its chunks: the model of record.

Three streams run their operations one after another: the link between nodes (dispatches, then a
slice of gradient all-reduce, then combines), the links inside a node (all-gathers and
reduce-scatters) and the experts' compute.

The paper runs all all-gathers before the first reduce-scatter. In the relaxed order only ``lead``
of them go first; after that every reduce-scatter is followed by one of the all-gathers that are
left, so that results start on their way back earlier. ``lead = r`` is the paper's order.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxsys.core.errors import UserError
from jaxsys.core.timeline import Task
from jaxsys.moe.cases import Chunk

INTER, INTRA, COMPUTE = "between nodes", "inside a node", "experts"


def makespan_s(
    chunk: Chunk, degree: Any, gradient_s: Any = 0.0, lead: Any = 0, *, most: int
) -> jax.Array:
    """Predict the seconds from the first dispatch to the last combine.

    With ``D_i = i·a``, and the all-gathers before the first reduce-scatter i = 1 … lead,

        A_i = max(A_{i−1}, D_i) + g,          X_i = max(X_{i−1}, A_i) + e,
        R_i = max(intra free, X_i) + s,       A_{lead+i} = max(R_i, D_{lead+i}) + g,
        C_1 = max(D_r + y, R_1) + a,          C_i = max(C_{i−1}, R_i) + a,

    where the links inside a node become free with the last of the A and R before. Jittable and
    vmappable over everything, for the loops run to ``most`` and mask what lies beyond r.

    Args:
        chunk: seconds of one chunk's operations, scalars.
        degree: r, from 1 to ``most``; may be traced.
        gradient_s: y, seconds of gradient all-reduce between dispatches and combines.
        lead: all-gathers before the first reduce-scatter, 1 … r; 0 for r, the paper's order.
        most: static bound of r.

    Returns:
        C_r, a scalar.

    Raises:
        UserError: for a degree (a plain number) outside 1 … ``most``.

    Reference: arXiv 2501.10714, Figure 3 and Algorithm 1; the recurrence is this package's.

    >>> makespan_s(Chunk(1.0, 4.0, 1.0, 1.0), 2, most=4).item()
    12.0
    """
    if isinstance(degree, int) and not 1 <= degree <= most:
        raise UserError(f"the degree is {degree}; it must be from 1 to most = {most}; change one")
    a, g, s, e = (jnp.asarray(t, jnp.result_type(float)) for t in chunk)
    degree = jnp.asarray(degree)
    lead = jnp.where(jnp.asarray(lead) > 0, jnp.minimum(lead, degree), degree)
    number = jnp.arange(1, most + 1)

    def first_gathers(free, i):
        free = jnp.where(i <= lead, jnp.maximum(free, i * a) + g, free)
        return free, free

    intra, gathered = lax.scan(first_gathers, jnp.zeros_like(g), number)

    def one_chunk(carry, i):
        intra, computed, combined, gathered = carry
        live = i <= degree
        computed = jnp.maximum(computed, gathered[i - 1]) + e
        scattered = jnp.maximum(intra, computed) + s
        combined = jnp.where(live, jnp.maximum(combined, scattered) + a, combined)
        later = lead + i
        again = jnp.maximum(scattered, later * a) + g
        intra = jnp.where(live, jnp.where(later <= degree, again, scattered), intra)
        gathered = jnp.where(number == later, again, gathered)
        return (intra, computed, combined, gathered), None

    start = (intra, jnp.zeros_like(e), degree * a + gradient_s, gathered)
    (_, _, combined, _), _ = lax.scan(one_chunk, start, number)
    return combined


def chunk_tasks(
    chunk: Chunk,
    degree: int,
    gradient_s: float | int = 0.0,
    lead: int = 0,
    *,
    suffix: str = "",
    after: tuple[str, ...] = (),
    one_link: bool = False,
) -> tuple[Task, ...]:
    """List a layer's operations as tasks for `core.timeline`, in the order of their streams.

    Args:
        chunk: seconds of one chunk's operations.
        degree: r.
        gradient_s: y.
        lead: as in `makespan_s`.
        suffix: added to every name, to tell layers apart.
        after: names of tasks that must have ended before the layer starts.
        one_link: whether all communication takes turns on one link, as in `cases.one_link_s`.

    Returns:
        Tasks named ``dispatch i``, ``gather i``, ``expert i``, ``scatter i``, ``combine i`` and
        ``gradient``, on three streams (two with one link).

    >>> from jaxsys.core.timeline import simulate
    >>> simulate(chunk_tasks(Chunk(1.0, 4.0, 1.0, 1.0), 2)).makespan_s
    12.0
    """
    a, g, s, e = (float(t) for t in chunk)
    lead = min(lead, degree) or degree
    intra = INTER if one_link else INTRA
    numbers = range(1, degree + 1)

    def tasks(what: str, stream: str, seconds: float, before: str | None) -> list[Task]:
        waits = {i: after if before is None else (f"{before} {i}{suffix}",) for i in numbers}
        return [Task(f"{what} {i}{suffix}", stream, seconds, waits[i]) for i in numbers]

    dispatches = tasks("dispatch", INTER, a, None)
    gathers = tasks("gather", intra, g, "dispatch")
    experts = tasks("expert", COMPUTE, e, "gather")
    scatters = tasks("scatter", intra, s, "expert")
    combines = tasks("combine", INTER, a, "scatter")
    gradient = [Task(f"gradient{suffix}", INTER, float(gradient_s))] * (gradient_s > 0)
    if one_link:
        there = [task for pair in zip(dispatches, gathers, strict=True) for task in pair]
        back = [task for pair in zip(scatters, combines, strict=True) for task in pair]
        return (*there, *experts, *gradient, *back)
    inside = gathers[:lead]
    for i, scatter in enumerate(scatters):
        inside += [scatter, *gathers[lead + i : lead + i + 1]]
    return (*dispatches, *inside, *experts, *gradient, *combines)
