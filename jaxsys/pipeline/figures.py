"""Pictures of a plan: what each device and link does when, and the fleet with its communities."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from jaxsys.core.report import COLOURS, figure
from jaxsys.core.timeline import gantt
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import Costs
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.timing import predict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plan_figure(plan: Plan, costs: Costs, fleet: Fleet) -> "Figure":
    """Draw the simulated step of a plan, one row per device and direction of a link.

    Args:
        plan: the plan.
        costs: what one micro-batch takes (`estimate.costs_of`).
        fleet: names and sites.

    Returns:
        A matplotlib figure; `jaxsys.core.report.save_figure` writes it.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> plan = Plan(2, (1,), (0, 1), micro_batches=2)
    >>> fig = plan_figure(plan, Costs((1.0, 1.0), (2.0, 2.0), (), (0, 1)), even_fleet([1, 1]))
    >>> [tick.get_text() for tick in fig.axes[0].get_yticklabels()]
    ['device 0', 'device 1']
    """
    timeline = predict(plan, costs, fleet)
    n_rows = len({span.stream for span in timeline.spans})
    fig, axes = figure(width=9.0, height=min(14.0, 1.2 + 0.24 * n_rows))
    gantt(axes[0, 0], timeline, labels=len(timeline.spans) <= 120)
    axes[0, 0].set_title(
        f"{plan.method}, {plan.order}, {plan.codec}: {timeline.makespan_s:.3g} s predicted"
    )
    kinds = dict.fromkeys(span.name.split(" ")[0] for span in timeline.spans)
    for k, kind in enumerate(kinds):  # the colours of `gantt`
        axes[0, 0].bar(0, 0, color=COLOURS[k % len(COLOURS)], label=kind)
    axes[0, 0].legend(fontsize=7, loc="upper right")
    return fig


def fleet_figure(
    fleet: Fleet, groups: Sequence[Sequence[int]], chain: Sequence[int] = ()
) -> "Figure":
    """Draw the rates of all links, devices by community, and a chain through them.

    Args:
        fleet: devices and links.
        groups: device indices of each community (`fence.communities`).
        chain: devices in the order of a plan; its links are marked.

    Returns:
        A matplotlib figure: rate from row to column, communities framed.

    >>> from jaxsys.pipeline.fleets import paper_fleet
    >>> fleet = paper_fleet(0, n_devices=8)
    >>> len(fleet_figure(fleet, [range(4), range(4, 8)], (0, 1, 4)).axes)
    2
    """
    order = [d for group in groups for d in group]
    place = {d: i for i, d in enumerate(order)}
    rate = np.log10(8 * fleet.bytes_per_s[np.ix_(order, order)])
    np.fill_diagonal(rate, np.nan)
    fig, axes = figure(width=6.0, height=5.0)
    ax = axes[0, 0]
    ax.grid(visible=False)
    image = ax.imshow(rate, cmap="viridis")
    fig.colorbar(image, ax=ax, label="log10 of the link's bits per second")
    start = 0.0
    for k, group in enumerate(groups):
        n, colour = len(group), COLOURS[(k + 1) % len(COLOURS)]
        frame = [start - 0.5, start + n - 0.5]
        ax.plot(
            [frame[0], frame[1], frame[1], frame[0], frame[0]],
            [frame[0], frame[0], frame[1], frame[1], frame[0]],
            color=colour,
        )
        start += n
    links = [(place[p], place[q]) for p, q in pairwise(chain)]
    if links:
        rows, columns = zip(*links, strict=True)
        ax.scatter(columns, rows, s=14, facecolors="none", edgecolors="white", label="chain")
        ax.legend(fontsize=7)
    names = [fleet.devices[d].name for d in order]
    if len(names) <= 60:
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
        ax.set_yticks(range(len(names)), names, fontsize=5)
    ax.set_title(f"{len(fleet)} devices, {len(groups)} communities")
    return fig
