"""A planned step as tasks on streams, and its Gantt figure."""

from collections.abc import Mapping
from pathlib import Path

from jaxsys.core.report import figure, save_figure
from jaxsys.core.timeline import Task, Timeline, gantt, simulate
from jaxsys.moe.cases import chunk_times
from jaxsys.moe.contract import MoEPlan
from jaxsys.moe.costs import Costs
from jaxsys.moe.recurrence import COMPUTE, INTER, chunk_tasks
from jaxsys.moe.systems import Stack, find_system, slice_s
from jaxsys.moe.volumes import Volumes


def step_tasks(
    costs: Costs, layers: Stack, chosen: MoEPlan, *, system: str = "jaxsys", element_bytes: int = 4
) -> tuple[Task, ...]:
    """List a whole training step as tasks: forward, backward with gradient slices, the rest.

    Args:
        costs: the lines that the plan was made from.
        layers: the stack that it was made for.
        chosen: the plan.
        system: the system that it was made for.
        element_bytes: bytes of a gradient's element.

    Returns:
        Tasks for `core.timeline.simulate`, whose makespan is the plan's ``predicted_s``.

    >>> import numpy as np
    >>> from jaxsys.moe.contract import LayerPlan
    >>> from jaxsys.moe.costs import TESTBED_B
    >>> one = np.ones(1)
    >>> layers = Stack(Volumes(4e6 * one, 2e7 * one, 2e7 * one, 5e10 * one), one, one, 0 * one)
    >>> tasks = step_tasks(TESTBED_B, layers, MoEPlan((LayerPlan(2, 2),)))
    >>> [task.name for task in tasks if task.stream == COMPUTE]
    ['dense f0', 'expert 1 f0', 'expert 2 f0', 'expert 1 b0', 'expert 2 b0', 'dense b0']
    """
    one_link = find_system(system).order in ("serial", "one_link")

    def sent_s(size: int) -> float:
        return float(slice_s(find_system(system), costs, size / element_bytes))

    def volumes(i: int) -> Volumes:
        return Volumes(*(float(field[i]) for field in layers.volumes))

    tasks: list[Task] = []
    after: tuple[str, ...] = ()
    for i, layer in enumerate(chosen.layers):
        tasks.append(Task(f"dense f{i}", COMPUTE, float(layers.dense_forward_s[i]), after))
        tasks += chunk_tasks(
            chunk_times(costs, volumes(i), layer.forward),
            layer.forward,
            lead=layer.forward_lead,
            suffix=f" f{i}",
            after=(f"dense f{i}",),
            one_link=one_link,
        )
        after = (f"combine {layer.forward} f{i}",)
    left = 0.0  # elements whose gradient is known and not reduced
    for i, layer in reversed(list(enumerate(chosen.layers))):
        tasks += chunk_tasks(
            chunk_times(costs, volumes(i), layer.backward, backward=True),
            layer.backward,
            sent_s(layer.gradient_bytes),
            layer.backward_lead,
            suffix=f" b{i}",
            after=after,
            one_link=one_link,
        )
        after = (f"combine {layer.backward} b{i}",)
        if layer.dense_bytes:
            tasks.append(Task(f"gradient dense b{i}", INTER, sent_s(layer.dense_bytes), after))
        tasks.append(Task(f"dense b{i}", COMPUTE, float(layers.dense_backward_s[i]), after))
        after = (f"dense b{i}",)
        left += float(layers.gradients[i])
        left -= (layer.gradient_bytes + layer.dense_bytes) / element_bytes
    if left > 0:
        tasks.append(Task("gradient rest", INTER, float(costs.all_reduce(left)), after))
    return tuple(tasks)


def step_timeline(
    costs: Costs, layers: Stack, chosen: MoEPlan, *, system: str = "jaxsys"
) -> Timeline:
    """Simulate a planned step.

    Args:
        costs: as in `step_tasks`, as are the others.

    Returns:
        When everything runs.

    >>> import numpy as np
    >>> from jaxsys.moe.contract import LayerPlan
    >>> from jaxsys.moe.costs import TESTBED_B
    >>> one = np.ones(1)
    >>> layers = Stack(Volumes(0 * one, 0 * one, 0 * one, 0 * one), one, one, 0 * one)
    >>> round(step_timeline(TESTBED_B, layers, MoEPlan((LayerPlan(),))).makespan_s, 3)
    2.001
    """
    return simulate(step_tasks(costs, layers, chosen, system=system))


def step_figure(
    costs: Costs, layers: Stack, plans: Mapping[str, MoEPlan], path: str | Path, title: str = ""
) -> None:
    """Draw the steps of several systems below one another, on one scale.

    Args:
        costs: the lines that the plans were made from.
        layers: the stack that they were made for.
        plans: name of a system to its plan.
        path: where the figure goes.
        title: what stands above.

    >>> import tempfile
    >>> import numpy as np
    >>> from jaxsys.moe.contract import LayerPlan
    >>> from jaxsys.moe.costs import TESTBED_B
    >>> one = np.ones(1)
    >>> layers = Stack(Volumes(4e6 * one, 2e7 * one, 2e7 * one, 5e10 * one), one, one, 0 * one)
    >>> plans = {"jaxsys": MoEPlan((LayerPlan(2, 2),))}
    >>> step_figure(TESTBED_B, layers, plans, Path(tempfile.mkdtemp()) / "step.png")
    """
    fig, grid = figure(len(plans), 1, width=10.0, height=1.7)
    lines = {name: step_timeline(costs, layers, p, system=name) for name, p in plans.items()}
    end_s = max(line.makespan_s for line in lines.values())
    for axis, (name, line) in zip(grid[:, 0], lines.items(), strict=True):
        gantt(axis, line, labels=False)
        axis.set(xlim=(0, end_s), title=f"{name}: {line.makespan_s * 1e3:.1f} ms (modelled)")
    if title:
        fig.suptitle(title, fontsize=9)
    save_figure(fig, path)
