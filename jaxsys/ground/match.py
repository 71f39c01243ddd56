"""Two baselines of SNARE: CLIP's similarity without training, and MATCH, a head on pooled views.

Axes: ``B`` rows, ``K`` candidates, ``D`` image width, ``L`` text width.

Reference: arXiv 2107.12514, section 4.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.ground import losses, views
from jaxsys.ground.contract import Batch, Grounder, keys_for, stateless
from jaxsys.ground.layers import Mlp
from jaxsys.models.encoder import unit


@dataclass(frozen=True)
class MatchConfig:
    """Describe MATCH; the defaults are SNARE's.

    Attributes:
        width: D.
        text_width: L.
        pooling: of the views: max, mean, one (random) or two (maximum of two random ones).
        hidden: widths of the head's hidden layers.
        dropout: rate in the head.
        smoothing: of the labels.

    >>> MatchConfig().hidden
    (512, 256)
    """

    width: int = 512
    text_width: int = 512
    pooling: views.Pooling = "max"
    hidden: tuple[int, ...] = (512, 256)
    dropout: float = 0.1
    smoothing: float = 0.1


def zero_shot(pooling: views.Pooling = "max", scale: float = 1 / 0.07) -> Grounder:
    """Score by similarity alone: normalise each view, pool, take the scaled dot product.

        s_j = a · pool_k( v_{j,k} / ‖v_{j,k}‖ ) · l / ‖l‖

    Args:
        pooling: of the views.
        scale: a; any positive one gives the same choice.

    Returns:
        A grounder without parameters; its batches need `views`, of the text's width.

    Raises:
        UserError: by ``scores``, when images and texts are not in one space.

    Reference: arXiv 2107.12514, section 4; CLIP, arXiv 2103.00020.

    >>> seen = 3 * jnp.eye(2, 4)[None, :, None]
    >>> batch = Batch(jnp.eye(2, 4)[:1], jnp.ones((1, 2, 1), bool), seen)
    >>> zero_shot(scale=1.0).scores({}, {}, batch).tolist()
    [[1.0, 0.0]]
    """

    def scores(
        trainable: Any, frozen: Any, batch: Batch, *, key: Any = None, train: bool = False
    ) -> Float[Array, "B K"]:
        seen, text = jnp.asarray(need(batch.views, "views")), jnp.asarray(batch.text)
        if seen.shape[-1] != text.shape[-1]:
            raise UserError(
                f"images have {seen.shape[-1]} numbers and texts {text.shape[-1]}; without "
                "training they must lie in one space, as CLIP's do; use MATCH"
            )
        pooled = views.pool(unit(seen), jnp.asarray(batch.mask), pooling, key)
        return scale * jnp.einsum("BKD,BD->BK", pooled, unit(text))

    def loss(trainable: Any, frozen: Any, batch: Batch, *, key: Any) -> tuple[Array, dict]:
        grounding = losses.lgr_ce(scores(trainable, frozen, batch, key=key), batch.answer)
        return losses.total(grounding)

    return Grounder(lambda key, frozen: {}, scores, loss)


def match(config: MatchConfig) -> Grounder:
    """Make MATCH: pool the views, normalise image and text, concatenate, 512 → 256 → 1.

    Args:
        config: sizes and pooling.

    Returns:
        A grounder whose batches need `views`; its loss is the smoothed cross entropy.

    Reference: arXiv 2107.12514, section 4.

    >>> import jax
    >>> model = match(MatchConfig(4, 3, hidden=(8,)))
    >>> batch = Batch(jnp.ones((2, 3)), jnp.ones((2, 5, 6), bool), jnp.ones((2, 5, 6, 4)))
    >>> jax.eval_shape(lambda: model.scores(model.init(jax.random.key(0), {}), {}, batch)).shape
    (2, 5)
    """
    widths = (config.width + config.text_width, *config.hidden, 1)
    graphdef, init = stateless(lambda rngs: Mlp(widths, config.dropout, rngs=rngs))

    def scores(
        trainable: Any, frozen: Any, batch: Batch, *, key: Any = None, train: bool = False
    ) -> Float[Array, "B K"]:
        view_key, drop_key = keys_for(key, 2, train=train)
        seen, mask = jnp.asarray(need(batch.views, "views")), jnp.asarray(batch.mask)
        pooled = unit(views.pool(seen, mask, config.pooling, view_key))
        joined = beside(pooled, unit(jnp.asarray(batch.text)))
        head = nnx.merge(graphdef, trainable["head"])
        return head(joined, drop_key if train else None)[..., 0]

    def loss(trainable: Any, frozen: Any, batch: Batch, *, key: Any) -> tuple[Array, dict]:
        found = scores(trainable, frozen, batch, key=key, train=True)
        return losses.total(losses.lgr_ce(found, batch.answer, config.smoothing))

    return Grounder(lambda key, frozen: {"head": init(key)}, scores, loss)


def beside(images: Float[Array, "B K D"], text: Float[Array, "B L"]) -> Float[Array, "B K W"]:
    """Set each row's text beside each of its candidates; W = D + L.

    >>> beside(jnp.ones((1, 2, 1)), jnp.zeros((1, 1))).tolist()
    [[[1.0, 0.0], [1.0, 0.0]]]
    """
    wide = jnp.broadcast_to(text[:, None], (*images.shape[:2], text.shape[1]))
    return jnp.concatenate([images, wide], -1)


def need(part: Any, name: str) -> Any:
    """Give a part of a batch back, or say that it is lacking.

    Raises:
        UserError: when it is None.

    >>> need(3, "views")
    3
    """
    if part is None:
        raise UserError(
            f"the batch has no {name}; this grounder reads them; fill Batch.{name}, or choose a "
            "grounder that does without"
        )
    return part
