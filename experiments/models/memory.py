"""How much memory loading and converting a sharded checkpoint takes beside the mapped files.

    python experiments/models/memory.py            about a minute; needs 2 GB of disk
    python experiments/models/memory.py --smoke    ten seconds, a smaller checkpoint, nothing kept

A random Llama is written in shards, then loaded, and converted to float16, each in a fresh process
in which a thread reads the anonymous memory (`RssAnon`, what is not a mapped file) twice a
millisecond. Linux only.

Expected: loading adds less than one tensor, since every tensor stays a view of its file; converting
adds about one tensor in each of the two types.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, format_bytes, format_seconds, markdown_table
from jaxsys.core.tree import flatten
from jaxsys.models import lm

RESULTS = Path(__file__).parent / "results"
SMALL = lm.LMConfig("llama", 4096, 512, 8, 8, 8, 64, 1408, 64)
LARGE = lm.LMConfig("llama", 32_000, 1024, 12, 16, 16, 64, 4096, 64)


def write(folder: Path, config: lm.LMConfig, shard_bytes: int) -> dict[str, int]:
    """Write a float32 checkpoint of ones in shards; count files, bytes and the largest tensor."""
    named = lm.shapes(config)
    files = lm.write_folder(
        folder, config, named, lambda name: np.ones(named[name].shape, np.float32), shard_bytes
    )
    shards = [file for file in files if file.suffix == ".safetensors"]
    return {
        "shards": len(shards),
        "file_bytes": sum(file.stat().st_size for file in shards),
        "tensor_bytes": max(4 * leaf.size for leaf in named.values()),
    }


def measure(source: Path, target: Path | None) -> dict[str, Any]:
    """Load `source`, or convert it to float16 into `target`, in a process of its own.

    Returns:
      `peak_bytes` of anonymous memory beyond what the process had before, and `seconds`.
    """
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(source), *([str(target)] if target else [])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def child(source: str, target: str | None = None) -> None:
    """Do one of both and print what it took."""

    def anonymous_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if "RssAnon" in line).split()[1])

    def watch() -> None:
        while not stop.wait(0.0005):
            peaks.append(anonymous_bytes())

    jax.block_until_ready(jax.device_put(np.ones(16)))
    lm.load_config(source)
    stop, peaks = threading.Event(), [anonymous_bytes()]
    watcher = threading.Thread(target=watch)
    watcher.start()
    begin_s = time.perf_counter()
    params: Any = {}
    if target:
        lm.convert(source, target, dtype=jnp.float16)
    else:
        params = jax.block_until_ready(lm.load(source)[0])
    seconds = time.perf_counter() - begin_s
    peaks.append(anonymous_bytes())
    stop.set()
    watcher.join()
    if not target:  # and the numbers are there
        assert float(np.asarray(flatten(params)["model.norm.weight"])[0]) == 1.0
    print(json.dumps({"peak_bytes": max(peaks) - peaks[0], "seconds": seconds}))


def main() -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(description="Measure the memory of loading and converting.")
    parser.add_argument("--smoke", action="store_true", help="a smaller checkpoint, nothing kept")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    config, shard_bytes = (SMALL, 25_000_000) if given.smoke else (LARGE, 250_000_000)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        sizes = write(source, config, shard_bytes)
        found = {
            "load": measure(source, None),
            "convert to float16": measure(source, Path(scratch, "target")),
        }
    rows = [
        {
            "what": name,
            "files": f"{format_bytes(sizes['file_bytes'])} in {sizes['shards']}",
            "largest tensor": format_bytes(sizes["tensor_bytes"]),
            "peak beside the files": format_bytes(row["peak_bytes"]),
            "in tensors": f"{row['peak_bytes'] / sizes['tensor_bytes']:.2f}",
            "time": format_seconds(row["seconds"]),
        }
        for name, row in found.items()
    ]
    text = (
        "# Memory of loading and converting a sharded checkpoint\n\n"
        "Anonymous memory beyond what the process had before; the files themselves are mapped, and "
        "the kernel drops and rereads their pages as it likes. Files in the page cache.\n\n"
        f"{markdown_table(rows)}\n\n`python experiments/models/memory.py` on "
        f"{machine(devices=True)}.\n"
    )
    print(text)
    if not given.smoke:
        atomic_write(RESULTS / "memory.md", text)


if __name__ == "__main__":
    main()
