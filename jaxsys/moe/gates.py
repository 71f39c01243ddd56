"""Gates whose tokens choose experts by a score: GShard's, the sigmoid's, and X-MoE's cosine.

Routers compute in float32 whatever the width of the tokens, matrices are [E, D].
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.models.encoder import unit
from jaxsys.models.lm.moe import soft_top_k
from jaxsys.moe.contract import Dims, Gate, TokenChoice

HOTTEST = math.log(100)  # Tutel's bound on the cosine gate's temperature


def check_k(k: int, experts: int) -> None:
    """Refuse a number of experts that a token cannot choose.

    Args:
        k: experts of a token.
        experts: E.

    Raises:
        UserError: unless 1 ≤ k ≤ E.

    >>> check_k(2, 8)
    """
    if not 1 <= k <= experts:
        raise UserError(
            f"each token chooses {k} of {experts} experts; expected from 1 to all of them; change "
            "k or the number of experts"
        )


def scores_of(weight: Float[Array, "E D"], x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    """Compute a linear router's logits in float32.

    >>> scores_of(jnp.eye(2), jnp.ones((1, 2), jnp.bfloat16)).dtype
    dtype('float32')
    """
    return jnp.einsum("...d,ed->...e", x.astype(jnp.float32), weight.astype(jnp.float32))


def rows_of(x: Float[Array, "... D"]) -> Float[Array, "N D"]:
    """Lay all tokens in rows.

    >>> rows_of(jnp.ones((2, 3, 4))).shape
    (6, 4)
    """
    return x.reshape(-1, x.shape[-1])


def linear_init(key: jax.Array, rows: int, width: int) -> Float[Array, "rows width"]:
    """Draw a router's matrix, normal with standard deviation 1/√D.

    >>> linear_init(jax.random.key(0), 4, 16).shape
    (4, 16)
    """
    return jax.random.normal(key, (rows, width)) / math.sqrt(width)


def noisy_top_k(k: int, over: Literal["chosen", "all"] = "chosen") -> Gate:
    """Make GShard's gate as FSMoE states it: the k largest noisy logits, and their softmax.

    h_i = (x W_g)_i + ε · softplus((x W_noise)_i), ε ~ N(0, 1); g = softmax(KeepTopK(h, k)). Without
    a key there is no noise, and the gate is Mixtral's.

    Args:
        k: experts of a token.
        over: the softmax runs over the ``chosen`` experts or, as in the Switch Transformer,
            ``all`` of them; with k = 1 only the second gives the router a gradient.

    Returns:
        The gate; its parameters are ``weight`` and ``noise``, [E, D], the second zeros at first
        (noise of standard deviation ln 2).

    Raises:
        UserError: from init, when k is not between 1 and E.

    Reference: arXiv 2501.10714 §2 (gate), 1701.06538 eq. 3-5, 2101.03961 (``all``).

    >>> gate = noisy_top_k(2)
    >>> params = gate.init(jax.random.key(0), Dims(4, 8, 3))
    >>> gate.route(params, jnp.ones((1, 5, 4)), None, ()).weights.sum(-1).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        check_k(k, dims.experts)
        weight = linear_init(key, dims.experts, dims.width)
        return {"weight": weight, "noise": jnp.zeros_like(weight)}

    def route(params, x, key, axes) -> TokenChoice:
        del axes
        rows = rows_of(x)
        logits = scores_of(params["weight"], rows)
        ranked = noise = None
        if key is not None:
            noise = jax.nn.softplus(scores_of(params["noise"], rows))
            ranked = logits + noise * jax.random.normal(key, logits.shape)
        weights, experts = soft_top_k(logits if ranked is None else ranked, k, over == "chosen")
        return TokenChoice(weights, experts, jax.nn.softmax(logits), logits, ranked, noise)

    return Gate(init, route, k)


def sigmoid(k: int) -> Gate:
    """Make the gate of BASE layers and StableMoE: choose by logits, weigh by their sigmoid.

    h = x W_g; the k largest; expert i's output times σ(h_i), not normalised.

    Args:
        k: experts of a token.

    Returns:
        The gate; its parameter is ``weight``, [E, D].

    Raises:
        UserError: from init, when k is not between 1 and E.

    Reference: arXiv 2501.10714 §2, 2103.16716, 2204.08396.

    >>> gate = sigmoid(1)
    >>> params = {"weight": jnp.array([[0.0], [1.0]])}
    >>> gate.route(params, jnp.zeros((1, 1, 1)), None, ()).weights.tolist()
    [[0.5]]
    """

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        check_k(k, dims.experts)
        return {"weight": linear_init(key, dims.experts, dims.width)}

    def route(params, x, key, axes) -> TokenChoice:
        del key, axes
        logits = scores_of(params["weight"], rows_of(x))
        top, experts = jax.lax.top_k(logits, k)
        share = jax.nn.sigmoid(logits)
        share = share / jnp.sum(share, axis=-1, keepdims=True)
        return TokenChoice(jax.nn.sigmoid(top), experts, share, logits)

    return Gate(init, route, k)


def cosine(k: int, projected: int = 256) -> Gate:
    """Make X-MoE's gate: softmax over the k experts whose vectors point most like the token.

    s_i = cos(W_proj x, w_i) · exp(min(τ, ln 100)); g = softmax(KeepTopK(s, k)).

    Args:
        k: experts of a token.
        projected: width in which directions are compared.

    Returns:
        The gate; its parameters are ``projection`` [projected, D], ``weight`` [E, projected]
        (normal, 0.01) and ``temperature`` τ, ln 2 at first.

    Raises:
        UserError: from init, when k is not between 1 and E.

    Reference: arXiv 2204.09179; the temperature and its bound are Tutel's.

    >>> gate = cosine(1, projected=2)
    >>> params = gate.init(jax.random.key(0), Dims(4, 8, 3))
    >>> gate.route(params, jnp.ones((1, 5, 4)), None, ()).scores.shape
    (5, 3)
    """

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        check_k(k, dims.experts)
        first, second = jax.random.split(key)
        return {
            "projection": linear_init(first, projected, dims.width),
            "weight": 0.01 * jax.random.normal(second, (dims.experts, projected)),
            "temperature": jnp.log(jnp.array(2.0)),
        }

    def route(params, x, key, axes) -> TokenChoice:
        del key, axes
        token = unit(scores_of(params["projection"], rows_of(x)))
        heat = jnp.exp(jnp.minimum(params["temperature"].astype(jnp.float32), HOTTEST))
        logits = heat * scores_of(unit(params["weight"].astype(jnp.float32)), token)
        weights, experts = soft_top_k(logits, k, True)
        return TokenChoice(weights, experts, jax.nn.softmax(logits), logits)

    return Gate(init, route, k)


def round_robin(k: int) -> Gate:
    """Make the gate that balances by force: row n visits experts n·k, …, n·k + k - 1 modulo E.

    For timing a layer without the luck of routing.

    Args:
        k: experts of a token, each with the weight 1/k.

    Returns:
        The gate, without parameters.

    Raises:
        UserError: from init, when k is not between 1 and E.

    >>> gate = round_robin(2)
    >>> params = gate.init(jax.random.key(0), Dims(4, 8, 3))
    >>> gate.route(params, jnp.ones((1, 2, 4)), None, ()).experts.tolist()
    [[0, 1], [2, 0]]
    """

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        del key
        check_k(k, dims.experts)
        return {"experts": jnp.zeros(dims.experts)}

    def route(params, x, key, axes) -> TokenChoice:
        del key, axes
        n_rows, n_experts = rows_of(x).shape[0], params["experts"].shape[0]
        experts = (jnp.arange(n_rows)[:, None] * k + jnp.arange(k)[None]) % n_experts
        even = jnp.full((n_rows, n_experts), 1 / n_experts)
        return TokenChoice(jnp.full((n_rows, k), 1 / k), experts, even, jnp.zeros_like(even))

    return Gate(init, route, k)
