"""Hold our proxies, from our networks on CIFAR-10 images, against the tabulated ones.

    python experiments/nas/own_proxies.py                about 25 minutes on 2 cores; resumes
    python experiments/nas/own_proxies.py --minutes 4    stops after about as long
    python experiments/nas/own_proxies.py --report       writes what is done so far
    python experiments/nas/own_proxies.py --draw 1       another initialisation, for the last column
    python experiments/nas/own_proxies.py --smoke        half a minute, nothing written

The 1,104 cells for which NASLib tabulates proxies, in a random order, so that what is done so far
is a random sample. The benchmark's network (16 channels, 5 cells a stage) drawn with seed 0 as
PyTorch draws, and one batch of 32 of CIFAR-10's test images (the tabulated jacob_cov and naswot
have the sizes that 32 images give). For the cells done: τ of our scores with test accuracy, τ of
the tabulated ones on the very same cells, the difference with an interval (cells drawn in pairs),
and, sharper, τ between the two scores, beside τ between two initialisations of ours: two random
draws of networks cannot agree better than that. Blocks go to `runs/nas/own-*`; the result is
`results/own_proxies.md`.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
from shared import RESULTS

from jaxsys.core.report import atomic_write, format_seconds, markdown_table
from jaxsys.nas import tables
from jaxsys.nas.batches import image_batch
from jaxsys.nas.model import cell_model
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.rank import kendall_tau, with_interval
from jaxsys.nas.score import ScoreConfig, score_all

# Ours -> NASLib's column; each group is a run of its own, with its share of the minutes.
RUNS = {
    "cheap": (
        {"params": "params", "flops": "flops", "l2_norm": "l2_norm", "synflow": "synflow"},
        1,
    ),
    "gradient": ({"grad_norm": "grad_norm", "snip": "snip", "plain": "plain"}, 2),
    "input": ({"jacob_cov": "jacov", "epe_nas": "epe_nas"}, 3),
    "forward": ({"naswot": "nwot"}, 1),
    "fisher": ({"fisher": "fisher"}, 2),
    "grasp": ({"grasp": "grasp"}, 3),
}
BLOCK, BATCH = 24, 32


def cells_and_table() -> tables.Table:
    """Load the 1,104 cells with their CIFAR-10 columns, in a random order."""
    folder = Path(os.environ.get("JAXSYS_DATA", "")) / "nas"
    table = tables.load(folder / "nb201_zc_1104.csv", dataset="cifar10")
    return table.select(np.random.default_rng(1).permutation(len(table.cells)))


def blocks_of(run: str, draw: int) -> dict[int, dict[str, np.ndarray]]:
    """Read the blocks that are done, by number."""
    files = sorted(folder_of(run, draw).glob("block-*.npz"))
    return {int(file.name[6:11]): dict(np.load(file)) for file in files}


def folder_of(run: str, draw: int) -> Path:
    return Path("runs/nas") / (f"own-{run}-{draw}" if draw else f"own-{run}")


def collect(table: tables.Table) -> str:
    """Compare what is done so far."""
    rows = []
    for run, (names, _) in RUNS.items():
        first, second = blocks_of(run, 0), blocks_of(run, 1)
        if not first:
            continue
        every = np.arange(len(table.cells))
        done = table.select(np.concatenate([every[n * BLOCK : (n + 1) * BLOCK] for n in first]))
        for ours, theirs in names.items():
            values = totals(first, ours)
            row = compared(ours, values, done.columns[theirs], done.column("test_accuracy"))
            both = [n for n in first if n in second]
            if both:
                a, b = (totals({n: v[n] for n in both}, ours) for v in (first, second))
                row["two of ours"] = f"{kendall_tau(a, b):.3f} ({len(a)} cells)"
            rows.append(row)
    text = "# Our proxies beside the tabulated ones, NAS-Bench-201, CIFAR-10\n\n"
    text += (
        "Kendall's τ-b with test accuracy, of ours and of the tabulated scores on the same random "
        "sample of the 1,104 cells; their difference with a 95 % bootstrap interval over cells; "
        "then τ-b between the two scores, and τ-b between two initialisations of ours.\n\n"
    )
    return text + markdown_table(rows)


def totals(blocks: dict[int, dict[str, np.ndarray]], name: str) -> np.ndarray:
    """Join the totals; where nothing flows synflow is minus infinity, here below all others."""
    values = np.concatenate([block[f"{name}.total"][:, 0] for block in blocks.values()])
    held = np.isfinite(values)
    return np.where(held, values, values[held].min() - 1)


def compared(name: str, values: np.ndarray, told: np.ndarray, wanted: np.ndarray) -> dict:
    """Compare one proxy with the tabulated one."""
    kept = np.isfinite(told)
    values, told, wanted = values[kept], told[kept], wanted[kept]
    tau, anchor = kendall_tau(values, wanted), kendall_tau(told, wanted)

    def gap(place: np.ndarray, wanted: np.ndarray) -> float:
        rows = place.astype(int)
        return kendall_tau(values[rows], wanted) - kendall_tau(told[rows], wanted)

    _, (low, high) = with_interval(gap, np.arange(len(values)), wanted)
    return {
        "proxy": name,
        "cells": int(kept.sum()),
        "ours": f"{tau:.3f}",
        "tabulated": f"{anchor:.3f}",
        "difference": f"{tau - anchor:+.3f} [{low:+.3f}, {high:+.3f}]",
        "within 0.03": "yes" if abs(tau - anchor) <= 0.03 else "no",
        "ours with tabulated": f"{kendall_tau(values, told):.3f}",
    }


def smoke() -> None:
    make = partial(cell_model, config=NetworkConfig(4, 1))
    images, labels = image_batch("noise", 2)
    cells = np.full((2, 6), 2, np.int32)
    config = ScoreConfig(("params", "naswot"))
    found = score_all(make, cells, images[:, :8, :8], labels, config, block=2)
    print({name: v[:, 0].tolist() for name, v in found.totals.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--only", nargs="*", help=f"out of {', '.join(RUNS)}")
    parser.add_argument("--draw", type=int, default=0, help="number of the initialisation")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        smoke()
        return
    table = cells_and_table()
    images, labels = image_batch("cifar", BATCH)
    make = partial(cell_model, config=NetworkConfig())
    chosen = {} if args.report else {k: v for k, v in RUNS.items() if k in (args.only or RUNS)}
    shares = sum(share for _, share in chosen.values())
    for run, (names, share) in chosen.items():
        start, limit = time.monotonic(), 60 * args.minutes * share / shares

        def stop(done: int, total: int, run=run, start=start, limit=limit) -> bool:
            spent = time.monotonic() - start
            print(f"{run}: {done}/{total} blocks, {format_seconds(spent)}", flush=True)
            return spent > limit

        config, folder = ScoreConfig(tuple(names), (args.draw,)), folder_of(run, args.draw)
        score_all(make, table.cells, images, labels, config, block=BLOCK, folder=folder, stop=stop)
    text = collect(table)
    atomic_write(RESULTS / "own_proxies.md", text)
    print(text)


if __name__ == "__main__":
    main()
