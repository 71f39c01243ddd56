"""GPT-2: learned positions, fused query/key/value, matrices [in, out].

Reference: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from collections.abc import Mapping
from typing import Any

from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families.fields import Fields
from jaxsys.models.lm.layout import Layout

LAYOUT = Layout(
    embed="wte",
    positions="wpe",
    blocks="h",
    final_norm="ln_f",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    attention="attn",
    qkv="attn.c_attn",
    out="attn.c_proj",
    gate="",
    up="mlp.c_fc",
    down="mlp.c_proj",
    in_out=True,
)


def sizes(fields: Fields) -> dict[str, Any]:
    """Read what GPT-2 and GPT-J share, as `LMConfig` keyword arguments.

    >>> sizes(Fields({"vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 1}))["ffn_width"]
    32
    """
    found = fields.multi_head("n_embd", "n_head", "n_layer")
    return {
        **found,
        "ffn_width": fields.take("n_inner", 4 * found["width"]),
        "max_positions": fields.take("n_positions", 1024),
        "activation": fields.take("activation_function", "gelu_new"),
        "norm_eps": fields.take("layer_norm_epsilon", 1e-5),
        "ffn_bias": True,
        "init_std": fields.take("initializer_range", 0.02),
        "prefix": "transformer",
        **fields.tokens(),
    }


def sizes_to_hf(config: LMConfig) -> dict[str, Any]:
    """Write what GPT-2 and GPT-J share.

    >>> sizes_to_hf(LMConfig("gpt2", 9, 8, 1, 2, 2, 4, 32, 16))["n_head"]
    2
    """
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.ffn_width,
        "n_positions": config.max_positions,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
    }


def from_hf(fields: Fields) -> LMConfig:
    """Read a gpt2 config.

    >>> hf = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 1}
    >>> from_hf(Fields(hf)).tied
    True
    """
    fields.fixed(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    fields.take("reorder_and_upcast_attn")  # a matter of half precision only
    tied = fields.take("tie_word_embeddings", True)
    return LMConfig(**sizes(fields), rope=None, tied=tied, qkv_bias=True, out_bias=True)


def to_hf(config: LMConfig) -> Mapping[str, Any]:
    """Write a gpt2 config.

    >>> to_hf(LMConfig("gpt2", 9, 8, 1, 2, 2, 4, 32, 16))["n_positions"]
    16
    """
    return sizes_to_hf(config)
