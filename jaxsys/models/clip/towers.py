"""CLIP's forward pass: patches or tokens, pre-norm blocks, one vector for the whole.

Axes: ``B`` batch, ``Y`` and ``X`` image rows and columns, ``T`` tokens, ``D`` width of a tower,
``E`` width of the space that both towers are projected into.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.models.clip.config import ClipConfig, Tower, shapes
from jaxsys.models.encoder import ACTIVATION, Projections, draw, self_attention, unit
from jaxsys.models.lm.linear import linear, normalise, rows_of
from jaxsys.models.pixels import prepare

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# What adapters usually change: query and value projections of every block.
VISION_LORA = ("vision_model.*.q_proj.weight", "vision_model.*.v_proj.weight")
TEXT_LORA = ("text_model.*.q_proj.weight", "text_model.*.v_proj.weight")
_ATTENTION = Projections("q_proj", "k_proj", "v_proj", "out_proj")


class Encoded(NamedTuple):
    """Hold what a tower makes of its inputs.

    Attributes:
        features: [B, E], projected, not normalised.
        tokens: [B, T, D], the last block's states: class token and patches as they are, or words
            after the final normalisation (transformers' ``last_hidden_state``).

    >>> Encoded(jnp.zeros((2, 4)), jnp.zeros((2, 5, 8))).features.shape
    (2, 4)
    """

    features: Array
    tokens: Array


def init(key: Array, config: ClipConfig) -> dict[str, Any]:
    """Draw fresh parameters: N(0, 0.02²), and the temperature 0.07 of the paper (section 2.5).

    Args:
        key: random key.
        config: the model.

    Returns:
        Nested dict whose dotted paths are the checkpoint's tensor names, float32.

    >>> import jax
    >>> config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4, vocab_size=9)
    >>> round(float(jnp.exp(init(jax.random.key(0), config)["logit_scale"])), 3)
    14.286
    """
    return draw(key, shapes(config)) | {"logit_scale": jnp.asarray(math.log(1 / 0.07))}


def preprocess(images: Sequence[Any], config: ClipConfig) -> Float[np.ndarray, "B Y X 3"]:
    """Make pictures ready for `encode_image`: resized, cut and normalised as CLIP was trained.

    Args:
        images: files, Pillow images, or uint8 arrays [rows, columns] or [rows, columns, 3].
        config: the model.

    Returns:
        float32, channels last.

    Raises:
        UserError: as `jaxsys.models.pixels.prepare` does.

    >>> config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4)
    >>> preprocess([np.zeros((12, 10, 3), np.uint8)], config).shape
    (1, 8, 8, 3)
    """
    return prepare(images, config.image_size, MEAN, STD)


def encode_image(
    params: Mapping[str, Any], config: ClipConfig, images: Float[Array, "B Y X 3"]
) -> Encoded:
    """Encode pictures.

    Args:
        params: the model; weights may be adapted or quantised.
        config: the model.
        images: as from `preprocess`.

    Returns:
        The projected class token, and the states of class token and patches [B, 1 + patches, D].

    Raises:
        UserError: for pictures of another size.

    Reference: arXiv 2103.00020, section 2.4; Dosovitskiy et al., arXiv 2010.11929.

    >>> import jax
    >>> config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4, vocab_size=9)
    >>> params, x = init(jax.random.key(0), config), jnp.ones((2, 8, 8, 3))
    >>> jax.eval_shape(lambda x: encode_image(params, config, x), x).tokens.shape
    (2, 5, 8)
    """
    batch, rows, columns, _ = images.shape
    if rows != config.image_size or columns != config.image_size:
        raise UserError(
            f"pictures have {rows} x {columns} pixels; this model takes {config.image_size} x "
            f"{config.image_size}; make them ready with clip.preprocess"
        )
    model = params["vision_model"]
    table = model["embeddings"]
    kernel, place = table["patch_embedding"]["weight"], table["position_embedding"]["weight"]
    # The order of a kernel's elements is channel, row, column.
    grid, side = config.image_size // config.patch_size, config.patch_size
    cut = images.astype(kernel.dtype).reshape(batch, grid, side, grid, side, 3)
    cut = cut.transpose(0, 1, 3, 5, 2, 4).reshape(batch, config.patches, -1)
    x = linear({"weight": kernel.reshape(kernel.shape[0], -1)}, cut)
    first = jnp.broadcast_to(table["class_embedding"][None, None], (batch, 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1) + place[None]
    x = normalise(model["pre_layrnorm"], x, "layer", config.vision.norm_eps)
    keep = jnp.ones((batch, x.shape[1], x.shape[1]), bool)
    x = _blocks(model, config.vision, x, keep)
    pooled = normalise(model["post_layernorm"], x[:, 0], "layer", config.vision.norm_eps)
    return Encoded(linear(params["visual_projection"], pooled), x)


def encode_text(
    params: Mapping[str, Any], config: ClipConfig, ids: Integer[Array, "B T"]
) -> Encoded:
    """Encode texts: causal attention, read off at the first end-of-text token.

    What follows that token changes neither the features nor the states before it, so padding
    needs no mask.

    Args:
        params: the model; weights may be adapted or quantised.
        config: the model.
        ids: as from `ClipTokenizer`; fewer columns than ``max_positions`` will do. A row without
            an end-of-text token is read off at its first token.

    Returns:
        The projected state of that token, and the states of all tokens [B, T, D].

    Raises:
        UserError: for texts that are too long.

    Reference: arXiv 2103.00020, section 2.4.

    >>> import jax
    >>> config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4, 9, eos_id=8)
    >>> params = init(jax.random.key(0), config)
    >>> ids = jnp.array([[7, 1, 8, 0]])
    >>> jax.eval_shape(lambda ids: encode_text(params, config, ids), ids).features.shape
    (1, 4)
    """
    batch, length = ids.shape
    if length > config.max_positions:
        raise UserError(
            f"texts have {length} tokens; this model takes up to {config.max_positions}; cut them"
        )
    model = params["text_model"]
    place = model["embeddings"]["position_embedding"]["weight"]
    x = rows_of(model["embeddings"]["token_embedding"]["weight"], ids) + place[:length][None]
    keep = jnp.broadcast_to(
        jnp.tril(jnp.ones((length, length), bool))[None], (batch,) + (length,) * 2
    )
    x = _blocks(model, config.text, x, keep)
    x = normalise(model["final_layer_norm"], x, "layer", config.text.norm_eps)
    at = jnp.argmax(ids if config.eos_id == 2 else ids == config.eos_id, axis=-1)
    pooled = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
    return Encoded(linear(params["text_projection"], pooled), x)


def _blocks(
    model: Mapping[str, Any], tower: Tower, x: Float[Array, "B T D"], keep: Bool[Array, "B T T"]
) -> Float[Array, "B T D"]:
    act = ACTIVATION[tower.activation]
    for i in range(tower.layers):
        block = model["encoder"]["layers"][str(i)]
        inner = normalise(block["layer_norm1"], x, "layer", tower.norm_eps)
        x = x + self_attention(block["self_attn"], _ATTENTION, inner, tower.heads, keep)
        inner = normalise(block["layer_norm2"], x, "layer", tower.norm_eps)
        x = x + linear(block["mlp"]["fc2"], act(linear(block["mlp"]["fc1"], inner)))
    return x


def logits(
    image_features: Float[Array, "I E"], text_features: Float[Array, "T E"], logit_scale: Array
) -> Float[Array, "I T"]:
    """Compare every picture with every text: exp(s) · cos(image, text).

    Args:
        image_features: as from `encode_image`.
        text_features: as from `encode_text`.
        logit_scale: s, the parameter ``logit_scale``.

    Returns:
        Softmax over texts classifies pictures, and over pictures finds them.

    Reference: arXiv 2103.00020, figure 3.

    >>> logits(jnp.eye(2), 3 * jnp.eye(2), jnp.log(2.0)).round(3).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    cosines = jnp.einsum("ie,te->it", unit(image_features), unit(text_features))
    return jnp.exp(logit_scale).astype(cosines.dtype) * cosines
