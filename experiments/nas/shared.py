"""What the experiments share: CIFAR images, node statistics, training sets."""

import os
from pathlib import Path

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.nas.space import N_CELLS

RESULTS = Path(__file__).parent / "results"
NODES = RESULTS / "node_statistics.npz"


def cifar_batch(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw images normalised to mean and deviation 0.5, as the released code does."""
    folder = os.environ.get("JAXSYS_DATA")
    file = Path(folder or "") / "images" / "cifar10_test_1000.npz"
    if not folder or not file.exists():
        raise UserError(f"{file} is not there; expected CIFAR-10 images; set JAXSYS_DATA")
    with np.load(file) as data:
        rows = np.random.default_rng(seed).permutation(len(data["label"]))[:size]
        images = data["image"][rows].astype(np.float32) / 255
        return (images - 0.5) / 0.5, data["label"][rows].astype(np.int32)


def load_nodes() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Load the committed node statistics: cell indices, and name -> logarithms [N, 98]."""
    with np.load(NODES) as data:
        index = data["index"]
        return index, {k: data[k].astype(np.float32) for k in data.files if k != "index"}


def order() -> np.ndarray:
    """Return all cells in the random order in which they are worked off."""
    return np.random.default_rng(0).permutation(N_CELLS)
