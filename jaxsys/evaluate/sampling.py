"""From logits to a token: greedy, temperature, top-k, top-p, min-p, repetition penalty."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key

from jaxsys.core.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Say how the next token is chosen; the laws apply in the order in which they stand here.

    Attributes:
      repetition_penalty: divides positive and multiplies negative logits of tokens that the row
        already holds; 1 leaves them (arXiv 1909.05858, section 4.1).
      temperature: divides all logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the fewest most likely tokens that together reach p (arXiv 1904.09751).
      min_p: keep tokens at least min_p times as likely as the most likely one (arXiv 2407.01082).

    >>> Sampling(temperature=-1.0)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: temperature is -1.0; it must be 0 (greedy) or more
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (keep all) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie above 0 and not above 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must lie between 0 and 1")
        if not self.repetition_penalty > 0:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is none)"
            )


def penalise(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float | int
) -> Float[Array, "B V"]:
    """Make tokens that were seen less likely: z/θ where z > 0, z·θ elsewhere.

    Args:
      logits: z.
      seen: the tokens that each row holds.
      penalty: θ.

    Reference: arXiv 1909.05858, section 4.1.

    >>> penalise(jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]]), 2.0)
    Array([[ 1., -4.,  2.]], dtype=float32)
    """
    changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, changed, logits)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Set all but the k largest logits to minus infinity; ties with the k-th stay.

    >>> keep_top_k(jnp.array([[1.0, 3.0, 2.0]]), 2)
    Array([[-inf,   3.,   2.]], dtype=float32)
    """
    k = min(k, logits.shape[-1])
    least = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(
    logits: Float[Array, "B V"], p: float | int | Float[Array, "B 1"]
) -> Float[Array, "B V"]:
    """Keep the fewest most likely tokens whose probabilities together reach p; at least one.

    Args:
      logits: as the model gave them, or scaled.
      p: of all rows, or of each.

    Reference: nucleus sampling, arXiv 1904.09751.

    >>> keep_top_p(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), 0.7)[0, 2]
    Array(-inf, dtype=float32)
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    likely = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    # The first is kept whatever p is: nothing stands before it.
    least = jnp.where(before < p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_min_p(logits: Float[Array, "B V"], min_p: float | int) -> Float[Array, "B V"]:
    """Keep tokens that are at least min_p times as likely as the most likely one.

    Reference: arXiv 2407.01082.

    >>> keep_min_p(jnp.log(jnp.array([[0.6, 0.3, 0.1]])), 0.4)[0, 2]
    Array(-inf, dtype=float32)
    """
    likely = jax.nn.softmax(logits, axis=-1)
    return jnp.where(likely < min_p * likely.max(axis=-1, keepdims=True), -jnp.inf, logits)


def warp(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, sampling: Sampling
) -> Float[Array, "B V"]:
    """Apply all laws of a `Sampling` to logits; temperature 0 leaves the scale alone.

    Args:
      logits: as the model gave them.
      seen: the tokens that each row holds; needed for a repetition penalty only.
      sampling: the laws.

    >>> warp(jnp.array([[1.0, 3.0, 2.0]]), None, Sampling(temperature=0.5, top_k=2))
    Array([[-inf,   6.,   4.]], dtype=float32)
    """
    logits = logits.astype(jnp.float32)
    if sampling.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs the tokens seen"
        logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def sample(
    keys: Key[Array, "B"],
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    sampling: Sampling,
) -> Int32[Array, "B"]:
    """Choose one token for each row.

    Args:
      keys: one for each row; unused at temperature 0.
      logits: as the model gave them.
      seen: the tokens that each row holds, for the repetition penalty.
      sampling: the laws.

    >>> key = jax.random.split(jax.random.key(0), 1)
    >>> sample(key, jnp.array([[1.0, 3.0, 2.0]]), None, Sampling())
    Array([1], dtype=int32)
    """
    if sampling.temperature == 0:
        # The other laws never remove the most likely token.
        only_penalty = Sampling(repetition_penalty=sampling.repetition_penalty)
        return warp(logits, seen, only_penalty).argmax(axis=-1).astype(jnp.int32)
    warped = warp(logits, seen, sampling)
    return jax.vmap(jax.random.categorical)(keys, warped).astype(jnp.int32)


def sample_each(
    keys: Key[Array, "B"],
    logits: Float[Array, "B V"],
    temperatures: Float[Array, "B"],
    top_ps: Float[Array, "B"],
) -> Int32[Array, "B"]:
    """Choose one token for each row, whose temperature and top-p are its own.

    Sorting and drawing are done only where some row asks for them; each row gets what `sample`
    gives it with the same key and a `Sampling` of its own.

    Args:
      keys: one for each row.
      logits: as the model gave them.
      temperatures: of each row; 0 takes the most likely token.
      top_ps: of each row; 1 keeps all.

    >>> keys, logits = jax.random.split(jax.random.key(0), 2), jnp.array([[1.0, 3.0], [3.0, 1.0]])
    >>> sample_each(keys, logits, jnp.array([0.0, 0.1]), jnp.array([1.0, 0.5]))
    Array([1, 0], dtype=int32)
    """
    logits = logits.astype(jnp.float32)
    likeliest = logits.argmax(axis=-1).astype(jnp.int32)

    def draw() -> Array:
        scaled = logits / jnp.where(temperatures > 0, temperatures, 1.0)[:, None]
        wanted = (top_ps < 1) & (temperatures > 0)
        kept = jax.lax.cond(
            wanted.any(),
            lambda: jnp.where(wanted[:, None], keep_top_p(scaled, top_ps[:, None]), scaled),
            lambda: scaled,
        )
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    drawn = jax.lax.cond((temperatures > 0).any(), draw, lambda: likeliest)
    return jnp.where(temperatures > 0, drawn, likeliest)
