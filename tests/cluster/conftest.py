"""What several of the cluster tests need: programs, an environment, bounded waiting, liveness."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]

_PSUM = """
import jaxsys.cluster
me = jaxsys.cluster.join(init_timeout_s=40)
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
first = {}
for device in jax.devices():
    first.setdefault(device.process_index, device)
mesh = Mesh(np.array([first[i] for i in range(me.num_processes)]), ("workers",))
sharding = NamedSharding(mesh, P("workers"))
mine = np.full((1,), me.process_id + 1.0, np.float32)
x = jax.make_array_from_callback((me.num_processes,), sharding, lambda index: mine)
total = jax.jit(jax.shard_map(
    lambda a: jax.lax.psum(a, "workers"), mesh=mesh, in_specs=P("workers"), out_specs=P()))(x)
print("how", me.how, "local", jax.local_device_count())
print("psum", float(np.asarray(total.addressable_data(0))[0]))
"""

# Writes its process id to a file named after its number and sleeps; a grandchild does the same.
_SLEEPER = """
import os, pathlib, subprocess, sys, time
folder, i = pathlib.Path(sys.argv[1]), os.environ["JAXSYS_PROCESS_ID"]
child = subprocess.Popen(["sleep", "300"])
(folder / f"{i}.tmp").write_text(f"{os.getpid()} {child.pid}")
(folder / f"{i}.tmp").rename(folder / f"{i}.pids")
time.sleep(300)
"""

_LAUNCHER = """
import signal, sys
from jaxsys.cluster import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
launch([sys.executable, "-c", sys.argv[1], sys.argv[2]], 3)
"""

_LAB_OWNER = """
import time
from jaxsys.cluster import netlab
with netlab(2, "10mbit") as lab:
    print(lab.hub_pid, *lab.pids, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def programs() -> SimpleNamespace:
    """Programs that the tests start in other processes, as text for ``python -c``."""
    return SimpleNamespace(psum=_PSUM, sleeper=_SLEEPER, launcher=_LAUNCHER, lab_owner=_LAB_OWNER)


@pytest.fixture
def environ() -> dict[str, str]:
    """This process's environment on CPU, with the package importable and no job set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAXSYS_", "XLA_FLAGS"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], bool]:
    """Poll a condition for at most 20 seconds and say whether it came true."""

    def wait(condition: Callable[[], bool]) -> bool:
        deadline_s = time.monotonic() + 20.0
        while time.monotonic() < deadline_s:
            if condition():
                return True
            time.sleep(0.02)
        return condition()

    return wait


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """Tell whether a process runs; a zombie does not."""

    def check(pid: int) -> bool:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] not in "ZX"

    return check
