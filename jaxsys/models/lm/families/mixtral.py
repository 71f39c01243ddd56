"""Mixtral, PhiMoE and Qwen3-MoE: Llama-like blocks with a mixture of experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import llama
from jaxsys.models.lm.families.fields import Fields
from jaxsys.models.lm.layout import Layout

LAYOUT = Layout(mlp="", moe="block_sparse_moe")
QWEN_LAYOUT = Layout(
    moe="mlp", expert_gate="gate_proj", expert_up="up_proj", expert_down="down_proj"
)


def from_hf(fields: Fields) -> LMConfig:
    """Read a mixtral or phimoe config.

    >>> hf = {"model_type": "mixtral", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
    ...       "num_attention_heads": 2, "intermediate_size": 4}
    >>> from_hf(Fields(hf)).experts
    8
    """
    phi = fields.model_type == "phimoe"
    kwargs = llama.common(fields, eps=1e-5, theta=1e6)
    bias = fields.take("attention_bias", False) if phi else False
    return LMConfig(
        **kwargs,
        norm="layer" if phi else "rms",
        qkv_bias=bias,
        out_bias=bias,
        head_bias=fields.take("lm_head_bias", False) if phi else False,
        windows=fields.windows(kwargs["layers"]),
        experts=fields.take("num_local_experts", 16 if phi else 8),
        experts_per_token=fields.take("num_experts_per_tok", 2),
        expert_width=kwargs["ffn_width"],
        router="sparsemixer" if phi else "softmax",
        router_jitter=fields.take("router_jitter_noise", 0.01),
    )


def to_hf(config: LMConfig) -> Mapping[str, Any]:
    """Write a mixtral or phimoe config.

    >>> config = LMConfig("mixtral", 9, 8, 1, 2, 2, 4, 8, 8, experts=3, experts_per_token=2)
    >>> to_hf(config)["num_local_experts"]
    3
    """
    hf = llama.common_to_hf(config) | {
        "sliding_window": max(config.windows, default=0) or None,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_jitter_noise": config.router_jitter,
    }
    if config.model_type == "phimoe":
        hf |= {"attention_bias": config.out_bias, "lm_head_bias": config.head_bias}
    return hf


def qwen_from_hf(fields: Fields) -> LMConfig:
    """Read a qwen3_moe config.

    >>> hf = {"model_type": "qwen3_moe", "vocab_size": 9, "hidden_size": 8, "num_experts": 16,
    ...       "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4,
    ...       "mlp_only_layers": [0]}
    >>> qwen_from_hf(Fields(hf)).is_sparse(0)
    False
    """
    kwargs = llama.common(fields, eps=1e-6)
    layers = kwargs["layers"]
    step, plain = max(1, fields.take("decoder_sparse_step", 1)), fields.take("mlp_only_layers", [])
    bias = fields.take("attention_bias", False)
    fields.take("max_window_layers")  # written by transformers 4, never used
    window = fields.take("sliding_window", 4096)
    window = window if fields.take("use_sliding_window", False) else 0
    # transformers 5 writes num_local_experts, 4 wrote num_experts.
    experts = fields.take("num_local_experts", fields.take("num_experts", 128))
    config = LMConfig(
        **kwargs,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=(window,) * layers if window else (),
        experts=experts,
        experts_per_token=fields.take("num_experts_per_tok", 8),
        expert_width=fields.take("moe_intermediate_size", 768),
        renormalise=fields.take("norm_topk_prob", False),
    )
    dense = tuple(i for i in range(layers) if i in plain or (i + 1) % step)
    return replace(config, dense_layers=dense)


def qwen_to_hf(config: LMConfig) -> Mapping[str, Any]:
    """Write a qwen3_moe config.

    >>> config = LMConfig("qwen3_moe", 9, 8, 2, 2, 2, 4, 8, 8, experts=3, experts_per_token=2,
    ...                   dense_layers=(1,))
    >>> qwen_to_hf(config)["mlp_only_layers"]
    [1]
    """
    window = max(config.windows, default=0)
    return llama.common_to_hf(config) | {
        "attention_bias": config.out_bias,
        "use_sliding_window": bool(window),
        "sliding_window": window or None,
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_width,
        "norm_topk_prob": config.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
    }
