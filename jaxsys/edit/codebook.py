"""GRACE's codebook: keys with radii, the rules by which they grow and split, and the lookup.

Reference: arXiv 2211.11031, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.models.lm.linear import linear

_FIRST_ROOM = 8


class Codebook(NamedTuple):
    """Hold keys, what replaces the output near them, and whose answer that is.

    Arrays have room for more entries than there are; those have a radius of −1.

    Attributes:
      keys: [K, I] inputs of the adapted matrix.
      values: [K, O] outputs in its place, without the bias.
      radii: [K] ε.
      labels: [K, M] tokens of the answers, filled up with −1.
      count: entries in use.

    >>> Codebook.empty(3, 2).radii.tolist()
    [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
    """

    keys: Any
    values: Any
    radii: Any
    labels: Any
    count: int

    @classmethod
    def empty(cls, inputs: int, outputs: int) -> "Codebook":
        """Make a codebook without entries.

        Args:
          inputs: I.
          outputs: O.
        """
        room = _FIRST_ROOM
        return cls(
            np.zeros((room, inputs), np.float32),
            np.zeros((room, outputs), np.float32),
            np.full(room, -1.0, np.float32),
            np.full((room, 1), -1, np.int32),
            0,
        )


def place(
    book: Codebook,
    key: Float[np.ndarray, "I"],
    label: Sequence[int],
    radius: float,
    same: float = 1e-3,
) -> tuple[Codebook, int | None]:
    """Make room for an edit: add a key, grow a radius, or split two (section 3.2, algorithm 1).

    With k_j the nearest key, d its distance: d > ε_0 + ε_j adds a key of radius ε_0; otherwise the
    same answer grows ε_j to d (if that is more), and another answer adds a key and gives both the
    radius d/2. Where d is next to nothing, another answer takes the old key over.

    Args:
      book: not changed.
      key: [I].
      label: tokens of the answer.
      radius: ε_0.
      same: part of ε_0 within which two keys are one.

    Returns:
      The codebook, and the index of the entry whose value is to be found, None if it has one.

    >>> book, index = place(Codebook.empty(2, 3), np.zeros(2, np.float32), [5], 1.0)
    >>> book, again = place(book, np.float32([1.5, 0]), [5], 1.0)
    >>> index, again, book.radii[0].item(), book.count
    (0, None, 1.5, 1)
    """
    n = book.count
    if n == 0:
        return _added(book, key, label, radius)
    distances = np.linalg.norm(book.keys[:n] - key[None], axis=1)
    nearest = int(distances.argmin())
    far = float(distances[nearest])
    if far > radius + book.radii[nearest]:
        return _added(book, key, label, radius)
    radii = book.radii.copy()
    if _tokens(book, nearest) == list(label):
        radii[nearest] = max(radii[nearest], far)
        return book._replace(radii=radii), None
    if far <= same * radius:
        return _labelled(book, nearest, label), nearest
    # A hair less for the old one: a prompt half way belongs to the newer answer.
    radii[nearest] = max(far / 2 - 1e-5, 0.0)
    return _added(book._replace(radii=radii), key, label, far / 2)


def _tokens(book: Codebook, i: int) -> list[int]:
    return [int(token) for token in book.labels[i] if token >= 0]


def _labelled(book: Codebook, i: int, label: Sequence[int]) -> Codebook:
    width = max(book.labels.shape[1], len(label))
    labels = np.full((book.labels.shape[0], width), -1, np.int32)
    labels[:, : book.labels.shape[1]] = book.labels
    labels[i] = -1
    labels[i, : len(label)] = label
    return book._replace(labels=labels)


def _added(
    book: Codebook, key: np.ndarray, label: Sequence[int], radius: float
) -> tuple[Codebook, int]:
    i = book.count
    arrays = [book.keys, book.values, book.radii, book.labels]
    if i == len(book.radii):
        # Room doubles, so that programs that read the book are seldom compiled anew.
        fills = (0, 0, -1, -1)
        arrays = [
            np.concatenate([array, np.full_like(array, fill)])
            for array, fill in zip(arrays, fills, strict=True)
        ]
    keys, values, radii, labels = (array.copy() for array in arrays)
    keys[i], radii[i] = key, radius
    return _labelled(Codebook(keys, values, radii, labels, i + 1), i, label), i


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "keys", "values", "radii"),
    meta_fields=("in_out",),
)
@dataclass(frozen=True)
class CodebookWeight:
    """Stand where a matrix stood: W, and a codebook that answers in its place near a key.

    Attributes:
      base: W, an array.
      keys: [K, I].
      values: [K, O].
      radii: [K]; negative for room without an entry.
      in_out: W is [in, out].

    >>> weight = CodebookWeight(jnp.eye(2), jnp.ones((1, 2)), jnp.full((1, 2), 9.0), jnp.ones(1))
    >>> weight.matmul(jnp.array([[1.0, 1.5], [3.0, 3.0]])).tolist()
    [[9.0, 9.0], [3.0, 3.0]]
    """

    base: Any
    keys: Any
    values: Any
    radii: Any
    in_out: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of the matrix."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Give the type of the matrix."""
        return self.base.dtype

    def matmul(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """Multiply rows by W, or answer with the value of the nearest key within whose radius.

        Args:
          x: rows.
        """
        y = linear({"weight": self.base}, x, in_out=self.in_out)
        wide = x.astype(jnp.float32)
        # ‖a − k‖² less ‖a‖² finds the nearest without a difference for every pair; its distance is
        # then computed exactly.
        crossed = jnp.einsum("ni,ki->nk", wide, self.keys, precision=jax.lax.Precision.HIGHEST)
        ranks = jnp.square(self.keys).sum(axis=1)[None] - 2.0 * crossed
        nearest = jnp.where(self.radii[None] < 0, jnp.inf, ranks).argmin(axis=1)
        distances = jnp.sqrt(jnp.square(wide - self.keys[nearest]).sum(axis=1))
        hit = distances <= self.radii[nearest]
        return jnp.where(hit[:, None], self.values[nearest].astype(y.dtype), y)
