"""Who a process is: the environment, arguments, JAX's detection, and meeting before JAX does."""

import subprocess
import sys
import threading
import time

import pytest

from jaxsys.cluster import _ports, _rendezvous, join
from jaxsys.cluster.join import Membership, read_environment
from jaxsys.core.errors import UserError

FULL = {
    "JAXSYS_COORDINATOR": "10.0.0.1:4000",
    "JAXSYS_PROCESS_ID": "2",
    "JAXSYS_NUM_PROCESSES": "4",
}


def test_launchers_environment_is_read():
    assert read_environment(FULL) == Membership(2, 4, "10.0.0.1:4000", "launcher")
    assert read_environment({"HOME": "/"}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"JAXSYS_COORDINATOR": "10.0.0.1"},
        {"JAXSYS_COORDINATOR": "10.0.0.1:0"},
        {"JAXSYS_COORDINATOR": "10.0.0.1:99999"},
        {"JAXSYS_COORDINATOR": ""},
        {"JAXSYS_PROCESS_ID": "4"},
        {"JAXSYS_PROCESS_ID": "-1"},
        {"JAXSYS_PROCESS_ID": "two"},
        {"JAXSYS_PROCESS_ID": ""},
        {"JAXSYS_NUM_PROCESSES": "0"},
        {"JAXSYS_NUM_PROCESSES": ""},
    ],
)
def test_half_an_environment_is_one_sentence(change):
    with pytest.raises(UserError) as caught:
        read_environment(FULL | change)
    assert "\n" not in str(caught.value)


def test_arguments_come_all_or_none():
    with pytest.raises(UserError, match="expected all three or none"):
        join("10.0.0.1:4000")
    with pytest.raises(UserError, match="process id 4 of 4"):
        join("10.0.0.1:4000", 4, 4)


def test_an_occupied_port_is_one_sentence():
    with _ports.listen_on_all(0) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .* is occupied"):
            _rendezvous.meet(f"127.0.0.1:{port}", 0, 2, timeout_s=5.0)


def test_a_coordinator_that_does_not_answer_is_one_sentence():
    port = _ports.free_port()
    with pytest.raises(UserError, match=f"127.0.0.1:{port} did not answer process 1"):
        _rendezvous.meet(f"127.0.0.1:{port}", 1, 2, timeout_s=0.5)


def test_a_member_that_does_not_come_is_named_on_both_sides():
    said = _meet_all([(0, 4), (2, 4)], timeout_s=1.0)
    assert all("only 2 of 4 processes came" in text for text in said.values())
    assert all("also process 1, 3;" in text for text in said.values())


def test_members_that_disagree_are_told():
    said = _meet_all([(0, 3), (1, 2)], timeout_s=3.0)
    assert "process 1 of 2 came to a job of 3" in said[0, 3]
    assert said[0, 3] == said[1, 2]
    said = _meet_all([(0, 3), (1, 3), (1, 3, "again")], timeout_s=3.0)
    assert all("two processes both say that they are number 1" in text for text in said.values())


def test_strangers_at_the_port_are_ignored():
    port = _ports.free_port()

    def bother():
        host_port = ("127.0.0.1", port)
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", b""):
            deadline_s = time.monotonic() + 5.0
            while time.monotonic() < deadline_s:
                try:
                    with _ports.socket.create_connection(host_port, timeout=1.0) as peer:
                        peer.sendall(data)
                    break
                except OSError:
                    time.sleep(0.01)

    stranger = threading.Thread(target=bother)
    coordinator = threading.Thread(
        target=_rendezvous.meet, args=(f"127.0.0.1:{port}", 0, 2, 20.0), daemon=True
    )
    coordinator.start()
    stranger.start()
    stranger.join()
    _rendezvous.meet(f"127.0.0.1:{port}", 1, 2, timeout_s=20.0)
    coordinator.join(timeout=20.0)
    assert not coordinator.is_alive()


def test_arguments_join_two_processes(environ, programs):
    """The same psum, joined by hand instead of by the launcher."""
    port = _ports.free_port()
    program = programs.psum.replace("join(", f"join('127.0.0.1:{port}', int(sys.argv[1]), 2, ")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", "import sys" + program, str(i)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=90)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert "how arguments local 2" in output
        assert "psum 3.0" in output


def test_slurms_environment_is_detected_by_jax(environ):
    """A step of one task needs no other process; JAX reads who it is from Slurm's variables."""
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    code = "from jaxsys.cluster import join; print(join(), join() is join())"
    done = _python(code, environ | slurm)
    assert "num_processes=1" in done.stdout, done.stderr
    assert "how='slurm'" in done.stdout
    assert "True" in done.stdout


def test_an_ordinary_pod_is_a_single_process(environ):
    done = _python(
        "from jaxsys.cluster import join; print(join())",
        environ | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    )
    assert "how='single'" in done.stdout, done.stderr


def test_joining_late_is_one_sentence(environ):
    code = "import jax; jax.devices(); import jaxsys.cluster as c; c.join('127.0.0.1:4000', 0, 2)"
    done = _python(code, environ | {"JAX_NUM_CPU_DEVICES": "2"})
    assert done.returncode != 0
    assert "JAX was already in use when join() was called" in done.stderr


def test_the_package_does_not_import_jax(environ):
    done = _python("import sys, jaxsys.cluster; print('jax' in sys.modules)", environ)
    assert done.stdout == "False\n", done.stderr


def _python(code: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60
    )


def _meet_all(members: list[tuple], timeout_s: float) -> dict[tuple, str]:
    """Let members meet in threads and collect the sentence that each one got."""
    address = f"127.0.0.1:{_ports.free_port()}"
    said = {}

    def meet(member: tuple) -> None:
        try:
            _rendezvous.meet(address, member[0], member[1], timeout_s)
        except UserError as error:
            said[member] = str(error)

    threads = [threading.Thread(target=meet, args=(member,), daemon=True) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30.0)
    assert set(said) == set(members)
    return said
