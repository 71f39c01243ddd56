"""Losses that teach a predictor to rank: DiffKendall, pair, ListMLE, squared error, mixtures.

Each takes scores `[N]` and targets `[N]` and returns a scalar to minimise.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError

Loss = Callable[[Any, Any], Any]


def diff_kendall(
    scores: Float[Array, "N"],
    targets: Float[Array, "N"],
    alpha: float = 0.5,
    *,
    exact: bool = False,
    block: int = 512,
) -> Float[Array, ""]:
    """Compute the negative of a differentiable Kendall's τ.

    Formula: −Σ_{i≠j} t(x_i − x_j)·t(y_i − y_j) / D with t(d) = σ(αd) − σ(−αd) = tanh(αd/2) and
    D = N(N−1)/2. As released the sum runs over ordered pairs while D counts unordered ones, so the
    loss lies in (−2, 2); `exact` divides by the ordered ones, and the loss tends to −τ (without
    ties) as α grows. The targets of the released code are standardised beforehand.

    Args:
      scores: x.
      targets: y.
      alpha: steepness.
      exact: divide by N(N−1).
      block: rows compared with all others at a time; memory is N·block, in the gradient too.

    Reference: ParZC, arXiv 2402.02105.

    >>> x = jnp.array([0.0, 10.0, 20.0])
    >>> [round(float(diff_kendall(x, y, 10.0)), 3) for y in (x, -x)]
    [-2.0, 2.0]
    """
    n = scores.shape[0]
    rows = -(-n // block) if n > block else 1
    size = -(-n // rows)
    pad = rows * size - n
    weight = jnp.pad(jnp.ones(n), (0, pad)).reshape(rows, size)
    xs, ys = (jnp.pad(v, (0, pad)).reshape(rows, size) for v in (scores, targets))

    # Recomputed in the backward pass: the saved differences would be N² numbers.
    @jax.checkpoint
    def one(total: Any, inputs: Any) -> Any:
        x, y, w = inputs
        a = jnp.tanh(alpha / 2 * (x[:, None] - scores[None, :]))
        b = jnp.tanh(alpha / 2 * (y[:, None] - targets[None, :]))
        return total + jnp.sum(a * b * w[:, None]), None

    total, _ = jax.lax.scan(one, jnp.zeros((), scores.dtype), (xs, ys, weight))
    return -total / (n * (n - 1) * (1.0 if exact else 0.5))


def pair_loss(scores: Float[Array, "N"], targets: Float[Array, "N"]) -> Float[Array, ""]:
    """Compute the mean over i ≠ j of ln(1 + exp(−(x_i − x_j)·sign(y_i − y_j))).

    >>> round(float(pair_loss(jnp.array([0.0, 9.0]), jnp.array([0.0, 1.0]))), 4)
    0.0001
    """
    n = scores.shape[0]
    gap = (scores[:, None] - scores[None, :]) * jnp.sign(targets[:, None] - targets[None, :])
    off = 1 - jnp.eye(n)
    return jnp.sum(off * jax.nn.softplus(-gap)) / (n * (n - 1))


def list_mle(scores: Float[Array, "N"], targets: Float[Array, "N"]) -> Float[Array, ""]:
    """Compute the negative log-likelihood per item of the true order under Plackett and Luce.

    Formula: −(1/N)·Σ_i [x_(i) − ln Σ_{k≥i} exp x_(k)], (i) in descending order of the targets.

    Reference: Xia et al., ICML 2008.

    >>> round(float(list_mle(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0]))), 4)
    0.3466
    """
    ordered = scores[jnp.argsort(-targets)]
    tails = jax.lax.cumlogsumexp(ordered, reverse=True)
    return jnp.mean(tails - ordered)


def mse(scores: Float[Array, "N"], targets: Float[Array, "N"]) -> Float[Array, ""]:
    """Compute the mean squared error.

    >>> float(mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])))
    2.0
    """
    return jnp.mean(jnp.square(scores - targets))


LOSSES: dict[str, Loss] = {
    "mse": mse,
    "pair": pair_loss,
    "diff_kendall": diff_kendall,
    "list_mle": list_mle,
}


def mixture(names: Sequence[str], *, alpha: float = 0.5) -> Loss:
    """Add up losses by name, each with weight 1 as in the released code.

    Args:
      names: out of `LOSSES`.
      alpha: steepness of `diff_kendall`.

    Raises:
      UserError: for an unknown name, or none.

    >>> x = jnp.array([0.0, 1.0])
    >>> float(mixture(["mse", "pair"])(x, x)) == float(mse(x, x) + pair_loss(x, x))
    True
    """
    unknown = [name for name in names if name not in LOSSES]
    if unknown or not names:
        raise UserError(
            f"loss {unknown[0] if unknown else ''!r} does not exist; expected some of "
            f"{', '.join(LOSSES)}; correct the list"
        )
    table = LOSSES | {"diff_kendall": partial(diff_kendall, alpha=alpha)}
    return lambda x, y: sum(table[name](x, y) for name in names)
