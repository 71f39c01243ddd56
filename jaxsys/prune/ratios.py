"""How much to remove where: the same everywhere, by outliers (OWL), or learnt (after BESA)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError


def outlier_share(scores: Float[Array, "O I"], factor: float = 5.0) -> Float[Array, ""]:
    """Count the scores above ``factor`` times their mean, as a share in percent (OWL's D).

    >>> float(outlier_share(jnp.array([[1.0] * 9 + [11.0]])))
    10.0
    """
    return 100.0 * jnp.mean(scores > factor * jnp.mean(scores))


def owl(
    shares: Sequence[float] | Float[np.ndarray, "L"], sparsity: float, spread: float = 0.08
) -> list[float]:
    """Give blocks with more outliers a higher density.

    density_l = 2 λ (D_l - min D) / (max D - min D), shifted to the mean 1 - sparsity.

    Args:
        shares: D_l of each block: over all scores of the block's layers.
        sparsity: mean over blocks.
        spread: λ; densities differ by 2 λ at most.

    Returns:
        Sparsity of each block.

    Raises:
        UserError: if that leaves [0, 1) somewhere.

    Reference: arXiv 2310.05175 and its released code; M = 5 and λ = 0.08 are its defaults.

    >>> [round(s, 3) for s in owl([1.0, 2.0, 3.0], 0.5)]
    [0.58, 0.5, 0.42]
    """
    found = np.asarray(shares, np.float64)
    span = found.max() - found.min()
    density = 2 * spread * (found - found.min()) / (span if span > 0 else 1.0)
    ratios = sparsity - (density - density.mean())
    if ratios.min() < 0 or ratios.max() >= 1:
        raise UserError(
            f"OWL's spread {spread} puts blocks at {ratios.min():.3f} to {ratios.max():.3f} of "
            f"sparsity around {sparsity}; each must lie in [0, 1); lower the spread"
        )
    return ratios.tolist()


def allocate(shares: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Turn shares into whole numbers with a given sum.

    All shares are shifted by one number, and kept within [0, 1], until Σ share · size is the total;
    the numbers are rounded down and the largest remainders get one more.

    Args:
        shares: of each part, to remove.
        sizes: of each part.
        total: to remove of all parts together.

    >>> allocate([0.5, 0.25], [5, 5], 4)
    [3, 1]
    """
    share, size = np.asarray(shares, np.float64), np.asarray(sizes, np.int64)
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = np.sum(np.clip(share + middle, 0, 1) * size) < total
        low, high = (middle, high) if below else (low, middle)
    wanted = np.clip(share + high, 0, 1) * size
    counts = np.floor(wanted - 1e-6).clip(0).astype(np.int64)
    order = np.argsort(counts - wanted, kind="stable")
    # Each is rounded down by one at most, so no more are missing than there are parts.
    counts[order[: total - counts.sum()]] += 1
    return counts.tolist()


def besa(
    output_error: Callable[..., Float[Array, ""]],
    weights: Mapping[str, Float[Array, "O I"]],
    scores: Mapping[str, Float[Array, "O I"]],
    sparsity: float,
    *,
    inputs: tuple[Any, ...] = (),
    rates: int = 100,
    steps: int = 20,
    learning_rate: float = 0.1,
    penalty: float = 20.0,
    reach: float = 0.2,
) -> dict[str, float]:
    """Learn how a block's sparsity is spread over its layers.

    Each layer has logits over the candidate rates p_d; β = softmax, α = Σ β_d p_d. A weight whose
    score has rank r in its row (as a share) stays with probability 1 - Σ_d β_d · [r < p_d]; forward
    the mask is r >= α, backward its derivative is that of the probability (straight through). Adam
    lowers the block's relative output error plus ``penalty`` · (mean α - sparsity)².

    Reconstruction: rates, mask and gradient are those of the released code; it learns rates for
    groups of rows and the objective's weights are not known to us, so here a layer has one rate,
    candidates lie within ``reach`` of the target, and the α found are shifted by one number so that
    the block as a whole has the sparsity asked for.

    Args:
        output_error: (masked weights by layer, *inputs) to the block's squared output error
            relative to the squared output; it is jitted here, once for all calls with the same
            function and shapes.
        weights: W of each layer.
        scores: of each layer, such as Wanda's.
        sparsity: of the block.
        inputs: of ``output_error``, trees of arrays.
        rates: candidates in (0, 1).
        steps: of Adam.
        learning_rate: of Adam, on logits.
        penalty: of missing the sparsity.
        reach: how far a layer's rate may lie from the target.

    Returns:
        Sparsity by layer; their mean, weighted by size, is the one asked for.

    Reference: arXiv 2402.16880.

    >>> error = lambda w: jnp.sum((w["a"] - 1) ** 2) + 0 * jnp.sum(w["b"])
    >>> w = {"a": jnp.ones((1, 8)), "b": jnp.ones((1, 8))}
    >>> found = besa(error, w, w, 0.5)
    >>> found["a"] < 0.5 < found["b"], round(found["a"] + found["b"], 6)
    (True, 1.0)
    """
    grid = np.arange(1, rates) / rates
    grid = jnp.asarray(grid[np.abs(grid - sparsity) <= reach + 1e-9], jnp.float32)
    ranks = {name: _rank_share(leaf) for name, leaf in scores.items()}
    sizes = {name: float(leaf.size) for name, leaf in weights.items()}
    total = sum(sizes.values())
    # At the start β lies around the target.
    begin = -jnp.square((grid - sparsity) / 0.05)
    logits = dict.fromkeys(weights, begin)
    state = optax.adam(learning_rate).init(logits)
    fixed = (dict(weights), ranks, grid, jnp.float32(sparsity), inputs)
    for _ in range(steps):
        logits, state = _learn(logits, state, fixed, output_error, learning_rate, penalty)
    alphas = {n: float(jnp.sum(jax.nn.softmax(leaf) * grid)) for n, leaf in logits.items()}
    shift = sum(sizes[n] * alpha for n, alpha in alphas.items()) / total - sparsity
    return {n: min(max(alpha - shift, 0.0), 0.999) for n, alpha in alphas.items()}


@partial(jax.jit, static_argnums=(3, 4, 5))
def _learn(
    logits: Any,
    state: Any,
    fixed: tuple[Any, ...],
    output_error: Callable[..., Array],
    learning_rate: float,
    penalty: float,
) -> Any:
    """Take one step of Adam on the logits."""
    weights, ranks, grid, sparsity, inputs = fixed
    total = sum(leaf.size for leaf in weights.values())

    def objective(logits: Any) -> Array:
        alphas = {name: jnp.sum(jax.nn.softmax(leaf) * grid) for name, leaf in logits.items()}
        masked = {n: _masked(w, ranks[n], logits[n], alphas[n], grid) for n, w in weights.items()}
        mean = sum((weights[name].size / total) * alpha for name, alpha in alphas.items())
        return output_error(masked, *inputs) + penalty * jnp.square(mean - sparsity)

    updates, state = optax.adam(learning_rate).update(jax.grad(objective)(logits), state)
    return optax.apply_updates(logits, updates), state


@jax.jit
def _rank_share(scores: Array) -> Array:
    order = jnp.argsort(scores, axis=1, stable=True)
    return jnp.argsort(order, axis=1).astype(jnp.float32) / scores.shape[1]


@jax.custom_jvp
def _straight_through(hard: Array, soft: Array) -> Array:
    return hard


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return primals[0], tangents[1]


def _masked(weight: Array, rank: Array, logits: Array, alpha: Array, grid: Array) -> Array:
    beta = jax.nn.softmax(logits)
    # Σ_d β_d [r < p_d] for all ranks: one minus the cumulative β up to the weight's rank.
    below = jnp.concatenate([jnp.zeros(1), jnp.cumsum(beta)])
    place = jnp.searchsorted(grid, rank.reshape(-1), side="right").reshape(rank.shape)
    soft = below[place]
    hard = jax.lax.stop_gradient((rank >= alpha).astype(jnp.float32))
    return weight * _straight_through(hard, soft)
