"""Gates in which tokens do not choose: experts do (expert choice), or all is mixed (SoftMoE).

Both read all tokens before they decide on one, so a causal language model sees the future through
them; its loss is honest only where nothing stands behind the token that is predicted.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsys.core.errors import UserError
from jaxsys.models.encoder import unit
from jaxsys.moe.contract import Dims, ExpertChoice, Gate, Mixing
from jaxsys.moe.gates import linear_init, rows_of, scores_of


def expert_choice(factor: float | int, over: Literal["experts", "tokens"] = "experts") -> Gate:
    """Make the gate whose experts each take their ⌈factor · N / E⌉ best tokens, N at most.

    ``experts``: S = softmax over the experts of each token's logits, an expert takes the tokens of
    largest S and weighs its output by S (the original). ``tokens``: G = softmax over the tokens
    that an expert keeps of its logits, G = softmax(KeepTopK((I W_g)ᵀ)) (as FSMoE states it).

    Args:
        factor: experts that visit a token on average.
        over: what the softmax runs over.

    Returns:
        The gate; its parameter is ``weight``, [E, D]. On several ranks an expert takes its share of
        each rank's tokens.

    Raises:
        UserError: from init, for a factor that is not above 0 or is above E.

    Reference: arXiv 2202.09368 eq. 1-2; 2501.10714 §2.

    >>> gate = expert_choice(1)
    >>> x = jnp.array([[[1.0], [3.0], [2.0], [0.0]]])
    >>> gate.route({"weight": jnp.array([[1.0], [0.0]])}, x, None, ()).tokens.tolist()
    [[1, 2], [3, 0]]
    """

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        if not 0 < factor <= dims.experts:
            raise UserError(
                f"expert choice has the factor {factor} for {dims.experts} experts; expected a "
                "number above 0, up to the number of experts; change it"
            )
        return {"weight": linear_init(key, dims.experts, dims.width)}

    def route(params, x, key, axes) -> ExpertChoice:
        del key, axes
        logits = scores_of(params["weight"], rows_of(x))
        n_rows, n_experts = logits.shape
        share = jax.nn.softmax(logits)
        size = min(n_rows, math.ceil(factor * n_rows / n_experts))
        top, tokens = jax.lax.top_k((share if over == "experts" else logits).T, size)
        weights = top if over == "experts" else jax.nn.softmax(top)
        return ExpertChoice(weights, tokens, share, logits)

    return Gate(init, route, factor)


def soft_moe(slots: int, *, normalise: bool = False) -> Gate:
    """Make SoftMoE's gate: slots are means of a sequence's tokens, tokens means of the slots.

    Z = X Φ; D = softmax of Z over the tokens, C = softmax over all slots; X̃ = Dᵀ X, Y = C Ỹ. No
    token is dropped and every expert has the same work.

    Args:
        slots: of an expert, per sequence.
        normalise: take X and Φ at unit length, Φ times a learned scale (the paper's §2.3, for wide
            models).

    Returns:
        The gate; its parameters are ``weight`` [E, slots, D] and, if normalised, ``scale`` [].

    Raises:
        UserError: for less than one slot.

    Reference: arXiv 2308.00951 eq. 1-3.

    >>> gate = soft_moe(2)
    >>> params = gate.init(jax.random.key(0), Dims(4, 8, 3))
    >>> gate.route(params, jnp.ones((1, 5, 4)), None, ()).dispatch.shape
    (1, 5, 3, 2)
    """
    if slots < 1:
        raise UserError(f"an expert has {slots} slots; expected a whole number from 1 up; raise it")

    def init(key: jax.Array, dims: Dims) -> dict[str, Array]:
        weight = linear_init(key, dims.experts * slots, dims.width)
        params = {"weight": weight.reshape(dims.experts, slots, dims.width)}
        return params | ({"scale": jnp.ones(())} if normalise else {})

    def route(params, x, key, axes) -> Mixing:
        del key, axes
        x, weight = x.astype(jnp.float32), params["weight"].astype(jnp.float32)
        if normalise:
            x, weight = unit(x), unit(weight) * params["scale"]
        logits = jnp.einsum("btd,ecd->btec", x, weight)
        combine = jax.nn.softmax(logits, axis=(2, 3))
        return Mixing(jax.nn.softmax(logits, axis=1), combine, logits)

    return Gate(init, route, slots)
