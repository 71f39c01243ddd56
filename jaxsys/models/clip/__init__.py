"""CLIP: one encoder for pictures and one for text, whose vectors are near where they fit.

Parameters are a nested dict whose dotted paths are the tensor names of a Hugging Face checkpoint,
in its own orientation; checkpoints in OpenAI's form are renamed to them. No weights are shipped:
`load` takes a checkpoint of the user's, `init` draws fresh ones.

Reference: Radford et al., arXiv 2103.00020.

>>> import jax
>>> config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4, vocab_size=9)
>>> params = init(jax.random.key(0), config)
>>> images = jax.numpy.ones((2, 8, 8, 3))
>>> jax.eval_shape(lambda images: encode_image(params, config, images), images).features.shape
(2, 4)
"""

from jaxsys.models.clip.checkpoint import load, save
from jaxsys.models.clip.config import ClipConfig, Tower, config_from_hf, config_to_hf, shapes
from jaxsys.models.clip.tokens import ClipTokenizer, load_tokenizer
from jaxsys.models.clip.towers import (
    TEXT_LORA,
    VISION_LORA,
    Encoded,
    encode_image,
    encode_text,
    init,
    logits,
    preprocess,
)

__all__ = [
    "TEXT_LORA",
    "VISION_LORA",
    "ClipConfig",
    "ClipTokenizer",
    "Encoded",
    "Tower",
    "config_from_hf",
    "config_to_hf",
    "encode_image",
    "encode_text",
    "init",
    "load",
    "load_tokenizer",
    "logits",
    "preprocess",
    "save",
    "shapes",
]
