"""The live view of a run: one line a strategy, on a terminal; one line a block elsewhere."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxsys.localsgd.record import Record


class LiveView:
    """Show a run's events as they come, on standard error.

    >>> view = LiveView(Record(), ["ssgd"], steps=10)
    >>> view.update({"event": "compile", "strategy": "ssgd", "at_s": 0.0})
    """

    def __init__(self, record: Record, strategies: Sequence[str], steps: int) -> None:
        self.record, self.strategies, self.steps = record, strategies, steps
        self.console = Console(stderr=True)
        self.done = dict.fromkeys(strategies, 0)
        self.loss: dict[str, float] = {}
        self.status = "starting the workers"
        self.began = time.monotonic()
        self._live: Live | None = None
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> "LiveView":
        """Take over the bottom of the terminal, where there is one."""
        if self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Leave the last view standing."""
        if self._live is not None:
            self._live.update(self._render())
            self._live.__exit__(*exception)

    def update(self, event: dict[str, Any]) -> None:
        """Take in one event."""
        self.record.add(event)
        kind = event["event"]
        if kind == "start":
            self._say(event.get("warning"))
            self._say(f"starting {event['workers']} workers: {self.record.label()}")
        elif kind == "setup":
            layers, parameters = len(event["layers"]), event["parameters"]
            self._say(f"model of {parameters:,} parameters in {layers} layers")
        elif kind == "profile":
            what = "the link" if "link" in event else "every layer"
            self.status = f"profiling {what}"
        elif kind == "link":
            self._say(event.get("warning"))
            if event["points"]:  # one worker alone has none
                line = f"{event['alpha_s'] * 1e3:.1f} ms + "
                line += f"{event['beta_s_per_unit'] * 1e9:.1f} ms per MB sent"
                self._say(f"link: {line} (r2 {event['r2']:.3f})")
        elif kind == "compile":
            self.status = f"compiling and warming up {event['strategy']}"
        elif kind == "resumed":
            self._say(f"resumed from the checkpoint of step {event['step']}")
        elif kind == "step":
            self.status = f"running {event['strategy']}"
            self.done[event["strategy"]] = event["step"] + 1
            self.loss[event["strategy"]] = event["loss"]
            if self._first is None:
                self._first = (event["at_s"], sum(self.done.values()))
        elif kind == "block" and self._live is None:
            name = event["strategy"]
            seconds = event["clock_s"][-1] / len(event["clock_s"])
            self._say(
                f"{name}: step {self.done[name]}/{self.steps}, loss {event['loss'][-1]:.3f}, "
                f"{seconds:.3f} s/step"
            )
        if self._live is not None:
            self._live.update(self._render())

    def _say(self, text: str | None) -> None:
        if text:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _remaining(self) -> str:
        total, done = self.steps * len(self.strategies), sum(self.done.values())
        elapsed = time.monotonic() - self.began
        if self._first is None or done <= self._first[1]:
            return f"{elapsed:.0f} s elapsed"
        rate = (elapsed - self._first[0]) / (done - self._first[1])
        return f"{elapsed:.0f} s elapsed, about {rate * (total - done):.0f} s to go"

    def _render(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("strategy", "progress", "step", "loss", "s/step", "predicted"):
            table.add_column(column, justify="left" if column == "strategy" else "right")
        for name in self.strategies:
            seconds = self.record.step_seconds(name)
            plan = self.record.plans.get(name)
            table.add_row(
                name,
                ProgressBar(total=self.steps, completed=self.done[name], width=24),
                f"{self.done[name]}/{self.steps}",
                f"{self.loss[name]:.3f}" if name in self.loss else "",
                f"{seconds.mean():.3f}" if len(seconds) else "",
                f"{plan.predicted_s:.3f}" if plan else "",
            )
        table.caption = Text(f"{self.status} ({self._remaining()})")
        return table
