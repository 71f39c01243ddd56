"""A bound on the norm of the whole gradient, of which each worker holds a part."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.pipeline.messages import NORM, rank_of
from jaxsys.pipeline.turn import Run, Turn


def clipped(
    turn: Turn, grads: dict[str, Any], owned: Sequence[str], bound: float | int, parts: int
) -> Run:
    """Scale a worker's gradients so that the norm of the whole gradient keeps a bound.

    ``g · min(1, bound / ‖g‖)`` as `optax.clip_by_global_norm`. Each worker of a chain tells the
    others one number, the squares of the leaves that are its own; all add them up in one order,
    so that leaves which several hold stay equal bit for bit.

    Args:
        turn: the worker's step.
        grads: path to summed gradient of each leaf that it holds.
        owned: those that count here; of a leaf that several hold, the first one's.
        bound: of the norm of the mean gradient.
        parts: micro-batches in the sum.

    Returns:
        Generator of the messages that are waited for; its value is the gradients.

    >>> clipped.__name__  # needs a plan's workers: see tests/pipeline/test_clip.py
    'clipped'
    """
    me, n_workers = turn.part.worker, turn.plan.n_workers
    own = np.asarray(_squares([grads[path] for path in owned]), np.float32)
    ranks = [rank_of(turn.plan, turn.part.chain, w) for w in range(n_workers)]
    for w in range(n_workers):
        if w != me:
            turn.send(ranks[w], (NORM, turn.number, 0, turn.rank, ranks[w]), [own])
    total = np.float64(0)
    for w in range(n_workers):
        told = own
        if w != me:
            key = (NORM, turn.number, 0, ranks[w], turn.rank)
            (told,) = yield from turn.receive(ranks[w], key, [own])
        total += np.float64(told)
    norm = float(np.sqrt(total)) / parts
    if norm < bound:
        return grads
    scale = np.float32(bound / norm)
    return dict(zip(grads, _scaled(list(grads.values()), scale), strict=True))


@jax.jit
def _squares(grads: list[Any]) -> Any:
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in grads]
    return sum((jnp.sum(jnp.abs(x) ** 2) for x in wide), jnp.zeros(()))


@jax.jit
def _scaled(grads: list[Any], scale: Any) -> list[Any]:
    return [(x * scale).astype(x.dtype) for x in grads]
