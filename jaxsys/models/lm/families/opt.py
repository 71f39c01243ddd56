"""OPT: learned positions from row 2 on, and the two odd arrangements of its 350M member.

Reference: Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (arXiv 2205.01068).
"""

from collections.abc import Mapping
from typing import Any

from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families.fields import Fields
from jaxsys.models.lm.layout import Layout

LAYOUT = Layout(
    embed="embed_tokens",
    positions="embed_positions",
    position_offset=2,
    project_in="project_in",
    project_out="project_out",
    final_norm="final_layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    out="self_attn.out_proj",
    mlp="",
    gate="",
    up="fc1",
    down="fc2",
)


def from_hf(fields: Fields) -> LMConfig:
    """Read an opt config.

    >>> hf = {"model_type": "opt", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
    ...       "num_attention_heads": 2, "ffn_dim": 16, "word_embed_proj_dim": 4}
    >>> from_hf(Fields(hf)).embed_width
    4
    """
    sizes = fields.multi_head()
    narrow = fields.take("word_embed_proj_dim", sizes["width"])
    fields.fixed(layer_norm_elementwise_affine=True)
    pre_norm = fields.take("do_layer_norm_before", True)
    bias = fields.take("enable_bias", True)
    no_final_norm = fields.take("_remove_final_layer_norm", False)
    return LMConfig(
        **sizes,
        ffn_width=fields.need("ffn_dim"),
        max_positions=fields.take("max_position_embeddings", 2048),
        activation=fields.take("activation_function", "relu"),
        norm_eps=1e-5,
        rope=None,
        tied=fields.take("tie_word_embeddings", True),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=bias,
        pre_norm=pre_norm,
        final_norm=pre_norm and not no_final_norm,
        embed_width=0 if narrow == sizes["width"] else narrow,
        init_std=fields.take("init_std", 0.02),
        prefix="model.decoder",
        **fields.tokens(),
    )


def to_hf(config: LMConfig) -> Mapping[str, Any]:
    """Write an opt config.

    >>> to_hf(LMConfig("opt", 9, 8, 1, 2, 2, 4, 32, 16, rope=None))["word_embed_proj_dim"]
    8
    """
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "ffn_dim": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "activation_function": config.activation,
        "do_layer_norm_before": config.pre_norm,
        "_remove_final_layer_norm": config.pre_norm and not config.final_norm,
        "word_embed_proj_dim": config.embed_width or config.width,
        "enable_bias": config.out_bias,
        "init_std": config.init_std,
    }
