"""Two tiny programs that make a launcher's workers die with it; run by path, standard library only.

``worker PARENT_PID CPU -- COMMAND…`` asks the kernel to kill this process when its parent dies,
binds it to a core if one is named, and becomes COMMAND. It is a program of its own, and not a
function run between fork and exec, because forking Python code in a process with threads (JAX
has many) can deadlock; and it does not stay as a middleman, so signals and exit codes are the
command's own.

``reaper`` reads process group numbers from standard input and kills these groups at the end of
the input, which the kernel brings about when the launcher dies in whatever way. It catches what
the kernel's parent-death signal does not reach: the children of a worker (a shell script's
program, say). A line "done" ends it in peace.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; end now if that has happened.

    Args:
      parent_pid: the parent that this process was started by.

    >>> callable(die_with_parent)  # calling it here would tie the test to its runner
    True
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def _worker(arguments: list[str]) -> None:
    parent_pid, cpu, _, *command = arguments
    die_with_parent(int(parent_pid))
    if cpu != "any":
        os.sched_setaffinity(0, {int(cpu)})
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot start {command[0]!r}: {error.strerror}", file=sys.stderr)
        os._exit(127)


def _reaper() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        word = line.strip()
        if word == "done":
            return
        if word == "forget":
            groups.clear()
        else:
            groups.add(int(word))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except OSError:
            continue


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        _worker(sys.argv[2:])
    else:
        _reaper()
