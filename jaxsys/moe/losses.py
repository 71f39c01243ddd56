"""Auxiliary losses of a gate, the same value however the tokens are sharded.

Each is made of sums over all tokens, taken over the named axes before anything is multiplied; the
mean of ranks' own losses would be another number, and would depend on the layout.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.moe.capacity import count
from jaxsys.moe.contract import TokenChoice


def total(x: Array, axes: tuple[str, ...] = ()) -> Array:
    """Sum over the ranks that hold the other tokens.

    >>> total(jnp.ones(2)).tolist()
    [1.0, 1.0]
    """
    return jax.lax.psum(x, axes) if axes else x


def mean_of_tokens(x: Float[Array, "N"], axes: tuple[str, ...] = ()) -> Float[Array, ""]:
    """Average over all tokens.

    >>> mean_of_tokens(jnp.array([1.0, 3.0])).item()
    2.0
    """
    return total(jnp.sum(x), axes) / total(jnp.array(float(x.shape[0])), axes)


def load(experts: Array, n_experts: int, axes: tuple[str, ...] = ()) -> Float[Array, "E"]:
    """Count the choices of each expert over all tokens.

    >>> load(jnp.array([[0, 2], [2, 1]]), 3).tolist()
    [1.0, 1.0, 2.0]
    """
    return total(count(experts, n_experts).astype(jnp.float32), axes)


def balance(chosen: TokenChoice, axes: tuple[str, ...] = ()) -> Float[Array, ""]:
    """Compute the load-balancing loss of Switch Transformers and GShard.

    E / (N² k) · Σ_e (Σ_t p_te) · count_e, 1 when balanced, E / k at worst.

    Args:
        chosen: what the gate gave.
        axes: over which the tokens are sharded.

    Returns:
        The loss; its gradient goes through p.

    Reference: arXiv 2101.03961 eq. 4-6, with all k choices counted as in Megatron-Core.

    >>> even = TokenChoice(jnp.ones((2, 1)), jnp.array([[0], [1]]), jnp.full((2, 2), 0.5),
    ...                    jnp.zeros((2, 2)))
    >>> balance(even).item()
    1.0
    """
    n_experts, k = chosen.scores.shape[-1], chosen.experts.shape[-1]
    counts = load(chosen.experts, n_experts, axes)
    n_rows = total(jnp.array(float(chosen.scores.shape[0])), axes)
    return n_experts / (n_rows**2 * k) * (total(jnp.sum(chosen.scores, axis=0), axes) @ counts)


def importance_load(chosen: TokenChoice, axes: tuple[str, ...] = ()) -> Float[Array, ""]:
    """Compute the importance and load loss.

    ½ [var(imp) / mean(imp)² + var(load) / mean(load)²] with imp_e = Σ_t p_te and the smooth load
    load_e = Σ_t Φ((h_te - the k-th logit that was ranked) / σ); σ is the gate's noise, or 1/E
    where it has none (Tutel's). Variances are those of the E values themselves.

    Args:
        chosen: what the gate gave.
        axes: over which the tokens are sharded.

    Returns:
        The loss, 0 when balanced.

    Reference: arXiv 1701.06538 §4 and appendix A; 2206.03382.

    >>> even = TokenChoice(jnp.ones((2, 1)), jnp.array([[0], [1]]), jnp.full((2, 2), 0.5),
    ...                    jnp.zeros((2, 2)))
    >>> importance_load(even).item()
    0.0
    """
    ranked = chosen.logits if chosen.ranked is None else chosen.ranked
    kth = jnp.take_along_axis(ranked, chosen.experts[:, -1:], axis=-1)
    spread = 1 / chosen.logits.shape[-1] if chosen.noise is None else chosen.noise
    smooth = _normal_cdf((chosen.logits - kth) / spread)

    def variation(per_expert: Array) -> Array:
        return jnp.var(per_expert) / (jnp.mean(per_expert) ** 2 + 1e-10)

    importance = total(jnp.sum(chosen.scores, axis=0), axes)
    return (variation(importance) + variation(total(jnp.sum(smooth, axis=0), axes))) / 2


def z_loss(logits: Float[Array, "N M"], axes: tuple[str, ...] = ()) -> Float[Array, ""]:
    """Compute the router's z-loss, mean_t (log Σ_e exp h_te)².

    Args:
        logits: h.
        axes: over which the tokens are sharded.

    Returns:
        The loss.

    Reference: arXiv 2202.08906 eq. 5.

    >>> round(z_loss(jnp.zeros((3, 2))).item(), 4)
    0.4805
    """
    return mean_of_tokens(jax.nn.logsumexp(logits, axis=-1) ** 2, axes)


def entropy(scores: Float[Array, "N E"], axes: tuple[str, ...] = ()) -> Float[Array, ""]:
    """Average the entropy of the tokens' scores, in nats: ln E if undecided, 0 if sure.

    >>> round(entropy(jnp.full((3, 4), 0.25)).item(), 4)
    1.3863
    """
    return mean_of_tokens(jnp.sum(jax.scipy.special.entr(scores), axis=-1), axes)


# JAX 0.12 cannot trace its own error function inside shard_map ("Primitive polynomial requires
# varying manual axes to match"), so this is formula 7.1.26 of Abramowitz and Stegun, right to
# 1.5e-7, with the exact derivative.
_TERMS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


@jax.custom_jvp
def _normal_cdf(x: Array) -> Array:
    size = jnp.abs(x) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * size)
    series = jnp.zeros_like(t)
    for term in _TERMS:
        series = (series + term) * t
    tail = 0.5 * series * jnp.exp(-size * size)
    return jnp.where(x > 0, 1 - tail, tail)


@_normal_cdf.defjvp
def _normal_cdf_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return _normal_cdf(x), dx * jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)
