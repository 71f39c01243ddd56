"""Hold our proxies, from our networks on CIFAR-10 images, against the tabulated ones.

    python experiments/nas/own_proxies.py                about 25 minutes on 2 cores; resumes
    python experiments/nas/own_proxies.py --minutes 4    stops after about as long
    python experiments/nas/own_proxies.py --smoke        half a minute, nothing written

The 1,104 cells for which NASLib tabulates proxies, in a random order, so that what is done so far
is a random sample. The benchmark's network (16 channels, 5 cells a stage), one initialisation (seed
0), one batch of CIFAR-10's test images. For the cells done: τ of our scores with test accuracy, τ
of the tabulated ones on the very same cells, and τ between the two. Blocks go to `runs/nas/own-*`;
the result is `results/own_proxies.md`.

Differences to the tabulated setting: 16 images a batch (NASLib: 64), CIFAR-10's test images without
augmentation; synflow as the logarithm of the sum, in single precision with rescaling.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
from shared import RESULTS

from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.nas import tables
from jaxsys.nas.batches import image_batch
from jaxsys.nas.model import cell_model
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.rank import kendall_tau, with_interval
from jaxsys.nas.score import ScoreConfig, score_all

# Ours -> NASLib's column. What shares its work stands in one run.
RUNS = (
    {"params": "params", "flops": "flops", "l2_norm": "l2_norm", "synflow": "synflow"},
    {"grad_norm": "grad_norm", "snip": "snip", "plain": "plain", "fisher": "fisher"},
    {"jacob_cov": "jacov", "naswot": "nwot", "epe_nas": "epe_nas"},
    {"grasp": "grasp"},
)
BLOCK = 24


def cells_and_table() -> tables.Table:
    """Load the 1,104 cells with their CIFAR-10 columns, in a random order."""
    folder = Path(os.environ.get("JAXSYS_DATA", "")) / "nas"
    table = tables.load(folder / "nb201_zc_1104.csv", dataset="cifar10")
    return table.select(np.random.default_rng(1).permutation(1104))


def folder_of(run: dict[str, str]) -> Path:
    return Path("runs/nas") / ("own-" + "-".join(run))


def collect(table: tables.Table) -> str:
    """Compare what is done so far."""
    rows = []
    for run in RUNS:
        files = sorted(folder_of(run).glob("block-*.npz"))
        if not files:
            continue
        blocks = [np.load(file) for file in files]
        places = [np.arange(i * BLOCK, min((i + 1) * BLOCK, 1104)) for i in map(number, files)]
        done = table.select(np.concatenate(places))
        test = done.column("test_accuracy")
        for ours, theirs in run.items():
            values = np.concatenate([b[f"{ours}.total"][:, 0] for b in blocks])
            told = done.columns[theirs]
            kept = np.isfinite(values) & np.isfinite(told)
            values, told, wanted = values[kept], told[kept], test[kept]
            tau, (low, high) = with_interval(kendall_tau, values, wanted)
            anchor = kendall_tau(told, wanted)
            rows.append(
                {
                    "proxy": ours,
                    "cells": int(kept.sum()),
                    "ours": f"{tau:.3f} [{low:.3f}, {high:.3f}]",
                    "tabulated, same cells": f"{anchor:.3f}",
                    "difference": f"{tau - anchor:+.3f}",
                    "within 0.03": "yes" if abs(tau - anchor) <= 0.03 else "no",
                    "ours with tabulated": f"{kendall_tau(values, told):.3f}",
                }
            )
    text = "# Our proxies beside the tabulated ones, NAS-Bench-201, CIFAR-10\n\n"
    text += (
        "Kendall's τ with test accuracy, 95 % bootstrap interval over cells; the last column is τ "
        "between our scores and the tabulated ones.\n\n"
    )
    return text + markdown_table(rows)


def number(file: Path) -> int:
    return int(file.name[6:11])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        make = partial(cell_model, config=NetworkConfig(4, 1))
        images, labels = image_batch("noise", 2)
        found = score_all(
            make, np.full((2, 6), 2, np.int32), images[:, :8, :8], labels,
            ScoreConfig(("params", "naswot")), block=2,
        )  # fmt: skip
        print({name: v[:, 0].tolist() for name, v in found.totals.items()})
        return
    table = cells_and_table()
    images, labels = image_batch("cifar", args.batch)
    make = partial(cell_model, config=NetworkConfig())
    for run in RUNS:
        start = time.monotonic()

        def stop(done: int, total: int, run=run, start=start) -> bool:
            spent = time.monotonic() - start
            print(f"{', '.join(run)}: {done}/{total} blocks, {spent:.0f} s", flush=True)
            return spent > 60 * args.minutes / len(RUNS)

        config, folder = ScoreConfig(tuple(run)), folder_of(run)
        options = {"block": BLOCK, "folder": folder, "stop": stop}
        score_all(make, table.cells, images, labels, config, **options)
    text = collect(table)
    atomic_write(RESULTS / "own_proxies.md", text)
    print(text)


if __name__ == "__main__":
    main()
