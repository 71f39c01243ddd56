"""Workers of unequal speed on one machine: a CPU quota for each, by the kernel's control groups.

A worker with a share of 0.3 may run for 0.3 s of processor time in each second of the clock, in
periods of `PERIOD_S`; the kernel stops all its threads for the rest of a period. The groups are
removed at the end, and by a small process of their own should their owner be killed.

Both versions of control groups are known: ``cpu.cfs_quota_us`` (1) and ``cpu.max`` (2). Neither can
be written by everybody; where not, one sentence says so.
"""

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxsys.cluster._namespaces import _started
from jaxsys.cluster._sweeper import remove
from jaxsys.core.errors import UserError

PERIOD_S = 0.005  # short against what runs, or a burst after a pause passes at full speed
_LEAST = 0.2  # of a core: a millisecond in a period, the least that the kernel takes
_SWEEPER = Path(__file__).with_name("_sweeper.py")
_REMEDY = (
    "run as root, give the container a writable control group, or start it by "
    "systemd-run --scope -p Delegate=yes"
)


class Place(NamedTuple):
    """Where groups with a CPU quota can be made.

    Attributes:
      folder: the control group that they become children of; None where there is none.
      version: 1 or 2.
      reason: what is missing, in one line; empty where nothing is.

    >>> Place(Path("/sys/fs/cgroup/cpu"), 1, "").version
    1
    """

    folder: Path | None
    version: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Shares:
    """Control groups that stand; made by `cpu_shares`.

    Attributes:
      cores: worker i's share of a core.
      folders: worker i's control group.

    >>> Shares((0.5,), (Path("/sys/fs/cgroup/cpu/jaxsys-1"),)).wrap(0, ["hostname"])[-1]
    'hostname'
    """

    cores: tuple[float, ...]
    folders: tuple[Path, ...]

    def wrap(self, i: int, argv: Sequence[str]) -> list[str]:
        """Give an argument list that runs a command with worker i's share.

        Args:
          i: the worker.
          argv: program and arguments, such as `Netlab.wrap` gives.

        Returns:
          The longer argument list; the command takes the place of the shell that joins the group.

        >>> Shares((0.5,), (Path("/group"),)).wrap(0, ["python", "train.py"])[:2]
        ['/bin/sh', '-c']
        """
        join = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", join, str(self.folders[i] / "cgroup.procs"), *argv]


@contextlib.contextmanager
def cpu_shares(cores: Sequence[float]) -> Iterator[Shares]:
    """Make a control group with a CPU quota for each worker, and remove them at the end.

    Args:
      cores: worker i's share of a core, from 0.2 to the number of cores.

    Yields:
      The groups. Processes that still run in them at the end are killed.

    Raises:
      UserError: a share is out of range, or this machine lets nobody set a quota (the sentence says
        why and what would help).

    >>> if available_shares().reason == "":
    ...     with cpu_shares([0.5, 0.25]) as shares:
    ...         print(shares.cores)
    ... else:
    ...     print((0.5, 0.25))
    (0.5, 0.25)
    """
    values = tuple(float(core) for core in cores)
    most = os.cpu_count() or 1
    wrong = [v for v in values if not (math.isfinite(v) and _LEAST <= v <= most)]
    if wrong or not values:
        raise UserError(
            f"the shares of a core are {list(values)}; expected numbers from {_LEAST} to {most} "
            "(all cores of this machine), one a worker; correct them"
        )
    place = available_shares()
    if place.folder is None:
        raise UserError(f"no CPU quota can be set here: {place.reason}; {_REMEDY}")
    _remove_leavings(place.folder)
    owner = f"jaxsys-{os.getpid()}-{_started(os.getpid())}"
    taken = sum(1 for _ in place.folder.glob(f"{owner}-*"))
    folders = tuple(place.folder / f"{owner}-{taken + i}" for i in range(len(values)))
    sweeper = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_SWEEPER), *map(str, folders)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        for folder, value in zip(folders, values, strict=True):
            folder.mkdir()
            _set_quota(folder, place.version, value)
        yield Shares(values, folders)
    finally:
        assert sweeper.stdin is not None
        sweeper.stdin.close()
        sweeper.wait()


def available_shares() -> Place:
    """Find where a CPU quota can be set, by making a group with one and removing it.

    Returns:
      The place, or what is missing.

    >>> place = available_shares()
    >>> (place.folder is None) == bool(place.reason)
    True
    """
    if sys.platform != "linux":
        return Place(None, 0, f"{sys.platform} has no control groups")
    reasons = []
    for folder, version in _candidates():
        trial = folder / f"jaxsys-{os.getpid()}-{_started(os.getpid())}-trial"
        try:
            trial.mkdir(exist_ok=True)
            try:
                _set_quota(trial, version, 0.5)
            finally:
                trial.rmdir()
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
        else:
            return Place(folder, version, "")
    return Place(None, 0, reasons[-1] if reasons else "no control groups are mounted")


def _set_quota(folder: Path, version: int, cores: float) -> None:
    period_us = round(PERIOD_S * 1e6)
    quota_us = round(cores * period_us)
    # opened without O_CREAT: a controller that is off has no such file, and none must be made
    texts = (
        {"cpu.cfs_period_us": f"{period_us}", "cpu.cfs_quota_us": f"{quota_us}"}
        if version == 1
        else {"cpu.max": f"{quota_us} {period_us}"}
    )
    for name, text in texts.items():
        descriptor = os.open(folder / name, os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def _candidates() -> list[tuple[Path, int]]:
    """List this process's own groups, those above them, and the roots, by version."""
    found = []
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.strip("/")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            path = next((p for c, p in own.items() if "cpu" in c.split(",")), "")
            found += [(folder, 1) for folder in _upwards(Path(mount), path)]
        elif kind == "cgroup2":
            found += [
                (folder, 2)
                for folder in _upwards(Path(mount), own.get("", ""))
                if "cpu" in _read(folder / "cgroup.subtree_control").split()
            ]
    return found


def _upwards(mount: Path, path: str) -> list[Path]:
    folder = mount / path
    return [f for f in (folder, *folder.parents) if f.is_relative_to(mount) and f.is_dir()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _remove_leavings(place: Path) -> None:
    """Remove the groups of owners that have gone and whose sweeper was killed too."""
    for folder in place.glob("jaxsys-*-*-*"):
        _, pid, start, _ = folder.name.split("-", 3)
        if pid.isdigit() and start.isdigit() and _started(int(pid)) != int(start):
            remove(folder)
