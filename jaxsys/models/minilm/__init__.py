"""Sentence encoders of BERT's form, such as all-MiniLM-L6-v2: one vector for a sentence.

Post-norm blocks with exact GELU; the vector is the mean of the last block's states over the tokens
of the sentence, scaled to length 1. Parameters are a nested dict whose dotted paths are the
checkpoint's tensor names.

References: Devlin et al., arXiv 1810.04805; Reimers and Gurevych, arXiv 1908.10084; Wang et al.,
arXiv 2002.10957.

>>> import jax
>>> config = BertConfig(8, 1, 2, 16, vocab_size=9, max_positions=4)
>>> ids = jax.numpy.array([[1, 2, 0], [3, 4, 5]])
>>> params = init(jax.random.key(0), config)
>>> jax.eval_shape(lambda ids: encode(params, config, ids, ids > 0), ids).shape
(2, 8)
"""

from jaxsys.models.minilm.checkpoint import load, packaged, save
from jaxsys.models.minilm.config import BertConfig, config_from_hf, config_to_hf, shapes
from jaxsys.models.minilm.forward import LORA, encode, init, mean_pool, states
from jaxsys.models.minilm.tokens import SentenceTokenizer, load_tokenizer

__all__ = [
    "LORA",
    "BertConfig",
    "SentenceTokenizer",
    "config_from_hf",
    "config_to_hf",
    "encode",
    "init",
    "load",
    "load_tokenizer",
    "mean_pool",
    "packaged",
    "save",
    "shapes",
    "states",
]
