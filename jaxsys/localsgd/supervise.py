"""Start the workers of a job on this machine, over the links asked for, and follow them."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from jaxsys.cluster import LaunchReport, available, format_rate, launch, netlab, parse_rate
from jaxsys.cluster.events import Listener
from jaxsys.core.errors import UserError
from jaxsys.core.report import atomic_write
from jaxsys.localsgd.job import Job

Link = Literal["auto", "netlab", "emulated", "none"]


@dataclasses.dataclass(frozen=True)
class Links:
    """How the workers of a local job are joined.

    Attributes:
      kind: ``netlab``, shaped network namespaces; ``emulated``, loopback with the communication
        device held busy for the modelled time; ``none``, loopback as it is; ``auto``, the first
        of netlab and emulated that works.
      bandwidth: rate of each worker's link, such as ``100mbit``, or one rate per worker.

    >>> Links("none").slowest_bits_s
    60000000.0
    """

    kind: Link = "auto"
    bandwidth: tuple[str, ...] = ("60mbit",)

    @property
    def slowest_bits_s(self) -> float:
        """Rate of the slowest link, which every collective waits for."""
        return min(parse_rate(rate) for rate in self.bandwidth)

    def resolve(self) -> tuple[str, str | None]:
        """Choose the kind of link, and say why where it is not the first choice.

        Raises:
          UserError: a netlab was asked for and cannot be had, or a rate is not a rate.
        """
        _ = self.slowest_bits_s
        if self.kind not in ("auto", "netlab"):
            return self.kind, None
        found = available()
        if found.ok:
            return "netlab", None
        if self.kind == "netlab":
            raise UserError(
                f"shaped networks cannot be had here ({found.reason}); expected user namespaces or "
                f"privileges; {found.remedy}, or pass --link emulated"
            )
        return (
            "emulated",
            f"no shaped network ({found.reason}; {found.remedy}): the link is emulated",
        )


def run_workers(
    job: Job,
    workers: int,
    links: Links,
    *,
    on_event: Callable[[dict[str, Any]], None],
    restarts: int = 0,
    port: int | None = None,
) -> LaunchReport:
    """Run a job in worker processes on this machine until it ends.

    Args:
      job: what to run; its folder receives ``job.json``, ``events.jsonl`` and ``workers.log``.
      workers: number of processes.
      links: what joins them.
      on_event: gets every event of worker 0, with the wall time since the start as ``at_s``.
      restarts: how often all workers may be started again after one has died.
      port: port of the coordinator; a free one by default.

    Returns:
      What became of the processes.

    Raises:
      UserError: a mistake that a worker reported, or links that cannot be had.
    """
    kind, warning = links.resolve()
    if kind == "emulated":
        job = dataclasses.replace(job, hold_bits_s=links.slowest_bits_s)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "job.json", job.to_json())
    listener = Listener(out, on_event)

    rates = links.bandwidth[0] if len(links.bandwidth) == 1 else links.bandwidth
    start = {"event": "start", "link": kind, "bandwidth": list(links.bandwidth), "workers": workers}
    with ExitStack() as stack:
        place: dict[str, Any] = {}
        if kind == "netlab":
            lab = stack.enter_context(netlab(workers, rates))
            found = lab.verify()
            start["verified_bits_s"] = [min(rate) for rate in found]
            place = {"wrap": lab.wrap, "host": lab.addresses[0]}
        if warning is not None:
            start["warning"] = warning
        listener.tell(start)
        report = launch(
            [sys.executable, "-m", "jaxsys.localsgd.worker", str(out / "job.json")],
            workers,
            restarts=restarts,
            on_line=listener,
            port=port,
            pin=kind != "none",
            **place,
        )
    if report.exit_code and listener.mistakes:
        raise UserError(listener.mistakes[0])
    if report.exit_code:
        raise RuntimeError(
            f"worker {report.attempts[-1].first_failed} ended with status "
            f"{report.attempts[-1].code}; its last lines were:\n{listener.tail()}"
        )
    return report


def describe_link(kind: str, bandwidth: Sequence[str]) -> str:
    """Name a link as figures are labelled with it.

    >>> describe_link("emulated", ["100mbit"])
    'emulated link, 100mbit'
    """
    rates = ", ".join(dict.fromkeys(format_rate(parse_rate(rate)) for rate in bandwidth))
    return {
        "netlab": f"shaped link, {rates}",
        "emulated": f"emulated link, {rates}",
        "none": "loopback",
        "joined": "the cluster's own links",
    }[kind]
