"""Masks from scores: True keeps a weight, False removes it.

The number of removed weights is exact, and of equal scores the one with the smaller index goes
first, as in a stable ascending sort. Nothing is sorted for that: a float32 score is read as an
integer of the same order, whose bits are settled one by one by counting. A pass over the scores is
far cheaper than a sort on every backend, and the threshold may be shared by a row, a matrix or a
whole model. Scores must be finite; callers check.
"""

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxsys.core.errors import UserError
from jaxsys.core.order import count_true, kth_smallest, ordered_keys

Mask = Bool[Array, "O I"]


def n_removed(n: int, sparsity: float | int) -> int:
    """Count the weights to remove of n: ⌊sparsity · n⌋, as the released codes take it.

    Args:
        n: weights.
        sparsity: share to remove, in [0, 1).

    Raises:
        UserError: for a sparsity outside [0, 1).

    >>> n_removed(10, 0.3), n_removed(3, 0.5)
    (3, 1)
    """
    if not 0 <= sparsity < 1:
        raise UserError(
            f"sparsity is {sparsity}; it is the share of weights to remove and lies in [0, 1), "
            "such as 0.5; correct it"
        )
    # 0.3 · 10 is 2.9999999999999996 in some roundings; a share is never meant that exactly.
    return math.floor(sparsity * n + 1e-9 * n + 1e-9)


def row_mask(scores: Float[Array, "O I"], sparsity: float | int) -> Mask:
    """Remove the ⌊sparsity · I⌋ smallest scores of every row.

    Args:
        scores: S, [O, I].
        sparsity: share to remove, in [0, 1).

    Returns:
        Mask [O, I].

    Raises:
        UserError: for a sparsity outside [0, 1).

    >>> row_mask(jnp.array([[3.0, 1.0, 2.0, 2.0]]), 0.5).tolist()
    [[True, False, False, True]]
    """
    return smallest_removed(scores, jnp.int32(n_removed(scores.shape[1], sparsity)))


def matrix_mask(scores: Float[Array, "O I"], sparsity: float | int) -> Mask:
    """Remove the ⌊sparsity · O · I⌋ smallest scores of the matrix.

    >>> matrix_mask(jnp.array([[4.0, 3.0], [1.0, 2.0]]), 0.5).tolist()
    [[True, True], [False, False]]
    """
    count = jnp.int32(n_removed(scores.size, sparsity))
    return smallest_removed(scores.reshape(1, -1), count).reshape(scores.shape)


def global_mask(
    scores: Mapping[str, Float[Array, "..."]], sparsity: float | int
) -> dict[str, Bool[Array, "..."]]:
    """Remove the smallest scores of several matrices together, whatever their shapes.

    Args:
        scores: by name; of equal scores those of earlier names go first.
        sparsity: share to remove of all together, in [0, 1).

    Returns:
        A mask for every name.

    >>> masks = global_mask({"a": jnp.array([[1.0, 4.0]]), "b": jnp.array([[2.0, 3.0]])}, 0.5)
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([[False, True]], [[False, True]])
    """
    total = sum(leaf.size for leaf in scores.values())
    found = _global(tuple(scores.values()), jnp.int32(n_removed(total, sparsity)))
    return dict(zip(scores, found, strict=True))


def counted_mask(scores: Float[Array, "O I"], count: int, scope: str = "row") -> Mask:
    """Remove exactly ``count`` weights of a matrix.

    Args:
        scores: S, [O, I].
        count: how many of the whole matrix.
        scope: compare the whole ``matrix``, or each ``row``, whose counts differ by one at most.

    Returns:
        Mask [O, I].

    >>> counted_mask(jnp.array([[1.0, 2.0], [3.0, 4.0]]), 3).tolist()
    [[False, True], [False, False]]
    """
    if scope == "matrix":
        return smallest_removed(scores.reshape(1, -1), jnp.int32(count)).reshape(scores.shape)
    return smallest_removed(scores, jnp.asarray(row_counts(scores.shape[0], count)))


def row_counts(rows: int, count: int) -> Int32[np.ndarray, "R 1"]:
    """Spread a number evenly over rows: ⌊(r + 1) · count / R⌋ - ⌊r · count / R⌋.

    >>> row_counts(4, 6).ravel().tolist()
    [1, 2, 1, 2]
    """
    until = [row * count // rows for row in range(rows + 1)]
    return np.diff(until).astype(np.int32)[:, None]


def nm_mask(scores: Float[Array, "O I"], n: int, m: int) -> Mask:
    """Keep the n largest of every m consecutive scores of a row.

    N:M here is "n of m are kept", as hardware counts; the released codes of Wanda and Pruner-Zero
    remove n of m, which is the same at 2:4 and 4:8.

    Args:
        scores: S, [O, I] with m dividing I.
        n: kept of each group.
        m: length of a group.

    Returns:
        Mask [O, I].

    Raises:
        UserError: unless 0 < n <= m and m divides I.

    >>> nm_mask(jnp.array([[3.0, 1.0, 2.0, 2.0]]), 2, 4).tolist()
    [[True, False, False, True]]
    """
    check_nm(n, m, scores.shape[-1])
    return _nm(scores, n, m)


def check_nm(n: int, m: int, inputs: int, where: str = "the matrix") -> None:
    """Refuse an N:M pattern that does not fit.

    Raises:
        UserError: unless 0 < n <= m and m divides the number of inputs.

    >>> check_nm(2, 4, 6, "layer 3")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: pattern 2:4 does not divide the 6 inputs of layer 3; ...
    """
    if not 0 < n <= m:
        raise UserError(
            f"pattern {n}:{m} keeps {n} of {m} weights; expected from 1 to {m} of them, as in 2:4; "
            "correct it"
        )
    if inputs % m:
        raise UserError(
            f"pattern {n}:{m} does not divide the {inputs} inputs of {where}; choose a pattern "
            "whose second number divides them, or leave that layer out"
        )


def block_mask(
    scores: Float[Array, "O I"],
    block: tuple[int, int],
    sparsity: float | int,
    count: int | None = None,
) -> Mask:
    """Remove whole blocks, those with the smallest sums of scores in the matrix.

    Args:
        scores: S, [O, I].
        block: rows and columns of a block; they divide O and I.
        sparsity: share of the blocks to remove, in [0, 1).
        count: how many blocks to remove instead.

    Returns:
        Mask [O, I].

    Raises:
        UserError: if a block does not divide the matrix.

    >>> block_mask(jnp.array([[1.0, 1.0, 0.0, 3.0]]), (1, 2), 0.5).tolist()
    [[False, False, True, True]]
    """
    (rows, columns), (o, i) = block, scores.shape
    check_block(block, (o, i))
    tiles = scores.reshape(o // rows, rows, i // columns, columns).sum((1, 3))
    kept = counted_mask(
        tiles, n_removed(tiles.size, sparsity) if count is None else count, "matrix"
    )
    return jnp.repeat(jnp.repeat(kept, rows, axis=0), columns, axis=1)


def check_block(block: tuple[int, int], shape: tuple[int, ...], where: str = "the matrix") -> None:
    """Refuse blocks that do not divide a matrix.

    Raises:
        UserError: naming the matrix.

    >>> check_block((2, 2), (4, 3), "layer 3")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: blocks of 2 x 2 do not divide the 4 x 3 of layer 3; ...
    """
    if min(block) < 1 or shape[0] % block[0] or shape[1] % block[1]:
        raise UserError(
            f"blocks of {block[0]} x {block[1]} do not divide the {shape[0]} x {shape[1]} of "
            f"{where}; choose sizes that do"
        )


@jax.jit
def smallest_removed(
    scores: Float[Array, "R N"], count: Int[Array, ""] | Int[Array, "R 1"]
) -> Bool[Array, "R N"]:
    """Remove the ``count`` smallest scores of each row, ties by index.

    Args:
        scores: finite, [R, N].
        count: how many of a row; a scalar or one for each row. It is traced, so another sparsity
            compiles nothing.

    Returns:
        Mask with exactly N - count True in each row.

    >>> smallest_removed(jnp.array([[0.0, -1.0, 0.0]]), jnp.int32(2)).tolist()
    [[False, False, True]]
    """
    keys = ordered_keys(scores)
    count = jnp.broadcast_to(count, (keys.shape[0], 1)).astype(jnp.int32)
    edge = kth_smallest(lambda at: count_true(keys < at), count)
    below = keys < edge
    wanted = count - count_true(below)
    return ~(below | _first(keys == edge, wanted))


def _first(ties: Bool[Array, "R N"], wanted: Int32[Array, "R 1"]) -> Bool[Array, "R N"]:
    """Choose the first ``wanted`` of each row's ties; there are that many."""

    def by_index(ties: Array) -> Array:
        index = jnp.arange(ties.shape[1], dtype=jnp.int32)[None]
        last = kth_smallest(lambda at: count_true(ties & (index < at)), wanted)
        return ties & (index <= last)

    found = count_true(ties)
    simple = jnp.all((wanted == found) | (wanted == 0))
    return jax.lax.cond(simple, lambda ties: ties & (wanted > 0), by_index, ties)


@jax.jit
def _global(scores: tuple[Array, ...], count: Array) -> tuple[Array, ...]:
    keys = [ordered_keys(leaf).reshape(1, -1) for leaf in scores]
    count = count.reshape(1, 1)
    edge = kth_smallest(lambda at: sum(count_true(k < at) for k in keys), count)
    left = count - sum(count_true(k < edge) for k in keys)
    masks = []
    for leaf, k in zip(scores, keys, strict=True):
        ties = k == edge
        here = jnp.minimum(left, count_true(ties))
        drop = (k < edge) | _first(ties, here)
        left = left - here
        masks.append(~drop.reshape(leaf.shape))
    return tuple(masks)


@partial(jax.jit, static_argnames=("n", "m"))
def _nm(scores: Array, n: int, m: int) -> Array:
    groups = scores.reshape(*scores.shape[:-1], -1, m)
    place = jnp.arange(m)
    # How many of its group go before it: pairwise comparisons, m of them for each score.
    rank = jnp.zeros(groups.shape, jnp.int32)
    for j in range(m):
        other = groups[..., j : j + 1]
        earlier = (place > j).reshape((1,) * (groups.ndim - 1) + (m,))
        rank += (other < groups) | ((other == groups) & earlier)
    return (rank >= m - n).reshape(scores.shape)


def sparsity_of(mask: Bool[Array | np.ndarray, "..."]) -> float:
    """Measure the share of removed weights.

    >>> sparsity_of(jnp.array([True, False]))
    0.5
    """
    return 1.0 - float(np.count_nonzero(np.asarray(mask))) / mask.size
