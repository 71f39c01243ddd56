"""Launching: prefixes, death, restarts, and that nothing survives the launcher."""

import os
import signal
import subprocess
import sys

import pytest

from jaxsys.cluster import _ports, launch, most_workers
from jaxsys.core.errors import UserError


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_carry_their_worker(capfd):
    code = (
        "import os, sys; i = os.environ['JAXSYS_PROCESS_ID']\n"
        "print('out', i); print('err', i, file=sys.stderr)\n"
    )
    report = launch(_python(code), 3)
    lines = capfd.readouterr().out.splitlines()
    assert report.exit_code == 0
    assert report.restarts == 0
    assert sorted(lines) == sorted(f"[{i}] {w} {i}" for i in range(3) for w in ("out", "err"))


def test_lines_arrive_while_the_worker_runs(tmp_path):
    """The worker goes on only when its first line has been delivered."""
    code = (
        "import pathlib, sys, time\n"
        "print('ready')\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)\n"
        "print('x' * 100000)\n"
    )
    lines: list[str] = []

    def on_line(i: int, line: str) -> None:
        lines.append(line)
        if line == "ready":
            (tmp_path / "go").touch()

    assert launch([*_python(code), str(tmp_path / "go")], 1, on_line=on_line).exit_code == 0
    assert lines == ["ready", "x" * 100000]


def test_workers_get_their_environment(environ):
    code = (
        "import os; e = os.environ; print(e['JAXSYS_COORDINATOR'], e['JAXSYS_PROCESS_ID'], "
        "e['JAXSYS_NUM_PROCESSES'], e['JAXSYS_ATTEMPT'], e['MINE'], os.getpgid(0) == os.getpid())"
    )
    port = _ports.free_port()
    seen: list[str] = []
    launch(
        _python(code),
        2,
        env=environ | {"MINE": "yes"},
        port=port,
        host="localhost",
        on_line=lambda i, line: seen.append(line),
    )
    assert sorted(seen) == [f"localhost:{port} {i} 2 0 yes True" for i in range(2)]


def test_wrap_changes_each_workers_command():
    seen: list[tuple[int, str]] = []
    report = launch(
        ["echo", "hello"],
        2,
        wrap=lambda i, argv: [*argv, f"from {i}"],
        on_line=lambda i, line: seen.append((i, line)),
    )
    assert report.exit_code == 0
    assert sorted(seen) == [(0, "hello from 0"), (1, "hello from 1")]


@pytest.mark.parametrize(
    ("end", "code", "status"), [("sys.exit(3)", 3, 3), ("os.kill(os.getpid(), 9)", -9, 137)]
)
def test_one_death_ends_all(tmp_path, alive, end, code, status):
    program = (
        "import os, pathlib, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / os.environ['JAXSYS_PROCESS_ID']).write_text(str(os.getpid()))\n"
        "while len(list(here.iterdir())) < 3: time.sleep(0.01)\n"
        f"if os.environ['JAXSYS_PROCESS_ID'] == '1': {end}\n"
        "time.sleep(300)\n"
    )
    report = launch(_python(program), 3)
    assert report.exit_code == status
    (attempt,) = report.attempts
    assert (attempt.first_failed, attempt.code) == (1, code)
    assert attempt.started_s <= attempt.ended_s
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)


def test_a_worker_that_ignores_the_request_is_killed(alive):
    program = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid())\n"
        "if os.environ['JAXSYS_PROCESS_ID'] == '0': sys.exit(1)\n"
        "time.sleep(300)\n"
    )
    pids: list[int] = []
    assert (
        launch(_python(program), 2, on_line=lambda i, line: pids.append(int(line))).exit_code == 1
    )
    assert not any(alive(pid) for pid in pids)


def test_restarts_start_all_again():
    code = (
        "import os, sys, time; attempt = int(os.environ['JAXSYS_ATTEMPT'])\n"
        "print('attempt', attempt)\n"
        "if attempt < 2 and os.environ['JAXSYS_PROCESS_ID'] == '1': sys.exit(5)\n"
        "time.sleep(300 if attempt < 2 else 0)\n"
    )
    seen: list[str] = []
    report = launch(_python(code), 2, restarts=3, on_line=lambda i, line: seen.append(line))
    assert (report.exit_code, report.restarts) == (0, 2)
    assert [(a.first_failed, a.code) for a in report.attempts] == [(1, 5), (1, 5), (None, 0)]
    assert seen.count("attempt 2") == 2
    report = launch(_python("import sys; sys.exit(5)"), 1, restarts=1)
    assert (report.exit_code, report.restarts) == (5, 1)


def test_pinned_workers_run_on_one_core_each():
    cores = sorted(os.sched_getaffinity(0))
    seen: dict[int, str] = {}
    code = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['NPROC'])"
    launch(_python(code), 3, pin=True, on_line=lambda i, line: seen.update({i: line}))
    assert seen == {i: f"[{cores[i % len(cores)]}] 3" for i in range(3)}


def test_an_error_while_printing_ends_the_workers():
    def on_line(i: int, line: str) -> None:
        raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        launch(_python("import time; print('x'); time.sleep(300)"), 2, on_line=on_line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_nothing_survives_the_launcher(tmp_path, environ, alive, wait_until, number, programs):
    """Neither the workers nor what they started, whatever the signal."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", programs.launcher, programs.sleeper, str(tmp_path)],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("*.pids"))) == 3)
        pids = [int(pid) for path in tmp_path.glob("*.pids") for pid in path.read_text().split()]
        assert len(pids) == 6
        assert all(alive(pid) for pid in pids)
        launcher.send_signal(number)
        code = launcher.wait(timeout=30)
    finally:
        launcher.kill()
        launcher.wait()
    assert wait_until(lambda: not any(alive(pid) for pid in pids))
    expected = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
    assert code == expected.get(number, code)
    assert code != 0


def test_mistakes_are_one_sentence():
    with _ports.listen_on_all(0) as server, pytest.raises(UserError, match="is occupied"):
        launch(["true"], 1, port=server.getsockname()[1])
    count, bound = most_workers()
    with pytest.raises(UserError, match=f"can start about {count}") as caught:
        launch(["true"], 10**6)
    assert bound.split(" of ")[-1] in str(caught.value)
    for command, n, restarts in ((["true"], 0, 0), ([], 1, 0), (["true"], 1, -1)):
        with pytest.raises(UserError):
            launch(command, n, restarts=restarts)
    with pytest.raises(UserError, match="'no-such-program' is not found"):
        launch(["no-such-program"], 1)
    with pytest.raises(UserError, match="99999"):
        launch(["true"], 1, port=99999)


def test_two_processes_add_up(environ, programs):
    """jax.distributed through launch and join, bounded from outside by the workers' time-outs."""
    seen: list[str] = []
    report = launch(
        ["timeout", "-k", "1", "90", *_python(programs.psum)],
        2,
        env=environ,
        on_line=lambda i, line: seen.append(line),
    )
    assert report.exit_code == 0, seen
    assert seen.count("psum 3.0") == 2
    assert seen.count("how launcher local 2") == 2


@pytest.mark.parametrize(("end", "status"), [("1 / 0", 1), ("jaxsys.cluster.leave(2)", 2)])
def test_a_failing_member_does_not_wait_for_the_others(environ, programs, end, status):
    """Its own status is what the launch reports, not that of the members that miss it."""
    program = programs.psum + (f"if me.process_id == 1: {end}\nimport time; time.sleep(300)\n")
    seen: list[str] = []
    report = launch(
        ["timeout", "-k", "1", "90", *_python(program)],
        2,
        env=environ,
        on_line=lambda i, line: seen.append(line),
    )
    assert report.exit_code == status, seen
    assert report.attempts[0].first_failed == 1
    assert not any("Terminating process" in line for line in seen)
