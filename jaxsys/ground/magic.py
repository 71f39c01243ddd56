"""MAGiC: one transformer over the views of all candidates and the words.

Axes: ``B`` rows, ``K`` candidates, ``V`` views, ``T`` words, ``D`` image width, ``L`` word width.

Reference: arXiv 2311.06694.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxsys.core.errors import UserError
from jaxsys.ground import losses, views
from jaxsys.ground.contract import Batch, Grounder, keys_for, stateless
from jaxsys.ground.layers import Block, Mlp
from jaxsys.ground.match import need
from jaxsys.models.encoder import unit


@dataclass(frozen=True)
class MagicConfig:
    """Describe MAGiC; sizes are the released configuration's.

    Attributes:
        width: D.
        word_width: of a word's feature.
        model_width: of the transformer.
        depth: its layers.
        heads: of attention.
        inner: width of its feed-forward parts ("filter size").
        head: widths of the score head's hidden layers.
        dropout: rate.
        drop_views: share of views that no token may attend to in a training step.
        drop_words: the same of words.
        smoothing: of the labels.

    Raises:
        UserError: for a width that the heads do not divide, or a share outside of 0 to 1.

    >>> MagicConfig().model_width
    256
    """

    width: int = 512
    word_width: int = 512
    model_width: int = 256
    depth: int = 3
    heads: int = 8
    inner: int = 256
    head: tuple[int, ...] = (128,)
    dropout: float = 0.1
    drop_views: float = 0.0
    drop_words: float = 0.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.model_width % self.heads:
            raise UserError(
                f"model_width is {self.model_width} and heads {self.heads}; every head needs the "
                "same whole width; choose a multiple"
            )
        if not (0 <= self.drop_views < 1 and 0 <= self.drop_words < 1):
            raise UserError(
                f"drop_views is {self.drop_views} and drop_words {self.drop_words}; expected "
                "shares from 0 to below 1; lower them"
            )


class _Magic(nnx.Module):
    def __init__(self, config: MagicConfig, *, rngs: nnx.Rngs):
        d = config.model_width
        self.image = nnx.Linear(config.width, d, rngs=rngs)
        self.word = nnx.Linear(config.word_width, d, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(d, rngs=rngs) for _ in range(2)])
        self.types = nnx.Param(0.02 * jax.random.normal(rngs.params(), (2, d)))
        sizes = config.heads, config.inner, config.dropout
        self.blocks = nnx.List([Block(d, *sizes, rngs=rngs) for _ in range(config.depth)])
        self.head = Mlp((d, *config.head, 1), config.dropout, rngs=rngs)

    def __call__(
        self,
        seen: Float[Array, "B K V D"],
        mask: Bool[Array, "B K V"],
        words: Float[Array, "B T L"],
        keep: Bool[Array, "B S"],
        key: Any,
    ) -> Float[Array, "B K"]:
        b, k, v, d = seen.shape
        keys = [None] * (len(self.blocks) + 1)
        if key is not None:
            keys = list(jax.random.split(key, len(keys)))
        images = self.norms[0](jax.nn.gelu(self.image(unit(seen.reshape(b, k * v, d)))))
        texts = self.norms[1](jax.nn.gelu(self.word(unit(words))))
        x = jnp.concatenate(
            [images + self.types[...][None, :1], texts + self.types[...][None, 1:]], 1
        )
        for block, drop in zip(self.blocks, keys[:-1], strict=True):
            x = block(x, keep, drop)
        pooled = views.pool(x[:, : k * v].reshape(b, k, v, -1), mask)
        return self.head(pooled, keys[-1])[..., 0]


def magic(config: MagicConfig) -> Grounder:
    """Make MAGiC: views of all candidates and words → transformer → maximum of each → score.

    There is no positional encoding, so neither the order of views nor that of candidates matters.

    Reconstruction: known are the sequence, type embeddings, three layers of width 256 with 8 heads,
    the maximum over an object's updated view tokens, 256 → 128 → 1, and that views and words are
    masked as attention keys in training. Chosen here: two types (view, word), so that any number of
    candidates can be scored; inputs normalised and passed through Linear-GELU-LayerNorm;
    normalisation before each layer; dropout 0.1; no masking by default, its rates being unknown.

    Args:
        config: sizes and rates.

    Returns:
        A grounder whose batches need `views`, `words` and `word_mask`.

    Reference: arXiv 2311.06694.

    >>> model = magic(MagicConfig(4, 3, model_width=8, depth=1, heads=2, inner=8, head=(4,)))
    >>> batch = Batch(jnp.ones((2, 3)), jnp.ones((2, 5, 6), bool), jnp.ones((2, 5, 6, 4)))
    >>> batch = batch._replace(words=jnp.ones((2, 7, 3)), word_mask=jnp.ones((2, 7), bool))
    >>> jax.eval_shape(lambda: model.scores(model.init(jax.random.key(0), {}), {}, batch)).shape
    (2, 5)
    """
    graphdef, init = stateless(lambda rngs: _Magic(config, rngs=rngs))

    def scores(
        trainable: Any, frozen: Any, batch: Batch, *, key: Any = None, train: bool = False
    ) -> Float[Array, "B K"]:
        key_views, key_words, drop_key = keys_for(key, 3, train=train)
        mask, words = jnp.asarray(batch.mask), jnp.asarray(need(batch.words, "words"))
        keep_views = mask.reshape(mask.shape[0], -1)
        keep_words = jnp.asarray(need(batch.word_mask, "word_mask"))
        if train:
            keep_views = _drop(keep_views, config.drop_views, key_views)
            keep_words = _drop(keep_words, config.drop_words, key_words)
        keep = jnp.concatenate([keep_views, keep_words], 1)
        seen = jnp.asarray(need(batch.views, "views"))
        network = nnx.merge(graphdef, trainable)
        return network(seen, mask, words, keep, drop_key if train else None)

    def loss(trainable: Any, frozen: Any, batch: Batch, *, key: Any) -> tuple[Array, dict]:
        found = scores(trainable, frozen, batch, key=key, train=True)
        return losses.total(losses.lgr_ce(found, batch.answer, config.smoothing))

    return Grounder(lambda key, frozen: init(key), scores, loss)


def _drop(keep: Bool[Array, "B N"], rate: float, key: Any) -> Bool[Array, "B N"]:
    return keep & jax.random.bernoulli(key, 1 - rate, keep.shape) if rate else keep
