"""Gates that balance by how they choose: sinkhorn, group-limited, and by a bias per expert."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.moe.contract import Dims, Gate, TokenChoice
from jaxsys.moe.gates import check_k, linear_init, rows_of, scores_of

MOST_ROUNDS = 200


def balance_rows(
    logits: Float[Array, "N E"], tolerance: float = 1e-4, axes: tuple[str, ...] = ()
) -> Float[Array, "N E"]:
    """Scale exp(logits) until every row sums to 1/N and every column to 1/E (Sinkhorn).

    d₀ = 1/(N · Σ_e d₁ K), d₁ = 1/(E · Σ_t d₀ K) in turn, K = exp(logits), until the mean change of
    d₁, relative to its mean, is below the tolerance.

    Args:
        logits: of this rank's tokens.
        tolerance: when to stop; 200 rounds at most.
        axes: over which the tokens are sharded; N counts all of them.

    Returns:
        d₀ K d₁.

    Reference: arXiv 2202.01169 (S-BASE), as in Megatron-Core; the relative change is ours, so that
    the result does not depend on the size of N.

    >>> balance_rows(jnp.array([[4.0, 0.0], [4.0, 0.0]])).round(3).tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    """
    n_experts = logits.shape[-1]
    # A row's factor cancels, so the largest entry may be 1.
    kernel = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    n_rows = _over(jnp.array(float(logits.shape[0])), axes)

    def rows_factor(columns: Array) -> Array:
        return 1 / (n_rows * (kernel @ columns))

    def turn(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        columns, _, i = state
        new = 1 / jnp.maximum(n_experts * _over(rows_factor(columns) @ kernel, axes), 1e-30)
        return new, jnp.mean(jnp.abs(new - columns)) / jnp.mean(new), i + 1

    def unsettled(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > tolerance) & (state[2] < MOST_ROUNDS)

    start = (jnp.ones(n_experts), jnp.array(jnp.inf), jnp.array(0))
    columns = jax.lax.while_loop(unsettled, turn, start)[0]
    return rows_factor(columns)[:, None] * kernel * columns[None]


def _over(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def sinkhorn(k: int, tolerance: float = 1e-4) -> Gate:
    """Make the gate that chooses by an assignment balanced over all tokens and experts.

    The k largest entries of the row that `balance_rows` gives; weights are those of the logits:
    σ(h) for k = 1, else softmax(h) over all experts. The balancing carries no gradient.

    Args:
        k: experts of a token.
        tolerance: of the balancing.

    Returns:
        The gate; its parameter is ``weight``, [E, D]. Every choice depends on all tokens, so a
        causal model sees the future through it while it trains.

    Raises:
        UserError: from init, when k is not between 1 and E.

    Reference: arXiv 2202.01169; weights as in Megatron-Core.

    >>> gate = sinkhorn(1)
    >>> x = jnp.array([[[1.0], [2.0]]])
    >>> gate.route({"weight": jnp.array([[1.0], [0.0]])}, x, None, ()).experts.tolist()
    [[1], [0]]
    """

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        check_k(k, dims.experts)
        return {"weight": linear_init(key, dims.experts, dims.width)}

    def route(params, x, key, axes) -> TokenChoice:
        del key
        logits = scores_of(params["weight"], rows_of(x))
        balanced = balance_rows(jax.lax.stop_gradient(logits), tolerance, axes)
        _, experts = jax.lax.top_k(balanced, k)
        share = jax.nn.sigmoid(logits) if k == 1 else jax.nn.softmax(logits)
        weights = jnp.take_along_axis(share, experts, axis=-1)
        return TokenChoice(weights, experts, jax.nn.softmax(logits), logits)

    return Gate(init, route, k)


def best_in_groups(
    scores: Float[Array, "N E"], k: int, groups: int, kept: int
) -> Int[Array, "N k"]:
    """Choose the k best experts of the best groups.

    A group's score is the sum of its two best experts' (DeepSeek-V3 §2.1.2); experts stand in
    groups of E / groups neighbours.

    Args:
        scores: by which to choose.
        k: experts of a token.
        groups: into how many the experts fall.
        kept: groups that a token may use.

    Returns:
        Experts, best first.

    Reference: arXiv 2412.19437.

    >>> best_in_groups(jnp.array([[9.0, 0.0, 5.0, 5.0]]), 1, groups=2, kept=1).tolist()
    [[2]]
    """
    if kept < groups:
        grouped = scores.reshape(scores.shape[0], groups, -1)
        best = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
        _, chosen = jax.lax.top_k(best, kept)
        open_ = jnp.any(chosen[:, :, None] == jnp.arange(groups)[None, None], axis=1)
        scores = jnp.where(open_[:, :, None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, k)[1]


def group_limited(k: int, groups: int, kept: int) -> Gate:
    """Make the gate that lets each token visit experts of a few groups only (of a few nodes).

    The k largest of softmax(x W_g) within the best ``kept`` groups; their softmax is the weight.

    Args:
        k: experts of a token.
        groups: into how many the experts fall, a divisor of E.
        kept: groups that a token may use.

    Returns:
        The gate; its parameter is ``weight``, [E, D].

    Raises:
        UserError: from init, when k experts are not to be had or the groups do not divide E.

    Reference: arXiv 2412.19437, 2405.04434 (whose group score is its one best expert's).

    >>> gate = group_limited(1, groups=3, kept=1)
    >>> gate.init(jax.random.key(0), Dims(4, 8, 4))
    Traceback (most recent call last):
    jaxsys.core.errors.UserError: 4 experts do not fall into 3 equal groups; change either
    """

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        _check_groups(k, groups, kept, dims.experts)
        return {"weight": linear_init(key, dims.experts, dims.width)}

    def route(params, x, key, axes) -> TokenChoice:
        del key, axes
        logits = scores_of(params["weight"], rows_of(x))
        share = jax.nn.softmax(logits)
        experts = best_in_groups(share, k, groups, kept)
        weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1))
        return TokenChoice(weights, experts, share, logits)

    return Gate(init, route, k)


def _check_groups(k: int, groups: int, kept: int, experts: int) -> None:
    if groups < 1 or experts % groups:
        raise UserError(f"{experts} experts do not fall into {groups} equal groups; change either")
    if not 1 <= kept <= groups:
        raise UserError(
            f"a token may use {kept} of {groups} groups; expected from 1 to all of them; change it"
        )
    check_k(k, kept * experts // groups)


def bias_balanced(
    k: int,
    *,
    score: Literal["sigmoid", "softmax"] = "sigmoid",
    groups: int = 1,
    kept: int = 1,
    scale: float = 1.0,
) -> Gate:
    """Make the gate that is balanced without a loss: a bias per expert, moved between steps.

    Choose the k largest s_i + b_i; weigh by s_i / Σ_chosen s_j. Gradients do not move b;
    `move_bias` does, from the load that `Info` reports.

    Args:
        k: experts of a token.
        score: s = σ(x W_g) or softmax(x W_g).
        groups: see `group_limited`; 1 for no limit.
        kept: groups that a token may use.
        scale: factor on all weights.

    Returns:
        The gate; its parameters are ``weight`` [E, D] and ``bias`` [E], zeros at first. Keep weight
        decay away from the bias.

    Raises:
        UserError: as `group_limited`.

    Reference: arXiv 2408.15664, 2412.19437.

    >>> gate = bias_balanced(1)
    >>> params = {"weight": jnp.array([[1.0], [0.0]]), "bias": jnp.array([0.0, 1.0])}
    >>> gate.route(params, jnp.ones((1, 1, 1)), None, ()).experts.tolist()
    [[1]]
    """

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        _check_groups(k, groups, kept, dims.experts)
        weight = linear_init(key, dims.experts, dims.width)
        return {"weight": weight, "bias": jnp.zeros(dims.experts)}

    def route(params, x, key, axes) -> TokenChoice:
        del key, axes
        logits = scores_of(params["weight"], rows_of(x))
        share = jax.nn.sigmoid(logits) if score == "sigmoid" else jax.nn.softmax(logits)
        bias = jax.lax.stop_gradient(params["bias"].astype(jnp.float32))
        experts = best_in_groups(jax.lax.stop_gradient(share) + bias[None], k, groups, kept)
        chosen = jnp.take_along_axis(share, experts, axis=-1)
        weights = scale * chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)
        whole = share / jnp.sum(share, axis=-1, keepdims=True)
        return TokenChoice(weights, experts, whole, logits)

    return Gate(init, route, k)


def move_bias(
    bias: Float[Array, "E"], load: Float[Array, "E"], rate: float = 1e-3
) -> Float[Array, "E"]:
    """Raise the bias of experts below the mean load and lower the others'.

    b_e ← b_e + u · sign(mean load - load_e).

    Args:
        bias: b.
        load: of the step, in any unit.
        rate: u.

    Returns:
        The bias for the next step.

    Reference: arXiv 2408.15664, algorithm 1.

    >>> move_bias(jnp.zeros(2), jnp.array([0.75, 0.25]), 0.5).tolist()
    [-0.5, 0.5]
    """
    return bias + rate * jnp.sign(jnp.mean(load) - load)
