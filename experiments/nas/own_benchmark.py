"""Make a tabular benchmark of our own: small NAS-Bench-201 cells trained to the end on real images.

    python experiments/nas/own_benchmark.py                hours for all 15,625 cells; resumes
    python experiments/nas/own_benchmark.py --minutes 8    stops after about as long
    python experiments/nas/own_benchmark.py --smoke        half a minute, nothing written

Networks of one cell a stage with 2, 4 and 8 channels, trained with Adam for 5 epochs on 1,078 of
the 1,797 handwritten 8×8 digits that scikit-learn carries, two seeds each; 360 images for
validation and 359 for testing. Cells come in a random order, so that what is done so far is a
random sample. Blocks go to `runs/nas/digits`; `results/digits_benchmark.npz` holds cells [N, 6],
and validation and test accuracy in percent, mean of the seeds [N]; `jaxsys nas fit` and `search`
read it. `results/digits_benchmark.md` says how far the seeds agree, and how well proxies rank the
cells.
"""

import argparse
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from shared import RESULTS, order

from jaxsys.core.report import atomic_write, markdown_table
from jaxsys.data.images import digits, train_valid
from jaxsys.nas import space
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.rank import kendall_tau, with_interval
from jaxsys.nas.score import write_npz
from jaxsys.nas.train import TrainConfig, train_cells

NET = NetworkConfig(channels=2, cells=1, n_classes=10, image_channels=1)
FOLDER = Path("runs/nas/digits")
BLOCK, SEEDS = 125, (0, 1)


def make_trainer(config: TrainConfig, n_train: int | None = None):
    """Divide the digits in three, and make the training function."""
    rest, test = train_valid(digits(), 0.2, seed=0)
    train, valid = train_valid(rest, 0.25, seed=1)
    held = tuple((jnp.asarray(d.images), jnp.asarray(d.labels)) for d in (valid, test))
    images, labels = (jnp.asarray(v[:n_train]) for v in (train.images, train.labels))
    # Networks as small as these spend their time between operations: all of a block at once.
    return train_cells(images, labels, held, config, NET, batching="vmap")


def collect(seconds: float) -> str:
    """Join the blocks, and write the table and what it is good for."""
    files = sorted(FOLDER.glob("block-*.npy"))
    found = np.concatenate([np.load(file) for file in files]) * 100  # [N, seeds, 2]
    index = np.concatenate([order()[n * BLOCK : (n + 1) * BLOCK] for n in map(number, files)])
    cells = space.from_index(index)
    valid, test = found.mean(1).T
    arrays = {"cells": cells.astype(np.int8), "valid": valid, "test": test}
    write_npz(RESULTS / "digits_benchmark.npz", {k: np.asarray(v) for k, v in arrays.items()})
    columns = {
        "parameters": space.params_m(cells),
        "FLOPs": space.mflops(cells),
        "3×3 convolutions that carry": (space.canonical(cells) == space.CONV3).sum(1),
        "edges that carry": space.reaches(cells).sum(1),
        "validation accuracy": valid,
    }
    rows = []
    for name, values in columns.items():
        tau, (low, high) = with_interval(kendall_tau, values, test)
        rows.append(
            {"ranked by": name, "τ with test accuracy": f"{tau:.3f} [{low:.3f}, {high:.3f}]"}
        )
    between = kendall_tau(found[:, 0, 1], found[:, 1, 1])
    quantiles = np.quantile(test, [0, 0.05, 0.5, 0.95, 1])
    text = "# Small cells trained on the 8×8 digits\n\n"
    text += (
        f"{len(cells)} of 15,625 cells, two seeds each, {seconds:.0f} s in this run. Test accuracy "
        f"from {quantiles[0]:.1f} to {quantiles[4]:.1f} %, median {quantiles[2]:.1f}, 90 % of them "
        f"in {quantiles[1]:.1f} to {quantiles[3]:.1f}. Kendall's τ between the seeds' test "
        f"accuracies is {between:.3f}.\n\n"
    )
    text += markdown_table(rows)
    atomic_write(RESULTS / "digits_benchmark.md", text)
    return text


def number(file: Path) -> int:
    return int(file.name[6:11])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    if args.smoke:
        trainer = make_trainer(TrainConfig(epochs=1), 128)
        print(trainer(space.from_index(np.array([7, 15_000])), jnp.zeros(1, int)).tolist())
        return
    trainer = make_trainer(TrainConfig(epochs=5))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for n in range(space.N_CELLS // BLOCK):
        file = FOLDER / f"block-{n:05d}.npy"
        if file.exists():
            continue
        if time.monotonic() - start > 60 * args.minutes:
            break
        cells = space.from_index(order()[n * BLOCK : (n + 1) * BLOCK])
        found = np.asarray(trainer(cells, jnp.array(SEEDS)))
        np.save(FOLDER / "part.npy", found)
        (FOLDER / "part.npy").rename(file)
        print(f"block {n}: {time.monotonic() - start:.0f} s", flush=True)
    print(collect(time.monotonic() - start))


if __name__ == "__main__":
    main()
