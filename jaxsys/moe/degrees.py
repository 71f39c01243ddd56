"""All pipeline degrees of a layer at once: what each costs, and what room it leaves for gradients.

A slice of gradient all-reduce of y seconds enters every schedule alike: a layer takes
``max(t(r), busy(r) + y)``, where t(r) is its time without gradients and busy(r) the seconds for
which its dispatches and combines keep the link. So two numbers per degree say everything, and the
best degree is found by looking at all of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsys.core.errors import UserError
from jaxsys.moe.cases import chunk_times, closed_form_s, one_link_s
from jaxsys.moe.costs import Costs
from jaxsys.moe.recurrence import makespan_s
from jaxsys.moe.volumes import Volumes

DEGREES = (1, 2, 4, 8)  # those that the paper's released code rounds to
ORDERS = ("serial", "one_link", "in_order", "relaxed")


class Table(NamedTuple):
    """Hold what each degree of one layer costs.

    Attributes:
        least_s: t(r), seconds without gradients, [R].
        busy_s: seconds for which the link between nodes is kept busy, [R].
        lead: all-gathers before the first reduce-scatter, as in `recurrence.makespan_s`, [R].

    >>> Table._fields
    ('least_s', 'busy_s', 'lead')
    """

    least_s: jax.Array
    busy_s: jax.Array
    lead: jax.Array


def check_degrees(degrees: tuple[int, ...]) -> tuple[int, ...]:
    """Return the degrees sorted, refusing what is none.

    Args:
        degrees: pipeline degrees to choose from.

    Returns:
        The same, ascending.

    Raises:
        UserError: for none, one below 1, one that is no whole number, or one given twice.

    >>> check_degrees((4, 1))
    (1, 4)
    """
    whole = all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in degrees)
    if not degrees or not whole or len(set(degrees)) < len(degrees):
        raise UserError(
            f"the degrees are {tuple(degrees)}; expected different whole numbers from 1 up, at "
            "least one; change them"
        )
    return tuple(sorted(degrees))


def tabulate(
    costs: Costs,
    volumes: Volumes,
    degrees: tuple[int, ...] = DEGREES,
    *,
    order: str = "relaxed",
    backward: bool = False,
) -> Table:
    """Evaluate every degree of one layer.

    - ``serial``: one chunk, nothing overlaps (DeepSpeed-MoE); all degrees are taken as 1.
    - ``one_link``: all-to-alls, gathers and scatters take turns on one link
      (`cases.one_link_s`: Tutel, PipeMoE, FSMoE without intra/inter overlap).
    - ``in_order``: the paper's three streams (`cases.closed_form_s`).
    - ``relaxed``: the best lead of reduce-scatters over all-gathers (`recurrence.makespan_s`).

    It may be jitted and vmapped over the volumes.

    Args:
        costs: fitted lines; static under jit.
        volumes: of one layer, scalars.
        degrees: degrees to evaluate, ascending; static.
        order: one of the four.
        backward: whether the experts' work counts twice.

    Returns:
        The table.

    Raises:
        UserError: for an unknown order.

    >>> from jaxsys.moe.costs import RELEASED
    >>> from jaxsys.moe.volumes import Shape, volumes
    >>> layer = volumes(Shape(4, 1024, 4096, 14336, matmuls=3, expert_ranks=8))
    >>> (tabulate(RELEASED, layer, order="in_order").least_s * 1e3).round(0).tolist()
    [86.0, 64.0, 60.0, 58.0]
    """
    if order not in ORDERS:
        raise UserError(
            f"the order is {order!r}; expected one of {', '.join(ORDERS)}; choose one of them"
        )
    counts = jnp.asarray([1] * len(degrees) if order == "serial" else degrees)
    volumes = Volumes(*(jnp.asarray(n, jnp.result_type(float)) for n in volumes))
    chunk = chunk_times(costs, volumes, counts, backward=backward)
    busy_s = 2 * counts * chunk.a
    if order == "serial":
        least_s = 2 * chunk.a + chunk.g + chunk.s + chunk.e
        return Table(least_s, least_s, counts)
    if order == "one_link":
        least_s = one_link_s(chunk, counts)
        return Table(least_s, busy_s + counts * (chunk.g + chunk.s), counts)
    if order == "in_order":
        return Table(closed_form_s(chunk, counts), busy_s, counts)
    return _relaxed(chunk, busy_s, degrees)


def _relaxed(chunk: Any, busy_s: jax.Array, degrees: tuple[int, ...]) -> Table:
    """Try every lead of every degree in one batch of recurrences."""
    most = max(degrees)
    pairs = [(column, r, lead) for column, r in enumerate(degrees) for lead in range(r, 0, -1)]
    columns, counts, leads = (jnp.asarray(x) for x in zip(*pairs, strict=True))

    def one(column, count, lead):
        here = type(chunk)(*(jnp.broadcast_to(t, busy_s.shape)[column] for t in chunk))
        return makespan_s(here, count, 0.0, lead, most=most)

    times = jax.vmap(one)(columns, counts, leads)
    least, chosen, start = [], [], 0
    for r in degrees:
        mine = times[start : start + r]  # leads r, r − 1, …, 1: the paper's order wins ties
        # What rounding alone makes smaller is no reason to leave the paper's order.
        best = jnp.argmin(jnp.where(mine < mine[0] * (1 - 1e-6), mine, mine[0]))
        least.append(mine[best])
        chosen.append(r - best)
        start += r
    return Table(jnp.stack(least), busy_s, jnp.stack(chosen))


def with_gradient(table: Table, gradient_s: Any) -> jax.Array:
    """Return every degree's time with a slice of gradient, ``max(t(r), busy(r) + y)``.

    Args:
        table: of one layer.
        gradient_s: y, a scalar.

    Returns:
        Seconds, [R].

    >>> with_gradient(Table(jnp.array([5.0]), jnp.array([2.0]), jnp.array([1])), 4.0).tolist()
    [6.0]
    """
    return jnp.maximum(table.least_s, table.busy_s + gradient_s)
