"""Decoder language models as checkpoints: one forward function over the tensors' own names.

>>> import jax
>>> from jaxsys.models import lm
>>> config = lm.config_from_hf({"model_type": "llama", "vocab_size": 97, "hidden_size": 32,
...     "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48})
>>> params = lm.init(jax.random.key(0), config)
>>> lm.apply(params, config, jax.numpy.ones((1, 5), int)).logits.shape
(1, 5, 97)
"""

from jaxsys.models.lm.blocks import block, half_block, half_step, layer, layer_prefix
from jaxsys.models.lm.cache import Cache, init_cache
from jaxsys.models.lm.config import LMConfig, Rope
from jaxsys.models.lm.convert import convert
from jaxsys.models.lm.decoder import Output, apply, embed, head, loss
from jaxsys.models.lm.execution import Execution, run_blocks, stack, unstack
from jaxsys.models.lm.families import FAMILIES, config_from_hf, config_to_hf
from jaxsys.models.lm.init import init, shapes
from jaxsys.models.lm.linear import linear
from jaxsys.models.lm.load import load, load_config, open_tensors, save, write_folder
from jaxsys.models.lm.names import find_model
from jaxsys.models.lm.sharding import shard, shard_batch
from jaxsys.models.lm.taps import Intervention, modules

__all__ = [
    "FAMILIES",
    "Cache",
    "Execution",
    "Intervention",
    "LMConfig",
    "Output",
    "Rope",
    "apply",
    "block",
    "config_from_hf",
    "config_to_hf",
    "convert",
    "embed",
    "find_model",
    "half_block",
    "half_step",
    "head",
    "init",
    "init_cache",
    "layer",
    "layer_prefix",
    "linear",
    "load",
    "load_config",
    "loss",
    "modules",
    "open_tensors",
    "run_blocks",
    "save",
    "shapes",
    "shard",
    "shard_batch",
    "stack",
    "unstack",
    "write_folder",
]
