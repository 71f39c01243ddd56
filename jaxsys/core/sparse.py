"""Compressed sparse rows: the one place where `jax.experimental.sparse` is used."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer


class Rows(NamedTuple):
    """Hold a sparse matrix [O, I] row by row.

    Attributes:
        values: what is stored, [Z].
        columns: of each value, ascending within a row, [Z].
        starts: where each row begins in ``values``, and the end, [O + 1].

    >>> Rows(jnp.ones(1), jnp.zeros(1, jnp.int32), jnp.array([0, 1])).values.shape
    (1,)
    """

    values: Float[Array, "Z"] | Float[np.ndarray, "Z"]
    columns: Integer[Array, "Z"] | Integer[np.ndarray, "Z"]
    starts: Integer[Array, "R"] | Integer[np.ndarray, "R"]


def to_rows(dense: Float[np.ndarray, "O I"], mask: Bool[np.ndarray, "O I"]) -> Rows:
    """Store the entries of a matrix that a mask keeps, zeros among them too.

    Args:
        dense: the matrix.
        mask: True is stored.

    Returns:
        NumPy arrays.

    >>> to_rows(np.array([[0.0, 2.0], [3.0, 0.0]]), np.array([[False, True], [True, False]])).starts
    array([0, 1, 2], dtype=int32)
    """
    _, columns = np.nonzero(mask)
    starts = np.concatenate([[0], np.cumsum(mask.sum(1))])
    return Rows(dense[mask], columns.astype(np.int32), starts.astype(np.int32))


def rows_product(rows: Rows, inputs: int, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
    """Multiply activations by a sparse weight: y = x · Wᵀ.

    Args:
        rows: W.
        inputs: I.
        x: activations.

    Returns:
        [N, O].

    >>> rows = to_rows(np.array([[0.0, 2.0]], np.float32), np.array([[False, True]]))
    >>> rows_product(rows, 2, jnp.array([[5.0, 7.0]])).tolist()
    [[14.0]]
    """
    from jax.experimental import sparse

    parts = (jnp.asarray(rows.values), jnp.asarray(rows.columns), jnp.asarray(rows.starts))
    matrix = sparse.BCSR(parts, shape=(rows.starts.shape[0] - 1, inputs))
    return (matrix @ x.T).T
