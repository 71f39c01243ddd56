"""Start and end the process that holds a netlab's namespaces, and tidy up after killed owners.

The holder dies with its owner (see `_holder.py`), so what a killed owner leaves is a folder in the
user's run folder; its name carries the owner's process id and start time.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError

_HOLDER = Path(__file__).with_name("_holder.py")
_SETUP_TIMEOUT_S = 60.0


class Refused(Exception):
    """Carries the stage at which the kernel refused, and its words.

    >>> Refused("tbf", "no such file").args
    ('tbf', 'no such file')
    """


class Held(NamedTuple):
    """The processes that hold the namespaces.

    Attributes:
      hub_pid: the one that holds the bridge's.
      pids: the one that holds worker i's.

    >>> Held(hub_pid=10, pids=(11, 12)).pids
    (11, 12)
    """

    hub_pid: int
    pids: tuple[int, ...]


@contextlib.contextmanager
def hold(plan: dict[str, Any], hosts: str) -> Iterator[Held]:
    """Make the namespaces of a plan and remove them at the end.

    Args:
      plan: what `_holder.py` reads, less the owner and the hosts file.
      hosts: the text of the workers' ``/etc/hosts``.

    Yields:
      The holding processes.

    Raises:
      Refused: the kernel or a program refused a stage.

    >>> plan = {"user_namespace": False, "ip": "false", "hub_address": "10.0.0.1"}
    >>> plan |= {"mtu_bytes": 1500, "gso_bytes": 1500, "workers": [], "trunks": []}
    >>> with hold(plan, hosts=""):
    ...     pass
    Traceback (most recent call last):
    ...
    jaxsys.cluster._namespaces.Refused: ...
    """
    folder = _note_folder()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        hosts_file = folder / "hosts"
        hosts_file.write_text(hosts)
        hosts_file.chmod(0o644)
        holder = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_HOLDER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        stack.callback(_end, holder)
        (folder / "holder").write_text(f"{holder.pid} {_started(holder.pid)}")
        ready = _talk(holder, {**plan, "owner_pid": os.getpid(), "hosts_file": str(hosts_file)})
        yield Held(holder.pid, tuple(ready["workers"]))


def remove_leavings() -> int:
    """Remove what netlabs of owners that were killed have left behind.

    Usually that is only a note in the user's run folder, because the namespaces die with their
    owner; a holder that still lives is ended.

    Returns:
      How many were found.

    >>> remove_leavings() >= 0
    True
    """
    count = 0
    for folder in _run_folder().glob("netlab-*-*-*"):
        _, pid, start, _ = folder.name.split("-", 3)
        if not (pid.isdigit() and start.isdigit()) or _started(int(pid)) == int(start):
            continue
        with contextlib.suppress(OSError, ValueError):  # none was written yet, or it is gone
            holder, started = map(int, (folder / "holder").read_text().split())
            if _started(holder) == started:  # the same process, not a later one of that number
                os.kill(holder, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        count += 1
    return count


def _talk(holder: subprocess.Popen[str], plan: dict[str, Any]) -> dict[str, Any]:
    """Hand over the plan, write the id maps when asked, and wait until the network stands."""
    assert holder.stdin is not None
    _send(holder, json.dumps(plan))
    answer = _receive(holder)
    if answer["stage"] == "user":
        try:
            _write_id_maps(holder.pid)
        except OSError as error:
            raise Refused("user", error.strerror or str(error)) from error
        _send(holder, "mapped")
        answer = _receive(holder)
    if answer["stage"] != "ready":
        raise Refused(answer["where"], answer["detail"])
    return answer


def _send(holder: subprocess.Popen[str], line: str) -> None:
    assert holder.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        holder.stdin.write(line + "\n")
        holder.stdin.flush()


def _receive(holder: subprocess.Popen[str]) -> dict[str, Any]:
    assert holder.stdout is not None
    readable, _, _ = select.select([holder.stdout], [], [], _SETUP_TIMEOUT_S)
    line = holder.stdout.readline() if readable else ""
    if not line:
        return {"stage": "failed", "where": "network", "detail": "the holder gave no answer"}
    return json.loads(line)


def _write_id_maps(pid: int) -> None:
    """Map all ids for root, so that files keep their owners; the caller's own to 0 for others."""
    process = Path(f"/proc/{pid}")
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            for name in ("uid_map", "gid_map"):
                extents = [
                    line.split() for line in Path("/proc/self", name).read_text().split("\n")
                ]
                lines = [f"{e[0]} {e[0]} {e[2]}\n" for e in extents if e]
                _write_at_once(process / name, "".join(lines))
            return
    (process / "setgroups").write_text("deny")
    _write_at_once(process / "uid_map", f"0 {os.geteuid()} 1\n")
    _write_at_once(process / "gid_map", f"0 {os.getegid()} 1\n")


def _write_at_once(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _end(holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    assert holder.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        holder.stdin.close()
    try:
        holder.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        holder.kill()
        holder.wait()
    holder.stdout.close()


def _run_folder() -> Path:
    """The user's own folder for notes on what is running; nobody else may write there."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK):
        folder = Path(base) / "jaxsys"
    else:
        folder = Path(tempfile.gettempdir()) / f"jaxsys-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UserError(
            f"the folder {folder} belongs to someone else or is open to others; expected one of "
            "your own with mode 700; remove it"
        )
    return folder


def _note_folder() -> Path:
    """Make a folder whose name says which process it belongs to, also after that has gone."""
    pid = os.getpid()
    return Path(tempfile.mkdtemp(prefix=f"netlab-{pid}-{_started(pid)}-", dir=_run_folder()))


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks after the machine did; None where it is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])
