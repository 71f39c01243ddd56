"""Whiten the vectors of texts by what the training part shows of them.

Sentence vectors of one kind of thing lie close together: "round table" and "glass table" differ in
directions that carry little of the variance. Whitening gives these directions their weight.

Axes: ``N`` vectors, ``D`` their width, ``P`` principal directions.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError


class Whitening(NamedTuple):
    """Hold x → (x − mean) · matrix.

    Attributes:
        mean: [D].
        matrix: [D, P].

    >>> Whitening(np.ones(2), np.array([[2.0], [0.0]]))(np.array([[2.0, 3.0]])).tolist()
    [[2.0]]
    """

    mean: Any
    matrix: Any

    def __call__(self, x: Any) -> Any:
        """Map [n, D] to [n, P]."""
        return (x - self.mean[None]) @ self.matrix


def whiten(x: Float[np.ndarray, "N D"], floor: float = 0.01) -> Whitening:
    """Fit a map to the principal directions, each divided by √(λ/λ₁ + floor).

    The mean squared length of the training vectors becomes 1. A high floor leaves the vectors
    as they are, 0 makes all directions equal.

    Args:
        x: training vectors, at least two different ones.
        floor: in units of the largest variance λ₁.

    Raises:
        UserError: for vectors that do not differ, or a negative floor.

    >>> to = whiten(np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 0.3], [0.0, -0.3]]), 0.0)
    >>> np.abs(to(np.array([[3.0, 0.0], [0.0, 0.3]]))).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    x = np.asarray(x, np.float64)
    mean = x.mean(0)
    _, s, directions = np.linalg.svd(x - mean, full_matrices=False)
    if floor < 0 or len(x) < 2 or s[0] < 1e-9:
        raise UserError(
            f"{len(x)} vectors with a largest spread of {s[0] if len(s) else 0:.3g} are to be "
            f"whitened with a floor of {floor}; expected different vectors and at least 0; give "
            "the training texts' vectors"
        )
    kept = s > 1e-6 * s[0]
    matrix = directions[kept].T / np.sqrt((s[kept] / s[0]) ** 2 + floor)
    length = np.sqrt((((x - mean) @ matrix) ** 2).sum(1).mean())
    return Whitening(mean.astype(np.float32), (matrix / length).astype(np.float32))
