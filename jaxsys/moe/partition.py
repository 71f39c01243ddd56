"""Where the dense gradients' all-reduces go: into the gaps that the backward pass leaves.

Backward, layer i = 0 … L−1 is one MoE layer followed by the dense part before it. When it starts,
``ready_i`` elements of gradient become free to be reduced (the paper's n_{i−1}). A slice may go
between the MoE layer's dispatches and combines, where it costs nothing up to the layer's slack
``t(r) − busy(r)``, or behind the dense part, up to ``dense_i`` seconds. What is left at the end is
reduced last, in the open, at β per element (one all-reduce ends the step in any case, so its α is
not counted).

An element that no longer fits a slack costs β in a layer as it does at the end. So, the degrees
given, filling every slack as early as possible is best, and what remains to be found is one degree
for each layer: a programme over (gradient still pending, seconds so far), pruned exactly.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxsys.core.errors import UserError


class Backward(NamedTuple):
    """State the problem: L layers in backward order, R degrees.

    Attributes:
        least_s: MoE layer's seconds without gradients for each degree, [L, R].
        busy_s: seconds for which its dispatches and combines keep the link, [L, R].
        dense_s: seconds for which the dense part leaves the link free, [L].
        ready: gradient elements that become free when the layer's backward starts, [L].
        alpha_s: all-reduce's seconds per message.
        beta_s: all-reduce's seconds per element.

    >>> Backward._fields
    ('least_s', 'busy_s', 'dense_s', 'ready', 'alpha_s', 'beta_s')
    """

    least_s: Any
    busy_s: Any
    dense_s: Any
    ready: Any
    alpha_s: Any
    beta_s: Any


class Partition(NamedTuple):
    """Say which degree each layer takes and where the gradients go, backward order.

    Attributes:
        choice: index of each layer's degree, [L].
        moe: elements reduced between its dispatches and combines, [L].
        dense: elements reduced behind its dense part, [L].
        pending: elements left at the end.
        seconds: MoE layers' time plus β for each of those.
        exact: whether nothing was cut off in the search.

    >>> Partition._fields
    ('choice', 'moe', 'dense', 'pending', 'seconds', 'exact')
    """

    choice: Any
    moe: Any
    dense: Any
    pending: Any
    seconds: Any
    exact: Any


def room(slack_s: Any, alpha_s: Any, beta_s: Any) -> Any:
    """Invert the all-reduce's line: elements that fit, ``g⁻¹(t) = max(0, t − α) / β``.

    Args:
        slack_s: seconds t.
        alpha_s: α.
        beta_s: β; where it is 0 anything fits once t exceeds α.

    Returns:
        Elements.

    >>> float(room(3.0, 1.0, 0.5))
    4.0
    """
    free = jnp.maximum(slack_s - alpha_s, 0.0)
    return jnp.where(free > 0, free / jnp.maximum(beta_s, 1e-30), 0.0)


def fill(problem: Backward, choice: Array, chunk: float | int = 0.0) -> Partition:
    """Fill every gap as early and as far as possible, the degrees given.

    Args:
        problem: see `Backward`.
        choice: index of each layer's degree, [L].
        chunk: elements of an indivisible message (Lina's 30 MB); 0 for any amount.

    Returns:
        What goes where.

    >>> one = jnp.ones((2, 1))
    >>> gaps = Backward(3 * one, one, jnp.zeros(2), jnp.array([0.0, 5.0]), 0.0, 1.0)
    >>> found = fill(gaps, jnp.array([0, 0]))
    >>> found.moe.tolist(), found.pending.item(), found.seconds.item()
    ([0.0, 2.0], 3.0, 9.0)
    """
    least_s, busy_s, dense_s, ready, alpha_s, beta_s = problem
    rows = jnp.arange(least_s.shape[0])
    taken_s = least_s[rows, choice]
    message_s = alpha_s + chunk * beta_s  # every message of a fixed size pays α

    def fits(slack_s):
        if chunk:
            return chunk * jnp.floor(slack_s / jnp.maximum(message_s, 1e-30) + 1e-9)
        return room(slack_s, alpha_s, beta_s)

    caps = jnp.stack([fits(taken_s - busy_s[rows, choice]), fits(dense_s)], axis=1)

    def layer(pending, given):
        ready, caps = given
        pending = pending + ready
        sent = []
        for cap in caps:
            whole = chunk * jnp.floor(pending / chunk + 1e-9) if chunk else pending
            sent.append(jnp.minimum(whole, cap))
            pending = pending - sent[-1]
        return pending, jnp.stack(sent)

    pending, sent = lax.scan(layer, jnp.zeros_like(ready[0]), (ready, caps))
    seconds = jnp.sum(taken_s) + beta_s * pending
    return Partition(choice, sent[:, 0], sent[:, 1], pending, seconds, True)


@partial(jax.jit, static_argnames="width")
def best_partition(problem: Backward, *, width: int = 64) -> Partition:
    """Choose degrees and gaps together, exactly.

    Labels (pending p, seconds c) run through the layers; each layer extends each label by every
    degree, ``p ← max(0, p + ready − room)``. A label falls to one with no more pending and no more
    seconds, and to one with more pending if c + β·p is smaller there, since surplus gradient costs
    at most β at the end. What survives contains the optimum; where more than ``width`` survive,
    those with most pending are cut off and ``exact`` is False.

    Jittable, and vmappable over many problems.

    Args:
        problem: see `Backward`.
        width: labels kept after each layer.

    Returns:
        The best partition. In the layers' own time nothing is lost by taking a gradient later than
        it could be, so ties go to filling early.

    Reference: this package's; arXiv 2501.10714, section on adaptive gradient partitioning, solves
    the same problem in two steps by differential evolution (`two_step.two_step`).

    >>> least, busy = jnp.array([[4.0, 3.0]] * 2), jnp.array([[1.0, 3.0]] * 2)
    >>> gaps = Backward(least, busy, jnp.zeros(2), jnp.array([0.0, 3.0]), 0.0, 1.0)
    >>> found = best_partition(gaps)
    >>> found.choice.tolist(), found.moe.tolist(), found.seconds.item()
    ([1, 0], [0.0, 3.0], 7.0)
    """
    least_s, busy_s, dense_s, ready, alpha_s, beta_s = problem
    choices = least_s.shape[1]
    caps = room(least_s - busy_s, alpha_s, beta_s)
    dense_caps = room(dense_s, alpha_s, beta_s)
    infinite, places = jnp.asarray(jnp.inf, least_s.dtype), jnp.arange(1, width + 1)
    tiny = 1e-12 * jnp.sum(jnp.max(least_s, axis=1))

    def layer(carry, given):
        pending, spent, exact = carry
        least, cap, dense_cap, ready = given
        behind = jnp.maximum(pending[:, None] + ready - cap[None, :], 0.0)
        behind = jnp.maximum(behind - dense_cap, 0.0).ravel()
        cost = (spent[:, None] + least[None, :]).ravel()
        order = jnp.argsort(behind)
        behind, cost = behind[order], cost[order]
        all_in = cost + beta_s * behind
        first = jnp.concatenate([infinite[None], lax.cummin(cost)[:-1]])
        later = jnp.concatenate([lax.cummin(all_in, reverse=True)[1:], infinite[None]])
        alive = (cost < first - tiny) & (all_in <= later + tiny) & jnp.isfinite(cost)
        count = jnp.cumsum(alive)  # the k-th survivor stands where the count reaches k
        kept = jnp.minimum(jnp.searchsorted(count, places), len(count) - 1)
        alive_kept = places <= count[-1]
        exact = exact & (count[-1] <= width)
        cost = jnp.where(alive_kept, cost[kept], infinite)
        return (jnp.where(alive_kept, behind[kept], 0.0), cost, exact), order[kept]

    begin = (
        jnp.zeros(width, least_s.dtype),
        jnp.full(width, infinite).at[0].set(0.0),
        jnp.asarray(True),
    )
    (pending, spent, exact), sources = lax.scan(layer, begin, (least_s, caps, dense_caps, ready))
    last = jnp.argmin(spent + beta_s * pending)

    def back(label, source):
        return source[label] // choices, source[label] % choices

    _, choice = lax.scan(back, last, sources, reverse=True)
    return fill(problem, choice)._replace(exact=exact)


def solve(problem: Backward) -> Partition:
    """Choose degrees and gaps exactly, with as many labels as that takes.

    Args:
        problem: see `Backward`; computed in float64.

    Returns:
        The best partition, as NumPy arrays.

    Raises:
        UserError: for times or gradients that are negative or not finite.

    >>> one = np.ones((2, 1))
    >>> solve(Backward(3 * one, one, np.zeros(2), np.array([0.0, 5.0]), 0.0, 1.0)).seconds
    array(9.)
    """
    problem = Backward(*(np.asarray(part, np.float64) for part in problem))
    for name, part in problem._asdict().items():
        if not (np.all(np.isfinite(part)) and np.all(part >= 0)):
            raise UserError(
                f"{name} has a value that is negative or not finite; times and gradients must be "
                "0 or more; mend it"
            )
    width = 64
    while True:
        with jax.enable_x64(True):
            found = jax.tree.map(np.asarray, best_partition(problem, width=width))
        if found.exact or width >= 4096:
            return found
        width *= 8
