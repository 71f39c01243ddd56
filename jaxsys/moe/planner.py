"""Plan a training step: every layer's degrees and the places of the gradients, with a prediction.

costs = Costs.from_json(...)                      # what `jaxsys moe profile` measured
plan(costs, [volumes(shape)] * 24, [gradient] * 24, dense_forward_s=…, dense_backward_s=…)
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import jax
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.moe.contract import LayerPlan, MoEPlan
from jaxsys.moe.costs import Costs
from jaxsys.moe.degrees import DEGREES, check_degrees
from jaxsys.moe.systems import Schedule, Stack, find_system, schedule
from jaxsys.moe.volumes import Volumes, stack


def make_stack(
    layers: Sequence[Volumes],
    gradients: Sequence[int | float],
    *,
    dense_forward_s: Any = 0.0,
    dense_backward_s: Any = 0.0,
) -> Stack:
    """Join what is known of the layers, checked.

    Args:
        layers: volumes of the MoE layers, forward order.
        gradients: elements of the dense gradient before each.
        dense_forward_s: seconds of the dense part before each; one number for all, or [L].
        dense_backward_s: the same, backward.

    Returns:
        Float64 arrays.

    Raises:
        UserError: for lengths that differ, or a value that is negative or not finite.

    >>> make_stack([Volumes(1, 2, 2, 4)] * 2, [3, 3], dense_forward_s=1.0).dense_forward_s.tolist()
    [1.0, 1.0]
    """
    joined, n = stack(layers), len(layers)
    rows = []
    for name, given in (
        ("dense_forward_s", dense_forward_s),
        ("dense_backward_s", dense_backward_s),
        ("gradients", gradients),
    ):
        values = np.asarray(given, np.float64)
        if values.shape not in ((n,), ()) or (name == "gradients" and values.shape != (n,)):
            raise UserError(
                f"{name} has shape {values.shape} for {n} layers; expected one value per layer; "
                "pass as many as there are volumes"
            )
        if not (np.all(np.isfinite(values)) and np.all(values >= 0)):
            raise UserError(
                f"{name} has a value that is negative or not finite; expected 0 or more; mend it"
            )
        rows.append(np.broadcast_to(values, (n,)))
    return Stack(joined, *rows)


def find_schedule(
    costs: Costs, layers: Stack, degrees: Sequence[int] = DEGREES, *, system: str = "jaxsys"
) -> Schedule:
    """Model a step under a system in float64, searching until the partition is exact.

    Args:
        costs: fitted lines.
        layers: see `make_stack`.
        degrees: to choose from.
        system: one of `systems.SYSTEMS`.

    Returns:
        The schedule, as NumPy arrays.

    Raises:
        UserError: for an unknown system or a bad degree.

    >>> from jaxsys.moe.costs import TESTBED_B
    >>> layers = make_stack([Volumes(4e6, 2e7, 2e7, 5e10)] * 2, [1e6] * 2)
    >>> find_schedule(TESTBED_B, layers, (1, 2), system="tutel").forward.tolist()
    [2, 2]
    """
    chosen, width = find_system(system), 64
    while True:
        with jax.enable_x64(True):
            found = schedule(chosen, costs, layers, check_degrees(tuple(degrees)), width=width)
            found = jax.tree.map(np.asarray, found)
        if found.exact or chosen.gradients != "exact" or width >= 4096:
            return found
        width *= 8


def plan(
    costs: Costs,
    layers: Sequence[Volumes],
    gradients: Sequence[int | float],
    *,
    dense_forward_s: Any = 0.0,
    dense_backward_s: Any = 0.0,
    degrees: Sequence[int] = DEGREES,
    system: str = "jaxsys",
    element_bytes: int = 4,
    min_r2: float | int = 0.9,
) -> MoEPlan:
    """Choose every layer's degrees and where the dense gradients are reduced.

    Args:
        costs: fitted lines of the machine's operations.
        layers: volumes of the MoE layers, forward order.
        gradients: elements of the dense gradient before each.
        dense_forward_s: seconds of the dense part before each layer (attention, gate, order); one
            number for all, or one per layer.
        dense_backward_s: the same, backward; the link between nodes is free meanwhile.
        degrees: pipeline degrees to choose from.
        system: whose scheduling: one of `systems.SYSTEMS`; others than ``jaxsys`` serve to compare.
        element_bytes: bytes of a gradient's element.
        min_r2: least r² of a line.

    Returns:
        The plan; ``predicted_s`` is the modelled time of the whole step, each layer's that of its
        forward and backward pass without the dense part.

    Raises:
        UserError: for bad sizes, degrees, times or an unknown system.
        PoorFitError: for a line whose fit is below the gate.

    Reference: arXiv 2501.10714.

    >>> from jaxsys.moe.costs import TESTBED_B
    >>> layer = Volumes(4e6, 2e7, 2e7, 5e10)
    >>> found = plan(TESTBED_B, [layer] * 2, [1e6] * 2, degrees=(1, 2), system="tutel")
    >>> found.layers[0].forward, found.layers[0].gradient_bytes
    (2, 0)
    """
    costs.check_fit(min_r2)
    joined = make_stack(
        layers, gradients, dense_forward_s=dense_forward_s, dense_backward_s=dense_backward_s
    )
    return as_plan(find_schedule(costs, joined, degrees, system=system), element_bytes)


def as_plan(found: Schedule, element_bytes: int = 4) -> MoEPlan:
    """Write a schedule as a plan, its parts whole numbers.

    Args:
        found: of one stack.
        element_bytes: bytes of a gradient's element.

    Returns:
        The plan.

    >>> from jaxsys.moe.costs import TESTBED_B
    >>> layers = make_stack([Volumes(4e6, 2e7, 2e7, 5e10)] * 2, [1e6] * 2)
    >>> as_plan(find_schedule(TESTBED_B, layers, (1, 2), system="tutel")).layers[1].backward
    2
    """
    parts = []
    for i in range(len(found.forward)):
        forward, backward = int(found.forward[i]), int(found.backward[i])
        parts.append(
            LayerPlan(
                forward=forward,
                backward=backward,
                gradient_bytes=int(found.moe[i]) * element_bytes,
                predicted_s=float(found.forward_s[i] + found.backward_s[i]),
                # All gathers first is the default, written 0 whatever the degree.
                forward_lead=int(found.forward_lead[i]) % forward,
                backward_lead=int(found.backward_lead[i]) % backward,
                dense_bytes=int(found.dense[i]) * element_bytes,
            )
        )
    return MoEPlan(tuple(parts), float(found.seconds))


def rivals(
    costs: Costs,
    layers: Sequence[Volumes],
    gradients: Sequence[int | float],
    *,
    n: int = 3,
    degrees: Sequence[int] = DEGREES,
    **more: Any,
) -> tuple[MoEPlan, ...]:
    """List the plans worth timing: the planner's, then those of the next best pairs of degrees.

    A pair is one forward and one backward degree for all layers.

    Args:
        costs: as in `plan`.
        layers: as in `plan`.
        gradients: as in `plan`.
        n: how many plans.
        degrees: as in `plan`.
        **more: as in `plan`.

    Returns:
        At most n plans with different degrees, the best predicted first.

    Raises:
        UserError: as `plan`.

    >>> from jaxsys.moe.costs import TESTBED_B
    >>> layer = Volumes(4e6, 2e7, 2e7, 5e10)
    >>> found = rivals(TESTBED_B, [layer] * 2, [1e6] * 2, degrees=(1, 2), system="tutel")
    >>> [plan.layers[0].forward for plan in found]
    [2, 1]
    """
    system, size = more.pop("system", "jaxsys"), more.pop("element_bytes", 4)
    costs.check_fit(more.pop("min_r2", 0.9))
    joined = make_stack(layers, gradients, **more)
    first = find_schedule(costs, joined, degrees, system=system)
    alone = [
        find_schedule(costs, joined, (r,), system=system) for r in check_degrees(tuple(degrees))
    ]
    pairs = (
        product(alone, repeat=2) if find_system(system).separate else zip(alone, alone, strict=True)
    )
    # Forward and backward times add up, so two schedules of one degree make those of two.
    mixed = [
        back._replace(
            forward=front.forward,
            forward_lead=front.forward_lead,
            forward_s=front.forward_s,
            seconds=back.seconds + front.forward_s.sum() - back.forward_s.sum(),
        )
        for front, back in pairs
    ]
    found: dict[Any, MoEPlan] = {}
    for candidate in (first, *sorted(mixed, key=lambda found: float(found.seconds))):
        key = (*candidate.forward.tolist(), *candidate.backward.tolist())
        found.setdefault(key, as_plan(candidate, size))
    return tuple(found.values())[:n]
