"""Channel permutation for N:M: put input channels into groups that lose little.

In an N:M mask every group of m consecutive inputs keeps n, wherever the good weights are. Which
inputs share a group is free as long as the layer's inputs are permuted alike, so the permutation
that keeps the largest sum of scores is sought (RIA, section 3.2): first channels are dealt to
groups by how many of their weights an unstructured mask keeps, then one position after another is
assigned anew so that the sum grows as much as it can.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jaxsys.prune.masks import check_nm, nm_mask, row_mask


def retained(
    scores: Float[Array, "O I"], permutation: Integer[Array | np.ndarray, "I"], n: int, m: int
) -> float:
    """Sum the scores that an N:M mask keeps after a permutation.

    >>> retained(jnp.array([[4.0, 3.0, 1.0, 2.0]]), np.array([0, 2, 1, 3]), 1, 2)
    7.0
    """
    moved = scores[:, jnp.asarray(permutation)]
    return float(jnp.sum(jnp.where(nm_mask(moved, n, m), moved, 0.0)))


def deal(counts: Float[np.ndarray, "I"], m: int) -> Int[np.ndarray, "I"]:
    """Deal channels to groups of m in serpentine order, the richest first.

    >>> deal(np.array([9.0, 8.0, 1.0, 2.0]), 2).tolist()
    [0, 2, 1, 3]
    """
    order = np.argsort(-counts, kind="stable").reshape(m, -1)
    order[1::2] = order[1::2, ::-1]
    return order.T.reshape(-1)


def permute_channels(
    scores: Float[Array, "O I"], n: int, m: int, *, sweeps: int = 1
) -> Int[np.ndarray, "I"]:
    """Find a permutation of input channels under which N:M keeps more.

    With the other m - 1 columns of group g fixed, taking column c in adds
    Σ_i max(0, S_ic - t_ig), t_ig being the n-th largest of the others' scores in row i; a linear
    assignment of columns to groups maximises the total. The best of the identity, the deal and the
    deal refined is returned, so the sum never falls below that of the order given.

    Args:
        scores: S, [O, I] with m dividing I.
        n: kept of each group.
        m: length of a group.
        sweeps: how often every position is assigned anew.

    Returns:
        Permutation p: group g of the permuted matrix holds channels p[g·m : (g + 1)·m].

    Raises:
        UserError: for a pattern that does not fit.

    Reference: RIA (Plug-and-Play, ICLR 2024), section 3.2 and its released code. Reconstruction:
    the paper's order of the positions and its block-wise splitting of large matrices are left out.

    >>> permutation = permute_channels(jnp.array([[4.0, 3.0, 1.0, 2.0]]), 1, 2)
    >>> retained(jnp.array([[4.0, 3.0, 1.0, 2.0]]), permutation, 1, 2)
    7.0
    """
    from scipy.optimize import linear_sum_assignment

    inputs = scores.shape[1]
    check_nm(n, m, inputs)
    identity = np.arange(inputs)
    if n == m or inputs == m:
        return identity
    counts = np.asarray(row_mask(scores, 1 - n / m).sum(0), np.float64)
    dealt = deal(counts, m)
    groups = dealt.reshape(-1, m).copy()
    for _ in range(sweeps):
        for position in range(m):
            others = np.delete(groups, position, axis=1)
            gains = np.asarray(_gains(scores, others, groups[:, position], n))
            _, chosen = linear_sum_assignment(gains, maximize=True)
            groups[:, position] = groups[chosen, position]
    tried = (identity, dealt, groups.reshape(-1))
    sums = [retained(scores, permutation, n, m) for permutation in tried]
    return tried[int(np.argmax(sums))]


@partial(jax.jit, static_argnames="n")
def _gains(scores: Array, others: Array, columns: Array, n: int) -> Array:
    """[groups, columns]: what each column would add to each group."""
    offered = scores[:, columns]

    def one(group: Array) -> Array:
        edge = jnp.sort(scores[:, group], axis=1)[:, -n][:, None]
        return jnp.sum(jnp.maximum(offered - edge, 0.0), axis=0)

    return jax.lax.map(one, others)


def permuted_nm_mask(
    scores: Float[Array, "O I"], permutation: Integer[Array | np.ndarray, "I"], n: int, m: int
) -> Array:
    """Keep n of every m in the permuted order; the mask is in the order of the scores.

    >>> permuted_nm_mask(jnp.array([[4.0, 3.0, 1.0, 2.0]]), np.array([0, 2, 1, 3]), 1, 2).tolist()
    [[True, True, False, False]]
    """
    permutation = jnp.asarray(permutation)
    mask = nm_mask(scores[:, permutation], n, m)
    return jnp.zeros(scores.shape, bool).at[:, permutation].set(mask)
