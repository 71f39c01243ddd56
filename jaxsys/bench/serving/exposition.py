"""What a server tells Prometheus, in its text format."""

from dataclasses import dataclass, field

from jaxsys.bench.serving.engine import Figures
from jaxsys.bench.serving.metrics import Trace


@dataclass
class Counts:
    """Count what a server has done since it began.

    >>> counts = Counts()
    >>> counts.refused(429)
    >>> counts.refusals
    {429: 1}
    """

    served: int = 0
    cancelled: int = 0
    tokens: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    refusals: dict[int, int] = field(default_factory=dict)

    def add(self, trace: Trace) -> None:
        """Count a request that has ended."""
        self.served += 1
        self.tokens += trace.tokens
        self.ttft_s += trace.ttft_s
        self.e2e_s += trace.e2e_s

    def refused(self, status: int) -> None:
        """Count a request that was refused."""
        self.refusals[status] = self.refusals.get(status, 0) + 1


def exposition(counts: Counts, figures: Figures, connections: int) -> str:
    """Write all counts.

    Args:
      counts: of the server.
      figures: of the engine.
      connections: open now.

    Reference: Prometheus' text-based exposition format, version 0.0.4.

    >>> text = exposition(Counts(served=2), Figures(*[0] * 10), 3)
    >>> "jaxsys_requests_served_total 2" in text
    True
    """
    lines: list[str] = []

    def write(name: str, kind: str, value: float | int, labels: str = "") -> None:
        typed = f"# TYPE jaxsys_{name} {kind}"
        if typed not in lines:
            lines.append(typed)
        lines.append(f"jaxsys_{name}{labels} {value}")

    for name, value in (("served", counts.served), ("cancelled", counts.cancelled)):
        write(f"requests_{name}_total", "counter", value)
    for status, value in sorted(counts.refusals.items()):
        write("requests_refused_total", "counter", value, f'{{status="{status}"}}')
    write("answer_tokens_total", "counter", counts.tokens)
    for name, value in (("ttft", counts.ttft_s), ("e2e", counts.e2e_s)):
        write(f"{name}_seconds_sum", "counter", value)
        write(f"{name}_seconds_count", "counter", counts.served)
    gauges = {"running", "waiting", "pages", "pages_held", "pages_kept"}
    for name, value in figures._asdict().items():
        is_gauge = name in gauges
        suffix = "" if is_gauge else "_total"
        write(f"engine_{name}{suffix}", "gauge" if is_gauge else "counter", value)
    write("connections", "gauge", connections)
    return "\n".join(lines) + "\n"
