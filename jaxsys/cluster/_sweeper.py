"""The program that removes control groups once their owner has gone; run by path, standard library.

``_sweeper.py FOLDER…`` waits for the end of its standard input, which the kernel brings about when
the owner dies in whatever way, then kills what still runs in the groups and removes them.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

_PATIENCE_S = 20.0


def remove(folder: Path) -> bool:
    """Kill what runs in a control group and remove it.

    Args:
      folder: the group's folder.

    Returns:
      Whether it is gone.

    >>> remove(Path("/sys/fs/cgroup/jaxsys-that-is-not-there"))
    True
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while folder.is_dir():
        with contextlib.suppress(OSError, ValueError):
            for pid in (folder / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            folder.rmdir()
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    for name in sys.argv[1:]:
        remove(Path(name))
