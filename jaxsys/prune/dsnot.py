"""DSnoT: exchange removed and kept weights until a row's mean output is what it was.

Removing weights changes the mean output of row i by ε_i = Σ_removed W_ij · E[x_j]. Each step takes
one removed weight back and removes one kept weight instead, such that |ε_i| falls.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsys.prune.masks import check_nm
from jaxsys.prune.stats import Stats


def dsnot(
    weight: Float[Array, "O I"],
    mask: Bool[Array, "O I"],
    stats: Stats,
    *,
    cycles: int = 50,
    threshold: float = 0.1,
    nm: tuple[int, int] | None = None,
) -> Bool[Array, "O I"]:
    """Refine a mask without training; every row keeps its number of weights.

    A step takes back the removed weight with the largest |W_ij · E[x_j] / Var(x_j)| whose
    W_ij · E[x_j] has the sign of ε_i, and removes the kept weight with the smallest |W_ij| · √X_j
    whose W_ij · E[x_j] has the other sign.

    Reconstruction: the released code stops a row when |ε_i| is at most the threshold, or at a
    change of sign; here a row stops when |ε_i| is at most the threshold, and a step that would not
    lower |ε_i| is not taken and ends the row, so that |ε_i| never grows.

    Args:
        weight: W before pruning.
        mask: True keeps.
        stats: with X, mean and var.
        cycles: steps of a row at most; 50 as in the paper.
        threshold: of |ε_i|; 0.1 as in the paper.
        nm: where the mask keeps n of every m: the removed weight comes from the group of the one
            taken back.

    Returns:
        The mask, with as many True in each row as before.

    Reference: arXiv 2310.08915, algorithm 1.

    >>> stats = Stats(X=jnp.ones(3), mean=jnp.ones(3), var=jnp.ones(3))
    >>> w, mask = jnp.array([[2.0, 1.0, -1.5]]), jnp.array([[False, True, True]])
    >>> dsnot(w, mask, stats).tolist()
    [[True, False, True]]
    """
    if nm is not None:
        check_nm(*nm, weight.shape[1])
    m = None if nm is None else nm[1]
    return _refine(weight.astype(jnp.float32), mask, stats, cycles, threshold, m)


@partial(jax.jit, static_argnames=("cycles", "threshold", "m"))
def _refine(
    weight: Array, mask: Array, stats: Stats, cycles: int, threshold: float, m: int | None
) -> Array:
    change = weight * stats.mean[None]
    worth = jnp.abs(change) / jnp.maximum(stats.var, 1e-12)[None]
    cost = jnp.abs(weight) * jnp.sqrt(stats.X)[None]
    rows = jnp.arange(weight.shape[0])
    group = None if m is None else jnp.arange(weight.shape[1]) // m

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        t, mask, error, active = state
        sign = jnp.sign(error)[:, None]
        back = jnp.where(~mask & (change * sign > 0), worth, -jnp.inf)
        grown = jnp.argmax(back, axis=1)
        allowed = mask & (change * sign < 0)
        if group is not None:
            allowed &= group[None] == group[grown][:, None]
        price = jnp.where(allowed, cost, jnp.inf)
        gone = jnp.argmin(price, axis=1)
        after = error - change[rows, grown] + change[rows, gone]
        possible = jnp.any(back > -jnp.inf, axis=1) & jnp.any(allowed, axis=1)
        active &= possible & (jnp.abs(after) < jnp.abs(error)) & (jnp.abs(error) > threshold)
        mask = mask.at[rows, grown].set(mask[rows, grown] | active)
        mask = mask.at[rows, gone].set(mask[rows, gone] & ~active)
        return t + 1, mask, jnp.where(active, after, error), active

    def going(state: tuple[Any, ...]) -> Array:
        return (state[0] < cycles) & jnp.any(state[3])

    error = jnp.sum(jnp.where(mask, 0.0, change), axis=1)
    start = (jnp.int32(0), mask, error, jnp.ones(weight.shape[0], bool))
    return jax.lax.while_loop(going, step, start)[1]
