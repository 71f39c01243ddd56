"""Drop policies: which of the tokens that chose an expert get one of its slots."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxsys.core.errors import UserError
from jaxsys.moe.contract import Capacity, ExpertChoice, Slots, TokenChoice


def slots_per_expert(
    capacity: Capacity, n_rows: int, k: int, experts: int, multiple: int = 1
) -> int:
    """Compute C = ⌈f · k · N / E⌉, rounded up to a multiple.

    An expert cannot be chosen by more than the N tokens there are, so C is N at most before it is
    rounded; without drops it is N.

    Args:
        capacity: factor and policy.
        n_rows: N of one rank.
        k: experts of a token.
        experts: E.
        multiple: of which C must be one: the least common multiple of the pipeline degrees.

    Returns:
        C.

    Raises:
        UserError: without tokens.

    Reference: arXiv 2501.10714 §2 (T = k·f·B·L/E).

    >>> slots_per_expert(Capacity(1.2), 64, 2, 8, multiple=8)
    24
    """
    if n_rows < 1:
        raise UserError("the batch holds no token; expected at least one; give another batch")
    wanted = n_rows
    if capacity.policy != "dropless":
        # A product such as 1.2 · 2 · 10 / 8 must not be rounded up for an error in the last place.
        wanted = min(n_rows, math.ceil(round(capacity.factor * k * n_rows / experts, 9)))
    return multiple * -(-wanted // multiple)


def fill_slots(chosen: TokenChoice, size: int, policy: str = "position") -> Slots:
    """Give the slots of each expert to those who chose it, in the policy's order.

    Args:
        chosen: what the gate gave.
        size: C.
        policy: see `Capacity`: ``position`` ranks choices by (j, token), j counting a token's
            choices; ``probability`` by weight; ``priority`` by (j, the token's largest weight);
            ties go to the first choice of the first token.

    Returns:
        Who sits where.

    Raises:
        UserError: for a capacity of 0.

    Reference: GShard (arXiv 2006.16668) for ``position``; Megatron-Core for ``probability``; V-MoE
    (arXiv 2106.05974) §3.4 and Tutel for ``priority``.

    >>> choice = TokenChoice(jnp.array([[0.6], [0.9]]), jnp.array([[1], [1]]),
    ...                      jnp.zeros((2, 2)), jnp.zeros((2, 2)))
    >>> fill_slots(choice, 1, "position").tokens.tolist()
    [[2], [0]]
    >>> fill_slots(choice, 1, "probability").places.tolist()
    [[2], [1]]
    """
    if size < 1:
        raise UserError(f"the capacity is {size}; expected at least one slot; raise the factor")
    n_rows, k = chosen.experts.shape
    n_experts = chosen.logits.shape[-1]
    queue = _queue(chosen, policy)
    slot = jnp.arange(size, dtype=jnp.int32)[None]
    taken = slot < queue.counts[:, None]
    at = jnp.where(taken, queue.starts[:, None] + slot, 0)
    tokens = jnp.where(taken, queue.choices[at] % n_rows, n_rows)
    rank = jnp.arange(k * n_rows, dtype=jnp.int32) - queue.starts[queue.experts]
    place = jnp.where(rank < size, queue.experts * size + rank, n_experts * size)
    return Slots(tokens, _of_choices(queue, place, n_rows), chosen.weights)


def fill_groups(chosen: TokenChoice) -> tuple[Slots, jax.Array]:
    """Sort all choices by expert, for products over groups of unequal sizes.

    Args:
        chosen: what the gate gave.

    Returns:
        Slots of one row that holds every choice, [1, N·k], and the groups' sizes, [E].

    >>> choice = TokenChoice(jnp.ones((2, 1)), jnp.array([[1], [0]]), jnp.zeros((2, 2)),
    ...                      jnp.zeros((2, 2)))
    >>> slots, sizes = fill_groups(choice)
    >>> slots.tokens.tolist(), sizes.tolist()
    ([[1, 0]], [1, 1])
    """
    n_rows = chosen.experts.shape[0]
    queue = _queue(chosen, "position")
    place = jnp.arange(queue.choices.shape[0], dtype=jnp.int32)
    places = _of_choices(queue, place, n_rows)
    return Slots(queue.choices[None] % n_rows, places, chosen.weights), queue.counts


class _Queue(NamedTuple):
    """The choices sorted by expert, and by rank among those of one expert."""

    experts: jax.Array
    choices: jax.Array  # choice j of token n is j·N + n
    counts: jax.Array
    starts: jax.Array


def _queue(chosen: TokenChoice, policy: str) -> _Queue:
    n_rows, k = chosen.experts.shape
    experts = chosen.experts.T.reshape(-1).astype(jnp.int32)
    own = jnp.arange(k * n_rows, dtype=jnp.int32)
    weights = jax.lax.stop_gradient(chosen.weights)
    if policy == "probability":
        keys = (experts, -weights.T.reshape(-1))
    elif policy == "priority":
        sure = jnp.broadcast_to(jnp.max(weights, axis=-1)[None], weights.T.shape)
        keys = (experts, own // n_rows, -sure.reshape(-1))
    else:
        keys = (experts,)
    done = jax.lax.sort((*keys, own), num_keys=len(keys), is_stable=True)
    counts = count(chosen.experts, chosen.logits.shape[-1])
    return _Queue(done[0], done[-1], counts, jnp.cumsum(counts) - counts)


def _of_choices(queue: _Queue, place: jax.Array, n_rows: int) -> jax.Array:
    """Bring places in the queue's order back to tokens, [N, k]."""
    places = jnp.zeros_like(place).at[queue.choices].set(place, unique_indices=True)
    return places.reshape(-1, n_rows).T


def count(experts: jax.Array, n_experts: int) -> jax.Array:
    """Count how often each expert is chosen.

    >>> count(jnp.array([[0, 2], [2, 1]]), 4).tolist()
    [1, 1, 2, 0]
    """
    # Comparing with all experts is faster than a scatter, which a CPU runs one by one.
    each = experts.reshape(-1, 1) == jnp.arange(n_experts)[None]
    return jnp.sum(each, axis=0, dtype=jnp.int32)


def seats(chosen: ExpertChoice, n_rows: int, multiple: int = 1) -> Slots:
    """Seat the tokens that experts chose, with empty slots up to a multiple.

    Args:
        chosen: what the gate gave.
        n_rows: N.
        multiple: of which C must be one.

    Returns:
        Who sits where; no places, as a token may have been chosen by any number of experts.

    >>> choice = ExpertChoice(jnp.ones((2, 1)), jnp.array([[3], [0]]), jnp.ones((4, 2)),
    ...                       jnp.ones((4, 2)))
    >>> seats(choice, 4, multiple=2).tokens.tolist()
    [[3, 4], [0, 4]]
    """
    pad = ((0, 0), (0, -chosen.tokens.shape[1] % multiple))
    tokens = jnp.pad(chosen.tokens.astype(jnp.int32), pad, constant_values=n_rows)
    return Slots(tokens, None, jnp.pad(chosen.weights, pad))
