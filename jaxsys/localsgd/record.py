"""What a run has shown so far: its events gathered, and the table that is made of them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.core.measure import bootstrap_ci
from jaxsys.localsgd.plan import SyncPlan
from jaxsys.localsgd.profile import Profile
from jaxsys.localsgd.supervise import describe_link


class Record:
    """Gather the events of a run; the same from a live run and from its ``events.jsonl``.

    >>> record = Record()
    >>> record.add({"event": "resumed", "step": 4, "at_s": 1.0})
    >>> record.resumed
    [(1.0, 4)]
    """

    def __init__(self, events: Iterable[dict[str, Any]] = ()) -> None:
        self.start: dict[str, Any] = {}
        self.setup: dict[str, Any] = {}
        self.profile: Profile | None = None
        self.plans: dict[str, SyncPlan] = {}
        self.blocks: dict[str, dict[int, dict[str, Any]]] = {}
        self.valid: dict[str, dict[str, float]] = {}
        self.again: dict[str, Sequence[float]] = {}
        self.link: dict[str, Any] = {}
        self.resumed: list[tuple[float, int]] = []
        self.steps: list[tuple[float, str, int]] = []
        for event in events:
            self.add(event)

    @classmethod
    def read(cls, path: str | Path) -> "Record":
        """Read the ``events.jsonl`` of a run."""
        return cls(json.loads(line) for line in Path(path).read_text().splitlines())

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event."""
        kind = event["event"]
        if kind == "start":
            self.start = event
        elif kind == "setup":
            self.setup = event
        elif kind == "link":
            self.link = event
        elif kind == "plans":
            self.profile = Profile.from_json(json.dumps(event["profile"]))
            self.plans = {
                name: SyncPlan.from_json(json.dumps(plan)) for name, plan in event["plans"].items()
            }
        elif kind == "block":
            self.blocks.setdefault(event["strategy"], {})[event["first"]] = event
        elif kind == "resumed":
            self.resumed.append((event["at_s"], event["step"]))
        elif kind == "step":
            self.steps.append((event["at_s"], event["strategy"], event["step"]))
        elif kind == "end":
            self.valid = event["valid"]
            self.again = event.get("again", {})

    def series(self, strategy: str) -> tuple[np.ndarray, np.ndarray]:
        """Join a strategy's blocks: its own wall time and the mean loss, after each step."""
        clock, losses, base = [], [], 0.0
        for _, block in sorted(self.blocks.get(strategy, {}).items()):
            times = np.asarray(block["clock_s"])
            clock.append(base + times)
            base += times[-1]
            losses.append(block["loss"])
        if not clock:
            return np.zeros(0), np.zeros(0)
        return np.concatenate(clock), np.concatenate(losses)

    def step_seconds(self, strategy: str) -> np.ndarray:
        """List the mean seconds of a step in each whole block."""
        blocks = [b for _, b in sorted(self.blocks.get(strategy, {}).items())]
        size = max((len(b["clock_s"]) for b in blocks), default=0)
        return np.array([b["clock_s"][-1] / size for b in blocks if len(b["clock_s"]) == size])

    def time_lost_s(self) -> float:
        """Sum, over restarts, the time from the last new step until the next new one."""
        lost, seen, last = 0.0, set(), 0.0
        broken = False
        restarts = [at for at, _ in self.resumed]
        for at, strategy, step in self.steps:
            if (strategy, step) in seen:
                broken = True
                continue
            if broken or any(last < r <= at for r in restarts):
                lost += at - last
                broken = False
            seen.add((strategy, step))
            last = at
        return lost

    def rows(self) -> list[dict[str, Any]]:
        """Make the table: one row a strategy, times of a step beside their prediction."""
        names = [n for n in self.plans if len(self.step_seconds(n))]
        if not names:
            return []
        series = {n: self.series(n) for n in names}
        ends = min(clock[-1] for clock, _ in series.values())
        rows = []
        for name in names:
            plan, seconds = self.plans[name], self.step_seconds(name)
            clock, losses = series[name]
            blocks = list(self.blocks[name].values())
            low, high = bootstrap_ci(seconds, seed=0)
            window = max(len(b["loss"]) for b in blocks)
            reached = int(np.searchsorted(clock, ends, side="right"))
            waited = sum(sum(b["wait_s"]) for b in blocks)
            sent = sum(sum(b["comm_s"]) for b in blocks)
            rows.append(
                {
                    "strategy": name,
                    "step_s": float(np.median(seconds)),
                    "low_s": low,
                    "high_s": high,
                    "predicted_s": plan.predicted_s,
                    "predicted_again_s": self.again.get(name, (None,))[0],
                    "hidden": max(0.0, 1.0 - waited / sent) if sent else 1.0,
                    "hidden_planned": plan.hidden_share,
                    "hidden_again": self.again.get(name, (None,))[-1],
                    "sent_bytes_per_step": sum(b["sent_bytes"] for b in blocks)
                    / sum(len(b["loss"]) for b in blocks),
                    "sent_counted": all(b["sent_counted"] for b in blocks),
                    "loss_equal_steps": float(np.mean(losses[-window:])),
                    "loss_equal_time": float(np.mean(losses[max(0, reached - window) : reached]))
                    if reached
                    else None,
                    "valid_loss": self.valid.get(name, {}).get("mean_model"),
                    "divergence": float(np.mean(blocks[-1]["divergence"])),
                }
            )
        return rows

    def table(self, intervals: bool = True) -> list[dict[str, str]]:
        """Write the rows for people, with speed-ups over S-SGD and local SGD where they ran.

        Args:
          intervals: write the 95 % bootstrap interval of each step time (the table is wider).
        """
        rows = self.rows()
        base = {r["strategy"]: r["step_s"] for r in rows}
        table = []
        for r in rows:
            line = {
                "strategy": r["strategy"],
                "s/step": f"{r['step_s']:.3f}",
                "predicted": f"{r['predicted_s']:.3f}",
                "error": f"{r['step_s'] / r['predicted_s'] - 1:+.0%}",
                "hidden": f"{r['hidden']:.0%}",
                "planned": f"{r['hidden_planned']:.0%}",
                "MB/step": ("" if r["sent_counted"] else "~")
                + f"{r['sent_bytes_per_step'] / 1e6:.2f}",
                "loss@steps": f"{r['loss_equal_steps']:.3f}",
                "loss@time": f"{r['loss_equal_time']:.3f}" if r["loss_equal_time"] else "",
            }
            if r["predicted_again_s"] is not None:
                line["in-run"] = f"{r['predicted_again_s']:.3f}"
                line["in-run error"] = f"{r['step_s'] / r['predicted_again_s'] - 1:+.0%}"
            if intervals:
                line["s/step"] += f" [{r['low_s']:.3f}, {r['high_s']:.3f}]"
            for other in ("ssgd", "local"):
                if other in base:
                    line[f"/{other}"] = f"{base[other] / r['step_s']:.2f}x"
            table.append(line)
        return table

    def label(self) -> str:
        """Name the network of the run, as every figure carries it."""
        if not self.start:
            return ""
        link = describe_link(self.start["link"], self.start["bandwidth"])
        rough = ", link rate only roughly known" if self.link.get("warning") else ""
        return f"{self.start['workers']} workers, {link}{rough}"


def smooth(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Average each value with those before it, over at most ``window`` values.

    >>> smooth([1.0, 3.0, 5.0], 2).tolist()
    [1.0, 2.0, 4.0]
    """
    total = np.cumsum(np.asarray(values, float))
    shifted = np.concatenate([np.zeros(min(window, len(total))), total[:-window]])
    count = np.minimum(np.arange(1, len(total) + 1), window)
    return (total - shifted) / count
