"""One kind of layer, many systems: modelled steps side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.moe.contract import MoEPlan
from jaxsys.moe.costs import Costs
from jaxsys.moe.degrees import DEGREES
from jaxsys.moe.planner import as_plan, find_schedule, make_stack
from jaxsys.moe.systems import Stack, find_system
from jaxsys.moe.volumes import Shape, dense_gradient, dense_work, volumes


def uniform(
    costs: Costs, shape: Shape, n_layers: int, *, dense_forward_s: float | int | None = None
) -> Stack:
    """Stack equal layers.

    Args:
        costs: its line of the experts times the attention where no time is given.
        shape: of each layer.
        n_layers: L.
        dense_forward_s: seconds of each dense part; backward takes twice that.

    Returns:
        The stack.

    Raises:
        UserError: for no layer, or a negative time.

    >>> from jaxsys.moe.costs import TESTBED_B
    >>> uniform(TESTBED_B, Shape(1, 8, 8, 32), 2, dense_forward_s=1.0).dense_backward_s.tolist()
    [2.0, 2.0]
    """
    if n_layers < 1:
        raise UserError(f"there are {n_layers} layers; expected a whole number from 1 up")
    dense_s = costs.expert(dense_work(shape)) if dense_forward_s is None else dense_forward_s
    return make_stack(
        [volumes(shape)] * n_layers,
        [dense_gradient(shape)] * n_layers,
        dense_forward_s=dense_s,
        dense_backward_s=2 * dense_s,
    )


def compare_systems(
    costs: Costs, layers: Stack, degrees: Sequence[int] = DEGREES, systems: Sequence[str] = ()
) -> dict[str, MoEPlan]:
    """Plan the same stack under several systems.

    Args:
        costs: fitted lines.
        layers: the stack.
        degrees: to choose from.
        systems: names of `systems.SYSTEMS`.

    Returns:
        Name to plan, in the order given.

    Raises:
        UserError: for no or an unknown system.

    >>> from jaxsys.moe.costs import TESTBED_B
    >>> layers = uniform(TESTBED_B, Shape(1, 8, 8, 32), 2)
    >>> list(compare_systems(TESTBED_B, layers, (1, 2), ("tutel",)))
    ['tutel']
    """
    if not systems:
        raise UserError("there are no systems; expected at least one, such as jaxsys; name it")
    for name in systems:
        find_system(name)
    return {name: as_plan(find_schedule(costs, layers, degrees, system=name)) for name in systems}


def comparison_rows(plans: Mapping[str, MoEPlan]) -> list[dict[str, Any]]:
    """Tabulate plans of one stack, each against the first.

    Args:
        plans: name to plan.

    Returns:
        One row per system: times, degrees of the first and last layer, MiB of gradient placed.

    >>> comparison_rows({"tutel": MoEPlan(predicted_s=2.0), "x": MoEPlan(predicted_s=1.0)})[1]
    {'system': 'x', 'ms': 1000.0, 'speed-up': 2.0, 'degrees': '1/1', 'in MoE, MiB': 0.0, ...}
    """
    first = next(iter(plans.values())).predicted_s
    return [
        {
            "system": name,
            "ms": chosen.predicted_s * 1e3,
            "speed-up": first / chosen.predicted_s,
            "degrees": " ".join(
                dict.fromkeys(f"{layer.forward}/{layer.backward}" for layer in chosen.layers)
            ),
            "in MoE, MiB": sum(layer.gradient_bytes for layer in chosen.layers) / 2**20,
            "in dense, MiB": sum(layer.dense_bytes for layer in chosen.layers) / 2**20,
        }
        for name, chosen in plans.items()
    ]
