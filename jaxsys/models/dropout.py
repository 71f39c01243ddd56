"""Dropout that a key draws, for networks that are called as pure functions."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(x: Float[Array, "..."], rate: float, key: Any) -> Float[Array, "..."]:
    """Zero a share of the values and scale the rest up; nothing without a key.

    >>> dropout(jnp.ones(3), 0.5, None).tolist()
    [1.0, 1.0, 1.0]
    """
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)
