"""`jaxsys launch`: workers wired up, restarted, joined to hosts; mistakes told."""

import json
import os
import subprocess
import sys

import pytest

from jaxsys import cluster
from jaxsys.cli import main
from jaxsys.cluster import Attempt, LaunchReport


def _run(*argv, timeout=120):
    return subprocess.run(
        [sys.executable, "-c", "import sys; from jaxsys.cli import main; sys.exit(main())", *argv],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


WHO = (
    "import os; print('I am', os.environ['JAXSYS_PROCESS_ID'], 'of',"
    "os.environ['JAXSYS_NUM_PROCESSES'])"
)


def test_local_workers_print_and_json_is_alone():
    done = _run("launch", "-n", "2", "--json", "--", sys.executable, "-c", WHO)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exit_code"] == 0
    assert "I am 0 of 2" in done.stderr
    assert "I am 1 of 2" in done.stderr


def test_a_failing_worker_gives_its_status_after_the_restarts(tmp_path):
    code = f"import sys, os; open({str(tmp_path / 'log')!r}, 'a').write('x'); sys.exit(5)"
    done = _run("launch", "--restarts", "2", "--", sys.executable, "-c", code)
    assert done.returncode == 5
    assert (tmp_path / "log").read_text() == "xxx"


def test_the_multi_host_form_becomes_the_command():
    argv = ["launch", "--coordinator", "node0:1234", "--process-id", "3", "-n", "8", "--"]
    done = _run(*argv, sys.executable, "-c", WHO)
    assert (done.returncode, done.stdout) == (0, "I am 3 of 8\n")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-n", "2"], "no command was given"),
        (["-n", "2", "--", "no-such-program-here"], "no-such-program-here"),
        (["-n", "0", "--", "true"], "0"),
        (["--coordinator", "h:1", "--", "true"], "needs both"),
        (["--coordinator", "h:1", "--process-id", "2", "-n", "2", "--", "true"], "process id 2"),
        (["--coordinator", "h", "--process-id", "0", "-n", "2", "--", "true"], "h"),
        (["--coordinator", "h:1", "--process-id", "0", "-n", "2"], "no command was given"),
        (["--coordinator", "h:1", "--process-id", "0", "--", "no-such-program-here"], "not found"),
        (
            ["--coordinator", "h:1", "--process-id", "0", "--restarts", "1", "--", "true"],
            "for workers on this machine",
        ),
        (["--bandwidth", "fast", "--", "true"], "fast"),
    ],
)
def test_mistakes_are_one_line_and_status_two(argv, words, capsys):
    assert main(["launch", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert words in err
    assert err.count("\n") == 1


def test_bandwidth_puts_the_workers_into_a_netlab(monkeypatch, capsys):
    """Check the wiring without namespaces; those are tested where they live."""
    import contextlib

    class Lab:
        addresses = ("10.0.0.1", "10.0.0.2")
        rates_bits_s = (1e8, 5e7)

        def wrap(self, i, argv):
            return argv

        def verify(self):
            return [cluster.LinkRate(0.99e8, 0.98e8), cluster.LinkRate(5e7, 5e7)]

    seen = {}

    def fake_netlab(n, bandwidth):
        seen.update(n=n, bandwidth=bandwidth)
        return contextlib.nullcontext(Lab())

    def fake_launch(command, n, **kwargs):
        seen.update(command=command, **kwargs)
        return LaunchReport(0, 0, (Attempt(None, 0, 0.0, 1.0),))

    monkeypatch.setattr(cluster, "netlab", fake_netlab)
    monkeypatch.setattr(cluster, "launch", fake_launch)
    argv = ["launch", "-n", "2", "--port", "4000", "--bandwidth", "100mbit", "50mbit", "--", "a"]
    assert main(argv) == 0
    assert seen["bandwidth"] == ("100mbit", "50mbit")
    assert (seen["n"], seen["command"], seen["host"], seen["port"]) == (2, ("a",), "10.0.0.1", 4000)
    assert seen["wrap"](0, ["x"]) == ["x"]
    assert "worker 0: 100mbit, measured 99mbit up, 98mbit down" in capsys.readouterr().err
    assert main(["launch", "--bandwidth", "10mbit", "--", "a"]) == 0
    assert seen["bandwidth"] == "10mbit"


@pytest.mark.netlab
def test_bandwidth_for_real():
    if not cluster.available().ok:
        pytest.skip(cluster.available().reason)
    done = _run("launch", "-n", "2", "--bandwidth", "50mbit", "--", sys.executable, "-c", WHO)
    assert done.returncode == 0, done.stderr
    assert "I am 1 of 2" in done.stdout
    assert "link of worker 1: 50mbit" in done.stderr
    assert os.environ.get("JAXSYS_PROCESS_ID") is None
