"""The times of one worker's step: what ran when, at work or waiting."""

import time

from jaxsys.cluster.throttle import Throttle
from jaxsys.core.timeline import Span


class Clock:
    """Time what a worker does in one step, each piece from the end of the one before.

    Args:
        throttle: starts a piece anew with each.

    Attributes:
        began: when the step did.
        busy_s: seconds at work.
        wait_s: seconds of waiting for messages.
        spans: what ran when, in seconds since the beginning.
        sent: when the last message of the piece under way left, or None.
        late: share of each backward that came after its message.

    >>> clock = Clock(Throttle(1.0))
    >>> clock.worked("forward 0", 0)
    >>> clock.spans[0].name, clock.busy_s > 0
    ('forward 0', True)
    """

    def __init__(self, throttle: Throttle) -> None:
        self.throttle = throttle
        throttle.begin()
        self.began = self.last = time.perf_counter()
        self.busy_s = self.wait_s = 0.0
        self.spans: list[Span] = []
        self.sent: float | None = None
        self.late: list[float] = []

    def worked(self, name: str, stage: int) -> None:
        """End a piece of work of a stage."""
        now = time.perf_counter()
        if self.sent is not None and name.startswith("backward"):
            self.late.append((now - self.sent) / (now - self.last))
        self.sent = None
        self.spans.append(Span(name, f"stage {stage}", self.last - self.began, now - self.began))
        self.busy_s += now - self.last
        self.last = now
        self.throttle.begin()

    def waited(self) -> None:
        """End a wait."""
        now = time.perf_counter()
        self.wait_s += now - self.last
        self.last = now
        self.throttle.begin()
