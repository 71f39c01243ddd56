"""The batch of images that data-dependent proxies look at."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from jaxsys.core.errors import UserError

Source = Literal["noise", "digits", "cifar"]


def image_batch(
    source: Source, size: int, *, seed: int = 0, data: Path | str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw images, normalised to mean and deviation about 0.5 as in ParZC's code, and labels.

    Args:
      source: `noise` (32×32×3, N(0, 1), labels at random), `digits` (8×8×1, scikit-learn's) or
        `cifar` (32×32×3, from the data folder).
      size: how many.
      seed: of the draw.
      data: folder with `images/cifar10_test_1000.npz`; the one that JAXSYS_DATA names by default.

    Returns:
      `[size, Y, X, C]` float32 and `[size]` int32.

    Raises:
      UserError: if the images are not there, or fewer than asked for.

    >>> images, labels = image_batch("noise", 4)
    >>> images.shape, labels.shape
    ((4, 32, 32, 3), (4,))
    """
    rng = np.random.default_rng(seed)
    if source == "noise":
        images = rng.standard_normal((size, 32, 32, 3)).astype(np.float32)
        return images, rng.integers(10, size=size).astype(np.int32)
    if source == "digits":
        from jaxsys.data.images import digits

        found = digits()
        pixels, classes = found.images, found.labels
    else:
        pixels, classes = _cifar(data)
    if not 1 <= size <= len(classes):
        raise UserError(
            f"a batch of {size} images was asked for; {source} has {len(classes)}; choose 1 to "
            f"{len(classes)}"
        )
    rows = rng.permutation(len(classes))[:size]
    return (pixels[rows] - 0.5) / 0.5, classes[rows].astype(np.int32)


def _cifar(data: Path | str | None) -> tuple[np.ndarray, np.ndarray]:
    folder = data if data is not None else os.environ.get("JAXSYS_DATA")
    file = Path(folder or "") / "images" / "cifar10_test_1000.npz"
    if not folder or not file.exists():
        raise UserError(
            f"CIFAR images are not there ({file}); expected the data folder; set JAXSYS_DATA, or "
            "take the images noise or digits"
        )
    with np.load(file) as archive:
        return archive["image"].astype(np.float32) / 255, archive["label"]
