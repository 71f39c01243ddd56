"""Compute node-wise statistics of NAS-Bench-201 cells: synflow, snip, grad_norm, 98 slots each.

    python experiments/nas/node_statistics.py                 about 1 hour on 2 idle cores; resumes
    python experiments/nas/node_statistics.py --minutes 3     stops after about as long
    python experiments/nas/node_statistics.py --smoke         half a minute, nothing written

The benchmark's network (16 channels, 5 cells a stage), drawn with seed 0 as PyTorch draws; 16 CIFAR
images for snip and grad_norm, one image of ones for synflow. Blocks go to `runs/nas/nodes-*`; cells
are taken in a random order, so what is done so far is a random sample of the space, and
`results/node_statistics.npz` holds it: for each proxy the numbers of the cells done, such as
`snip_index` [n], and the natural logarithm of every slot's sum (synflow, snip) or norm (grad_norm),
float16 [n, 98], 0 where no layer is.

Expected: all 15,625 cells for synflow in about 4 minutes, for the other two in about 50 minutes.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
from shared import NODES, order

from jaxsys.core.report import format_seconds
from jaxsys.nas.batches import image_batch
from jaxsys.nas.model import cell_model
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.score import ScoreConfig, score_all, write_npz
from jaxsys.nas.space import from_index

RUNS = (("synflow",), ("snip", "grad_norm"))
BLOCK = 125


def folder_of(proxies: tuple[str, ...]) -> Path:
    """Name the folder of one run's blocks."""
    return Path("runs/nas") / ("nodes-" + "-".join(proxies))


def collect() -> dict[str, int]:
    """Join the blocks that each run has done, and write the statistics."""
    found: dict[str, np.ndarray] = {}
    for proxies in RUNS:
        files = sorted(folder_of(proxies).glob("block-*.npz"))
        if not files:
            continue
        places = [int(file.name[6:11]) for file in files]
        index = np.concatenate([order()[i * BLOCK : (i + 1) * BLOCK] for i in places])
        blocks = [np.load(file) for file in files]
        for proxy in proxies:
            nodes = np.concatenate([b[f"{proxy}.nodes"][:, 0] for b in blocks])[np.argsort(index)]
            logs = nodes if proxy == "synflow" else np.log(np.where(nodes > 0, nodes, 1.0))
            found |= {f"{proxy}_index": np.sort(index).astype(np.uint16)}
            found |= {proxy: logs.astype(np.float16)}
    write_npz(NODES, found)
    return {name: len(v) for name, v in found.items() if not name.endswith("index")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    images, labels = image_batch("noise" if args.smoke else "cifar", 16)
    archs = from_index(order())
    if args.smoke:
        make = partial(cell_model, config=NetworkConfig(8, 1))
        config = ScoreConfig(("synflow", "snip", "grad_norm"))
        found = score_all(make, archs[:4], images[:4], labels[:4], config, block=4)
        print({name: v[:, 0].tolist() for name, v in found.totals.items()})
        return
    make = partial(cell_model, config=NetworkConfig())
    for proxies in RUNS:

        def stop(done: int, total: int, proxies: tuple[str, ...] = proxies) -> bool:
            spent = time.monotonic() - start
            print(f"{proxies}: {done}/{total} blocks, {format_seconds(spent)}", flush=True)
            return spent > 60 * args.minutes

        config = ScoreConfig(proxies)
        score_all(
            make, archs, images, labels, config, block=BLOCK, folder=folder_of(proxies), stop=stop
        )
    print(f"{collect()} cells in {NODES}, {format_seconds(time.monotonic() - start)}")


if __name__ == "__main__":
    main()
