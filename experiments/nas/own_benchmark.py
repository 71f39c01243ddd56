"""Make a tabular benchmark of our own: every cell of NAS-Bench-201's space trained on real digits.

    python experiments/nas/own_benchmark.py                  about 30 minutes of one core; resumes
    python experiments/nas/own_benchmark.py --minutes 8      stops after about as long
    python experiments/nas/own_benchmark.py --images cifar   32×32 colours, for a GPU
    python experiments/nas/own_benchmark.py --smoke          half a minute, nothing written

The 9,445 cells that remain when operations through which nothing flows become `none`; each in a
network of one stage with 8 channels (`jaxsys.nas.small`), trained with Adam for 40 epochs on 256 of
the 1,797 handwritten 8×8 digits that scikit-learn carries, two seeds; 441 images for validation and
1,100 for testing. Few images, few channels and a mean over the image before the classifier make the
cell matter. Beside the accuracies stand zero-cost proxies of the same network on 64 training images
(seed 0, totals; synflow and snip also node by node). Cells come in a random order, so that what is
done so far is a random sample. Blocks go to `runs/nas/IMAGES`; the table is the package's own
`jaxsys/nas/digits_cells.npz` (`tables.load("digits")`); `results/own_benchmark.md` says how far the
seeds agree, and how well proxies rank the cells. With `--images cifar` (700 of the 1,000 images
that `JAXSYS_DATA` has, 32 channels) the table is `runs/nas/cifar/table.npz`.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from shared import RESULTS

from jaxsys.core.report import atomic_write, format_seconds, markdown_table
from jaxsys.nas import space, tables
from jaxsys.nas.batches import image_batch
from jaxsys.nas.rank import kendall_tau, with_interval
from jaxsys.nas.score import ScoreConfig, score_all, write_npz
from jaxsys.nas.small import SmallConfig, small_model
from jaxsys.nas.train import TrainConfig, trainer

BLOCK, SEEDS = 125, (0, 1)
PROXIES = (
    "params", "l2_norm", "grad_norm", "snip", "plain", "grasp", "fisher", "synflow", "jacob_cov",
    "epe_nas", "naswot", "zico",
)  # fmt: skip
NODES = ("synflow", "snip")
# Images for training and validation; the rest is for testing.
SPLITS = {"digits": (1797, 256, 441), "cifar": (1000, 700, 100)}
NETS = {"digits": SmallConfig(), "cifar": SmallConfig(channels=32, image_channels=3)}


def distinct_cells() -> np.ndarray:
    """List the canonical cells in the random order in which they are worked off."""
    index = np.unique(space.to_index(space.canonical(space.all_cells())))
    return space.from_index(np.random.default_rng(0).permutation(index))


def split(source: str) -> list[tuple]:
    """Divide the images in three."""
    n, first, second = SPLITS[source]
    images, labels = image_batch(source, n, seed=0)
    ends = (slice(first), slice(first, first + second), slice(first + second, n))
    return [(jnp.asarray(images[e]), jnp.asarray(labels[e])) for e in ends]


def train_block(source: str, parts: list[tuple], config: TrainConfig):
    (images, labels), *held = parts
    make = partial(small_model, config=NETS[source])
    return trainer(make, images, labels, held, config)


def train_all(source: str, minutes: float) -> np.ndarray:
    """Train block after block; the numbers of the blocks that are done."""
    start, folder = time.monotonic(), Path("runs/nas") / source
    folder.mkdir(parents=True, exist_ok=True)
    train = train_block(source, split(source), TrainConfig())
    cells = distinct_cells()
    for n in range(-(-len(cells) // BLOCK)):
        file = folder / f"block-{n:05d}.npz"
        if file.exists():
            continue
        if time.monotonic() - start > 60 * minutes:
            break
        rows = cells[n * BLOCK : (n + 1) * BLOCK]
        padded = np.concatenate([rows, np.repeat(rows[:1], BLOCK - len(rows), 0)])
        found = train(padded, jnp.array(SEEDS))
        write_npz(file, {k: np.asarray(v)[: len(rows)] for k, v in found._asdict().items()})
        print(f"block {n}: {format_seconds(time.monotonic() - start)}", flush=True)
    return np.array(sorted(int(file.name[6:11]) for file in folder.glob("block-*.npz")))


def rounded(values: np.ndarray) -> np.ndarray:
    """Keep eleven binary places, so that the file packs well."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 11)) & np.uint32(0xFFFFF000)).view(np.float32)


def proxies_of(source: str, cells: np.ndarray) -> dict[str, np.ndarray]:
    """Score the cells' networks, untrained, on training images."""
    images, labels = (np.asarray(v[:64]) for v in split(source)[0])
    make = partial(small_model, config=NETS[source])
    folder = Path("runs/nas") / f"{source}-proxies-{len(cells)}"
    found = score_all(make, cells, images, labels, ScoreConfig(PROXIES), block=500, folder=folder)
    assert found is not None
    totals = {name: v[:, 0] for name, v in found.totals.items()}
    flow = totals["synflow"]  # minus infinity for the one cell through which nothing flows
    totals["synflow"] = np.where(np.isfinite(flow), flow, flow[np.isfinite(flow)].min())
    nodes = {f"{name}_nodes": found.nodes[name][:, 0] for name in NODES}
    return {k: rounded(v) for k, v in (totals | nodes).items()}


def collect(source: str, places: np.ndarray) -> dict[str, np.ndarray]:
    """Join the blocks that are done, in the order of the cells' numbers."""
    files = [np.load(Path("runs/nas") / source / f"block-{n:05d}.npz") for n in places]
    cells = distinct_cells()
    cells = np.concatenate([cells[n * BLOCK : (n + 1) * BLOCK] for n in places])
    accuracy, loss, train_loss = (
        np.concatenate([f[k] for f in files]) for k in ("accuracy", "loss", "train_loss")
    )
    seeds = np.float32(accuracy * 100)
    found = {
        "cells": cells.astype(np.int8),
        "valid": seeds[..., 0].mean(1),
        "test": seeds[..., 1].mean(1),
        "test_seeds": seeds[..., 1],
        "test_loss": rounded(loss[..., 1].mean(1)),
        "test_loss_seeds": rounded(loss[..., 1]),
        "train_loss": rounded(train_loss.mean(1)),
    }
    order = np.argsort(space.to_index(cells))
    return {k: v[order] for k, v in found.items()}


def report(table: tables.Table, source: str) -> str:
    """Say how far the seeds agree, and how well proxies rank."""
    test, n = table.column("test"), len(table.cells)
    quantiles = np.quantile(test, [0, 0.05, 0.5, 0.95, 1])
    text = f"# Small cells trained on {source}\n\n"
    text += (
        f"{n:,} different cells, {len(SEEDS)} seeds each. Mean test accuracy from "
        f"{quantiles[0]:.1f} to {quantiles[4]:.1f} %, median {quantiles[2]:.1f}, 90 % of them in "
        f"{quantiles[1]:.1f} to {quantiles[3]:.1f}. Kendall's τ-b, 95 % bootstrap interval over "
        "cells.\n\n"
    )
    carried = space.canonical(table.cells)
    pairs = {
        "seed 0's test accuracy, against seed 1's": table.column("test_seeds").T,
        "seed 0's test loss, against seed 1's": table.column("test_loss_seeds").T,
    }
    columns = {
        "validation accuracy": table.column("valid"),
        "training loss, negative": -table.column("train_loss"),
        "3×3 convolutions": (carried == space.CONV3).sum(1),
        "edges that carry": space.reaches(table.cells).sum(1),
    }
    columns |= {name: table.column(name) for name in PROXIES}
    pairs |= {f"{name}, against test accuracy": (v, test) for name, v in columns.items()}
    rows = []
    for name, (a, b) in pairs.items():
        tau, (low, high) = with_interval(kendall_tau, a, b)
        rows.append({"ranked by": name, "τ-b": f"{tau:.3f} [{low:.3f}, {high:.3f}]"})
    return text + markdown_table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--images", choices=list(SPLITS), default="digits")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        parts = [(x[:64], y[:64]) for x, y in split("digits")]
        train = train_block("digits", parts, TrainConfig(epochs=1))
        print(train(distinct_cells()[:2], jnp.zeros(1, int)).accuracy.tolist())
        return
    places = train_all(args.images, args.minutes)
    arrays = collect(args.images, places)
    arrays |= proxies_of(args.images, arrays["cells"].astype(np.int32))
    own = args.images == "digits"
    file = tables.DIGITS if own else Path("runs/nas/cifar/table.npz")
    write_npz(file, arrays)
    text = report(tables.load(file), args.images)
    atomic_write(RESULTS / "own_benchmark.md" if own else file.with_suffix(".md"), text)
    print(text, f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
