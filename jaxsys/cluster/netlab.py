"""A network of slow links inside one machine: a namespace and a shaped link for each worker.

Every worker has its own network namespace, host name and address; a virtual cable with a token
bucket at both ends (`tc … tbf`: one limits what the worker sends, one what it receives) joins it
to a bridge: one for all, or one for each cluster of workers, the others' joined to the first's by
links of their own. Nothing has a global name, so nothing can collide with another netlab on the
machine and everything disappears with the processes that hold it (see `_holder.py`).

An unprivileged user namespace is tried first; where those are refused, root does without. Workers
see the same files and devices as outside, but no other network: neither the internet nor the
machine's own services.
"""

import contextlib
import dataclasses
import functools
import ipaddress
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxsys.cluster._exchange import LinkRate, ShapedLink, time_links, warn_where_off
from jaxsys.cluster._namespaces import Refused, hold, remove_leavings
from jaxsys.cluster.rates import format_rate, parse_rate
from jaxsys.core.errors import UserError

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
      clusters: the workers at each bridge; one group of all where there is one bridge.
      between_bits_s: the rate of each further cluster's link to the first, in each direction.
      between_burst_bytes: what that link lets pass at once after a pause.
      hubs: address and process of an end that is not shaped, at each further cluster's bridge.

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
    clusters: tuple[tuple[int, ...], ...] = ()
    between_bits_s: tuple[float, ...] = ()
    between_burst_bytes: tuple[int, ...] = ()
    hubs: tuple[tuple[str, int], ...] = ()

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

        The links are measured one after the other against their bridge's unshaped end, so that
        each number belongs to one link.

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
        links = [
            ShapedLink(f"worker {i}", functools.partial(self.wrap, i), rate, burst)
            for i, (rate, burst) in enumerate(zip(self.rates_bits_s, self.burst_bytes, strict=True))
        ]
        ends = [(self.hub_address, self.hub_pid), *self.hubs]
        found: dict[int, LinkRate] = {}
        for (address, pid), group in zip(ends, self.clusters, strict=True):
            at_hub = functools.partial(self._enter, pid)
            rates = time_links(at_hub, address, [links[i] for i in group], seconds)
            found.update(zip(group, rates, strict=True))
        measured = [found[i] for i in range(len(links))]
        warn_where_off(links, measured, tolerance)
        return tuple(measured)

    def verify_between(self, tolerance: float = 0.10, seconds: float = 0.3) -> tuple[LinkRate, ...]:
        """Time an exchange over each link between clusters, as `verify` does over the workers'.

        Args:
          tolerance: the relative deviation from which on to warn.
          seconds: about how long each direction is timed.

        Returns:
          The measured rates, one for each further cluster, whose side counts as the link's end.

        Raises:
          UserError: an exchange failed or did not end.

        >>> from jaxsys.cluster.netlab import available, netlab
        >>> if available().ok:
        ...     with netlab(2, "1gbit", clusters=((0,), (1,)), between="50mbit") as lab:
        ...         rates = lab.verify_between(tolerance=1.0, seconds=0.05)
        """
        columns = (self.hubs, self.between_bits_s, self.between_burst_bytes)
        links = [
            ShapedLink(f"cluster {k}", functools.partial(self._enter, hub[1]), rate, burst)
            for k, (hub, rate, burst) in enumerate(zip(*columns, strict=True), start=1)
        ]
        if not links:
            return ()
        at_hub = functools.partial(self._enter, self.hub_pid)
        measured = time_links(at_hub, self.hub_address, links, seconds)
        warn_where_off(links, measured, tolerance)
        return tuple(measured)


@contextlib.contextmanager
def netlab(
    n: int,
    bandwidth: str | Sequence[str] = "100mbit",
    *,
    burst_bytes: int | None = None,
    clusters: Sequence[Sequence[int]] = (),
    between: str | Sequence[str] = "10mbit",
    frame_bytes: int = _MTU_BYTES,
) -> Iterator[Netlab]:
    """Make a network of n workers with shaped links, and remove it at the end.

    Args:
      n: how many workers.
      bandwidth: the rate of every link, such as ``100mbit``, or a list of n such rates; it holds
        in each direction by itself, headers (below 1 %) included.
      burst_bytes: what a link lets pass at once after a pause; the default is 8 ms at its rate and
        at least two bundles of frames, small against what is measured and large enough for
        timers that come late on a busy machine.
      clusters: groups of workers, each at a bridge of its own; by default all are at one. Two
        clusters have one link between them; of more, all hang on the first one's bridge.
      between: the rate of the links between clusters, or one for each cluster after the first.
      frame_bytes: largest frame. With smaller ones, such as the internet's 1500, headers take more
        (4 %), but the links between clusters let only one of them pass at once after a pause, so
        that they are as slow for a short message as for a long one.

    Yields:
      The network.

    Raises:
      UserError: a rate is no rate or out of range, their number is not n, the clusters do not hold
        every worker once, or this machine cannot make such a network (the sentence says why and
        what would help).

    >>> if available().ok:
    ...     with netlab(2, ["10mbit", "100mbit"]) as lab:
    ...         print(lab.addresses, lab.rates_bits_s)
    ... else:
    ...     print(('10.77.0.1', '10.77.0.2'), (1e7, 1e8))
    ('10.77.0.1', '10.77.0.2') (10000000.0, 100000000.0)
    """
    rates_bits_s = _rates(n, bandwidth, "worker")
    groups = _clusters(n, clusters)
    further = len(groups) - 1
    between_bits_s = _rates(further, between, "link between clusters") if further else ()
    lab = Netlab(
        addresses=tuple(str(_NETWORK[i + 1]) for i in range(n)),
        hostnames=tuple(f"jaxsys-w{i}" for i in range(n)),
        rates_bits_s=rates_bits_s,
        burst_bytes=tuple(burst_bytes or _burst_bytes(rate) for rate in rates_bits_s),
        how="",
        hub_address=str(_NETWORK[-2]),
        hub_pid=0,
        pids=(),
        clusters=groups,
        between_bits_s=between_bits_s,
        between_burst_bytes=tuple(
            burst_bytes or _between_burst_bytes(rate, frame_bytes) for rate in between_bits_s
        ),
        hubs=tuple((str(_NETWORK[-3 - k]), 0) for k in range(further)),
    )
    missing = [name for name in ("ip", "tc", "nsenter") if _tool(name) is None]
    if missing:
        raise _Unavailable("tools", f"{' and '.join(missing)} is missing")
    remove_leavings()
    with contextlib.ExitStack() as stack:
        refusals = []
        for how in _HOW if os.geteuid() == 0 else _HOW[:1]:
            try:
                held = stack.enter_context(hold(_plan(lab, how, frame_bytes), _hosts(lab)))
            except Refused as refusal:
                refusals.append(refusal)
                continue
            hubs = zip([address for address, _ in lab.hubs], held.pids[n:], strict=True)
            yield dataclasses.replace(
                lab, how=how, hub_pid=held.hub_pid, pids=held.pids[:n], hubs=tuple(hubs)
            )
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


def _rates(n: int, bandwidth: str | Sequence[str], what: str) -> tuple[float, ...]:
    if not 1 <= n < _NETWORK.num_addresses // 2:
        raise UserError(f"{n} workers in a netlab; expected 1 or more; pass another number")
    texts = [bandwidth] * n if isinstance(bandwidth, str) else list(bandwidth)
    if len(texts) != n:
        raise UserError(
            f"{len(texts)} link rates for {n} ({what}); expected one for all or one for each; "
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


def _clusters(n: int, clusters: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    groups = tuple(tuple(group) for group in clusters) or (tuple(range(n)),)
    if sorted(i for group in groups for i in group) != list(range(n)) or not all(groups):
        raise UserError(
            f"the clusters are {groups}; expected each of the workers 0 to {n - 1} in one of them, "
            "and none empty; correct the groups"
        )
    return groups


def _burst_bytes(rate_bits_s: float) -> int:
    return max(2 * _GSO_BYTES, round(rate_bits_s / 8 * 8e-3))


def _between_burst_bytes(rate_bits_s: float, frame_bytes: int) -> int:
    """One frame, or what passes while a timer is late; the bucket takes larger bundles apart."""
    if frame_bytes >= _MTU_BYTES:
        return _burst_bytes(rate_bits_s)
    return max(frame_bytes + 100, round(rate_bits_s / 8 * 3e-4))


def _tool(name: str) -> str | None:
    """Find a program also where administrators' programs are, which Debian hides from users."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return shutil.which(name, path=path)


def _hosts(lab: Netlab) -> str:
    lines = [f"{a} {h}\n" for a, h in zip(lab.addresses, lab.hostnames, strict=True)]
    return "127.0.0.1 localhost\n::1 localhost\n" + "".join(lines)


def _plan(lab: Netlab, how: str, frame_bytes: int) -> dict[str, Any]:
    """What `_holder.py` has to build."""
    bridge = {i: "jxhub" if k == 0 else f"jxc{k}" for k, g in enumerate(lab.clusters) for i in g}
    bridges = tuple(bridge[i] for i in range(len(lab.addresses)))
    columns = (lab.hostnames, lab.addresses, lab.rates_bits_s, lab.burst_bytes, bridges)
    names = ("hostname", "address", "rate_bits_s", "burst_bytes", "bridge")
    workers = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    hubs = [
        dict(zip(names, (f"jaxsys-hub{k}", address, None, 0, f"jxc{k}"), strict=True))
        for k, (address, _) in enumerate(lab.hubs, start=1)
    ]
    trunks = [
        {"bridge": f"jxc{k}", "rate_bits_s": rate, "burst_bytes": burst}
        for k, (rate, burst) in enumerate(
            zip(lab.between_bits_s, lab.between_burst_bytes, strict=True), start=1
        )
    ]
    return {
        "user_namespace": how == _HOW[0],
        "ip": _tool("ip"),
        "tc": _tool("tc"),
        "hub_address": lab.hub_address,
        "queue_s": _QUEUE_S,
        "mtu_bytes": frame_bytes,
        "gso_bytes": _GSO_BYTES,
        "workers": [*workers, *hubs],
        "trunks": trunks,
    }
