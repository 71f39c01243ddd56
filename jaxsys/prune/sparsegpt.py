"""SparseGPT: remove weights column by column, and let the columns that follow make up for it.

With H = (2/n) Σ x xᵀ and U the upper Cholesky factor of H⁻¹, columns are taken from left to right.
Column j's removed weights leave the error e = w / U_jj, which the columns after it take over:
W_:,j.. -= e · U_j,j... Columns go in blocks, so that most of that is one matrix product; a block's
mask is chosen when the block is reached, from W² / U_jj².

Reference: arXiv 2301.00774, algorithm 1, and its released code.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsys.prune.masks import check_nm, n_removed, nm_mask, row_counts, smallest_removed

Result = tuple[Float[Array, "O I"], Bool[Array, "O I"], Float[Array, ""]]
BLOCK = 128


def settle_dead(
    weight: Float[Array, "O I"], hessian: Float[Array, "I I"]
) -> tuple[Float[Array, "O I"], Float[Array, "I I"]]:
    """Put 1 on the diagonal of H for inputs that never fire, and 0 into their weights.

    >>> w, h = settle_dead(jnp.ones((1, 2)), jnp.diag(jnp.array([0.0, 3.0])))
    >>> w.tolist(), jnp.diagonal(h).tolist()
    ([[0.0, 1.0]], [1.0, 3.0])
    """
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    return jnp.where(dead[None], 0.0, weight), hessian + jnp.diag(dead.astype(hessian.dtype))


@jax.jit
def inverse_factor(
    hessian: Float[Array, "I I"], damping: float | Float[Array, ""] = 0.01
) -> Float[Array, "I I"]:
    """Factor the inverse of a damped Hessian: (H + λ · mean(diag H) · I)⁻¹ = Uᵀ U, U upper.

    With P the reversal of the order, P H P = L Lᵀ gives U = (P L P)⁻¹: one Cholesky factor and one
    triangular inverse, where the released code takes two factors and an inverse. Where H is so
    singular that the factor fails in float32, λ is multiplied by ten until it does not; far enough
    up every symmetric matrix has one.

    Args:
        hessian: H, symmetric.
        damping: λ.

    Returns:
        U, finite.

    >>> inverse_factor(4.0 * jnp.eye(2), 0.0).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    >>> bool(jnp.isfinite(inverse_factor(jnp.ones((3, 3)), 0.0)).all())
    True
    """
    size = hessian.shape[0]
    eye = jnp.eye(size, dtype=hessian.dtype)
    diagonal = jnp.mean(jnp.diagonal(hessian))

    def factor(damping: Array) -> Array:
        damped = hessian + damping * jnp.where(diagonal > 0, diagonal, 1.0) * eye
        lower = jnp.linalg.cholesky(damped[::-1, ::-1])
        upper = lower[::-1, ::-1]
        return jax.scipy.linalg.solve_triangular(upper, eye, lower=False)

    def failed(state: tuple[Array, Array]) -> Array:
        return ~jnp.all(jnp.isfinite(state[1]))

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        damping = jnp.maximum(10.0 * state[0], 1e-6)
        return damping, factor(damping)

    start = jnp.asarray(damping, hessian.dtype)
    return jax.lax.while_loop(failed, again, (start, factor(start)))[1]


def sparsegpt(
    weight: Float[Array, "O I"],
    hessian: Float[Array, "I I"],
    sparsity: float | int = 0.5,
    *,
    scope: Literal["matrix", "row"] = "matrix",
    nm: tuple[int, int] | None = None,
    count: int | None = None,
    damping: float = 0.01,
    block: int = BLOCK,
) -> Result:
    """Choose a mask and update the weights that stay.

    Args:
        weight: W.
        hessian: H.
        sparsity: share to remove, in [0, 1); unused with ``nm``.
        scope: compare the scores of a block of columns all together, as the paper does, or of each
            row by itself.
        nm: keep n of every m consecutive weights instead.
        count: weights to remove of the whole matrix, exactly, in place of the share.
        damping: λ, of the mean of H's diagonal.
        block: columns of a block; with ``nm`` it is rounded down to a multiple of m.

    Returns:
        The updated weights (zero where removed), the mask, and Σ e² / 2. The number of removed
        weights is exactly ``count``, or ⌊sparsity · O · I⌋ (⌊sparsity · I⌋ in every row); the
        released code removes one more in each block.

    Raises:
        UserError: for a sparsity or a pattern that does not fit.

    >>> w = jnp.array([[1.0, 4.0, 2.0, 3.0]])
    >>> sparsegpt(w, jnp.eye(4), 0.5, damping=0.0)[0].tolist()
    [[0.0, 4.0, 0.0, 3.0]]
    """
    o, i = weight.shape
    if nm is not None:
        check_nm(*nm, i)
        block = max(block // nm[1], 1) * nm[1]
    edges = [min(j, i) for j in range(0, i + block, block)]
    if count is None:
        per = o if scope == "matrix" else 1
        until = [np.int64(n_removed(per * edge, sparsity)) for edge in edges]
    else:
        whole = row_counts(o, count) if scope == "row" else np.int64(count)
        until = [whole.astype(np.int64) * edge // i for edge in edges]
    counts = jnp.asarray(np.diff(until, axis=0), jnp.int32)
    weight, hessian = settle_dead(weight.astype(jnp.float32), hessian)
    factor = inverse_factor(hessian, damping)
    return _sweep(weight, factor, counts, None, scope=scope, nm=nm, block=block)


def reconstruct(
    weight: Float[Array, "O I"],
    hessian: Float[Array, "I I"],
    mask: Bool[Array, "O I"],
    *,
    damping: float = 0.01,
    block: int = BLOCK,
) -> Result:
    """Update the weights that stay under a mask that something else has chosen.

    Args:
        weight: W before pruning.
        hessian: H.
        mask: True keeps.
        damping: λ, of the mean of H's diagonal.
        block: columns of a block.

    Returns:
        As `sparsegpt`.

    >>> w, h = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0], [1.0, 2.0]])
    >>> reconstruct(w, h, jnp.array([[False, True]]), damping=0.0)[0].tolist()
    [[0.0, 2.5]]
    """
    weight, hessian = settle_dead(weight.astype(jnp.float32), hessian)
    counts = jnp.zeros(-(-weight.shape[1] // block), jnp.int32)
    factor = inverse_factor(hessian, damping)
    return _sweep(weight, factor, counts, mask, scope="matrix", nm=None, block=block)


@partial(jax.jit, static_argnames=("scope", "nm", "block"))
def _sweep(
    weight: Array,
    factor: Array,
    counts: Array,
    given: Array | None,
    *,
    scope: str,
    nm: tuple[int, int] | None,
    block: int,
) -> Result:
    """Go over the blocks. Columns of W are rows here, so that taking one reads memory in order."""
    o, i = weight.shape
    padded = counts.shape[0] * block
    wt = jnp.pad(weight, ((0, 0), (0, padded - i))).T
    # Columns that do not exist: error-free, and never chosen.
    factor = jnp.pad(factor, (0, padded - i)) + jnp.diag(jnp.arange(padded) >= i).astype(
        jnp.float32
    )
    fixed = None if given is None else jnp.pad(given, ((0, 0), (0, padded - i))).T

    def choose(b: Any, w: Array, diagonal: Array) -> Array:
        if fixed is not None:
            return jax.lax.dynamic_slice_in_dim(fixed, b * block, block)
        if nm is not None:
            return jnp.ones(w.shape, bool)
        real = b * block + jnp.arange(block) < i
        scores = jnp.where(real[:, None], jnp.square(w / diagonal[:, None]), jnp.inf).T
        if scope == "row":
            return smallest_removed(scores, counts[b]).T
        return smallest_removed(scores.reshape(1, -1), counts[b]).reshape(o, block).T

    def step(b: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        wt, masks, loss = state
        start = b * block
        rows = jax.lax.dynamic_slice_in_dim(factor, start, block)
        inside = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        w = jax.lax.dynamic_slice_in_dim(wt, start, block)
        keep = choose(b, w, jnp.diagonal(inside))
        w, keep, errors = _columns(w, keep, inside, nm)
        # Earlier columns are done, and those of this block were updated one by one.
        later = jnp.where(jnp.arange(padded)[None] >= start + block, rows, 0.0)
        wt = wt - jnp.dot(later.T, errors, precision=jax.lax.Precision.HIGHEST)
        wt = jax.lax.dynamic_update_slice_in_dim(wt, w, start, axis=0)
        masks = jax.lax.dynamic_update_slice_in_dim(masks, keep, start, axis=0)
        return wt, masks, loss + 0.5 * jnp.sum(jnp.square(errors))

    state = (wt, jnp.ones(wt.shape, bool), jnp.zeros((), jnp.float32))
    wt, masks, loss = jax.lax.fori_loop(0, counts.shape[0], step, state)
    return wt[:i].T, masks[:i].T, loss


def _columns(
    w: Array, keep: Array, inside: Array, nm: tuple[int, int] | None
) -> tuple[Array, Array, Array]:
    """Take the columns of one block (rows of ``w``) one after another."""
    diagonal = jnp.diagonal(inside)

    def group(j: Any, state: tuple[Array, Array]) -> Array:
        assert nm is not None
        w, keep = state
        part = jax.lax.dynamic_slice_in_dim(w, j, nm[1])
        scale = jax.lax.dynamic_slice_in_dim(diagonal, j, nm[1])
        chosen = nm_mask(jnp.square(part / scale[:, None]).T, *nm).T
        return jax.lax.dynamic_update_slice_in_dim(keep, chosen, j, axis=0)

    def column(j: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, keep, errors = state
        if nm is not None:
            keep = jax.lax.cond(j % nm[1] == 0, group, lambda j, s: s[1], j, (w, keep))
        error = jnp.where(keep[j], 0.0, w[j]) / diagonal[j]
        w = w - inside[j][:, None] * error[None]
        return w, keep, errors.at[j].set(error)

    w, keep, errors = jax.lax.fori_loop(0, w.shape[0], column, (w, keep, jnp.zeros_like(w)))
    return jnp.where(keep, w, 0.0), keep, errors
