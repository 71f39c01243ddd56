"""Score the NAS-Bench-101 cells of NASLib's table with our networks and rank them.

    python experiments/nas/nasbench101.py                 about 10 minutes on 2 idle cores; resumes
    python experiments/nas/nasbench101.py --minutes 3     stops after about as long
    python experiments/nas/nasbench101.py --smoke         half a minute, nothing written

The table has 500 rows of 292 cells, the others being isomorphic to one before; the first row of
each is scored. Synflow sees 64 channels and the benchmark's 3 cells a stack; snip, grad_norm,
naswot and l2_norm see 32 channels, 1 cell a stack and 16 CIFAR images. Weights are drawn with seed
0 as PyTorch draws by default. Blocks go to `runs/nas/nb101-*`; `results/nasbench101.md` holds what
is done so far: Kendall's τ-b with validation accuracy of our values and of the table's, and of the
two with each other.

Expected: parameters and FLOPs by formula equal to the table's; the rest as in the README.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
from shared import RESULTS

from jaxsys.core.report import atomic_write, format_seconds, markdown_table
from jaxsys.nas import nb101, rank, tables
from jaxsys.nas.batches import image_batch
from jaxsys.nas.nb101_network import Nb101Config, cell_model
from jaxsys.nas.score import ScoreConfig, score_all

RUNS = (
    (("snip", "grad_norm", "naswot", "l2_norm"), Nb101Config(32, 1), 16),
    (("synflow",), Nb101Config(64, 3), 1),
)
BLOCK = 10


def folder_of(proxies: tuple[str, ...]) -> Path:
    """Name the folder of one run's blocks."""
    return Path("runs/nas") / ("nb101-" + "-".join(proxies))


def report(table: tables.Table) -> str:
    """Compare what is done with the table."""
    accuracy, rows = table.column("val_accuracy"), []
    for proxies, config, _ in RUNS:
        files = sorted(folder_of(proxies).glob("block-*.npz"))
        if not files:
            continue
        starts = [BLOCK * int(f.name[6:11]) for f in files]
        at = np.concatenate([np.arange(s, min(s + BLOCK, len(accuracy))) for s in starts])
        blocks = [np.load(f) for f in files]
        for proxy in proxies:
            ours = np.concatenate([b[f"{proxy}.total"][:, 0] for b in blocks])
            row = {"proxy": proxy, "channels": config.channels, "cells": config.cells}
            row |= {"n": len(at), "τ ours": round(rank.kendall_tau(ours, accuracy[at]), 3)}
            if proxy in table.columns:
                theirs = table.column(proxy)[at]
                row["τ table"] = round(rank.kendall_tau(theirs, accuracy[at]), 3)
                row["τ ours with table"] = round(rank.kendall_tau(ours, theirs), 3)
            rows.append(row)
    return markdown_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    begin = time.monotonic()
    table = tables.load(
        tables.data_folder() / "zc_nasbench101.json", dataset="cifar10", cells=False
    )
    archs = np.stack([nb101.from_string(str(a)) for a in table.columns["arch"]])
    for name, found in {"params": nb101.params_m(archs), "flops": nb101.mflops(archs)}.items():
        print(f"largest difference of {name}: {np.abs(found - table.column(name)).max()}")
    keys = [nb101.module_hash(arch) for arch in archs]
    first = [i for i, key in enumerate(keys) if keys.index(key) == i]
    table, archs = table.select(first), archs[first]
    if args.smoke:
        images, labels = image_batch("noise", 2)
        make = partial(cell_model, config=Nb101Config(4, 1))
        small = (archs[:4], images[:, :8, :8], labels, ScoreConfig(("synflow",)))
        print(score_all(make, *small, block=4))
        return
    images, labels = image_batch("cifar", 16)
    for proxies, config, batch in RUNS:

        def stop(done: int, total: int, proxies: tuple[str, ...] = proxies) -> bool:
            spent = time.monotonic() - begin
            print(f"{proxies}: {done}/{total} blocks, {format_seconds(spent)}", flush=True)
            return spent > 60 * args.minutes

        make = partial(cell_model, config=config)
        data = (archs, images[:batch], labels[:batch], ScoreConfig(proxies))
        score_all(make, *data, block=BLOCK, folder=folder_of(proxies), stop=stop)
        text = report(table)
        atomic_write(RESULTS / "nasbench101.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main()
