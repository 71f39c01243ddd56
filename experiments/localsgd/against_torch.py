"""PyTorch's DDP and post-local SGD beside jaxsys, over the same slow links, in one run.

    python experiments/localsgd/against_torch.py            about 8 minutes on 2 idle cores
    python experiments/localsgd/against_torch.py --smoke    half a minute, nothing written

Needs the extra `peers` (pip install 'jaxsys[peers]'); without it `--smoke` says so and ends.

Both sides train the same GPT-2 from the same weights on the same bytes with the same AdamW, one
process per worker and side, bound to the same core and in the same shaped network namespace. All
processes stay alive and take turns, a period of steps each, so that only one contender computes or
sends at a time; contenders are compared by the ratios of neighbouring turns. PyTorch is eager, with
its fused attention and AdamW, and DDP's own buckets; post-local SGD averages over gloo every H
steps and sends nothing in between.

Expected: the losses of the first step agree to 1e-3, torch-ddp takes about as long a step as
jaxsys-ssgd (both wait for the same bytes), torch-postlocal about as long as jaxsys-local, and
jaxsys-dreamddp less than both.
"""

import argparse
import importlib.util
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.cluster import available, interface_bytes, launch, netlab
from jaxsys.core.errors import UserError
from jaxsys.core.measure import Timing, machine, ratio, timing
from jaxsys.core.report import atomic_write, format_seconds, markdown_table

RESULTS = Path(__file__).parent / "results"
TURN = "@turn "
ORDER = (
    *("torch-ddp", "jaxsys-wfbp", "jaxsys-ssgd", "torch-postlocal", "jaxsys-local"),
    *("jaxsys-dreamddp", "torch-compute", "jaxsys-compute"),
)
PAIRS = (
    ("torch-compute", "jaxsys-compute"),
    ("torch-ddp", "jaxsys-ssgd"),
    ("torch-ddp", "jaxsys-wfbp"),
    ("torch-postlocal", "jaxsys-local"),
    ("torch-postlocal", "jaxsys-dreamddp"),
    ("torch-ddp", "jaxsys-dreamddp"),
)
Block = Callable[[int], list[float]]


def schedule(rounds: int) -> list[str]:
    """List the turns: each side sets up, everybody warms up, then rounds in rotating order."""
    turns = ["torch-setup", "jaxsys-setup", *ORDER]
    for k in range(rounds):
        shift = 3 * k % len(ORDER)
        turns += [*ORDER[shift:], *ORDER[:shift]]
    return turns


def take_turns(
    job: dict[str, Any], side: str, rank: int, barrier: Callable[[], Any], blocks: Callable[[], Any]
) -> None:
    """Follow the schedule: take this side's turns, sleep through the other's."""
    folder, contenders = Path(job["folder"]), {}
    for number, name in enumerate(schedule(job["rounds"])):
        if name.startswith(side):
            barrier()
            sent, began = interface_bytes().tx_bytes, time.perf_counter()
            if name.endswith("-setup"):
                contenders, losses = blocks(), []
            else:
                losses = contenders[name](job["period"])
            row = {
                "name": name,
                "seconds": time.perf_counter() - began,
                "sent_bytes": interface_bytes().tx_bytes - sent,
                "losses": losses,
            }
            atomic_write(folder / f"turn-{number}-{rank}", json.dumps(row))
            if rank == 0:
                print(TURN + json.dumps(row | {"number": number}), flush=True)
        while not all((folder / f"turn-{number}-{r}").exists() for r in range(job["workers"])):
            time.sleep(0.02)


def jaxsys_contenders(job: dict[str, Any]) -> dict[str, Block]:
    """Profile and plan as `jaxsys localsgd compare` does, and build this side's contenders."""
    import jax

    from jaxsys.core.mesh import device_pair
    from jaxsys.localsgd import host, profile, profiling
    from jaxsys.localsgd.layers import layer_bytes
    from jaxsys.localsgd.step import Due, due
    from jaxsys.localsgd.strategy import choose
    from jaxsys.localsgd.task import Task, set_up
    from jaxsys.localsgd.wire import Wire
    from jaxsys.train import optimizers

    task = Task(**job["task"])
    setup = set_up(task, job["seed"], job["rank"], job["workers"])
    wire = Wire(device_pair())
    params = jax.device_put(setup.params, wire.pair.compute)
    batch = setup.train.batch_at(0)
    optimizer = optimizers.PRESETS[task.optimizer](lr=task.lr)
    staged = host.cut_loss(setup.loss_fn, params, batch, setup.layers)
    presets = choose(["ssgd", "wfbp", "local", "dreamddp"], job["period"])

    def build(name: str) -> host.Overlapped:
        return host.overlapped_local_sgd(
            setup.loss_fn, optimizer, setup.layers, presets[name], staged, wire
        )

    compute = profiling.measure_compute(build("wfbp"), staged, params, batch, wire)
    sizes = [n // 4 for n in layer_bytes(params, setup.layers)]
    link, _, _ = profiling.measure_link(wire, min(sizes), sum(sizes))
    measured = profile.make_profile(setup.layers, params, compute, link, wire.workers)

    def block(name: str, sync: bool = True) -> Block:
        strategy = presets[name]
        phases = measured.plan(strategy).phases
        run = build(name)
        state, step = run.init(params, jax.random.key(job["seed"])), 0

        def take(steps: int) -> list[float]:
            nonlocal state, step
            losses = []
            for _ in range(steps):
                now = due(phases, strategy, step) if sync else Due((), ())
                state, info = run.step(state, setup.train.batch_at(step), now)
                losses.append(float(info.loss))
                step += 1
            return losses

        return take

    return {f"jaxsys-{name}": block(name) for name in presets} | {
        "jaxsys-compute": block("local", sync=False)
    }


def work(file: str) -> None:
    """Be one worker: the first half of the processes is jaxsys, the second PyTorch."""
    job = json.loads(Path(file).read_text())
    number, workers = int(os.environ["JAXSYS_PROCESS_ID"]), job["workers"]
    coordinator = os.environ["JAXSYS_COORDINATOR"]
    job["rank"] = rank = number % workers
    if number < workers:
        from jaxsys.cluster import join
        from jaxsys.core.mesh import device_pair
        from jaxsys.localsgd.wire import Wire

        join(coordinator, rank, workers)
        meeting = Wire(device_pair())
        take_turns(
            job,
            "jaxsys",
            rank,
            lambda: meeting.gather(np.zeros(1, np.float32)),
            lambda: jaxsys_contenders(job),
        )
        return
    import torch_side

    names = [name for _, name in socket.if_nameindex() if name == "eth0"]
    barrier = torch_side.join(
        rank,
        workers,
        coordinator.rpartition(":")[0],
        job["torch_port"],
        names[0] if job["shaped"] and names else None,
    )
    take_turns(job, "torch", rank, barrier, lambda: torch_side.contenders(job, rank))
    torch_side.leave()


def write_job(args: argparse.Namespace, folder: Path, shaped: bool) -> Path:
    """Write what all workers read: the sizes, the initial weights and the tokens."""
    from jaxsys.core import tree
    from jaxsys.localsgd.task import MODELS, Task, set_up

    task = Task(model=args.model, batch=args.batch, min_layer_bytes=args.min_layer_bytes)
    setup = set_up(task, args.seed, 0, args.workers)
    config = MODELS[task.model]()
    data = folder / "data.npz"
    weights = {name: np.asarray(leaf) for name, leaf in tree.flatten(setup.params).items()}
    np.savez(data, __tokens__=setup.train.tokens, **weights)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    job = {
        "folder": str(folder),
        "data": str(data),
        "task": {"model": args.model, "batch": args.batch, "min_layer_bytes": args.min_layer_bytes},
        "workers": args.workers,
        "period": args.period,
        "rounds": args.rounds,
        "seed": args.seed,
        "lr": task.lr,
        "batch": task.batch,
        "length": config.n_positions,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "eps": config.layer_norm_epsilon,
        "shaped": shaped,
        "torch_port": port,
    }
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    return file


def measure(args: argparse.Namespace, folder: Path) -> str:
    """Run both sides to the end; returns a description of the link."""
    shaped = args.link == "netlab" or (args.link == "auto" and available().ok)
    file = write_job(args, folder, shaped)
    total, last = len(schedule(args.rounds)), []

    def on_line(worker: int, line: str) -> None:
        if line.startswith(TURN):
            row = json.loads(line[len(TURN) :])
            spent = format_seconds(row["seconds"])
            print(f"turn {row['number'] + 1:3} of {total}: {row['name']:16} {spent}", flush=True)
        else:
            last.append(f"[{worker}] {line}")

    with ExitStack() as stack:
        wrap, host, link = None, "127.0.0.1", "loopback, not shaped"
        if shaped:
            lab = stack.enter_context(netlab(args.workers, args.bandwidth))
            found = min(min(rate) for rate in lab.verify()) / 1e6
            link = f"shaped links of {args.bandwidth} (slowest measured: {found:.1f} Mbit/s)"
            host = lab.addresses[0]

            def wrap(i: int, argv: list[str]) -> list[str]:
                return lab.wrap(i % args.workers, argv)

        report = launch(
            [sys.executable, str(Path(__file__).resolve()), "--worker", str(file)],
            2 * args.workers,
            wrap=wrap,
            host=host,
            on_line=on_line,
            pin=True,
        )
    if report.exit_code:
        raise RuntimeError("a worker died; the last lines were:\n" + "\n".join(last[-20:]))
    return link


def read_rows(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Collect the counted turns of each contender; the slowest worker's time counts."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ORDER}
    first = len(schedule(0))
    for number, name in enumerate(schedule(args.rounds)):
        if name not in rows:
            continue
        files = [folder / f"turn-{number}-{r}" for r in range(args.workers)]
        found = [json.loads(file.read_text()) for file in files]
        rows[name].append(
            {
                "counted": number >= first,
                "step_s": max(row["seconds"] for row in found) / args.period,
                "sent_bytes": np.mean([row["sent_bytes"] for row in found]) / args.period,
                "losses": np.mean([row["losses"] for row in found], axis=0),
            }
        )
    return rows


def report(args: argparse.Namespace, rows: dict[str, list[dict[str, Any]]], link: str) -> str:
    """Write the tables as Markdown."""
    times: dict[str, Timing] = {
        name: timing(name, [row["step_s"] for row in turns if row["counted"]])
        for name, turns in rows.items()
    }

    def summary(name: str) -> dict[str, Any]:
        low, high = (format_seconds(t) for t in times[name].ci_s)
        sent = np.mean([row["sent_bytes"] for row in rows[name] if row["counted"]])
        return {
            "contender": name,
            "step, median [95 %]": f"{format_seconds(times[name].median_s)} [{low}, {high}]",
            "MB sent per step and worker": round(float(sent) / 1e6, 2),
            "loss, first step": round(float(rows[name][0]["losses"][0]), 4),
            f"loss, mean of steps {args.period * args.rounds + 1} to "
            f"{args.period * (args.rounds + 1)}": round(float(rows[name][-1]["losses"].mean()), 4),
        }

    ratios = [
        {
            "torch": a,
            "jaxsys": b,
            "torch step time / jaxsys step time [95 %]": f"{ratio(times[a], times[b]):.2f}",
        }
        for a, b in PAIRS
    ]
    return (
        f"{args.workers} workers, one core each (they share the machine's), {link}; GPT-2 "
        f"{args.model!r}, batch {args.batch}, period {args.period}, {args.rounds} rounds, seed "
        f"{args.seed}; {machine()}; torch {metadata.version('torch')} on gloo, eager. One turn is "
        f"{args.period} steps; intervals are bootstraps over rounds.\n\n"
        + markdown_table([summary(name) for name in ORDER])
        + "\n"
        + markdown_table(ratios)
    )


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--period", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="small")
    parser.add_argument("--min-layer-bytes", type=int, default=250_000)
    parser.add_argument("--link", choices=("auto", "netlab", "none"), default="auto")
    parser.add_argument("--bandwidth", default="100mbit")
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return 0
    if importlib.util.find_spec("torch") is None:
        print(
            "torch is not installed; expected the extra 'peers'; run: pip install 'jaxsys[peers]'"
        )
        return 0 if args.smoke else 2
    if args.smoke:
        args.workers, args.rounds, args.period, args.model = 2, 2, 2, "tiny"
        args.min_layer_bytes = 20_000
    try:
        with tempfile.TemporaryDirectory() as folder:
            link = measure(args, Path(folder))
            text = report(args, read_rows(args, Path(folder)), link)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    if not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        atomic_write(RESULTS / "against_torch.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
