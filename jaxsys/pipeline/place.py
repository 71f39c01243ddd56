"""A fleet inside one machine: shaped links in clusters, and a share of a core for each device."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxsys.cluster import LinkRate, cpu_shares, most_workers, netlab
from jaxsys.cluster.throttle import throttled
from jaxsys.core.errors import UserError


class Standing(NamedTuple):
    """A place whose networks and quotas stand.

    Attributes:
      wrap: gives the argument list that runs a command as a device.
      hosts: the devices' addresses.
      links: what each device's link was measured to carry; empty on loopback.
      between: what each further cluster's link to the first was measured to carry.

    >>> Standing(lambda i, argv: argv, ("127.0.0.1",), (), ()).hosts
    ('127.0.0.1',)
    """

    wrap: Callable[[int, list[str]], list[str]]
    hosts: tuple[str, ...]
    links: tuple[LinkRate, ...]
    between: tuple[LinkRate, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """What stands for the devices of a fleet and the links between them on this machine.

    Attributes:
      devices: how many there are.
      bandwidth: rate of each device's link, such as ``1gbit``, or one for all; loopback as it is
        where left out.
      clusters: groups of devices that are near each other; all are where left out.
      between: rate of the links between clusters, or one for each after the first.
      cores: share of a core that each device may use; all of what there is where left out. A
        device is bound to one core where the shares fit on the cores.
      shares_by: what holds a device to its share: ``quota`` (the kernel, `cpu_shares`), under
        which a device that has waited is fast for a moment, or ``throttle`` (the worker itself
        sleeps in proportion to what it computed, `cluster.throttle`), as a slower device would be.
      frame_bytes: largest frame on the links. With 1500, as on the internet, the links between
        clusters let next to nothing pass at once after a pause.

    Raises:
      UserError: numbers of rates or shares that are not one for each device, or clusters without a
        rate.

    >>> Place(4, ("1gbit",), ((0, 2), (1, 3)), ("20mbit",), (0.6, 0.6, 0.3, 0.3)).devices
    4
    """

    devices: int
    bandwidth: tuple[str, ...] = ()
    clusters: tuple[tuple[int, ...], ...] = ()
    between: tuple[str, ...] = ()
    cores: tuple[float | int, ...] = ()
    shares_by: str = "quota"
    frame_bytes: int = 9000

    def __post_init__(self):
        """Check what the network and the quotas do not check themselves."""
        if self.devices < 1:
            raise UserError(f"{self.devices} devices; a fleet has at least one; raise the number")
        for name, most in (("bandwidth", (0, 1, self.devices)), ("cores", (0, self.devices))):
            if len(getattr(self, name)) not in most:
                raise UserError(
                    f"{len(getattr(self, name))} values of {name} for {self.devices} devices; "
                    "expected one for each; correct the list"
                )
        if self.shares_by not in ("quota", "throttle"):
            raise UserError(
                f"shares are held by {self.shares_by!r}; expected quota or throttle; choose one"
            )
        if self.clusters and not (self.bandwidth and self.between):
            raise UserError(
                "clusters were given without the rates of links; expected --bandwidth for those "
                "inside and --between for those between clusters; add them"
            )

    @contextlib.contextmanager
    def stand(self) -> Iterator[Standing]:
        """Make the networks and quotas, time the links, and remove everything at the end.

        Yields:
          The standing place.

        Raises:
          UserError: this machine cannot make them, or cannot start as many processes.

        >>> with Place(2).stand() as standing:
        ...     standing.wrap(1, ["hostname"]), standing.hosts
        (['hostname'], ('127.0.0.1', '127.0.0.1'))
        """
        count, bound = most_workers()
        if self.devices > count:
            raise UserError(
                f"{self.devices} devices; this machine can stand for about {count} ({bound}); use "
                "fewer, or start one process on each machine"
            )
        with contextlib.ExitStack() as stack:
            wraps: list[Callable[[int, list[str]], list[str]]] = []
            hosts, links, between = ("127.0.0.1",) * self.devices, (), ()
            if self.bandwidth:
                rate = self.bandwidth[0] if len(self.bandwidth) == 1 else self.bandwidth
                slow = self.between[0] if len(self.between) == 1 else self.between
                lab = stack.enter_context(
                    netlab(
                        self.devices,
                        rate,
                        clusters=self.clusters,
                        between=slow or "1gbit",
                        frame_bytes=self.frame_bytes,
                    )
                )
                links, between, hosts = lab.verify(), lab.verify_between(), lab.addresses
                wraps.append(lab.wrap)
            if self.cores:
                core = _cores(self.cores)
                if core and shutil.which("taskset"):
                    wraps.append(lambda i, argv: ["taskset", "-c", str(core[i]), *argv])
                if self.shares_by == "throttle":
                    wraps.append(lambda i, argv: throttled(self.cores[i], argv))
                else:
                    wraps.append(stack.enter_context(cpu_shares(self.cores)).wrap)

            def wrap(i: int, argv: list[str]) -> list[str]:
                for each in wraps:
                    argv = each(i, argv)
                return argv

            yield Standing(wrap, hosts, links, between)


def read_clusters(texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Read groups of devices as a command line has them.

    Args:
      texts: one for each group, device numbers with commas between.

    Raises:
      UserError: something else than such numbers.

    >>> read_clusters(["0,2", "1,3"])
    ((0, 2), (1, 3))
    """
    try:
        return tuple(tuple(int(part) for part in text.split(",")) for text in texts)
    except ValueError as error:
        raise UserError(
            f"the clusters are {list(texts)}; expected device numbers with commas between, such "
            "as 0,2 1,3; correct them"
        ) from error


def _cores(shares: Sequence[float | int]) -> tuple[int, ...]:
    """Bind devices to cores so that no core is asked for more than it has; () where it cannot be.

    Largest share first, each to the core with the most left, so that a group that fits stays even.
    """
    left = dict.fromkeys(sorted(os.sched_getaffinity(0)), 1.0)
    chosen = {}
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
        core = max(left, key=lambda c: left[c])
        left[core] -= shares[i]
        chosen[i] = core
    if min(left.values()) < -1e-9:
        return ()
    return tuple(chosen[i] for i in range(len(shares)))
