"""How a plan is chosen: settings for the planner, methods side by side, pictures of plans."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.core.report import figure, format_seconds, save_figure
from jaxsys.core.timeline import gantt
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import NO_OVERHEADS, Overheads, costs_of
from jaxsys.pipeline.memory import Limits
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.planner import METHODS, make_plan
from jaxsys.pipeline.replan import Planner
from jaxsys.pipeline.timing import closed_form_s, lower_bound_s, predict, predict_s
from jaxsys.pipeline.work import Work

CODECS = ("dense", "uniform", "adatopk", "int8", "int4")
_COPIES = {"sgd": 2.0}  # parameter and gradient; others keep two moments as well


@dataclasses.dataclass(frozen=True)
class Choice:
    """Say how to plan.

    Attributes:
      method: ``equal-number``, ``equal-compute``, ``op-fence``, ``exact`` or ``search``.
      codec: ``dense``, ``uniform`` (top-k on every boundary), ``adatopk``, ``int8`` or ``int4``.
      ratio: by how much top-k shrinks the slowest boundary's bytes, or of uniform top-k how many
        elements there are for each that is kept; 100 is recalled from the paper.
      order: one of `schedule.ORDERS`, or ``auto`` for the fastest.
      chunks: stages of each device, for ``interleaved``.
      micro_batches: micro-batches in a step.
      remat: keep a stage's inputs only, and run it forward again before its backward.

    >>> Choice(codec="adatopk").settings()["codec"]
    'topk'
    """

    method: str = "search"
    codec: str = "dense"
    ratio: float | int = 100.0
    order: str = "1f1b"
    chunks: int = 1
    micro_batches: int = 4
    remat: bool = False

    def __post_init__(self):
        """Refuse names that the planner does not know under these."""
        if self.codec not in CODECS:
            raise UserError(
                f"codec is {self.codec!r}; expected one of {', '.join(CODECS)}; choose one"
            )
        if self.method not in METHODS:
            raise UserError(
                f"method is {self.method!r}; expected one of {', '.join(METHODS)}; choose one"
            )

    def settings(self) -> dict[str, Any]:
        """Give the arguments of `make_plan`."""
        topk = self.codec in ("uniform", "adatopk")
        return {
            "micro_batches": self.micro_batches,
            "method": self.method,
            "order": self.order,
            "chunks": self.chunks,
            "codec": "topk" if topk else self.codec,
            "ratio": self.ratio if topk else 1.0,
            "adaptive": self.codec == "adatopk",
        }


def planner_of(
    work: Work,
    choice: Choice,
    *,
    optimizer: str = "adamw",
    overheads: Overheads = NO_OVERHEADS,
    seed: int = 0,
) -> Planner:
    """Make the planner of a run, which plans again when a device is lost or slow.

    Args:
      work: the graph's costs.
      choice: how to plan.
      optimizer: name of the preset, for the copies of a parameter that it keeps.
      overheads: measured seconds of what stages do beside their nodes.
      seed: of the search.

    Returns:
      The planner.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> planner = planner_of(chain_work([1] * 4, [1] * 3), Choice("exact"))
    >>> planner.over(even_fleet([3, 6, 3]), (0, 2)).devices in ((0, 2), (2, 0))
    True
    """
    limits = Limits(_COPIES.get(optimizer, 4.0), choice.remat)

    def make(fleet: Fleet) -> Plan:
        return make_plan(
            work,
            fleet,
            limits=limits,
            overheads=overheads,
            seed=seed,
            **choice.settings(),
        )

    def seconds(plan: Plan, fleet: Fleet) -> float:
        return predict_s(plan, costs_of(work, fleet, plan, overheads=overheads), fleet)

    return Planner(make, seconds, work, limits)


def compare(
    work: Work,
    fleet: Fleet,
    choice: Choice,
    *,
    methods: Sequence[str] = METHODS,
    codecs: Sequence[str] = ("dense", "uniform", "adatopk"),
    **given: Any,
) -> list[dict[str, Any]]:
    """Plan by every method under every codec.

    Args:
      work: the graph's costs.
      fleet: the devices.
      choice: everything else.
      methods: which.
      codecs: which, as `Choice` names them.
      **given: as for `planner_of`.

    Returns:
      A row for each with the plan, its predicted seconds by simulation and by the closed form, the
      lower bound, and the speed-up over the first row; or the reason why there is no such plan.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> work = chain_work([1] * 4, [1] * 3)
    >>> rows = compare(work, even_fleet([3, 6]), Choice(), methods=["exact"])
    >>> [row["codec"] for row in rows], rows[0]["speedup"]
    (['dense', 'uniform', 'adatopk'], 1.0)
    """
    rows: list[dict[str, Any]] = []
    overheads = given.get("overheads", NO_OVERHEADS)
    first_s = None
    for codec in codecs:
        for method in methods:
            each = dataclasses.replace(choice, method=method, codec=codec)
            row: dict[str, Any] = {"method": method, "codec": codec}
            rows.append(row)
            try:
                plan = planner_of(work, each, **given).make(fleet)
            except UserError as error:
                row["refused"] = str(error)
                continue
            costs = costs_of(work, fleet, plan, overheads=overheads)
            first_s = first_s or plan.predicted_s
            row |= {
                "plan": plan,
                "predicted_s": plan.predicted_s,
                "closed_form_s": closed_form_s(plan, costs, fleet),
                "lower_bound_s": lower_bound_s(plan, costs, fleet),
                "speedup": first_s / plan.predicted_s,
            }
    return rows


def plan_rows(plan: Plan, fleet: Fleet, work: Work) -> list[dict[str, Any]]:
    """Describe a plan, a row for each stage.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> plan_rows(Plan(2, (1,), (1, 0)), even_fleet([1, 1]), chain_work([1, 3], [1]))[1]["device"]
    'device 0'
    """
    costs = costs_of(work, fleet, plan)
    rows = []
    for stage, device in enumerate(plan.devices):
        nodes = plan.nodes(stage)
        last = stage == plan.n_stages - 1
        rows.append(
            {
                "stage": stage,
                "device": fleet.devices[device].name,
                "first node": work.names[nodes.start],
                "nodes": len(nodes),
                "share of the work": f"{_share(work, nodes):.0%}",
                "forward": format_seconds(costs.forward_s[stage]),
                "backward": format_seconds(costs.backward_s[stage]),
                "ratio to the next": "" if last else f"{plan.ratios_forward[stage]:.1f}",
            }
        )
    return rows


def _share(work: Work, nodes: range) -> float:
    return float((work.total[nodes.stop] - work.total[nodes.start]) / work.total[-1])


def plan_figure(plans: dict[str, Plan], fleet: Fleet, work: Work, path: Path, **given: Any) -> None:
    """Draw a step of each plan as it is predicted: a row for each device and link.

    Args:
      plans: by title.
      fleet: the devices.
      work: the graph's costs.
      path: the figure's file.
      **given: as for `costs_of`.

    >>> import tempfile
    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> path = Path(tempfile.mkdtemp(), "plan.png")
    >>> plans = {"one": Plan(2, (1,), (1, 0))}
    >>> plan_figure(plans, even_fleet([1, 1]), chain_work([1, 3], [1]), path)
    >>> path.exists()
    True
    """
    fig, axes = figure(len(plans), 1, width=9.0, height=0.9 + 0.28 * 3 * len(fleet))
    for axis, (title, plan) in zip(axes[:, 0], plans.items(), strict=True):
        timeline = predict(plan, costs_of(work, fleet, plan, **given), fleet)
        gantt(axis, timeline, labels=plan.micro_batches * plan.n_stages <= 24)
        axis.set_title(f"{title}: {format_seconds(timeline.makespan_s)} a step, modelled")
    save_figure(fig, path)
