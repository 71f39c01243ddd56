"""LaGOR: look at two views of each object, and learn to say which views they are.

Axes: ``B`` rows, ``K`` candidates, ``V`` views, ``D`` image width, ``L`` text width.

Reference: arXiv 2107.12514, section 4, and the code that came with it (``rotator``).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsys.ground import losses, views
from jaxsys.ground.contract import Batch, Grounder, keys_for, stateless
from jaxsys.ground.layers import Mlp
from jaxsys.ground.match import beside, need
from jaxsys.models.encoder import unit


@dataclass(frozen=True)
class LagorConfig:
    """Describe LaGOR; the defaults are the released code's.

    Attributes:
        width: D.
        text_width: L.
        views: V, the classes of the view classifier.
        hidden: of the score head.
        view_hidden: of the view classifier.
        dropout: rate in both.
        smoothing: of the labels of both.
        view_weight: of the view classifier's loss.
        score_weight: of the grounding loss.

    >>> LagorConfig().score_weight
    0.2
    """

    width: int = 512
    text_width: int = 512
    views: int = 8
    hidden: tuple[int, ...] = (512, 256)
    view_hidden: tuple[int, ...] = (512, 256, 128, 64)
    dropout: float = 0.1
    smoothing: float = 0.1
    view_weight: float = 1.0
    score_weight: float = 0.2


def lagor(config: LagorConfig) -> Grounder:
    """Make LaGOR: two views of each candidate, their maximum scored as MATCH does.

        L = w_v · ½ Σ_{objects} [ CE(view | first) + CE(view | second) ] + w_s · CE(answer)

    with means over candidates where there are more than two. The first view is `Batch.first_view`
    where it is given (validation runs over all of them), else it is drawn; the second is drawn
    evenly, and may be the first again. Views are normalised before the maximum, which is not.

    The published recipe starts from a trained two-view MATCH at a learning rate of 5e-5: put its
    ``head`` into the parameters, ``{**init(key, {}), "head": match_params["head"]}``.

    Args:
        config: sizes and weights.

    Returns:
        A grounder whose batches need `views`; ``scores`` always needs a key.

    Reference: arXiv 2107.12514, section 4.

    >>> model = lagor(LagorConfig(4, 3, views=6, hidden=(8,), view_hidden=(8,)))
    >>> batch = Batch(jnp.ones((2, 3)), jnp.ones((2, 5, 6), bool), jnp.ones((2, 5, 6, 4)))
    >>> key = jax.random.key(0)
    >>> jax.eval_shape(lambda: model.scores(model.init(key, {}), {}, batch, key=key)).shape
    (2, 5)
    """
    score_widths = (config.width + config.text_width, *config.hidden, 1)
    view_widths = (config.width, *config.view_hidden, config.views)
    head, init_head = stateless(lambda rngs: Mlp(score_widths, config.dropout, rngs=rngs))
    guess, init_guess = stateless(lambda rngs: Mlp(view_widths, config.dropout, rngs=rngs))

    def init(key: Any, frozen: Any) -> Any:
        keys = jax.random.split(key)
        return {"head": init_head(keys[0]), "view": init_guess(keys[1])}

    def look(batch: Batch, key: Any) -> tuple[Array, Array]:
        """Give the two views' places [B, K, 2] and their normalised features."""
        mask = jnp.asarray(batch.mask)
        places = views.draw(mask, 2, key)
        if batch.first_view is not None:
            places = places.at[..., 0].set(jnp.asarray(batch.first_view))
        return places, views.take(unit(jnp.asarray(need(batch.views, "views"))), places)

    def score(trainable: Any, batch: Batch, seen: Array, key: Any) -> Float[Array, "B K"]:
        joined = beside(jnp.max(seen, 2), unit(jnp.asarray(batch.text)))
        return nnx.merge(head, trainable["head"])(joined, key)[..., 0]

    def scores(
        trainable: Any, frozen: Any, batch: Batch, *, key: Any = None, train: bool = False
    ) -> Float[Array, "B K"]:
        view_key, drop_key = keys_for(key, 2, train=train)
        _, seen = look(batch, view_key)
        return score(trainable, batch, seen, drop_key if train else None)

    def loss(trainable: Any, frozen: Any, batch: Batch, *, key: Any) -> tuple[Array, dict]:
        view_key, drop_key, guess_key = keys_for(key, 3, train=True)
        places, seen = look(batch, view_key)
        logits = nnx.merge(guess, trainable["view"])(seen, guess_key)
        view_loss = 2 * losses.lgr_ce(  # the first view's and the second's, each a mean
            logits.reshape(-1, config.views), places.reshape(-1), config.smoothing
        )
        found = score(trainable, batch, seen, drop_key)
        grounding = losses.lgr_ce(found, batch.answer, config.smoothing)
        right = jnp.mean(jnp.argmax(logits, -1) == places)
        parts = {"grounding": grounding, "view": view_loss, "view_accuracy": right}
        return config.view_weight * view_loss + config.score_weight * grounding, parts

    return Grounder(init, scores, loss)
