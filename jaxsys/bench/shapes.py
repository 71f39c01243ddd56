"""Named shapes of language models: sizes only, so that no model need be at hand."""

from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.models import lm


def _llama(width: int, layers: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **more,
    }


def _like(kind: str, base: dict[str, Any], **more: Any) -> dict[str, Any]:
    return base | {"model_type": kind} | more


_7B = _llama(4096, 32, 32, 11008)
# As the models' own config.json have them; `small` and `tiny-…` are for processors.
_SHAPES: dict[str, dict[str, Any]] = {
    "small": _llama(
        256, 4, 8, 688, vocab_size=2048, num_key_value_heads=4, max_position_embeddings=1024
    ),
    "llama-1.3b": _llama(2048, 24, 16, 5504),
    "llama2-7b": _7B,
    "llama2-13b": _llama(5120, 40, 40, 13824),
    "llama2-70b": _llama(8192, 80, 64, 28672, num_key_value_heads=8),
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
             "n_positions": 1024},
    "gptj-6b": {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28,
                "n_head": 16, "n_positions": 2048, "rotary_dim": 64},
    "pythia-6.9b": _like("gpt_neox", {k: v for k, v in _7B.items() if k != "rms_norm_eps"},
                         vocab_size=50432, intermediate_size=16384, max_position_embeddings=2048),
    "opt-6.7b": {"model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "ffn_dim": 16384,
                 "num_hidden_layers": 32, "num_attention_heads": 32,
                 "max_position_embeddings": 2048, "word_embed_proj_dim": 4096},
    "mistral-7b": _like("mistral", _7B, num_key_value_heads=8, intermediate_size=14336,
                        sliding_window=4096, max_position_embeddings=32768),
    "qwen2-7b": _like("qwen2", _llama(3584, 28, 28, 18944), vocab_size=152064,
                      num_key_value_heads=4, max_position_embeddings=32768),
    "qwen3-8b": _like("qwen3", _llama(4096, 36, 32, 12288), vocab_size=151936,
                      num_key_value_heads=8, head_dim=128, max_position_embeddings=40960),
    "mixtral-8x7b": _like("mixtral", _7B, num_key_value_heads=8, intermediate_size=14336,
                          num_local_experts=8, num_experts_per_tok=2,
                          max_position_embeddings=32768),
    "phi3.5-moe": _like("phimoe", _llama(4096, 32, 32, 6400), vocab_size=32064,
                        num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2,
                        max_position_embeddings=131072),
    "qwen3-30b-a3b": _like("qwen3_moe", _llama(2048, 48, 32, 6144), vocab_size=151936,
                           num_key_value_heads=4, head_dim=128, num_experts=128,
                           num_experts_per_tok=8, moe_intermediate_size=768,
                           max_position_embeddings=40960),
}  # fmt: skip

NAMES = tuple(_SHAPES)


def shape(name: str) -> lm.LMConfig:
    """Give the configuration of a named shape.

    Args:
      name: one of `NAMES`.

    Returns:
      The model's configuration.

    Raises:
      UserError: another name.

    Reference: Touvron et al., "Llama 2" (arXiv 2307.09288), for the Llama shapes; ``llama-1.3b`` is
    that of Sheared-LLaMA (arXiv 2310.06694).

    >>> shape("llama2-7b").width, shape("llama2-70b").kv_heads
    (4096, 8)
    """
    if name not in _SHAPES:
        raise UserError(f"shape {name!r} is not known; expected one of {', '.join(NAMES)}; name it")
    return lm.config_from_hf(_SHAPES[name])


def config_of(model: str) -> lm.LMConfig:
    """Give the configuration of a named shape or of a model's file or folder.

    Args:
      model: one of `NAMES`, or what `models.lm.find_model` takes; the weights are not read.

    Returns:
      The configuration.

    Raises:
      UserError: neither.

    >>> config_of("tiny").layers >= 1, config_of("small").heads
    (True, 8)
    """
    if model in _SHAPES:
        return shape(model)
    try:
        return lm.load_config(lm.find_model(model))
    except UserError as error:
        raise UserError(f"{error} (shapes known by name: {', '.join(NAMES)})") from None
