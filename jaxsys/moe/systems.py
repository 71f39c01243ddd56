"""The systems that a plan is compared with, each as a choice of order, degrees and gradients."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsys.core.errors import UserError
from jaxsys.moe.costs import Costs
from jaxsys.moe.degrees import DEGREES, tabulate
from jaxsys.moe.partition import Backward, Partition, best_partition, fill
from jaxsys.moe.volumes import Volumes

LINA_BYTES = 30 * 10**6


@dataclass(frozen=True)
class System:
    """Describe how a system schedules a training step.

    Args:
        order: as in `degrees.tabulate`.
        separate: whether forward and backward pass have degrees of their own; else the one that is
            best for their sum.
        gradients: where dense gradients are reduced: ``end`` (after the backward pass), ``dense``
            (behind the dense parts), ``chunks`` (whole 30 MB messages in any gap that holds them),
            ``two_step`` (`two_step.two_step`) or ``exact`` (`partition.best_partition`).

    >>> SYSTEMS["tutel"].separate
    False
    """

    order: str
    separate: bool
    gradients: str


SYSTEMS = {
    # Nothing overlaps (DeepSpeed-MoE).
    "serial": System("serial", False, "end"),
    # Tutel with PipeMoE's degree: experts run beside communication.
    "tutel": System("one_link", False, "end"),
    # The same, gradients behind the dense parts (the paper's Tutel-Improved).
    "tutel-improved": System("one_link", False, "dense"),
    # PipeMoE with Lina's fixed chunks of gradient.
    "lina": System("one_link", False, "chunks"),
    # FSMoE without overlap of communication between nodes and inside them.
    "no-iio": System("one_link", True, "exact"),
    # FSMoE as the paper schedules a layer, with its gradients placed exactly.
    "fsmoe-exact": System("in_order", True, "exact"),
    # FSMoE as published.
    "fsmoe": System("in_order", True, "two_step"),
    # Reduce-scatters may overtake all-gathers, gradients are placed exactly.
    "jaxsys": System("relaxed", True, "exact"),
}


class Stack(NamedTuple):
    """Describe what a step computes besides communication schedules, layers in forward order.

    Attributes:
        volumes: of the MoE layers, fields [L], or [1] where all are equal.
        dense_forward_s: seconds of the dense part before each MoE layer, [L].
        dense_backward_s: the same, backward, [L]; the link between nodes is free meanwhile.
        gradients: elements of each dense part's gradient, [L].

    >>> Stack._fields
    ('volumes', 'dense_forward_s', 'dense_backward_s', 'gradients')
    """

    volumes: Volumes
    dense_forward_s: Any
    dense_backward_s: Any
    gradients: Any


class Schedule(NamedTuple):
    """Say how a system runs a step, layers in forward order.

    Attributes:
        forward: each layer's degree, [L].
        backward: each layer's degree, [L].
        forward_lead: as in `recurrence.makespan_s`, [L].
        backward_lead: the same, backward, [L].
        moe: gradient elements reduced inside each MoE layer's backward pass, [L].
        dense: gradient elements reduced behind each dense part's backward pass, [L].
        forward_s: seconds of each MoE layer, [L].
        backward_s: seconds of each MoE layer with its gradient, [L].
        tail_s: seconds of the all-reduce after the backward pass.
        seconds: of the whole step.
        exact: whether the search for the partition cut nothing off.

    >>> Schedule._fields[-2:]
    ('seconds', 'exact')
    """

    forward: Any
    backward: Any
    forward_lead: Any
    backward_lead: Any
    moe: Any
    dense: Any
    forward_s: Any
    backward_s: Any
    tail_s: Any
    seconds: Any
    exact: Any


def find_system(name: str) -> System:
    """Look a system up.

    Args:
        name: one of `SYSTEMS`.

    Raises:
        UserError: for another name.

    >>> find_system("jaxsys").order
    'relaxed'
    """
    if name not in SYSTEMS:
        raise UserError(
            f"the system is {name!r}; expected one of {', '.join(SYSTEMS)}; choose one of them"
        )
    return SYSTEMS[name]


def schedule(
    system: System,
    costs: Costs,
    stack: Stack,
    degrees: tuple[int, ...] = DEGREES,
    *,
    width: int = 64,
) -> Schedule:
    """Model one training step under a system.

    The backward pass visits the layers from the last to the first; the gradient of the dense part
    before MoE layer i can be reduced from when that part's backward pass has ended. The first
    layer's, and what found no gap, is reduced after it.

    Compiled, and vmappable over stacks, unless gradients are placed in two steps.

    Args:
        system: what overlaps with what.
        costs: fitted lines; static under jit.
        stack: the layers.
        degrees: to choose from, ascending; static under jit.
        width: labels of the search for a partition.

    Returns:
        The schedule and its modelled times.

    Raises:
        UserError: for an unknown order or placement.

    >>> from jaxsys.moe.costs import TESTBED_B
    >>> one = jnp.ones(2)
    >>> layers = Stack(Volumes(4e6 * one, 2e7 * one, 2e7 * one, 5e10 * one), one, one, 1e6 * one)
    >>> schedule(SYSTEMS["tutel"], TESTBED_B, layers, (1, 2)).forward.tolist()
    [2, 2]
    """
    run = _schedule if system.gradients == "two_step" else _compiled
    return run(system, costs, stack, degrees, width)


def _schedule(
    system: System, costs: Costs, stack: Stack, degrees: tuple[int, ...], width: int
) -> Schedule:
    forward, backward = (
        jax.vmap(lambda v, b=b: tabulate(costs, v, degrees, order=system.order, backward=b))(
            Volumes(*(jnp.asarray(n, jnp.result_type(float)) for n in stack.volumes))
        )
        for b in (False, True)
    )
    rows = jnp.arange(len(stack.gradients))
    forward, backward = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (len(rows), *x.shape[1:])), (forward, backward)
    )
    together = jnp.argmin(forward.least_s + backward.least_s, axis=1)
    front = jnp.argmin(forward.least_s, axis=1) if system.separate else together
    turned = jnp.asarray(stack.gradients, jnp.result_type(float))[::-1]
    problem = Backward(
        backward.least_s[::-1],
        backward.busy_s[::-1],
        jnp.asarray(stack.dense_backward_s, jnp.result_type(float))[::-1],
        jnp.concatenate([jnp.zeros_like(turned[:1]), turned[:-1]]),
        jnp.asarray(costs.all_reduce.alpha_s, jnp.result_type(float)),
        jnp.asarray(costs.all_reduce.beta_s_per_unit, jnp.result_type(float)),
    )
    placed = _place(system, problem, together[::-1], width)
    back = jnp.asarray(placed.choice)[::-1]
    moe = jnp.asarray(placed.moe)[::-1]
    sent_s = slice_s(system, costs, moe)
    forward_s = forward.least_s[rows, front]
    backward_s = jnp.maximum(backward.least_s[rows, back], backward.busy_s[rows, back] + sent_s)
    left = placed.pending + turned[-1]
    tail_s = jnp.where(left > 0, costs.all_reduce(left), 0.0)
    dense_s = jnp.sum(jnp.asarray(stack.dense_forward_s)) + jnp.sum(problem.dense_s)
    counts = jnp.asarray([1] * len(degrees) if system.order == "serial" else degrees)
    return Schedule(
        forward=counts[front],
        backward=counts[back],
        forward_lead=forward.lead[rows, front],
        backward_lead=backward.lead[rows, back],
        moe=moe,
        dense=jnp.asarray(placed.dense)[::-1],
        forward_s=forward_s,
        backward_s=backward_s,
        tail_s=tail_s,
        seconds=jnp.sum(forward_s) + jnp.sum(backward_s) + dense_s + tail_s,
        exact=placed.exact,
    )


_compiled = jax.jit(_schedule, static_argnums=(0, 1, 3, 4))
_LINA_ELEMENTS = LINA_BYTES / 4  # gradients are float32


def slice_s(system: System, costs: Costs, elements: Any) -> Any:
    """Predict the seconds of a slice of gradient, 0 for none.

    Args:
        system: one that sends chunks of fixed size pays α for each.
        costs: fitted lines.
        elements: of the slice; may be an array or traced.

    Returns:
        Seconds.

    >>> from jaxsys.moe.costs import TESTBED_B
    >>> float(slice_s(SYSTEMS["tutel"], TESTBED_B, 0.0))
    0.0
    """
    if system.gradients == "chunks":
        return elements / _LINA_ELEMENTS * costs.all_reduce(_LINA_ELEMENTS)
    return jnp.where(jnp.asarray(elements) > 0, costs.all_reduce(elements), 0.0)


def _place(system: System, problem: Backward, choice: jax.Array, width: int) -> Partition:
    """Place the gradients as a system does; ``choice`` is the one degree, where there is one."""
    if system.separate and system.gradients != "exact" and system.gradients != "two_step":
        choice = jnp.argmin(problem.least_s, axis=1)
    full = problem._replace(busy_s=problem.least_s)  # leaves no gap inside the MoE layers
    if system.gradients == "exact":
        return best_partition(problem, width=width)
    if system.gradients == "two_step":
        from jaxsys.moe.two_step import two_step

        return two_step(problem)
    if system.gradients == "chunks":
        return fill(problem, choice, _LINA_ELEMENTS)
    if system.gradients == "dense":
        return fill(full, choice)
    if system.gradients == "end":
        return fill(full._replace(dense_s=jnp.zeros_like(problem.dense_s)), choice)
    raise UserError(
        f"gradients are placed {system.gradients!r}; expected end, dense, chunks, two_step or "
        "exact; choose one of them"
    )
