"""Run one command in N local processes that can join each other, and supervise them.

Each worker gets its own session, the environment that `jaxsys.cluster.join` reads, and a thread
that reads its output line by line. When one dies badly the rest is of no use (a collective with a
dead member never ends), so all are ended, and started again if restarts are left: the program
itself goes on from its last checkpoint.

Nothing survives the launcher: Ctrl-C, SIGTERM and SIGHUP end the workers from here; for a launcher
that is killed outright see `_child.py`.
"""

import contextlib
import dataclasses
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from jaxsys.cluster import _ports
from jaxsys.cluster.join import COORDINATOR, NUM_PROCESSES, PROCESS_ID
from jaxsys.core.errors import UserError

ATTEMPT = "JAXSYS_ATTEMPT"
WORKER_BYTES = 300 * 2**20  # a Python process with JAX imported and a small model
# Between the request to end and the kill; jax.distributed catches SIGTERM (it takes it for a notice
# of preemption) and goes on, so this is time lost whenever a worker has died.
_GRACE_S = 1.0
# On a worker bound to one core XLA would make a pool of one thread, shared by its devices, and a
# collective that waits in it stops all compute: measured, steps that stalled for a whole exchange.
_POOL_THREADS = "3"
_COLOURS = (36, 33, 32, 35, 34, 31, 96, 93, 92, 95, 94, 91)
_CHILD = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_child.py"))]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of all workers.

    Attributes:
      first_failed: the worker that died badly first; None where all ended well.
      code: that worker's exit status; the negative number of the signal that killed it; 0.
      started_s: when the workers were started, in seconds after the launch began.
      ended_s: when that worker died, or the last one ended.

    >>> Attempt(first_failed=2, code=-9, started_s=0.0, ended_s=4.5).code
    -9
    """

    first_failed: int | None
    code: int
    started_s: float
    ended_s: float


@dataclasses.dataclass(frozen=True)
class LaunchReport:
    """What became of a launch.

    Attributes:
      exit_code: 0 where the last attempt ended well, else the first failing worker's status as a
        shell gives it (128 + the signal's number for a killed one).
      restarts: how many times all workers were started again.
      attempts: one entry for each start.

    >>> LaunchReport(0, 0, (Attempt(None, 0, 0.0, 1.0),)).exit_code
    0
    """

    exit_code: int
    restarts: int
    attempts: tuple[Attempt, ...]


def launch(
    command: Sequence[str],
    n: int,
    *,
    env: Mapping[str, str] | None = None,
    wrap: Callable[[int, list[str]], list[str]] | None = None,
    restarts: int = 0,
    on_line: Callable[[int, str], None] | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    pin: bool = False,
) -> LaunchReport:
    """Run a command in n local processes until all have ended.

    Args:
      command: program and arguments, the same for every worker.
      n: how many workers.
      env: the environment, instead of this process's own; the JAXSYS_ variables are added.
      wrap: gives worker i's argument list another form, such as `Netlab.wrap` does.
      restarts: how many times all workers may be started again after one died badly.
      on_line: gets (i, line) for each line of worker i, one at a time; the default prints it with
        the worker's number in front.
      port: the coordinator's port; a free one is found where none is given.
      host: the address at which worker 0 is reached by the others.
      pin: bind the workers round-robin to single cores, each with three threads for XLA's pool.

    Returns:
      The report.

    Raises:
      UserError: the command is not found, n is below 1 or above what this machine can start,
        restarts is negative, or the given port is occupied.

    >>> seen = []
    >>> code = "import os; print('worker', os.environ['JAXSYS_PROCESS_ID'])"
    >>> report = launch([sys.executable, "-c", code], 2, on_line=lambda i, line: seen.append(line))
    >>> report.exit_code, sorted(seen)
    (0, ['worker 0', 'worker 1'])
    """
    environ = dict(os.environ if env is None else env)
    if pin:
        environ.setdefault("NPROC", _POOL_THREADS)
    _check(command, n, restarts, port, host, environ)
    show = on_line or _printer()
    begin_s = time.monotonic()
    attempts: list[Attempt] = []
    with _stopped_by_signals(), _reaper() as reaper:
        for number in range(restarts + 1):
            environ |= {
                COORDINATOR: _address(host, port or _ports.free_port()),
                NUM_PROCESSES: str(n),
                ATTEMPT: str(number),
            }
            started_s = time.monotonic() - begin_s
            crew = _Crew(show, reaper)
            try:
                for i in range(n):
                    argv = list(command) if wrap is None else wrap(i, list(command))
                    crew.start(i, argv, environ | {PROCESS_ID: str(i)}, _core(i) if pin else None)
                failed, code = crew.wait()
                ended_s = time.monotonic() - begin_s
            finally:
                crew.stop()
            attempts.append(Attempt(failed, code, started_s, ended_s))
            if failed is None:
                break
    last = attempts[-1].code
    exit_code = last if last >= 0 else 128 - last
    return LaunchReport(exit_code, len(attempts) - 1, tuple(attempts))


def most_workers() -> tuple[int, str]:
    """Estimate how many workers this machine can start, from memory and the user's limits.

    Returns:
      The number, and what bounds it in words.

    >>> count, bound = most_workers()
    >>> count >= 1, isinstance(bound, str)
    (True, True)
    """
    bounds: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(FileNotFoundError, StopIteration):
            lines = Path("/proc/meminfo").read_text().splitlines()
            line = next(line for line in lines if line.startswith("MemAvailable:"))
            available = int(line.split()[1]) * 1024
        text = f"{available / 2**30:.1f} GiB of free memory at {WORKER_BYTES // 2**20} MiB each"
        bounds[text] = available // WORKER_BYTES
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if processes != resource.RLIM_INFINITY:  # a worker has some 32 threads, which count
        bounds[f"the user's limit of {processes} processes and threads"] = processes // 32
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY:
        bounds[f"the limit of {files} open files"] = (files - 32) // 2
    bound = min(bounds, key=lambda text: bounds[text])
    return max(bounds[bound], 1), bound


def _check(
    command: Sequence[str],
    n: int,
    restarts: int,
    port: int | None,
    host: str,
    environ: Mapping[str, str],
) -> None:
    if not command:
        raise UserError(
            "no command was given; expected one to run in every worker; "
            "write it after --, as in jaxsys launch -n 4 -- python train.py"
        )
    if shutil.which(command[0], path=environ.get("PATH")) is None:
        raise UserError(
            f"the command {command[0]!r} is not found; expected a program on the PATH or a path "
            "to one; correct it (a script needs its interpreter, as in python train.py)"
        )
    if n < 1:
        raise UserError(f"{n} workers; expected at least 1; pass -n 1 or more")
    count, bound = most_workers()
    if n > count:
        raise UserError(
            f"{n} workers; this machine can start about {count} ({bound}); "
            f"pass -n {count} or fewer, or spread the job over several machines"
        )
    if restarts < 0:
        raise UserError(f"{restarts} restarts; expected 0 or more; pass --restarts 0 for none")
    if port is not None:
        _ports.split_address(_address(host, port))
        if _ports.is_local(host):  # another network namespace has its own ports
            _ports.listen_on_all(port).close()


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _core(i: int) -> int | None:
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[i % len(cores)]


class _Crew:
    """The processes of one attempt."""

    def __init__(self, on_line: Callable[[int, str], None], reaper: subprocess.Popen[str]):
        self._on_line = on_line
        self._one_at_a_time = threading.Lock()
        self._reaper = reaper
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []
        self._events: queue.Queue[tuple[int, BaseException | None]] = queue.Queue()

    def start(self, i: int, argv: list[str], environ: dict[str, str], core: int | None) -> None:
        environ.setdefault("PYTHONUNBUFFERED", "1")
        cpu = "any" if core is None else str(core)
        process = subprocess.Popen(
            [*_CHILD, "worker", str(os.getpid()), cpu, "--", *argv],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._processes.append(process)
        _tell(self._reaper, str(process.pid))
        for target in (self._read, self._watch):
            thread = threading.Thread(target=target, args=(i, process), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _read(self, i: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                with self._one_at_a_time:
                    self._on_line(i, line.rstrip("\n"))
        except Exception as error:
            self._events.put((i, error))

    def _watch(self, i: int, process: subprocess.Popen[str]) -> None:
        # WNOWAIT leaves the dead process to be reaped by stop(): until then the kernel gives its
        # number to nobody else, so that killing its group can only hit its own children.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self._events.put((i, None))

    def wait(self) -> tuple[int | None, int]:
        """Wait until all have ended well or one has not; give that one and its code."""
        for _ in self._processes:
            i, error = self._events.get()
            if error is not None:
                raise error
            code = _exit_code(self._processes[i].pid)
            if code:
                return i, code
        return None, 0

    def stop(self) -> None:
        """End every process group: ask, wait a little, kill; then read what is left to read."""
        for process in self._processes:
            _signal_group(process, signal.SIGTERM)
        deadline_s = time.monotonic() + _GRACE_S
        while any(_exit_code(p.pid) is None for p in self._processes):
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.01)
        for process in self._processes:
            _signal_group(process, signal.SIGKILL)
        deadline_s = time.monotonic() + _GRACE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        for process in self._processes:
            process.wait()
            # a worker's child that left the group may hold the pipe and keep its reader waiting
            if process.stdout is not None and not any(t.is_alive() for t in self._threads):
                process.stdout.close()
        _tell(self._reaper, "forget")


def _exit_code(pid: int) -> int | None:
    """Read a dead child's code without reaping it; None while it lives."""
    state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _printer() -> Callable[[int, str], None]:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def show(i: int, line: str) -> None:
        prefix = f"[{i}]"
        if colour:
            prefix = f"\x1b[{_COLOURS[i % len(_COLOURS)]}m{prefix}\x1b[0m"
        print(prefix, line, flush=True)

    return show


@contextlib.contextmanager
def _reaper() -> Iterator[subprocess.Popen[str]]:
    """Keep the process that kills the workers' groups should this one be killed."""
    with subprocess.Popen(
        [*_CHILD, "reaper"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        yield process
        _tell(process, "done")


def _tell(reaper: subprocess.Popen[str], line: str) -> None:
    assert reaper.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        reaper.stdin.write(line + "\n")
        reaper.stdin.flush()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that the clean-up runs; Ctrl-C is one."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; its owner decides then
        return

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
