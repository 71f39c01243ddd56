"""BERT's forward pass, and the mean that makes one vector of a sentence.

Axes: ``B`` sentences, ``T`` tokens, ``D`` width.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.models.encoder import ACTIVATION, Projections, draw, self_attention, unit
from jaxsys.models.lm.linear import linear, normalise, rows_of
from jaxsys.models.minilm.config import BertConfig, shapes

# What adapters usually change: query and value projections of every block.
LORA = ("encoder.layer.*.self.query.weight", "encoder.layer.*.self.value.weight")
_ATTENTION = Projections("self.query", "self.key", "self.value", "output.dense")


def init(key: Array, config: BertConfig) -> dict[str, Any]:
    """Draw fresh parameters: N(0, 0.02²).

    Args:
        key: random key.
        config: the model.

    Returns:
        Nested dict whose dotted paths are the checkpoint's tensor names, float32.

    >>> import jax
    >>> config = BertConfig(8, 1, 2, 16, vocab_size=9, max_positions=4)
    >>> init(jax.random.key(0), config)["pooler"]["dense"]["weight"].shape
    (8, 8)
    """
    return draw(key, shapes(config))


def states(
    params: Mapping[str, Any],
    config: BertConfig,
    ids: Integer[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Compute the last block's states of every token.

    Args:
        params: the model; weights may be adapted or quantised.
        config: the model.
        ids: tokens, as from `SentenceTokenizer`.
        mask: which of them belong to the sentence; the others are not attended to.

    Returns:
        States; those of tokens outside the mask mean nothing.

    Raises:
        UserError: for sentences that are too long.

    >>> import jax
    >>> config = BertConfig(8, 1, 2, 16, vocab_size=9, max_positions=4)
    >>> params, ids = init(jax.random.key(0), config), jnp.array([[1, 2, 3]])
    >>> jax.eval_shape(lambda ids: states(params, config, ids, ids > 0), ids).shape
    (1, 3, 8)
    """
    batch, length = ids.shape
    if length > config.max_positions:
        raise UserError(
            f"sentences have {length} tokens; this model takes up to {config.max_positions}; cut "
            "them"
        )
    table = params["embeddings"]
    x = rows_of(table["word_embeddings"]["weight"], ids)
    x = x + table["token_type_embeddings"]["weight"][:1][None]
    x = x + table["position_embeddings"]["weight"][:length][None]
    x = normalise(table["LayerNorm"], x, "layer", config.norm_eps)
    keep = jnp.broadcast_to(mask[:, None], (batch, length, length))
    act = ACTIVATION[config.activation]
    for i in range(config.layers):
        block = params["encoder"]["layer"][str(i)]
        inner = self_attention(block["attention"], _ATTENTION, x, config.heads, keep)
        x = normalise(
            block["attention"]["output"]["LayerNorm"], x + inner, "layer", config.norm_eps
        )
        inner = linear(block["output"]["dense"], act(linear(block["intermediate"]["dense"], x)))
        x = normalise(block["output"]["LayerNorm"], x + inner, "layer", config.norm_eps)
    return x


def mean_pool(x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Average the states of a sentence's tokens: Σ m_t x_t / max(Σ m_t, 10⁻⁹).

    Args:
        x: states.
        mask: m, which of them count.

    Returns:
        Means; zero for a row without any.

    Reference: arXiv 1908.10084, section 3.

    >>> x = jnp.array([[[1.0], [3.0], [9.0]]])
    >>> mean_pool(x, jnp.array([[True, True, False]])).tolist()
    [[2.0]]
    """
    total = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1e-9).astype(x.dtype)


def encode(
    params: Mapping[str, Any],
    config: BertConfig,
    ids: Integer[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B D"]:
    """Encode sentences: the mean of their tokens' states, of length 1.

    Args:
        params: the model; weights may be adapted or quantised.
        config: the model.
        ids: tokens, as from `SentenceTokenizer`.
        mask: which of them belong to the sentence.

    Returns:
        Vectors; their products are cosines.

    Raises:
        UserError: for sentences that are too long.

    Reference: arXiv 1908.10084.

    >>> import jax
    >>> config = BertConfig(8, 1, 2, 16, vocab_size=9, max_positions=4)
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = init(jax.random.key(0), config)
    >>> jax.eval_shape(lambda ids: encode(params, config, ids, ids > 0), ids).shape
    (1, 8)
    """
    return unit(mean_pool(states(params, config, ids, mask), mask))
