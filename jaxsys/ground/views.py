"""Pool and weigh the views of a candidate; a view that is masked counts as absent.

Axes: ``B`` rows, ``K`` candidates, ``V`` views, ``D`` width.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.models.encoder import unit

Pooling = Literal["max", "mean", "one", "two"]
Weighting = Literal["none", "softmax", "sigmoid"]


def draw(mask: Bool[Array, "B K V"], count: int, key: Any) -> Int[Array, "B K n"]:
    """Draw views of each candidate among those present, evenly and with replacement.

    Args:
        mask: which are present; at least one of each candidate.
        count: n.
        key: random key.

    Raises:
        UserError: without a key.

    >>> draw(jnp.array([[[False, True, False]]]), 2, jax.random.key(0)).tolist()
    [[[1, 1]]]
    """
    if key is None:
        raise UserError(
            f"{count} random views are wanted of each object and key is None; expected a random "
            "key; pass key, or pool by max or mean"
        )
    logits = jnp.where(mask, 0.0, -jnp.inf)[..., None, :]
    b, k, _ = mask.shape
    return jax.random.categorical(key, logits, axis=-1, shape=(b, k, count))


def take(x: Float[Array, "B K V *rest"], places: Int[Array, "B K n"]) -> Float[Array, "B K n *r"]:
    """Take the views at some places.

    >>> take(jnp.array([[[[1.0], [2.0]]]]), jnp.array([[[1]]])).tolist()
    [[[[2.0]]]]
    """
    return jnp.take_along_axis(x, places.reshape(places.shape + (1,) * (x.ndim - 3)), axis=2)


def pool(
    x: Float[Array, "B K V D"],
    mask: Bool[Array, "B K V"],
    kind: Pooling = "max",
    key: Any = None,
) -> Float[Array, "B K D"]:
    """Make one vector of a candidate's views.

    ``max`` and ``mean`` are over the views that are present; ``one`` is one of them at random;
    ``two`` is the maximum of two drawn with replacement, as SNARE's code draws them. A candidate
    without views gives zeros.

    Args:
        x: features of views.
        mask: False where a view is missing.
        kind: see above.
        key: for the random kinds.

    Raises:
        UserError: for an unknown kind, or a random one without a key.

    Reference: arXiv 2107.12514, section 4 (max and random views).

    >>> x, mask = jnp.array([[[[1.0], [5.0], [3.0]]]]), jnp.array([[[True, False, True]]])
    >>> pool(x, mask).tolist(), pool(x, mask, "mean").tolist()
    ([[[3.0]]], [[[2.0]]])
    """
    if kind not in get_args(Pooling):
        raise UserError(
            f"pooling is {kind!r}; expected one of {', '.join(get_args(Pooling))}; correct the name"
        )
    present = mask[..., None]
    if kind == "mean":
        count = jnp.maximum(jnp.sum(present, 2), 1)
        return jnp.sum(jnp.where(present, x, 0.0), 2) / count
    if kind == "max":
        best = jnp.max(jnp.where(present, x, -jnp.inf), 2)
        return jnp.where(jnp.any(present, 2), best, 0.0)
    return jnp.max(take(x, draw(mask, 1 if kind == "one" else 2, key)), 2)


def weights(
    x: Float[Array, "B K V D"],
    text: Float[Array, "B D"],
    mask: Bool[Array, "B K V"],
    kind: Weighting = "softmax",
    temperature: float = 0.1,
) -> Float[Array, "B K V"]:
    """Weigh views by how well they fit the description (DA4LG's re-weighting RW).

        softmax: w_k = V · softmax_k( cos(f_{d,k}, f_l) / τ ),    sigmoid: w_k = σ( cos / τ )

    V counts the views that are present, so that the weights of a candidate average 1. Of a single
    view softmax says nothing (w = 1): use ``sigmoid`` there.

    Reconstruction: known is that cosine similarity of visual and language features weighs what
    matters to the description; the softmax over views, the gate and τ are chosen here.

    Args:
        x: f_d of each view.
        text: f_l in the same space.
        mask: False where a view is missing; its weight is 0.
        kind: ``none`` gives 1 to every view that is present.
        temperature: τ.

    Raises:
        UserError: for an unknown kind or a τ that is not positive.

    Reference: arXiv 2407.02846.

    >>> x, text = jnp.eye(2)[None, None], jnp.array([[1.0, 0.0]])
    >>> weights(x, text, jnp.ones((1, 1, 2), bool), temperature=1.0).tolist()
    [[[1.46..., 0.53...]]]
    """
    if kind not in get_args(Weighting) or temperature <= 0:
        raise UserError(
            f"weighting is {kind!r} with temperature {temperature}; expected one of "
            f"{', '.join(get_args(Weighting))} and a temperature above 0; correct them"
        )
    if kind == "none":
        return mask.astype(x.dtype)
    cosine = jnp.einsum("BKVD,BD->BKV", unit(x), unit(text)) / temperature
    if kind == "sigmoid":
        return jnp.where(mask, jax.nn.sigmoid(cosine), 0.0)
    count = jnp.sum(mask, -1, keepdims=True)
    return count * jax.nn.softmax(cosine, -1, where=mask)
