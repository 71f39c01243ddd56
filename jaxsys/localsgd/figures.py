"""Figures of local SGD runs and plans."""

from pathlib import Path
from typing import Any

from jaxsys.core.report import figure, save_figure
from jaxsys.core.timeline import Span, gantt, simulate
from jaxsys.localsgd.plan import SyncPlan
from jaxsys.localsgd.plan_time import phase_tasks
from jaxsys.localsgd.profile import Profile
from jaxsys.localsgd.record import Record, smooth
from jaxsys.localsgd.strategy import Strategy

COMPUTE, WIRE = "compute", "communication"


def planned_spans(profile: Profile, plan: SyncPlan, strategy: Strategy) -> tuple[Span, ...]:
    """Lay out one planned period, iteration after iteration.

    >>> from jaxsys.core.cost import LinearCost
    >>> cost = LinearCost(0.0, 1.0, 1.0, 0.0, 3)
    >>> profile = Profile(("w",), (1,), (1.0,), (1.0,), 0.0, cost, 2)
    >>> strategy = Strategy(period=1)
    >>> planned_spans(profile, profile.plan(strategy), strategy)[-1].end_s
    6.0
    """
    merged = strategy.launch == "after"
    comm_s = [profile.message_s(n, strategy.codec) for n in profile.elements]
    spans, base = [], 0.0
    for phase, wait_s in zip(plan.phases, plan.wait_s, strict=True):
        layers = phase[:1] if merged else phase
        times = list(comm_s)
        if merged and phase:
            times[phase[0]] = profile.message_s(
                sum(profile.elements[i] for i in phase), strategy.codec
            )
        tasks = phase_tasks(
            layers,
            profile.backward_s,
            times,
            launch=plan.launch,
            forward_s=sum(profile.forward_s),
            tail_s=profile.tail_s,
        )
        names = {"comm": WIRE}
        for span in simulate(tasks).spans:
            stream = names.get(span.stream, span.stream)
            spans.append(Span(span.name, stream, base + span.start_s, base + span.end_s))
        base += plan.compute_s + wait_s
    return tuple(spans)


def measured_spans(record: Record, name: str) -> tuple[Span, ...]:
    """Lay out the last whole block that was measured, on worker 0's clock."""
    blocks = [b for _, b in sorted(record.blocks[name].items())]
    size = max(len(b["spans"]) for b in blocks)
    last = [b for b in blocks if len(b["spans"]) == size][-1]
    spans, base = [], 0.0
    for step in last["spans"]:
        for task, stream, start, end in step:
            spans.append(Span(task, stream, base + start, base + end))
        base += max((s[3] for s in step if s[1] == COMPUTE), default=0.0)
    return tuple(spans)


def compare_figure(
    record: Record, strategies: dict[str, Strategy], path: str | Path, focus: str | None = None
) -> None:
    """Draw loss against wall time, and one period measured above the same period planned.

    Args:
      record: a run.
      strategies: those of the run.
      path: where the PNG goes.
      focus: the strategy whose period is drawn; the last partial one by default.
    """
    names = [n for n in record.plans if len(record.series(n)[0])]
    focus = focus or ([n for n in names if n.startswith("dreamddp")] or names)[-1]
    fig, grid = figure(3, 1, width=8.0, height=2.8)
    axes = grid[:, 0]
    window = max(s.period for s in strategies.values())
    for name in names:
        clock, losses = record.series(name)
        axes[0].plot(clock, smooth(losses, window), label=name)
    axes[0].set(
        xlabel="wall time of the strategy, s",
        ylabel="training loss, nats/token",
        title=record.label(),
    )
    axes[0].legend()
    assert record.profile is not None
    measured = measured_spans(record, focus)
    planned = planned_spans(record.profile, record.plans[focus], strategies[focus])
    end = max(s.end_s for s in (*measured, *planned))
    for axis, spans, kind in ((axes[1], measured, "measured"), (axes[2], planned, "planned")):
        gantt(axis, spans, labels=False)
        axis.set(xlim=(0, end), title=f"{focus}: one period, {kind}")
    save_figure(fig, path)


def sweep_figure(rows: list[dict[str, Any]], path: str | Path, title: str) -> None:
    """Draw predicted step time against bandwidth, one line per strategy.

    Args:
      rows: dicts with ``strategy``, ``bandwidth_bits_s`` and ``predicted_s``.
      path: where the PNG goes.
      title: what stands above.

    >>> import tempfile
    >>> row = {"strategy": "local", "bandwidth_bits_s": 1e8, "predicted_s": 0.5}
    >>> sweep_figure([row], Path(tempfile.mkdtemp()) / "sweep.png", "4 workers")
    """
    fig, axes = figure(1, 1, width=6.4, height=4.0)
    axis = axes[0, 0]
    for name in dict.fromkeys(r["strategy"] for r in rows):
        mine = [r for r in rows if r["strategy"] == name]
        axis.plot(
            [r["bandwidth_bits_s"] / 1e6 for r in mine],
            [r["predicted_s"] for r in mine],
            marker="o",
            markersize=3,
            label=name,
        )
    axis.set(xscale="log", yscale="log", xlabel="link rate, Mbit/s", ylabel="s per step (modelled)")
    axis.set_title(title)
    axis.legend()
    save_figure(fig, path)
