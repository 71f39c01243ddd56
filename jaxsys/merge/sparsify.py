"""Keep a part of a difference: the largest entries, a band of them, or random ones, rescaled.

The four functions take one difference τ and give it back with zeros; merges and packed experts use
them. Which entries stay is decided by three primitives that work on slices as well: thresholds of
given rank, 16-bit draws by address, and ranks within rows.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.merge.draws import LEVELS, bits16, key_words, levels
from jaxsys.merge.views import TracedView

Rescale = Literal["none", "l1", "expected"]
_ZERO = np.zeros(2, np.uint32)


def trim(tau: Float[Array, "..."], density: Any) -> Float[Array, "..."]:
    """Keep the largest entries by magnitude.

    Args:
      tau: τ.
      density: share to keep, in (0, 1]; equal magnitudes at the border all stay.

    Returns:
      τ with zeros.

    Reference: arXiv 2306.01708, section 3 (trim).

    >>> trim(jnp.array([1.0, -3.0, 2.0, 0.5]), 0.5).tolist()
    [0.0, -3.0, 2.0, 0.0]
    """
    return band(tau, density, 0.0)


def band(tau: Float[Array, "..."], density: Any, gamma: Any) -> Float[Array, "..."]:
    """Drop the largest entries as outliers and keep the next ones by magnitude.

    Args:
      tau: τ.
      density: share to keep, in (0, 1].
      gamma: share of outliers; fewer where density and gamma do not fit together.

    Returns:
      τ with zeros.

    Reference: arXiv 2312.06795, section 3 (β and γ).

    >>> band(jnp.array([1.0, -3.0, 2.0, 0.5]), 0.5, 0.25).tolist()
    [1.0, 0.0, 2.0, 0.0]
    """
    high, low = TracedView(None, tau[None]).ranked(magnitude, kept_ranks(tau.size, density, gamma))
    return in_band(tau, low, high)


def drop(
    tau: Float[Array, "..."], density: Any, key: Any, rescale: Rescale = "expected"
) -> Float[Array, "..."]:
    """Keep each entry with one probability (DARE's drop and rescale).

    Args:
      tau: τ.
      density: probability to keep, 1 − p; taken to the nearest 65,536th.
      key: random key.
      rescale: ``expected`` divides by the probability, as in the paper; ``l1`` restores Σ|τ|.

    Returns:
      τ with zeros, rescaled.

    Reference: arXiv 2311.03099, section 3.2.

    >>> kept = drop(jnp.ones(1000), 0.25, jax.random.key(0))
    >>> sorted(set(kept.tolist())), abs(float(kept.mean()) - 1) < 0.2
    ([0.0, 4.0], True)
    """
    keep = levels(density)
    (drawn,) = bits16(key_words(key), _ZERO, tau.shape, 1)
    return _rescaled(tau, jnp.where(drawn < keep, tau, 0.0), LEVELS / keep, rescale)


def drop_by_rank(
    tau: Float[Array, "..."], density: Any, epsilon: Any, key: Any, rescale: Rescale = "l1"
) -> Float[Array, "..."]:
    """Keep entries with a probability that grows with their rank in the row (DELLA's MagPrune).

    Args:
      tau: τ; rows are along the last axis.
      density: mean probability to keep.
      epsilon: the smallest entry of a row is kept with density − ε, the largest with density + ε.
      key: random key.
      rescale: ``expected`` divides each entry by its probability, as in the paper; ``l1`` restores
        Σ|τ| of the tensor.

    Returns:
      τ with zeros, rescaled.

    Reference: arXiv 2406.11617, section 3.1.

    >>> kept = drop_by_rank(jnp.arange(1.0, 9.0), 0.5, 0.4, jax.random.key(0), "none")
    >>> set(kept.tolist()) <= set(range(9))
    True
    """
    (drawn,) = bits16(key_words(key), _ZERO, tau.shape, 1)
    keep = rank_levels(tau, density, epsilon)
    kept = jnp.where(drawn < keep, tau, 0.0)
    return _rescaled(tau, kept, LEVELS / keep, rescale)


def _rescaled(tau: Any, kept: Any, inverse: Any, rescale: Rescale) -> Any:
    if rescale == "expected":
        return kept * inverse
    if rescale == "l1":
        return kept * l1_scale(jnp, jnp.sum(jnp.abs(tau)), jnp.sum(jnp.abs(kept)))
    return kept


def kept_ranks(size: int, density: Any, gamma: Any = 0.0) -> tuple[Any, Any]:
    """Give the first and the last rank that stay, 1 for the largest magnitude.

    The number kept is ⌊density · size⌋, at least one, and of outliers ⌊gamma · size⌋.

    >>> kept_ranks(10, 0.5), kept_ranks(10, 0.5, 0.2), kept_ranks(10, 0.9, 0.2)
    ((1, 5), (3, 7), (2, 10))
    """
    if isinstance(density, jax.Array) or isinstance(gamma, jax.Array):
        count = jnp.maximum(1, jnp.floor(density * size).astype(jnp.int32))
        top = jnp.floor(jnp.asarray(gamma) * size).astype(jnp.int32)
        top = jnp.maximum(0, jnp.minimum(top, size - count))
    else:
        count = max(1, int(density * size))
        top = max(0, min(int(gamma * size), size - count))
    return top + 1, top + count


def magnitude(flags: tuple, numbers: Any, base: Any, stack: Any, place: Any) -> tuple[Any]:
    """Give |τ| of the one model as a term for a view; without a base the model is τ itself.

    >>> magnitude((), (), jnp.array([1.0]), jnp.array([[-2.0]]), None)[0].tolist()
    [3.0]
    """
    return (jnp.abs(stack[0] if base is None else stack[0] - base),)


def in_band(tau: Any, low: Any, high: Any) -> Any:
    """Keep entries whose magnitude lies in [low, high].

    >>> in_band(jnp.array([-1.0, 2.0, 3.0]), 1.5, 2.5).tolist()
    [0.0, 2.0, 0.0]
    """
    size = jnp.abs(tau)
    return jnp.where((size >= low) & (size <= high), tau, 0.0)


def rank_levels(tau: Any, density: Any, epsilon: Any) -> Any:
    """Give the probability of staying, in 65,536ths, by rank of magnitude in the row.

    >>> (rank_levels(jnp.array([3.0, 1.0, 2.0]), 0.5, 0.25) / 65536).tolist()
    [0.75, 0.25, 0.5]
    """
    rows = tau.reshape(-1, tau.shape[-1]) if tau.ndim else tau.reshape(1, 1)
    order = jnp.argsort(jnp.abs(rows), axis=-1)
    lines = jnp.arange(rows.shape[0])[:, None]
    count = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    rank = jnp.zeros(rows.shape, jnp.int32).at[lines, order].set(count, unique_indices=True)
    return levels_of_rank(rank.reshape(tau.shape), density, epsilon)


def levels_of_rank(rank: Any, density: Any, epsilon: Any) -> Any:
    """Give the probability of staying, in 65,536ths, of the ranks 0 … of rows.

    >>> (levels_of_rank(jnp.array([2, 0, 1]), 0.5, 0.25) / 65536).tolist()
    [0.75, 0.25, 0.5]
    """
    width = rank.shape[-1] if rank.ndim else 1
    # A row of one entry is all middle.
    share = rank / (width - 1) if width > 1 else jnp.full(rank.shape, 0.5)
    probability = (density - epsilon) + share * (2 * epsilon)
    return jnp.clip(jnp.round(probability * LEVELS), 1, LEVELS).astype(jnp.uint32)


def host_ranks(sizes: np.ndarray) -> np.ndarray:
    """Rank the entries of each row from 0 with NumPy, whose sorting is many times XLA's on a CPU.

    >>> host_ranks(np.array([[3.0, 1.0, 2.0]])).tolist()
    [[2, 0, 1]]
    """
    order = np.argsort(sizes, axis=-1, kind="stable")
    ranks = np.empty(sizes.shape, np.int32)
    count = np.arange(sizes.shape[-1], dtype=np.int32)
    np.put_along_axis(ranks, order, np.broadcast_to(count, sizes.shape), axis=-1)
    return ranks


def l1_scale(xp: Any, before: Any, after: Any) -> Any:
    """Give the factor that restores a sum of magnitudes, 1 where either is as good as zero.

    >>> float(l1_scale(np, np.float64(3.0), np.float64(1.5)))
    2.0
    """
    sound = (before >= 1e-7) & (after >= 1e-7)
    return xp.where(sound, before / xp.where(sound, after, 1.0), 1.0)


def check_density(name: str, value: Any) -> None:
    """Refuse a density outside (0, 1]; one value or one for each model; traced values pass.

    Raises:
      UserError: with the value.

    >>> check_density("density", 1.5)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: density is 1.5; it is the share of entries kept and must lie ...
    """
    for one in value if isinstance(value, tuple) else (value,):
        if isinstance(one, float | int) and not 0 < one <= 1:
            raise UserError(
                f"{name} is {one}; it is the share of entries kept and must lie in (0, 1]; "
                "correct it, and to leave a model out drop it from the list"
            )
