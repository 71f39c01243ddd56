"""Small image sets that come with installed packages, so that nothing is downloaded."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxsys.core.errors import UserError


class Images(NamedTuple):
    """Images and their classes.

    Attributes:
        images: [N, Y, X, C] float32 in 0..1.
        labels: [N] int32.

    >>> Images(np.zeros((1, 8, 8, 1), np.float32), np.zeros(1, np.int32)).labels.shape
    (1,)
    """

    images: Float32[np.ndarray, "N Y X C"]
    labels: Int32[np.ndarray, "N"]


def digits() -> Images:
    """Load the 1797 handwritten 8×8 digits that scikit-learn carries (UCI optical recognition).

    Returns:
        [1797, 8, 8, 1] images and labels 0..9, in the package's order.

    Raises:
        UserError: when scikit-learn is not installed.

    >>> digits().images.shape
    (1797, 8, 8, 1)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "scikit-learn, which carries the digits, is not installed; expected the extra "
            "'vision'; run: pip install 'jaxsys[vision]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.float32).reshape(-1, 8, 8, 1) / 16  # grey levels 0..16
    return Images(images, np.asarray(labels, np.int32))


def train_valid(data: Images, valid_fraction: float = 0.2, seed: int = 0) -> tuple[Images, Images]:
    """Divide a set at random into one for training and one for validation.

    Args:
        data: the whole set.
        valid_fraction: share of it kept for validation, above 0 and below 1.
        seed: the same seed divides the same way on every machine.

    Returns:
        The training and the validation set, which share no image; both are shuffled.

    Raises:
        UserError: for a fraction that leaves one of them empty.

    >>> train, valid = train_valid(digits())
    >>> len(train.labels), len(valid.labels)
    (1438, 359)
    """
    n_images = len(data.labels)
    n_valid = round(n_images * valid_fraction)
    if not 0 < n_valid < n_images:
        raise UserError(
            f"valid_fraction is {valid_fraction} of {n_images} images; both parts need at least "
            "one; choose a fraction between 0 and 1"
        )
    order = np.random.default_rng(seed).permutation(n_images)
    valid, train = order[:n_valid], order[n_valid:]
    return (
        Images(data.images[train], data.labels[train]),
        Images(data.images[valid], data.labels[valid]),
    )
