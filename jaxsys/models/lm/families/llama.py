"""Llama 1 to 3, Mistral, Qwen2 and Qwen3: gated feed-forward, RMS norm, rotary positions."""

from collections.abc import Mapping
from typing import Any

from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families.fields import Fields, rope_fields
from jaxsys.models.lm.layout import Layout

LAYOUT = Layout()


def common(fields: Fields, eps: float, theta: float = 10000.0) -> dict[str, Any]:
    """Read what every Llama-like family shares, as `LMConfig` keyword arguments.

    Args:
        fields: the config being read.
        eps: the family's default of ``rms_norm_eps``.
        theta: the family's default of ``rope_theta``.

    Returns:
        Keyword arguments of `LMConfig`.

    >>> hf = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
    ...       "num_attention_heads": 2, "intermediate_size": 4}
    >>> common(Fields(hf), 1e-6)["head_width"]
    4
    """
    fields.fixed(rope_interleaved=False)
    heads, width = fields.need("num_attention_heads"), fields.need("hidden_size")
    head_width = fields.take("head_dim", width // heads)
    return {
        "model_type": fields.model_type,
        "vocab_size": fields.need("vocab_size"),
        "width": width,
        "layers": fields.layers(),
        "heads": heads,
        "kv_heads": fields.take("num_key_value_heads", heads),
        "head_width": head_width,
        "ffn_width": fields.need("intermediate_size"),
        "max_positions": fields.take("max_position_embeddings", 2048),
        "activation": fields.take("hidden_act", "silu"),
        "norm_eps": fields.take("rms_norm_eps", eps),
        "rope": fields.rope(head_width, theta),
        "tied": fields.take("tie_word_embeddings", False),
        "init_std": fields.take("initializer_range", 0.02),
        **fields.tokens(),
    }


def from_hf(fields: Fields) -> LMConfig:
    """Read a llama, mistral, qwen2 or qwen3 config.

    >>> hf = {"model_type": "qwen2", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
    ...       "num_attention_heads": 2, "intermediate_size": 4}
    >>> from_hf(Fields(hf)).qkv_bias
    True
    """
    kind = fields.model_type
    kwargs = common(fields, eps=1e-6)
    layers = kwargs["layers"]
    if kind == "qwen3" and not fields.take("head_dim", 0):
        kwargs["head_width"] = 128
        kwargs["rope"] = fields.rope(128)
    bias = fields.take("attention_bias", False) if kind in ("llama", "qwen3") else False
    if kind == "mistral":
        windows = fields.windows(layers, default=4096)
    else:
        windows = fields.windows(layers, default=4096, switch=True) if kind != "llama" else ()
    return LMConfig(
        **kwargs,
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        ffn_bias=fields.take("mlp_bias", False) if kind == "llama" else False,
        qk_norm=kind == "qwen3",
        windows=windows,
    )


def common_to_hf(config: LMConfig) -> dict[str, Any]:
    """Write what every Llama-like family shares.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> common_to_hf(config)["num_key_value_heads"]
    2
    """
    assert config.rope is not None
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_positions,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        **rope_fields(config.rope),
    }


def to_hf(config: LMConfig) -> Mapping[str, Any]:
    """Write a llama, mistral, qwen2 or qwen3 config.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> to_hf(config)["mlp_bias"]
    False
    """
    hf = common_to_hf(config)
    kind = config.model_type
    if kind in ("llama", "qwen3"):
        hf["attention_bias"] = config.out_bias
    if kind == "llama":
        hf["mlp_bias"] = config.ffn_bias
        return hf
    hf["sliding_window"] = max(config.windows, default=0) or None
    if kind != "mistral":
        hf["use_sliding_window"] = bool(config.windows)
        hf["layer_types"] = [
            "sliding_attention" if config.window(i) else "full_attention"
            for i in range(config.layers)
        ]
    return hf
