"""What the experiments share: node statistics, the order of cells, records that resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.core.report import atomic_write, to_json
from jaxsys.nas.space import N_CELLS

RESULTS = Path(__file__).parent / "results"
NODES = RESULTS / "node_statistics.npz"
DATASETS = {"c10": "CIFAR-10", "c100": "CIFAR-100", "in16": "ImageNet16-120"}


def load_nodes() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Load the committed node statistics: name -> cell numbers [n], logarithms [n, 98]."""
    with np.load(NODES) as data:
        names = [k for k in data.files if not k.endswith("index")]
        return {k: (data[f"{k}_index"], data[k].astype(np.float32)) for k in names}


def order() -> np.ndarray:
    """Return all cells in the random order in which they are worked off."""
    return np.random.default_rng(0).permutation(N_CELLS)


class Records:
    """Results by key in one JSON file, so that a run that was stopped goes on."""

    def __init__(self, file: Path):
        self.file = file
        self.found: dict[str, Any] = {}
        self._read()

    def _read(self) -> None:
        if self.file.exists():
            self.found |= json.loads(self.file.read_text())

    def add(self, key: str, value: Any) -> None:
        self._read()  # another run may have added parts of its own
        self.found[key] = json.loads(to_json(value))
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.found.items()]
        atomic_write(self.file, "{\n" + ",\n".join(lines) + "\n}\n")
