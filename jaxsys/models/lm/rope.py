"""Rotary positions: which angle each pair of a head turns by, and the turning.

Reference: Su et al., "RoFormer" (arXiv 2104.09864); Llama 3's stretching: Grattafiori et al.,
"The Llama 3 Herd of Models" (arXiv 2407.21783), with the formula of its published code.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxsys.models.lm.config import Rope


def frequencies(rope: Rope) -> Float[np.ndarray, "half"]:
    """Compute the angle per position of each pair, θ^(-2i/width), stretched as the model says.

    Args:
        rope: the model's rotary positions.

    Returns:
        width / 2 float32 angles in radians per position.

    >>> frequencies(Rope(theta=100.0, width=4)).tolist()
    [1.0, 0.10000000149011612]
    """
    exponent = np.arange(0, rope.width, 2, dtype=np.float32) / np.float32(rope.width)
    angles = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.scaling == "linear":
        return angles / np.float32(rope.factor)
    if rope.scaling == "llama3":
        return _llama3(angles, rope)
    return angles


def _llama3(angles: np.ndarray, rope: Rope) -> np.ndarray:
    # Long waves are divided by the factor, short ones kept, those between blended linearly in
    # the number of turns within the original positions.
    turns = rope.original_positions * angles / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - keep) * angles / rope.factor + keep * angles).astype(np.float32)


def angles(
    rope: Rope, positions: Integer[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Compute the cosine and sine of every pair's angle at every position.

    Args:
        rope: the model's rotary positions.
        positions: [B, T] positions counted from 0.

    Returns:
        Two arrays [B, T, width/2] in float32.

    >>> cos, sin = angles(Rope(width=4), jnp.zeros((1, 3), jnp.int32))
    >>> cos.shape, float(sin.max())
    ((1, 3, 2), 0.0)
    """
    phase = positions[..., None].astype(jnp.float32) * frequencies(rope)[None, None]
    return jnp.cos(phase), jnp.sin(phase)


def turn(
    rope: Rope,
    x: Float[Array, "B T H C"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
) -> Float[Array, "B T H C"]:
    """Turn each pair (a, b) of every head to (a cos - b sin, b cos + a sin).

    Args:
        rope: says which numbers form pairs; those beyond ``rope.width`` pass unchanged.
        x: queries or keys.
        cos: from `angles`.
        sin: from `angles`.

    Returns:
        The turned queries or keys, in the dtype of x.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> cos, sin = angles(Rope(width=4), jnp.zeros((1, 3), jnp.int32))
    >>> bool((turn(Rope(width=4), x, cos, sin) == x).all())
    True
    """
    rotated, rest = x[..., : rope.width].astype(jnp.float32), x[..., rope.width :]
    cos, sin = cos[:, :, None], sin[:, :, None]
    if rope.interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(rotated.shape)
    else:
        a, b = jnp.split(rotated, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
