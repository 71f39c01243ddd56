"""Scores: the larger, the more a weight is worth keeping.

W is the weight, [O, I]; every score takes |W|. The statistics are those of
`jaxsys.prune.stats.Stats`, in the papers' letters. All of it is in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.prune.stats import Stats, weight_sums

Score = Float[Array, "O I"]


class Metric(NamedTuple):
    """Hold a score and what it asks for.

    Attributes:
        apply: (W, stats) to scores [O, I].
        needs: the fields of `Stats` that it reads.
        scope: what is compared with what, where nothing else is said: a row, or the matrix.

    >>> METRICS["wanda"].needs, METRICS["magnitude"].scope
    (frozenset({'X'}), 'matrix')
    """

    apply: Callable[[Array, Stats], Array]
    needs: frozenset[str] = frozenset()
    scope: Literal["row", "matrix"] = "row"


@jax.jit
def magnitude(weight: Float[Array, "O I"], stats: Stats) -> Score:
    """Score by |W|; the released codes set one threshold for a matrix.

    >>> magnitude(jnp.array([[-2.0, 1.0]]), Stats()).tolist()
    [[2.0, 1.0]]
    """
    return jnp.abs(weight.astype(jnp.float32))


@jax.jit
def wanda(weight: Float[Array, "O I"], stats: Stats) -> Score:
    """Score by |W_ij| · √X_j, the weight times the norm of its input channel (equation 1).

    Reference: arXiv 2306.11695.

    >>> wanda(jnp.array([[-2.0, 1.0]]), Stats(X=jnp.array([4.0, 25.0]))).tolist()
    [[4.0, 5.0]]
    """
    return jnp.abs(weight.astype(jnp.float32)) * jnp.sqrt(stats.X)[None]


@jax.jit
def cumulative_share(scores: Score) -> Score:
    """Replace each score by the share of its row's sum that it and all smaller ones make up.

    Wanda's α variant removes from each row the smallest scores that together are at most α of the
    row's sum, and seeks the α that gives the sparsity wanted. That is to compare these shares over
    the whole matrix: the α sought is the threshold. The released code stops at 0.001 of the
    sparsity; here the count is exact.

    >>> cumulative_share(jnp.array([[3.0, 1.0, 4.0]])).tolist()
    [[0.5, 0.125, 1.0]]
    """
    order = jnp.argsort(scores, axis=1, stable=True)
    sums = jnp.cumsum(jnp.take_along_axis(scores, order, axis=1), axis=1)
    rows = jnp.arange(scores.shape[0])[:, None]
    back = jnp.zeros_like(scores).at[rows, order].set(sums)
    return back / jnp.maximum(sums[:, -1:], jnp.finfo(jnp.float32).tiny)


def wanda_alpha(weight: Float[Array, "O I"], stats: Stats) -> Score:
    """Score by the cumulative share of Wanda's score in its row; see `cumulative_share`.

    Reference: the released code of arXiv 2306.11695 (``--use_variant``).

    >>> wanda_alpha(jnp.array([[-3.0, 1.0]]), Stats(X=jnp.ones(2))).tolist()
    [[1.0, 0.25]]
    """
    return cumulative_share(wanda(weight, stats))


@partial(jax.jit, static_argnames="a")
def ria(weight: Float[Array, "O I"], stats: Stats, a: float = 0.5) -> Score:
    """Score by relative importance and activation.

    (|W_ij| / Σ_i' |W_i'j| + |W_ij| / Σ_j' |W_ij'|) · (√X_j)^a.

    Args:
        weight: W.
        stats: with X.
        a: power of the activation's norm; 0.5 as in the paper.

    Returns:
        Scores [O, I].

    Reference: RIA (Plug-and-Play, ICLR 2024), its released code.

    >>> ria(jnp.array([[1.0, 3.0]]), Stats(X=jnp.array([1.0, 16.0]))).tolist()
    [[1.25, 3.5]]
    """
    size = jnp.abs(weight.astype(jnp.float32))
    tiny = jnp.finfo(jnp.float32).tiny
    columns = jnp.maximum(weight_sums(weight, 0), tiny)
    rows = jnp.maximum(weight_sums(weight, 1), tiny)
    return (size / columns + size / rows) * (jnp.sqrt(stats.X)[None] ** a)


@jax.jit
def gradient(weight: Float[Array, "O I"], stats: Stats) -> Score:
    """Score by |W| · G.

    >>> gradient(jnp.array([[-2.0]]), Stats(G=jnp.array([[3.0]]))).tolist()
    [[6.0]]
    """
    return jnp.abs(weight.astype(jnp.float32)) * stats.G


@partial(jax.jit, static_argnames="l1")
def gblm(weight: Float[Array, "O I"], stats: Stats, l1: bool = False) -> Score:
    """Score by |W| · √X + |W| · G, GBLM-Pruner's sum of activations and gradients.

    Args:
        weight: W.
        stats: with X, and G or G1.
        l1: take G1, the sum of absolute gradients, in place of G.

    Returns:
        Scores [O, I].

    Reference: arXiv 2311.04902, its released code (whose factor is inside G).

    >>> gblm(jnp.array([[-2.0]]), Stats(X=jnp.array([4.0]), G=jnp.array([[3.0]]))).tolist()
    [[10.0]]
    """
    size = jnp.abs(weight.astype(jnp.float32))
    return size * jnp.sqrt(stats.X)[None] + size * (stats.G1 if l1 else stats.G)


@jax.jit
def pruner_zero(weight: Float[Array, "O I"], stats: Stats) -> Score:
    """Score by |W · W| · mms(G), the metric that Pruner-Zero's search found and published.

    mms scales the matrix of gradients to [0, 1]; a constant one becomes 0.

    Reference: arXiv 2406.02924, ``best_tree.json`` of the released code.

    >>> g = jnp.array([[1.0, 2.0, 3.0]])
    >>> pruner_zero(jnp.array([[2.0, 2.0, 1.0]]), Stats(G=g)).tolist()
    [[0.0, 2.0, 1.0]]
    """
    low, high = jnp.min(stats.G), jnp.max(stats.G)
    scaled = (stats.G - low) / jnp.where(high > low, high - low, 1.0)
    return jnp.square(weight.astype(jnp.float32)) * scaled


METRICS: dict[str, Metric] = {
    "magnitude": Metric(magnitude, scope="matrix"),
    "wanda": Metric(wanda, frozenset({"X"})),
    "wanda_alpha": Metric(wanda_alpha, frozenset({"X"}), scope="matrix"),
    "ria": Metric(ria, frozenset({"X"})),
    "gradient": Metric(gradient, frozenset({"G"})),
    "gblm": Metric(gblm, frozenset({"X", "G"})),
    "gblm_l1": Metric(partial(gblm, l1=True), frozenset({"X", "G1"})),
    "pruner_zero": Metric(pruner_zero, frozenset({"G"})),
}


def check_finite(scores: Any, metric: str, where: str) -> None:
    """Refuse scores that are not finite.

    Args:
        scores: [O, I].
        metric: name or expression, for the message.
        where: the layer, for the message.

    Raises:
        UserError: naming both.

    >>> check_finite(jnp.array([[jnp.inf]]), "1/W", "h.3")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the metric '1/W' gives 1 of 1 scores of h.3 that are not ...
    """
    bad = int(jnp.size(scores) - jnp.sum(jnp.isfinite(scores)))
    if bad:
        raise UserError(
            f"the metric {metric!r} gives {bad} of {jnp.size(scores)} scores of {where} that are "
            "not finite numbers; scores must be finite; change the metric, or look whether the "
            "layer's weights and its calibration inputs are finite"
        )
