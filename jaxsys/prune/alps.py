"""ALPS: mask and weights of a layer together, by ADMM, then conjugate gradients on the support.

It minimises ‖X Wᵀ - X Ŵᵀ‖² over Ŵ with k entries. H is damped, scaled to unit diagonal and
decomposed once; then, in the scaled coordinates B = (W · D^½)ᵀ,

    B ← (H + ρI)⁻¹ (H B₀ - V + ρ D),   D ← top-k(B + V/ρ),   V ← V + ρ (B - D).

Reference: arXiv 2406.07831, algorithms 1 and 2, and its released code for the schedule of ρ.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsys.prune.masks import check_nm, n_removed, nm_mask, row_counts, smallest_removed
from jaxsys.prune.sparsegpt import settle_dead

_product = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)


def alps(
    weight: Float[Array, "O I"],
    hessian: Float[Array, "I I"],
    sparsity: float | int = 0.5,
    *,
    scope: Literal["matrix", "row"] = "matrix",
    nm: tuple[int, int] | None = None,
    count: int | None = None,
    damping: float = 0.01,
    rho: float = 0.1,
    steps: int = 300,
    cg_steps: int = 10,
) -> tuple[Float[Array, "O I"], Bool[Array, "O I"], Float[Array, ""]]:
    """Choose a mask and the weights that stay.

    ρ follows the change c of the support every third step, with k weights kept: c/k > 0.1 gives
    1.3 ρ, > 0.005 gives 1.2 ρ, any other change 1.1 ρ, none ends it. While ρ has never been raised
    the last two give ρ/5 instead, and a change starts afresh.

    Args:
        weight: W.
        hessian: H.
        sparsity: share to remove, in [0, 1); unused with ``nm``.
        scope: compare the whole matrix, as the paper does, or each row.
        nm: keep n of every m consecutive weights instead.
        count: weights to remove of the whole matrix, exactly, in place of the share.
        damping: of the mean of H's diagonal.
        rho: ρ at the start.
        steps: of ADMM at most.
        cg_steps: of conjugate gradients on the support.

    Returns:
        The new weights (zero where removed), the mask, and half the squared output error,
        tr(ΔW H ΔWᵀ) / 2 with the H given.

    Raises:
        UserError: for a sparsity or a pattern that does not fit.

    >>> w = jnp.array([[1.0, 4.0, 2.0, 3.0]])
    >>> alps(w, jnp.eye(4), 0.5)[0].round().tolist()
    [[0.0, 4.0, 0.0, 3.0]]
    """
    if nm is not None:
        check_nm(*nm, weight.shape[1])
    if count is not None:
        gone = jnp.asarray(row_counts(weight.shape[0], count) if scope == "row" else count)
    else:
        gone = jnp.asarray(n_removed(weight.shape[1] if scope == "row" else weight.size, sparsity))
    weight, hessian = settle_dead(weight.astype(jnp.float32), hessian)
    return _alps(weight, hessian, gone.astype(jnp.int32), scope, nm, damping, rho, steps, cg_steps)


class _State(NamedTuple):
    step: Array
    b: Array
    d: Array
    v: Array
    rho: Array
    support: Array
    raised: Array
    done: Array


@partial(jax.jit, static_argnames=("scope", "nm", "damping", "rho", "steps", "cg_steps"))
def _alps(weight, hessian, count, scope, nm, damping, rho, steps, cg_steps):
    mean = jnp.mean(jnp.diagonal(hessian))
    damped = hessian + damping * mean * jnp.eye(hessian.shape[0], dtype=jnp.float32)
    scale = jnp.sqrt(jnp.diagonal(damped))
    h = damped / scale[:, None] / scale[None]
    values, vectors = jnp.linalg.eigh(h)
    b0 = (weight * scale[None]).T
    target = _product(h, b0)

    def keep(b: Array) -> Array:
        scores = jnp.square(b).T
        if nm is not None:
            return nm_mask(scores, *nm).T
        if scope == "row":
            return smallest_removed(scores, count).T
        return smallest_removed(scores.reshape(1, -1), count).reshape(scores.shape).T

    kept = jnp.sum(keep(b0)).astype(jnp.float32)

    def step(s: _State) -> _State:
        right = target - s.v + s.rho * s.d
        b = _product(vectors, _product(vectors.T, right) / (values + s.rho)[:, None])
        shifted = b + s.v / s.rho
        support = keep(shifted)
        d = jnp.where(support, shifted, 0.0)
        s = s._replace(step=s.step + 1, b=b, d=d, v=s.v + s.rho * (b - d))
        return jax.lax.cond(s.step % 3 == 0, _adapt, lambda s, *_: s, s, support, kept, b0)

    zero = jnp.zeros_like(b0)
    no, none = jnp.zeros((), bool), jnp.int32(0)
    start = _State(none, b0, b0, zero, jnp.float32(rho), keep(b0), no, no)
    end = jax.lax.while_loop(lambda s: (s.step < steps) & ~s.done, step, start)
    mask = keep(end.d)
    b = _conjugate(h, target, jnp.where(mask, end.d, 0.0), mask, cg_steps)
    new = (b / scale[:, None]).T
    delta = new - weight
    loss = 0.5 * jnp.sum(_product(delta, hessian) * delta)
    return new, mask.T, loss


def _adapt(s: _State, support: Array, kept: Array, b0: Array) -> _State:
    # As the released code counts: a weight that comes and one that goes are two changes.
    changed = jnp.sum(support != s.support).astype(jnp.float32)
    share = changed / kept
    large, middle, some = share > 0.1, share > 0.005, changed >= 1
    raised = s.raised | middle
    factor = jnp.where(large, 1.3, jnp.where(middle, 1.2, jnp.where(some, 1.1, 1.0)))
    rho = jnp.where(raised, s.rho * factor, s.rho / 5.0)
    # ρ was too large from the start: begin anew with less.
    afresh = ~raised & some
    small = (s.step >= 30) & (share < 3e-4)
    return s._replace(
        b=jnp.where(afresh, b0, s.b),
        d=jnp.where(afresh, b0, s.d),
        v=jnp.where(afresh, 0.0, s.v),
        rho=rho,
        support=support,
        raised=raised,
        done=raised & (~some | small),
    )


def _conjugate(h: Array, target: Array, b: Array, mask: Array, steps: int) -> Array:
    """Solve H B = target on the support, each column by itself."""

    def step(_: Any, state: tuple[Array, Array, Array, Array]) -> tuple[Array, ...]:
        b, r, p, rr = state
        hp = jnp.where(mask, _product(h, p), 0.0)
        curve = jnp.sum(p * hp, axis=0, keepdims=True)
        alpha = jnp.where(curve > 0, rr / jnp.where(curve > 0, curve, 1.0), 0.0)
        b, r = b + alpha * p, r - alpha * hp
        new = jnp.sum(jnp.square(r), axis=0, keepdims=True)
        beta = jnp.where(rr > 0, new / jnp.where(rr > 0, rr, 1.0), 0.0)
        return b, r, r + beta * p, new

    r = jnp.where(mask, target - _product(h, b), 0.0)
    rr = jnp.sum(jnp.square(r), axis=0, keepdims=True)
    return jax.lax.fori_loop(0, steps, step, (b, r, r, rr))[0]
