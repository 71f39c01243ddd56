"""CPU shares: the kernel holds them, they go at the end and after a kill, and refusals say why."""

import importlib
import os
import subprocess
import sys

import pytest

from jaxsys.cluster import available_shares, cpu_shares
from jaxsys.core.errors import UserError

module = importlib.import_module("jaxsys.cluster.shares")
needs_shares = pytest.mark.skipif(
    available_shares().folder is None, reason=f"no CPU quota: {available_shares().reason}"
)

_BUSY = """
import os, time
start = time.monotonic()
while time.monotonic() - start < 0.5:
    pass
print(time.process_time() / (time.monotonic() - start))
"""

_OWNER = """
import subprocess, sys, time
from jaxsys.cluster import cpu_shares
with cpu_shares([0.5, 0.2]) as shares:
    child = subprocess.Popen(shares.wrap(0, ["sleep", "300"]))
    print(child.pid, *shares.folders, flush=True)
    time.sleep(300)
"""


@needs_shares
def test_the_kernel_holds_the_shares(environ):
    """No process runs for more than its share; a busy machine may give it less."""
    with cpu_shares([0.5, 0.2]) as shares:
        busy = [sys.executable, "-S", "-c", _BUSY]
        running = [
            subprocess.Popen(shares.wrap(i, busy), stdout=subprocess.PIPE, text=True, env=environ)
            for i in range(2)
        ]
        used = [float(process.communicate(timeout=30)[0]) for process in running]
    # a period may begin or end inside the interval, and process_time counts the start-up too
    assert used[0] <= 0.5 * 1.25
    assert used[1] <= 0.2 * 1.5
    assert used[1] < used[0]


@needs_shares
def test_the_end_leaves_nothing(alive):
    with cpu_shares([0.5]) as one, cpu_shares([0.3, 0.3]) as more:
        folders = (*one.folders, *more.folders)
        assert len(set(folders)) == 3
        assert all(folder.is_dir() for folder in folders)
        left = subprocess.Popen(more.wrap(1, ["sleep", "300"]))
    assert left.wait(timeout=20) < 0
    assert not any(folder.exists() for folder in folders)


@needs_shares
def test_a_killed_owner_leaves_nothing(environ, alive, wait_until):
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER], env=environ, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid, *folders = owner.stdout.readline().split()
        assert len(folders) == 2
        assert all(os.path.isdir(folder) for folder in folders)
        owner.kill()
    assert wait_until(lambda: not alive(int(pid)))
    assert wait_until(lambda: not any(os.path.exists(folder) for folder in folders))


@needs_shares
def test_leavings_of_owners_without_a_sweeper_are_removed():
    place = available_shares().folder
    gone = subprocess.Popen(["true"])
    gone.wait()
    leaving = place / f"jaxsys-{gone.pid}-1-0"
    leaving.mkdir()
    with cpu_shares([0.5]):
        assert not leaving.exists()


@pytest.mark.parametrize("cores", [[], [0.0], [0.5, -1.0], [1e6], [float("nan")]])
def test_mistakes_are_one_sentence(cores):
    with pytest.raises(UserError, match="shares of a core") as caught, cpu_shares(cores):
        pass
    assert "\n" not in str(caught.value)


def test_a_refusal_says_why_and_what_helps(monkeypatch, tmp_path):
    """A folder that is no control group has no quota to set; a file must not be made there."""
    monkeypatch.setattr(module, "_candidates", lambda: [(tmp_path, 1), (tmp_path, 2)])
    match = r"no CPU quota can be set here: .*No such file.*run as"
    with pytest.raises(UserError, match=match), cpu_shares([0.5]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_version_two_writes_one_line(tmp_path):
    (tmp_path / "cpu.max").write_text("")
    module._set_quota(tmp_path, 2, 0.25)
    assert (tmp_path / "cpu.max").read_text() == "1250 5000"
