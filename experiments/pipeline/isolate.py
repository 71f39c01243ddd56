"""Why a step over devices of unequal speed is not what their profile predicts: each cause alone.

Command:   python experiments/pipeline/isolate.py            about 2 minutes on 2 idle cores
           python experiments/pipeline/isolate.py --smoke    seconds, kept nowhere
Expected:  a stage of k blocks takes less than k times a block (the rest is the call); a piece of
           work after a pause passes a CPU quota faster than the same piece in a row of them, and a
           throttle (see `jaxsys.cluster.throttle`) not; a core is slower while the other one works
Results:   results/isolate.md and .jsonl

Everything runs on one core but for the row that says otherwise. The model is netlab.py's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import netlab
import numpy as np

from jaxsys.cluster import cpu_shares
from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table, write_jsonl

RESULTS = Path(__file__).parent / "results"
SHARE = 0.3
_A = np.full((64, 64), 0.01, np.float32)


def chew(seconds: float) -> float:
    """Multiply matrices for so much processor time; gives the seconds of the clock."""
    start_s, cpu_s = time.perf_counter(), time.thread_time()
    while time.thread_time() - cpu_s < seconds:
        np.einsum("ij,jk->ik", _A, _A)
    return time.perf_counter() - start_s


def pieces(piece_s: float, pause_s: float, total_s: float, throttle: Any = None) -> float:
    """Median seconds of the clock of a piece of work, each after a pause."""
    found = []
    end_s = time.perf_counter() + total_s
    while time.perf_counter() < end_s or len(found) < 3:
        if pause_s:
            time.sleep(pause_s)
        start_s = time.perf_counter()
        if throttle is not None:
            throttle.begin()
        chew(piece_s)
        if throttle is not None:
            throttle.pay()
        found.append(time.perf_counter() - start_s)
    return float(np.mean(found))


def work_alone(core: int, seconds: float) -> tuple[float, float]:
    """Count matrix products a second of the clock, and a second of processor time, on one core."""
    os.sched_setaffinity(0, {core})
    start_s, cpu_s, count = time.perf_counter(), time.thread_time(), 0
    while time.perf_counter() - start_s < seconds:
        np.einsum("ij,jk->ik", _A, _A)
        count += 1
    return count / (time.perf_counter() - start_s), count / (time.thread_time() - cpu_s)


def siblings(seconds: float) -> list[dict[str, Any]]:
    """One core's speed while the other one idles, and while it works."""
    rows = []
    for other in ("idle", "busy"):
        child = None
        if other == "busy":
            argv = [sys.executable, __file__, "--part", "chew", str(3 * seconds)]
            child = subprocess.Popen(["taskset", "-c", "1", *argv])
            time.sleep(1.5)
        of_clock, of_cpu = work_alone(0, seconds)
        if child is not None:
            child.wait()
        rows.append({"what": f"products a second, the other core {other}",
                     "found": of_clock, "a second of processor time": of_cpu})  # fmt: skip
    return rows


def quota_worker(seconds: float) -> None:
    """Print how long pieces of work take, relative to piece / share, in a row and after pauses."""
    for piece_ms in (2, 5, 10, 20, 40):
        for pause_ms in (0, 40):
            took = pieces(piece_ms / 1e3, pause_ms / 1e3, seconds)
            print(piece_ms, pause_ms, took * SHARE * 1e3 / piece_ms, flush=True)


def quotas(seconds: float) -> list[dict[str, Any]]:
    """Pieces of work under a CPU quota and under a throttle, in a row and after pauses."""
    from jaxsys.cluster.throttle import Throttle

    rows = []
    with cpu_shares([SHARE]) as shares:
        argv = ["taskset", "-c", "0", sys.executable, __file__, "--part", "quota", str(seconds)]
        done = subprocess.run(shares.wrap(0, argv), check=True, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        piece, pause, took = line.split()
        rows.append({"what": f"{piece} ms of work, each after a pause of {pause} ms",
                     "quota": float(took)})  # fmt: skip
    throttle = Throttle(SHARE)
    for row in rows:
        piece, pause = (float(row["what"].split()[i]) / 1e3 for i in (0, 9))
        row["throttle"] = pieces(piece, pause, seconds, throttle) * SHARE / piece
    return rows


def programs(options: dict) -> list[dict[str, Any]]:
    """Seconds of runs of blocks compiled as one stage, and of their forward that keeps nothing."""
    from jaxsys.core.graph import dag
    from jaxsys.pipeline import programs as timed

    setup, parts = netlab.model(options), options["micro_batches"]
    graph = dag(setup.loss_fn, setup.shapes(), *setup.micro_batch(parts), granularity="scope")
    n = len(graph.nodes)
    rows, single = [], {}
    for begin, end in ((1, 2), (1, 3), (1, 5), (0, n)):
        cuts = tuple(b for b in (begin, end) if 0 < b < n)
        (run,) = timed.stage_programs(setup, parts, cuts, [int(begin > 0)], "scope")
        forward, backward = timed.time_programs(run)
        dropped = timed.time_program(lambda run=run: run[0]()[0])
        single = single or {"forward": forward, "backward": backward}
        rows.append(
            {
                "nodes": end - begin,
                "forward, ms": 1e3 * forward,
                "a block": forward / single["forward"],
                "backward, ms": 1e3 * backward,
                "a block ": backward / single["backward"],
                "forward that drops its residuals, ms": 1e3 * dropped,
            }
        )
    return rows


def steps(options: dict) -> list[dict[str, Any]]:
    """A worker's spans beside the programs that it runs in them, one stage in one process."""
    import jax

    from jaxsys.cluster.transport import in_memory
    from jaxsys.core.stages import cut_at
    from jaxsys.pipeline import programs as timed
    from jaxsys.pipeline.execute import Worker
    from jaxsys.pipeline.plan import Plan
    from jaxsys.train import optimizers

    setup, parts = netlab.model(options), options["micro_batches"]
    staged = cut_at(setup.loss_fn, setup.shapes(), setup.micro_batch(parts), (),
                    granularity="scope")  # fmt: skip
    plan = Plan(options["blocks"] + 2, (), (0,), micro_batches=parts)
    worker = Worker(staged, plan, in_memory(1)[0], optimizers.adamw(lr=1e-4), setup.shapes())
    state = worker.init(setup.init(jax.random.key(0)))
    spans = []
    for k in range(8):
        state, info = worker.step(state, setup.data(k))
        spans += [(s.name.split()[0], s.end_s - s.start_s) for s in info.spans] if k > 1 else []
    (run,) = timed.stage_programs(setup, parts, (), [0], "scope")
    alone = dict(zip(("forward", "backward"), timed.time_programs(run), strict=True))
    rows = []
    for name in ("forward", "backward", "update"):
        mine = [taken_s for kind, taken_s in spans if kind == name]
        rows.append({"what": name, "in the worker, ms": 1e3 * float(np.median(mine)),
                     "program, ms": 1e3 * alone.get(name, float("nan"))})  # fmt: skip
    return rows


def codecs(options: dict) -> list[dict[str, Any]]:
    """Seconds of encoding and of decoding by size and ratio."""
    import jax
    import jax.numpy as jnp

    from jaxsys.pipeline import codec
    from jaxsys.pipeline.programs import time_program

    rows = []
    whole = options["batch"] // options["micro_batches"] * (options["length"]) * options["width"]
    for n in (whole // 4, whole, 4 * whole):
        for ratio in (16.0, 23.5):
            x = jnp.asarray(np.random.default_rng(0).standard_normal(n), jnp.float32)
            parts = codec.encode(x, ratio, "topk")
            jax.block_until_ready(codec.decode(parts, x.shape, x.dtype, ratio, "topk"))
            encode = time_program(lambda x=x, r=ratio: codec.encode(x, r, "topk"))
            decode = time_program(
                lambda p=parts, x=x, r=ratio: codec.decode(p, x.shape, x.dtype, r, "topk")
            )
            rows.append({"what": f"{n} values, ratio {ratio:g}", "encode, ms": 1e3 * encode,
                         "decode, ms": 1e3 * decode})  # fmt: skip
    return rows


def main() -> int:
    """Measure each cause and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        seconds = float(args.part[1])
        chew(seconds) if args.part[0] == "chew" else quota_worker(seconds)
        return 0
    os.sched_setaffinity(0, {0})
    import jax

    cache = str(Path(tempfile.gettempdir()) / "jaxsys-netlab-programs")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    options = netlab.SMOKE if args.smoke else netlab.FULL
    seconds = 0.05 if args.smoke else 1.0
    tables: dict[str, list[dict[str, Any]]] = {}
    try:
        tables["Quotas: seconds of a piece of work, in units of work / share"] = quotas(seconds)
    except UserError as error:
        print(error, file=sys.stderr)
    if (os.cpu_count() or 1) > 1:
        tables["The other core"] = siblings(seconds)
        os.sched_setaffinity(0, {0})
    tables["Stages of several nodes beside the sum of single ones"] = programs(options)
    tables["A worker's spans beside its programs"] = steps(options)
    tables["Top-k"] = codecs(options)
    text = "# What moves a step's time\n\n`python experiments/pipeline/isolate.py`\n\n"
    text += f"{machine()}\n\n" + "\n".join(
        f"## {title}\n\n{markdown_table(rows)}" for title, rows in tables.items()
    )
    print(text)
    if not args.smoke:
        atomic_write(RESULTS / "isolate.md", text)
        write_jsonl(
            RESULTS / "isolate.jsonl",
            [{"table": title, **row} for title, rows in tables.items() for row in rows],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
