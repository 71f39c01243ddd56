"""Shaped networks: rates, names, collectives inside, and that a killed owner leaves nothing."""

import functools
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jaxsys.cluster import _namespaces, launch, netlab, rates
from jaxsys.cluster.netlab import _Unavailable, available
from jaxsys.core.errors import UserError

needs_netlab = [
    pytest.mark.netlab,
    pytest.mark.skipif(
        not available().ok, reason=f"no netlab: {available().reason}; {available().remedy}"
    ),
]


def _inside(lab, i: int, *argv: str) -> str:
    done = subprocess.run(lab.wrap(i, argv), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _bits_s(lab, source: int, target: int) -> float:
    """Time an exchange between two workers."""
    exchange = importlib.import_module("jaxsys.cluster._exchange")
    enter = [functools.partial(lab.wrap, i) for i in (target, source)]
    link = exchange.ShapedLink("pair", enter[1], 2e7, 40000)
    return min(exchange.time_links(enter[0], lab.addresses[target], [link], 0.3)[0])


class TestWithNetlab:
    pytestmark = needs_netlab

    def test_rates_hold(self):
        """Within 10 % in each direction; one more try, because the machine is shared."""
        for attempt in range(2):
            with netlab(3, ["100mbit", "20mbit", "100mbit"]) as lab:
                assert lab.rates_bits_s == (1e8, 2e7, 1e8)
                measured = lab.verify(tolerance=1.0)
            ratios = [
                r / w for link, w in zip(measured, lab.rates_bits_s, strict=True) for r in link
            ]
            if all(0.9 < ratio < 1.1 for ratio in ratios) or attempt == 1:
                break
        assert all(0.9 < ratio < 1.1 for ratio in ratios), ratios

    def test_the_link_between_clusters_is_slow_and_those_inside_are_not(self):
        """Two bridges, one link between: each is timed by itself, and it is on the way across."""
        groups = ((0, 2), (1, 3))
        for attempt in range(2):
            with netlab(4, "200mbit", clusters=groups, between="20mbit") as lab:
                assert (lab.clusters, lab.between_bits_s) == (groups, (2e7,))
                (between,) = lab.verify_between(tolerance=1.0)
                inside = lab.verify(tolerance=1.0, seconds=0.1)
                across, within = (_bits_s(lab, i, 0) for i in (1, 2))
            off = [rate / 2e7 for rate in (*between, across)]
            off += [rate / 2e8 for rate in (*inside[0], *inside[1], *inside[3], within)]
            if all(0.85 < ratio < 1.15 for ratio in off) or attempt == 1:
                break
        assert all(0.85 < ratio < 1.15 for ratio in off), off

    def test_three_clusters_have_links_of_their_own(self):
        rates = ["10mbit", "40mbit"]
        with netlab(3, "200mbit", clusters=((0,), (1,), (2,)), between=rates) as lab:
            found = lab.verify_between(tolerance=1.0, seconds=0.1)
            assert 3 < found[1].down_bits_s / found[0].down_bits_s < 5
            assert _bits_s(lab, 1, 2) < 1.2e7  # by way of both links

    def test_a_rate_that_is_off_is_said(self):
        message = "worker 0 .* instead of 10mbit"
        with netlab(1, "10mbit") as lab, pytest.warns(RuntimeWarning, match=message):
            lab.verify(tolerance=1e-6, seconds=0.05)

    def test_hosts_are_named_and_files_are_shared(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with netlab(2, "1gbit") as lab:
            assert lab.addresses == ("10.77.0.1", "10.77.0.2")
            code = "import socket; n = socket.gethostname(); print(n, socket.gethostbyname(n))"
            for i in range(2):
                said = _inside(lab, i, sys.executable, "-c", code)
                assert said == f"{lab.hostnames[i]} {lab.addresses[i]}"
            other = "import socket; print(socket.gethostbyname('jaxsys-w1'))"
            assert _inside(lab, 0, sys.executable, "-c", other) == lab.addresses[1]
            assert _inside(lab, 1, "pwd") == str(tmp_path)
            _inside(lab, 1, "sh", "-c", "echo written > file")
        assert (tmp_path / "file").read_text() == "written\n"
        assert (tmp_path / "file").stat().st_uid == os.geteuid()

    def test_bytes_are_counted_inside(self, environ):
        """What is sent over the link shows in the counters, and the idle link is silent."""
        code = (
            "import socket, sys; from jaxsys.cluster import interface_bytes as count\n"
            "before = count(); print(before)\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for _ in range(10): s.sendto(bytes(1000), (sys.argv[1], 9))\n"
            "after = count(); print(after.tx_bytes - before.tx_bytes)\n"
        )
        with netlab(2, "1gbit") as lab:
            done = subprocess.run(
                lab.wrap(0, [sys.executable, "-c", code, lab.addresses[1]]),
                capture_output=True,
                text=True,
                timeout=30,
                env=environ,
            )
        first, sent = done.stdout.splitlines()
        assert first == str(rates.Traffic(0, 0))
        assert 10_000 <= int(sent) <= 10_700  # 42 bytes of headers each, and one address request

    def test_two_processes_add_up_inside(self, environ, programs):
        seen: list[str] = []
        with netlab(2, "100mbit") as lab:
            report = launch(
                ["timeout", "-k", "1", "90", sys.executable, "-c", programs.psum],
                2,
                env=environ,
                wrap=lab.wrap,
                host=lab.addresses[0],
                on_line=lambda i, line: seen.append(line),
            )
        assert report.exit_code == 0, seen
        assert seen.count("psum 3.0") == 2

    def test_workers_inside_die_with_the_launcher(self, tmp_path, environ, alive, wait_until):
        """The kernel's parent-death signal outlives the change of namespaces."""
        code = (
            "import sys; from jaxsys.cluster import launch, netlab\n"
            "with netlab(1, '1gbit') as lab:\n"
            "    launch(['sh', '-c', 'echo $$; exec sleep 300'], 1, wrap=lab.wrap)\n"
        )
        owner = subprocess.Popen(
            [sys.executable, "-u", "-c", code], env=environ, stdout=subprocess.PIPE, text=True
        )
        with owner:
            assert owner.stdout is not None
            pid = int(owner.stdout.readline().split()[-1])
            assert alive(pid)
            owner.kill()
        assert wait_until(lambda: not alive(pid))

    def test_the_end_leaves_nothing(self, alive):
        with netlab(2, "10mbit") as lab:
            assert all(alive(pid) for pid in (lab.hub_pid, *lab.pids))
            assert len(_own_notes()) == 1
        assert not any(alive(pid) for pid in (lab.hub_pid, *lab.pids))
        assert not _own_notes()

    def test_an_error_inside_leaves_nothing(self, alive):
        with pytest.raises(ZeroDivisionError), netlab(1, "10mbit") as lab:
            raise ZeroDivisionError
        assert not alive(lab.hub_pid)
        assert not _own_notes()

    def test_a_killed_owner_leaves_nothing(self, environ, alive, wait_until, programs):
        owner = subprocess.Popen(
            [sys.executable, "-c", programs.lab_owner],
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        with owner:
            assert owner.stdout is not None
            pids = [int(word) for word in owner.stdout.readline().split()]
            assert len(pids) == 3
            assert all(alive(pid) for pid in pids)
            owner.kill()
        assert wait_until(lambda: not any(alive(pid) for pid in pids))
        assert _notes_of(owner.pid)
        with netlab(1, "10mbit"):
            assert not _notes_of(owner.pid)

    def test_another_user_can_make_one(self):
        """An ordinary user needs no privileges; shown where this is root and `setpriv` exists."""
        if os.geteuid() != 0 or available().how != "user namespace":
            pytest.skip("needs root, to become somebody else, and user namespaces")
        plain = "/usr/bin/python3"
        if not os.access(plain, os.X_OK):
            pytest.skip("no Python that another user may run")
        package = Path(tempfile.mkdtemp(prefix="jaxsys-test-"))
        try:
            shutil.copytree(Path(_namespaces.__file__).parents[1], package / "jaxsys")
            package.chmod(0o755)
            someone = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            code = "from jaxsys.cluster import available; print(available())"
            done = subprocess.run(
                [*someone, plain, "-B", "-c", code],
                env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin"},
                cwd="/",
                capture_output=True,
                text=True,
                timeout=60,
            )
        finally:
            shutil.rmtree(package)
        assert "ok=True, how='user namespace'" in done.stdout, done.stdout + done.stderr


def test_a_holder_that_outlives_its_owner_is_ended():
    """Found by process id and start time; a later process of the same number is left alone."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    mine = _namespaces._started(os.getpid())
    with subprocess.Popen(["sleep", "300"]) as holder, subprocess.Popen(["sleep", "300"]) as other:
        started = _namespaces._started(holder.pid)
        notes = [_namespaces._run_folder() / f"netlab-{gone.pid}-1-test{i}" for i in range(2)]
        alive_owner = _namespaces._run_folder() / f"netlab-{os.getpid()}-{mine}-test"
        for folder in (*notes, alive_owner):
            folder.mkdir()
        (notes[0] / "holder").write_text(f"{holder.pid} {started}")
        (notes[1] / "holder").write_text(f"{other.pid} {_namespaces._started(other.pid)}0")
        try:
            assert _namespaces.remove_leavings() >= 2
            assert holder.wait(timeout=20) == -signal.SIGKILL
            assert other.poll() is None
            assert not any(folder.exists() for folder in notes)
            assert alive_owner.exists()
        finally:
            alive_owner.rmdir()
            holder.kill()
            other.kill()


@pytest.mark.parametrize(
    ("n", "bandwidth"),
    [(0, "10mbit"), (2, ["10mbit"]), (2, "fast"), (1, "1kbit"), (1, "400gbit"), (10**6, "1gbit")],
)
def test_mistakes_are_one_sentence(n, bandwidth):
    with pytest.raises(UserError) as caught, netlab(n, bandwidth):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("clusters", "between"),
    [
        (((0, 1),), "10mbit"),
        (((0, 1), (1, 2)), "10mbit"),
        (((0, 1, 2), ()), "10mbit"),
        (((0,), (1, 2)), "1kbit"),
        (((0,), (1, 2)), ["1mbit", "1mbit"]),
    ],
)
def test_mistaken_clusters_are_one_sentence(clusters, between):
    with (
        pytest.raises(UserError) as caught,
        netlab(3, clusters=clusters, between=between),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "detail", "remedy"),
    [
        ("tools", "tc is missing", "apt-get install iproute2"),
        ("user", "No space left on device", "user namespaces"),
        ("bridge", "RTNETLINK answers: Operation not permitted", "run as root"),
        ("bridge", "Error: Unknown device type.", "modprobe bridge veth"),
        ("tbf", "Error: Specified qdisc kind is unknown.", "modprobe sch_tbf"),
    ],
)
def test_a_refusal_names_the_remedy(stage, detail, remedy):
    refusal = _Unavailable(stage, detail)
    assert remedy in refusal.remedy
    assert detail in str(refusal)
    assert "emulated" in str(refusal)
    assert "\n" not in str(refusal)


def test_missing_tools_are_named(monkeypatch):
    module = importlib.import_module("jaxsys.cluster.netlab")
    monkeypatch.setattr(module, "_tool", lambda name: None if name == "tc" else f"/bin/{name}")
    with pytest.raises(UserError, match="tc is missing; install Debian's iproute2"), netlab(1):
        pass


def _own_notes() -> list[str]:
    return _notes_of(os.getpid())


def _notes_of(pid: int) -> list[str]:
    return [path.name for path in _namespaces._run_folder().glob(f"netlab-{pid}-*")]
