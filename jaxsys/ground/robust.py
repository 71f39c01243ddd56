"""Make what is seen worse, to learn how much a grounder depends on it.

Axes: ``B`` rows, ``K`` candidates, ``V`` views, ``Y`` and ``X`` pixels, ``C`` channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsys.core.errors import UserError


def drop_views(key: Any, mask: Bool[Array, "B K V"], keep: int) -> Bool[Array, "B K V"]:
    """Keep a few views of each candidate, drawn evenly; fewer where fewer are present.

    Args:
        key: random key.
        mask: views that are present.
        keep: how many are left, at least 1.

    Raises:
        UserError: for fewer than one.

    >>> int(drop_views(jax.random.key(0), jnp.ones((1, 1, 8), bool), 3).sum())
    3
    """
    if keep < 1:
        raise UserError(f"keep is {keep}; expected at least 1, for zero views show nothing")
    draws = jnp.where(mask, jax.random.uniform(key, mask.shape), 2.0)
    place = jnp.argsort(jnp.argsort(draws, -1), -1)
    return mask & (place < keep)


def occlude(
    key: Any, images: Float[Array, "*b Y X C"], share: float, grey: float = 0.5
) -> Float[Array, "*b Y X C"]:
    """Cover a square of each image with grey, at a place drawn for each.

    Args:
        key: random key.
        images: in 0..1.
        share: of the image's area that is covered, 0 to 1.
        grey: the level.

    Raises:
        UserError: for a share outside of 0 to 1.

    >>> picture = occlude(jax.random.key(0), jnp.ones((1, 8, 8, 3)), 0.25)
    >>> float(jnp.mean(picture == 0.5))
    0.25
    """
    if not 0 <= share <= 1:
        raise UserError(f"share is {share}; expected a share of the area, 0 to 1; change it")
    *lead, rows, columns, _ = images.shape
    tall, wide = round(rows * share**0.5), round(columns * share**0.5)
    key_y, key_x = jax.random.split(key)
    top = jax.random.randint(key_y, (*lead, 1), 0, rows - tall + 1)
    left = jax.random.randint(key_x, (*lead, 1), 0, columns - wide + 1)
    lines = jnp.arange(rows).reshape((1,) * len(lead) + (-1,))
    across = jnp.arange(columns).reshape((1,) * len(lead) + (-1,))
    in_rows = (lines >= top) & (lines < top + tall)
    in_columns = (across >= left) & (across < left + wide)
    covered = in_rows[..., :, None] & in_columns[..., None, :]
    return jnp.where(covered[..., None], grey, images)
