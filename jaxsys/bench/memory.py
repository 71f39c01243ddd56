"""The peak memory of a training step, measured in a process of its own.

On a GPU the allocator keeps the peak. On a CPU it is the high-water mark of the process's resident
memory above what was resident before the state was made, after one step has already run and been
freed, so that code, threads and the compiler are not counted. The process hands all but the
smallest arrays straight back to the system (`MALLOC_MMAP_THRESHOLD_`), which would otherwise be
reused unseen.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxsys.core.errors import UserError

_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_MMAP_MAX_": "65536",  # glibc's own; the caller may run without
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


def measured_bytes(
    config: Any,
    technique: Any,
    task: Any,
    *,
    platform: str,
    n_devices: int = 1,
    steps: int = 2,
    limit_s: int | float = 600,
) -> int | None:
    """Run some steps in a process of their own and give the peak of one device.

    Args:
      config: the model, an `LMConfig`.
      technique: a `Technique`.
      task: a `Task`.
      platform: of the devices: ``cpu``, ``gpu``.
      n_devices: how many of them; virtual ones on a CPU, whose memory is then divided by them.
      steps: that are run.
      limit_s: seconds after which the process is ended.

    Returns:
      Bytes; None where the process ran out of memory or time, or the system does not tell.

    >>> from jaxsys.bench.step import Task, Technique
    >>> measured_bytes({}, Technique(), Task(), platform="cpu", limit_s=0.001) is None
    True
    """
    given = {
        "config": config if isinstance(config, Mapping) else asdict(config),
        "technique": asdict(technique),
        "task": asdict(task),
        "platform": platform,
        "n_devices": n_devices,
        "steps": steps,
    }
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "jaxsys.bench.memory"],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=limit_s,
            env={**os.environ, **_ENVIRONMENT},
        )
    except subprocess.TimeoutExpired:
        return None
    lines = ran.stdout.splitlines()
    return json.loads(lines[-1])["bytes"] if ran.returncode == 0 and lines else None


def read_config(values: Mapping[str, Any]) -> Any:
    """Make an `LMConfig` of what `dataclasses.asdict` and JSON made of it.

    >>> from jaxsys.bench.shapes import shape
    >>> read_config(json.loads(json.dumps(asdict(shape("gpt2"))))) == shape("gpt2")
    True
    """
    from jaxsys.models import lm

    plain: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
    }
    rope = plain.pop("rope", None)
    return lm.LMConfig(**plain, rope=lm.Rope(**rope) if rope else None)


def peak_while(work: Any, platform: str, n_devices: int) -> int | None:
    """Do some work twice and give one device's peak of the second time.

    Args:
      work: function of no arguments that leaves nothing behind.
      platform: of the devices.
      n_devices: that share the work.

    Returns:
      Bytes, or None where the system does not tell.

    >>> peak_while(lambda: None, "tpu-of-another-kind", 1) is None
    True
    """
    import jax

    if platform == "gpu":
        work()
        return int((jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"])
    marks = Path("/proc/self/clear_refs")
    if platform != "cpu" or not marks.exists():
        return None
    work()
    gc.collect()
    before = _resident("VmRSS")
    marks.write_text("5")  # the high-water mark falls back to what is resident now
    work()
    return (_resident("VmHWM") - before) // n_devices


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise UserError(f"the system does not tell {name}; expected Linux; leave the measurement out")


def main() -> None:
    """Read a cell from standard input, run it, and print its peak."""
    given = json.load(sys.stdin)
    import jax

    if given["platform"] == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", given["n_devices"])
    from jaxsys.bench.static import analyse
    from jaxsys.bench.step import Task
    from jaxsys.bench.techniques import Technique

    config, technique = read_config(given["config"]), Technique(**given["technique"])
    devices = jax.devices()[: given["n_devices"]]
    found = analyse(config, technique, Task(**given["task"]), devices)

    def work() -> None:
        state, batch = found.built.init(), found.built.data(0)
        for _ in range(given["steps"]):
            state, _info = found.compiled(state, batch)
            jax.block_until_ready(state)

    peak = peak_while(work, given["platform"], given["n_devices"])
    print(json.dumps({"bytes": peak}))


if __name__ == "__main__":
    main()
