"""Order: rows into experts' slots and back, by one-hot products or by gathers alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.moe.contract import Mixing, Order, Slots


def einsum_order() -> Order:
    """Make GShard's order: products with one-hot matrices.

    buffer_ecd = Σ_n M_ecn x_nd; y_nd = Σ_ec W_nec buffer_ecd. The matrices have N·E·C elements, and
    the products cost as much as a matrix product of N·E·C·D.

    Returns:
        The order.

    Reference: arXiv 2006.16668, algorithm 2.

    >>> slots = Slots(jnp.array([[1], [2]]), jnp.array([[2], [0]]), jnp.ones((2, 1)))
    >>> einsum_order().forward(jnp.array([[5.0], [7.0]]), slots).tolist()
    [[[7.0]], [[0.0]]]
    """

    def forward(x: Float[Array, "N D"], slots: Slots) -> Float[Array, "E C D"]:
        mask = jax.nn.one_hot(slots.tokens, x.shape[0], dtype=x.dtype)
        return jnp.einsum("ecn,nd->ecd", mask, x)

    def inverse(buffer: Float[Array, "E C D"], slots: Slots, n_rows: int) -> Float[Array, "N D"]:
        flat = buffer.reshape(-1, buffer.shape[-1]).astype(jnp.float32)
        weights = slots.weights.astype(jnp.float32)
        if slots.places is None:
            mask = jax.nn.one_hot(slots.tokens.reshape(-1), n_rows, axis=0)
            return ((mask * weights.reshape(1, -1)) @ flat).astype(buffer.dtype)
        mask = jax.nn.one_hot(slots.places, flat.shape[0])
        return (jnp.einsum("nk,nkm->nm", weights, mask) @ flat).astype(buffer.dtype)

    return Order(forward, inverse)


def sparse_order() -> Order:
    """Make Tutel's order: rows are gathered by expert and slot, and outputs by place.

    The gradient of either is a gather too where tokens chose, since every slot knows its token and
    every token its slots; where experts chose, outputs are scattered.

    Returns:
        The order.

    Reference: arXiv 2206.03382 (fast encode and decode).

    >>> slots = Slots(jnp.array([[1], [2]]), jnp.array([[2], [0]]), jnp.ones((2, 1)))
    >>> sparse_order().inverse(jnp.array([[[3.0]], [[4.0]]]), slots, 2).tolist()
    [[0.0], [3.0]]
    """

    def forward(x: Float[Array, "N D"], slots: Slots) -> Float[Array, "E C D"]:
        if slots.places is None:
            return _rows(x, slots.tokens)
        return _to_slots(x, slots.tokens, slots.places)

    def inverse(buffer: Float[Array, "E C D"], slots: Slots, n_rows: int) -> Float[Array, "N D"]:
        flat = buffer.reshape(-1, buffer.shape[-1])
        if slots.places is not None:
            return _from_slots(flat, slots.weights, slots.tokens, slots.places)
        scaled = flat.astype(jnp.float32) * slots.weights.astype(jnp.float32).reshape(-1, 1)
        zeros = jnp.zeros((n_rows, flat.shape[-1]), jnp.float32)
        return zeros.at[slots.tokens.reshape(-1)].add(scaled, mode="drop").astype(buffer.dtype)

    return Order(forward, inverse)


def _rows(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _sum_of_choices(flat: Array, places: Array, weights: Array | None) -> Array:
    total = jnp.zeros((places.shape[0], flat.shape[-1]), jnp.float32)
    for j in range(places.shape[1]):
        own = _rows(flat, places[:, j]).astype(jnp.float32)
        total = total + (own if weights is None else weights[:, j, None] * own)
    return total.astype(flat.dtype)


@jax.custom_vjp
def _to_slots(x: Array, tokens: Array, places: Array) -> Array:
    return _rows(x, tokens)


def _to_slots_forward(x, tokens, places):
    return _rows(x, tokens), places


def _to_slots_backward(places, dbuffer):
    flat = dbuffer.reshape(-1, dbuffer.shape[-1])
    return _sum_of_choices(flat, places, None), None, None


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def _from_slots(flat: Array, weights: Array, tokens: Array, places: Array) -> Array:
    return _sum_of_choices(flat, places, weights.astype(jnp.float32))


def _from_slots_forward(flat, weights, tokens, places):
    return _from_slots(flat, weights, tokens, places), (flat, weights, tokens, places)


def _from_slots_backward(saved, dy):
    flat, weights, tokens, places = saved
    # Of a slot: the weight that its token gives it. Scalars only are scattered.
    own = jnp.zeros(flat.shape[0], jnp.float32)
    own = own.at[places.reshape(-1)].set(weights.reshape(-1).astype(jnp.float32), mode="drop")
    dflat = _rows(dy, tokens.reshape(-1)).astype(jnp.float32) * own[:, None]
    columns = [
        jnp.sum(dy.astype(jnp.float32) * _rows(flat, places[:, j]).astype(jnp.float32), axis=-1)
        for j in range(places.shape[1])
    ]
    dweights = jnp.stack(columns, axis=-1)
    return dflat.astype(flat.dtype), dweights.astype(weights.dtype), None, None


_from_slots.defvjp(_from_slots_forward, _from_slots_backward)


def mix(x: Float[Array, "B T D"], mixing: Mixing, multiple: int = 1) -> Float[Array, "E M D"]:
    """Fill SoftMoE's slots, X̃ = Dᵀ X, sequence after sequence, zeros up to a multiple of slots.

    >>> ones = jnp.ones((2, 3, 4, 1)) / 3
    >>> mix(jnp.ones((2, 3, 5)), Mixing(ones, ones, ones), multiple=4).shape
    (4, 4, 5)
    """
    buffer = jnp.einsum("btec,btd->ebcd", mixing.dispatch.astype(x.dtype), x)
    buffer = buffer.reshape(buffer.shape[0], -1, x.shape[-1])
    return jnp.pad(buffer, ((0, 0), (0, -buffer.shape[1] % multiple), (0, 0)))


def unmix(buffer: Float[Array, "E M D"], mixing: Mixing) -> Float[Array, "B T D"]:
    """Undo `mix`: Y = C Ỹ.

    >>> ones = jnp.ones((2, 3, 4, 1)) / 4
    >>> unmix(jnp.ones((4, 4, 5)), Mixing(ones, ones, ones)).shape
    (2, 3, 5)
    """
    batch, _, experts, slots = mixing.combine.shape
    kept = buffer[:, : batch * slots].reshape(experts, batch, slots, -1)
    return jnp.einsum("btec,ebcd->btd", mixing.combine.astype(buffer.dtype), kept)
