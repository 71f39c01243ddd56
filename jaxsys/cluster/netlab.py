"""A network of slow links inside one machine: a namespace and a shaped link for each worker.

Every worker has its own network namespace, host name and address; a virtual cable with a token
bucket at both ends (`tc … tbf`: one limits what the worker sends, one what it receives) joins it
to one bridge. Nothing has a global name, so nothing can collide with another netlab on the machine
and everything disappears with the processes that hold it (see `_holder.py`).

An unprivileged user namespace is tried first; where those are refused, root does without. Workers
see the same files and devices as outside, but no other network: neither the internet nor the
machine's own services.
"""

import contextlib
import dataclasses
import functools
import ipaddress
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsys.cluster._namespaces import Refused, hold, remove_leavings
from jaxsys.cluster.rates import format_rate, parse_rate
from jaxsys.core.errors import UserError

_HERE = Path(__file__).parent
_NETWORK = ipaddress.ip_network("10.77.0.0/16")
_LEAST_BITS_S, _MOST_BITS_S = 1e5, 1e10  # below, one frame takes a second; above, this CPU is slow
_HOW = ("user namespace", "root")
_QUEUE_S = 0.4  # so long a full queue takes to drain; what comes on top is dropped
# Large frames and small bundles of them (GSO): headers stay below 1 % of the bytes, and a bundle
# fits into a bucket that is small enough to give little away to short messages.
_MTU_BYTES, _GSO_BYTES = 9000, 18000
_REMEDIES = {
    "tools": "install Debian's iproute2 and util-linux (apt-get install iproute2 util-linux)",
    "user": "run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 and "
    "kernel.apparmor_restrict_unprivileged_userns=0), or give the container --privileged",
    "tbf": "load the kernel's token bucket (modprobe sch_tbf)",
    "bridge": "load the kernel's bridge and veth drivers (modprobe bridge veth)",
}


class Availability(NamedTuple):
    """Whether this machine can make a netlab.

    Attributes:
      ok: True where a trial one was made.
      how: ``user namespace`` or ``root``; empty where not ok.
      reason: what is missing, in one line; empty where ok.
      remedy: how to get it, in one line; empty where ok.

    >>> Availability(False, "", "tc is missing", "install iproute2").ok
    False
    """

    ok: bool
    how: str
    reason: str
    remedy: str


class LinkRate(NamedTuple):
    """What a worker's link was measured to carry.

    Attributes:
      up_bits_s: payload bits per second that the worker sends.
      down_bits_s: payload bits per second that it receives.

    >>> LinkRate(up_bits_s=9.9e7, down_bits_s=9.8e7).up_bits_s
    99000000.0
    """

    up_bits_s: float
    down_bits_s: float


@dataclasses.dataclass(frozen=True)
class Netlab:
    """A running network; made by `netlab`.

    Attributes:
      addresses: worker i's IPv4 address.
      hostnames: worker i's host name, known to all workers.
      rates_bits_s: the rate of worker i's link in each direction, headers included.
      burst_bytes: what worker i's link lets pass at once after a pause.
      how: ``user namespace`` or ``root``.
      hub_address: the bridge's own address; its end is not shaped.
      hub_pid: the process that holds the bridge's namespace.
      pids: the process that holds worker i's namespaces.

    >>> lab = Netlab(("10.77.0.1",), ("jaxsys-w0",), (1e8,), (32768,), "root", "10.77.255.254",
    ...              hub_pid=10, pids=(11,))
    >>> lab.wrap(0, ["python", "train.py"])[0].endswith("nsenter")
    True
    """

    addresses: tuple[str, ...]
    hostnames: tuple[str, ...]
    rates_bits_s: tuple[float, ...]
    burst_bytes: tuple[int, ...]
    how: str
    hub_address: str
    hub_pid: int
    pids: tuple[int, ...]

    def wrap(self, i: int, argv: Sequence[str]) -> list[str]:
        """Give an argument list that runs a command in worker i's namespaces.

        Args:
          i: the worker.
          argv: program and arguments; it starts in the present working directory.

        Returns:
          The longer argument list. `nsenter` becomes the command, so signals reach it.

        >>> lab = Netlab(("10.77.0.1",), ("jaxsys-w0",), (1e8,), (32768,), "root",
        ...              "10.77.255.254", hub_pid=10, pids=(11,))
        >>> lab.wrap(0, ["hostname"])[-1]
        'hostname'
        """
        return self._enter(self.pids[i], argv)

    def _enter(self, pid: int, argv: Sequence[str]) -> list[str]:
        user = ["--user", "--preserve-credentials"] if self.how == _HOW[0] else []
        nsenter = _tool("nsenter") or "nsenter"
        # another mount namespace begins at /, hence the change back to the present folder
        return [
            *(nsenter, "--target", str(pid), *user, "--mount", "--net", "--uts", "--"),
            *("/bin/sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *argv),
        ]

    def verify(self, tolerance: float = 0.10, seconds: float = 0.3) -> tuple[LinkRate, ...]:
        """Time an exchange over each worker's link and warn where a rate is not what it should be.

        The links are measured one after the other against the bridge's unshaped end, so that each
        number belongs to one link.

        Args:
          tolerance: the relative deviation from which on to warn.
          seconds: about how long each direction is timed.

        Returns:
          The measured rates, one for each worker.

        Raises:
          UserError: an exchange failed or did not end.

        >>> from jaxsys.cluster.netlab import available, netlab
        >>> if available().ok:
        ...     with netlab(1, "50mbit") as lab:
        ...         rates = lab.verify(tolerance=1.0, seconds=0.05)
        """
        measured = []
        probe = [sys.executable, "-I", "-S", str(_HERE / "_probe.py")]
        with subprocess.Popen(
            self._enter(self.hub_pid, [*probe, "serve", str(len(self.pids))]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        ) as server:
            try:
                assert server.stdout is not None
                port = server.stdout.readline().strip() or "0"  # nothing: the first time fails
                for i, rate_bits_s in enumerate(self.rates_bits_s):
                    timed_bytes = max(round(rate_bits_s * seconds / 8), 2 * _MTU_BYTES)
                    warm_bytes = 2 * self.burst_bytes[i] + timed_bytes // 4
                    arguments = [self.hub_address, port, str(warm_bytes), str(timed_bytes)]
                    done = subprocess.run(
                        self.wrap(i, [*probe, "time", *arguments]),
                        capture_output=True,
                        text=True,
                        timeout=30.0 + 20.0 * seconds,
                    )
                    if done.returncode != 0:
                        raise UserError(
                            f"the timed exchange of worker {i} failed "
                            f"({(done.stderr.strip().splitlines() or ['no message'])[-1]}); "
                            "expected it to reach the bridge; try again or use an emulated link"
                        )
                    times = json.loads(done.stdout)
                    bits = 8.0 * timed_bytes
                    measured.append(LinkRate(bits / times["up_s"], bits / times["down_s"]))
            finally:
                server.kill()
        self._warn(measured, tolerance)
        return tuple(measured)

    def _warn(self, measured: Sequence[LinkRate], tolerance: float) -> None:
        off = [
            f"worker {i} {format_rate(rate)} instead of {format_rate(wanted)}"
            for i, (link, wanted) in enumerate(zip(measured, self.rates_bits_s, strict=True))
            for rate in link
            if abs(rate / wanted - 1.0) > tolerance
        ]
        if off:
            warnings.warn(
                f"links are off by more than {tolerance:.0%} ({'; '.join(off[:4])}); "
                "the machine is busy or too slow for the rate; choose a lower one or wait",
                RuntimeWarning,
                stacklevel=3,
            )


@contextlib.contextmanager
def netlab(
    n: int,
    bandwidth: str | Sequence[str] = "100mbit",
    *,
    burst_bytes: int | None = None,
) -> Iterator[Netlab]:
    """Make a network of n workers with shaped links, and remove it at the end.

    Args:
      n: how many workers.
      bandwidth: the rate of every link, such as ``100mbit``, or a list of n such rates; it holds
        in each direction by itself, headers (below 1 %) included.
      burst_bytes: what a link lets pass at once after a pause; the default is 8 ms at its rate and
        at least two bundles of frames, small against what is measured and large enough for
        timers that come late on a busy machine.

    Yields:
      The network.

    Raises:
      UserError: a rate is no rate or out of range, their number is not n, or this machine cannot
        make such a network (the sentence says why and what would help).

    >>> if available().ok:
    ...     with netlab(2, ["10mbit", "100mbit"]) as lab:
    ...         print(lab.addresses, lab.rates_bits_s)
    ... else:
    ...     print(('10.77.0.1', '10.77.0.2'), (1e7, 1e8))
    ('10.77.0.1', '10.77.0.2') (10000000.0, 100000000.0)
    """
    rates_bits_s = _rates(n, bandwidth)
    lab = Netlab(
        addresses=tuple(str(_NETWORK[i + 1]) for i in range(n)),
        hostnames=tuple(f"jaxsys-w{i}" for i in range(n)),
        rates_bits_s=rates_bits_s,
        burst_bytes=tuple(burst_bytes or _burst_bytes(rate) for rate in rates_bits_s),
        how="",
        hub_address=str(_NETWORK[-2]),
        hub_pid=0,
        pids=(),
    )
    missing = [name for name in ("ip", "tc", "nsenter") if _tool(name) is None]
    if missing:
        raise _Unavailable("tools", f"{' and '.join(missing)} is missing")
    remove_leavings()
    with contextlib.ExitStack() as stack:
        refusals = []
        for how in _HOW if os.geteuid() == 0 else _HOW[:1]:
            try:
                held = stack.enter_context(hold(_plan(lab, how), _hosts(lab)))
            except Refused as refusal:
                refusals.append(refusal)
                continue
            yield dataclasses.replace(lab, how=how, hub_pid=held.hub_pid, pids=held.pids)
            return
        raise _Unavailable(*refusals[-1].args)


@functools.cache
def available() -> Availability:
    """Find out whether this machine can make a netlab, by making a small one (once a process).

    Returns:
      The answer, with what is missing and how to get it.

    >>> found = available()
    >>> found.ok or bool(found.reason and found.remedy)
    True
    """
    if sys.platform != "linux":
        return Availability(False, "", f"{sys.platform} has no network namespaces", "use Linux")
    try:
        with netlab(1, "100mbit") as lab:
            return Availability(True, lab.how, "", "")
    except _Unavailable as refusal:
        return Availability(False, "", refusal.reason, refusal.remedy)


class _Unavailable(UserError):
    """This machine refuses a netlab; carries the reason and the remedy."""

    def __init__(self, stage: str, detail: str):
        what = {
            "tools": detail,
            "user": f"user namespaces are refused ({detail})",
            "mount": f"mounts are refused ({detail})",
            "network": f"network namespaces are refused ({detail})",
            "bridge": f"a bridge with virtual cables is refused ({detail})",
            "tbf": f"the token bucket is refused ({detail})",
        }
        self.reason = what.get(stage, detail)
        refused = "not permitted" in detail.lower() or "denied" in detail.lower()
        self.remedy = _REMEDIES["user" if refused else stage if stage in _REMEDIES else "user"]
        super().__init__(
            f"no shaped network can be made here: {self.reason}; {self.remedy}, or use an "
            "emulated link"
        )


def _rates(n: int, bandwidth: str | Sequence[str]) -> tuple[float, ...]:
    if not 1 <= n < _NETWORK.num_addresses - 3:
        raise UserError(f"{n} workers in a netlab; expected 1 or more; pass another number")
    texts = [bandwidth] * n if isinstance(bandwidth, str) else list(bandwidth)
    if len(texts) != n:
        raise UserError(
            f"{len(texts)} link rates for {n} workers; expected one for all or one for each; "
            "correct the list"
        )
    rates_bits_s = tuple(parse_rate(text) for text in texts)
    for text, rate_bits_s in zip(texts, rates_bits_s, strict=True):
        if not _LEAST_BITS_S <= rate_bits_s <= _MOST_BITS_S:
            raise UserError(
                f"the link rate is {text}; the kernel's shaper holds rates from "
                f"{format_rate(_LEAST_BITS_S)} to {format_rate(_MOST_BITS_S)}; choose one of these"
            )
    return rates_bits_s


def _burst_bytes(rate_bits_s: float) -> int:
    return max(2 * _GSO_BYTES, round(rate_bits_s / 8 * 8e-3))


def _tool(name: str) -> str | None:
    """Find a program also where administrators' programs are, which Debian hides from users."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return shutil.which(name, path=path)


def _hosts(lab: Netlab) -> str:
    lines = [f"{a} {h}\n" for a, h in zip(lab.addresses, lab.hostnames, strict=True)]
    return "127.0.0.1 localhost\n::1 localhost\n" + "".join(lines)


def _plan(lab: Netlab, how: str) -> dict[str, Any]:
    """What `_holder.py` has to build."""
    columns = (lab.hostnames, lab.addresses, lab.rates_bits_s, lab.burst_bytes)
    names = ("hostname", "address", "rate_bits_s", "burst_bytes")
    return {
        "user_namespace": how == _HOW[0],
        "ip": _tool("ip"),
        "tc": _tool("tc"),
        "hub_address": lab.hub_address,
        "queue_s": _QUEUE_S,
        "mtu_bytes": _MTU_BYTES,
        "gso_bytes": _GSO_BYTES,
        "workers": [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)],
    }
