"""GPT-NeoX and Pythia: partial rotary positions, fused heads, parallel blocks with two norms.

Reference: Black et al., "GPT-NeoX-20B" (arXiv 2204.06745); Pythia (arXiv 2304.01373).
"""

from collections.abc import Mapping
from typing import Any

from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families.fields import Fields, rope_fields
from jaxsys.models.lm.layout import Layout

LAYOUT = Layout(
    embed="embed_in",
    final_norm="final_layer_norm",
    head="embed_out",
    attention="attention",
    qkv="attention.query_key_value",
    qkv_per_head=True,
    out="attention.dense",
    gate="",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def from_hf(fields: Fields) -> LMConfig:
    """Read a gpt_neox config.

    >>> hf = {"model_type": "gpt_neox", "vocab_size": 9, "hidden_size": 32,
    ...       "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    >>> from_hf(Fields(hf)).rope.width
    4
    """
    sizes = fields.multi_head()
    theta, part = fields.take("rotary_emb_base", 10000.0), fields.take("rotary_pct", 0.25)
    bias = fields.take("attention_bias", True)
    return LMConfig(
        **sizes,
        ffn_width=fields.need("intermediate_size"),
        max_positions=fields.take("max_position_embeddings", 2048),
        activation=fields.take("hidden_act", "gelu"),
        norm_eps=fields.take("layer_norm_eps", 1e-5),
        rope=fields.rope(sizes["head_width"], theta, part),
        tied=fields.take("tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=True,
        parallel=fields.take("use_parallel_residual", True),
        init_std=fields.take("initializer_range", 0.02),
        prefix="gpt_neox",
        **fields.tokens(),
    )


def to_hf(config: LMConfig) -> Mapping[str, Any]:
    """Write a gpt_neox config.

    >>> config = LMConfig("gpt_neox", 9, 8, 1, 2, 2, 4, 32, 16, parallel=True)
    >>> to_hf(config)["rotary_pct"]
    1.0
    """
    assert config.rope is not None
    scaling = rope_fields(config.rope)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.rope.width / config.head_width,
        "rotary_emb_base": config.rope.theta,
        "rope_scaling": scaling["rope_scaling"],
        "attention_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel,
        "initializer_range": config.init_std,
    }
