"""Plain TCP against JAX's transfer engine: what carries a pipeline's messages.

Command:   python experiments/pipeline/transports.py
Minutes:   about 1 on 2 cores (two processes, on loopback and over a shaped link of 100 Mbit/s)
Expected:  from 1 MiB on both fill the shaped link and hide a message behind compute; small
           messages take TCP less time. Bytes at the interface within 3 % of those predicted from
           64 KiB on; below, the frames' own headers count
Results:   results/transports.md and .jsonl

Messages of both transports take turns, so they see the same machine. A round trip is a message and
an empty one back; "hidden" is the share of a message's time that passes while the receiver
computes for as long. TCP is the default: it is not slower, needs no experimental part of JAX and
names a lost process by itself. The engine of jaxlib 0.12 stopped for good in messages of 8 MiB over
the shaped link (one of 1 MiB passes), so larger ones are not timed here.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from jaxsys.cluster import available, interface_bytes, join, launch, netlab
from jaxsys.cluster.engine import Engine
from jaxsys.cluster.events import EVENT, say
from jaxsys.cluster.sockets import connect
from jaxsys.cluster.transport import message_bytes
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table, write_jsonl

HERE = Path(__file__).parent
EMPTY = np.zeros(1, np.uint8)


def _round_trip(end, number: int, payload, n: int) -> float:
    """Send forth a message and back an empty one; seconds on process 0."""
    begin_s = time.perf_counter()
    if end.rank == 0:
        end.send(1, (n, number, 0), [payload])
        end.receive(1, (n, number, 1), [EMPTY])
    else:
        end.receive(0, (n, number, 0), [payload])
        end.send(0, (n, number, 1), [EMPTY])
    return time.perf_counter() - begin_s


def _hidden(end, number: int, payload, alone_s: float) -> float:
    """Compute on process 1 while a message comes; the share of its time that is hidden."""
    import jax
    import jax.numpy as jnp

    if end.rank == 0:
        end.send(1, (0, number, 2), [payload])
        end.receive(1, (0, number, 3), [EMPTY])
        return 0.0
    spin = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: jnp.sin(y @ y), x))
    x = jnp.eye(64)
    spin(x).block_until_ready()
    end.expect(0, (0, number, 2), [payload])
    begin_s = time.perf_counter()
    while time.perf_counter() - begin_s < alone_s:
        spin(x).block_until_ready()
    computed_s = time.perf_counter() - begin_s
    end.receive(0, (0, number, 2), [payload])
    exposed_s = time.perf_counter() - begin_s - computed_s
    end.send(0, (0, number, 3), [EMPTY])
    return max(0.0, 1.0 - exposed_s / alone_s)


def worker(sizes: list[int], rounds: int) -> None:
    """Exchange with the other process; process 0 tells the times, process 1 what was hidden."""
    member = join(local_devices=1, distributed=False)
    sockets = connect(member)
    ends = {"sockets": sockets, "engine": Engine(sockets)}
    number = 0
    for n_bytes in sizes:
        payload = np.random.default_rng(0).normal(size=n_bytes // 4).astype(np.float32)
        times: dict[str, list[float]] = {name: [] for name in ends}
        wire: dict[str, list[int]] = {name: [] for name in ends}
        for turn in range(rounds + 2):
            for name, end in ends.items():
                number += 1
                before = interface_bytes().tx_bytes
                seconds = _round_trip(end, number, payload, n_bytes)
                if turn >= 2:
                    times[name].append(seconds)
                    wire[name].append(interface_bytes().tx_bytes - before)
        hidden = {}
        for name, end in ends.items():
            number += 1
            median = np.array([statistics.median(times[name])])
            end.send(1 - end.rank, (1, number), [median])
            (theirs,) = end.receive(1 - end.rank, (1, number), [median])
            alone_s = float((median if end.rank == 0 else theirs)[0])
            hidden[name] = _hidden(end, number, payload, alone_s)
        for name in ends:
            say(
                {
                    "event": "row", "rank": member.process_id, "transport": name,
                    "bytes": message_bytes([payload]), "hidden": hidden[name],
                    "median_s": statistics.median(times[name]), "best_s": min(times[name]),
                    "interface_bytes": statistics.median(wire[name]),
                }
            )  # fmt: skip
    ends["engine"].close()


def measure(sizes: list[int], rounds: int, rate: str | None) -> list[dict]:
    """Run the two workers over one kind of link; one row for each size and transport."""
    found: dict[tuple, dict] = {}

    def on_line(rank: int, line: str) -> None:
        if not line.startswith(EVENT):
            print(f"[{rank}] {line}", file=sys.stderr)
            return
        event = json.loads(line[len(EVENT) :])
        row = found.setdefault((event["bytes"], event["transport"]), {})
        if event["rank"] == 1:
            row["hidden"] = event["hidden"]
            return
        row |= {k: event[k] for k in ("transport", "bytes", "median_s", "best_s")}
        row["Mbit/s"] = 8e-6 * event["bytes"] / event["median_s"]
        if rate is not None:
            row["interface / predicted"] = event["interface_bytes"] / event["bytes"]

    command = [sys.executable, __file__, "--worker", json.dumps([sizes, rounds])]
    with contextlib.ExitStack() as stack:
        place = {}
        if rate is not None:
            lab = stack.enter_context(netlab(2, rate))
            place = {"wrap": lab.wrap, "host": lab.addresses[0]}
        report = launch(command, 2, on_line=on_line, pin=True, **place)
    if report.exit_code:
        raise SystemExit(report.exit_code)
    return [{"link": rate or "loopback", **row} for row in found.values()]


def main() -> None:
    """Measure on loopback and, where it can be had, over a shaped link; write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker")
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--smoke", action="store_true", help="seconds, and nothing is written")
    options = parser.parse_args()
    if options.worker:
        worker(*json.loads(options.worker))
        return
    sizes = [2**10, 2**16] if options.smoke else [2**10, 2**16, 2**18, 2**20]
    rounds = 2 if options.smoke else 8
    rows = measure(sizes, rounds, None)
    if available().ok:
        rows += measure(sizes, rounds, options.rate)
    columns = ["link", "transport", "bytes", "median_s", "best_s", "Mbit/s", "hidden"]
    table = markdown_table(rows, [*columns, "interface / predicted"])
    print(table)
    if not options.smoke:
        text = f"# Transports\n\n{table}\n\n{machine()}\n"
        atomic_write(HERE / "results" / "transports.md", text)
        write_jsonl(HERE / "results" / "transports.jsonl", rows)


if __name__ == "__main__":
    main()
