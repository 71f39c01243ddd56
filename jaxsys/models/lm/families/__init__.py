"""The supported families: where their tensors stand and how their ``config.json`` reads.

A family is one module with a `Layout`, a reader and a writer; adding one is one file and one line.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import gpt2, gpt_neox, gptj, llama, mixtral, opt
from jaxsys.models.lm.families.fields import Fields
from jaxsys.models.lm.layout import Layout


class Family(NamedTuple):
    """Hold what distinguishes a family on disk.

    >>> FAMILIES["llama"].architecture
    'LlamaForCausalLM'
    """

    architecture: str  # the class name that transformers writes and looks for
    layout: Layout
    from_hf: Callable[[Fields], LMConfig]
    to_hf: Callable[[LMConfig], Mapping[str, Any]]


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", gpt2.LAYOUT, gpt2.from_hf, gpt2.to_hf),
    "gptj": Family("GPTJForCausalLM", gptj.LAYOUT, gptj.from_hf, gptj.to_hf),
    "gpt_neox": Family("GPTNeoXForCausalLM", gpt_neox.LAYOUT, gpt_neox.from_hf, gpt_neox.to_hf),
    "opt": Family("OPTForCausalLM", opt.LAYOUT, opt.from_hf, opt.to_hf),
    "llama": Family("LlamaForCausalLM", llama.LAYOUT, llama.from_hf, llama.to_hf),
    "mistral": Family("MistralForCausalLM", llama.LAYOUT, llama.from_hf, llama.to_hf),
    "qwen2": Family("Qwen2ForCausalLM", llama.LAYOUT, llama.from_hf, llama.to_hf),
    "qwen3": Family("Qwen3ForCausalLM", llama.LAYOUT, llama.from_hf, llama.to_hf),
    "mixtral": Family("MixtralForCausalLM", mixtral.LAYOUT, mixtral.from_hf, mixtral.to_hf),
    "phimoe": Family("PhimoeForCausalLM", mixtral.LAYOUT, mixtral.from_hf, mixtral.to_hf),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", mixtral.QWEN_LAYOUT, mixtral.qwen_from_hf, mixtral.qwen_to_hf
    ),
}


def layout_of(config: LMConfig) -> Layout:
    """Give the names of the config's family.

    >>> layout_of(LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)).down
    'mlp.down_proj'
    """
    return FAMILIES[config.model_type].layout


def config_from_hf(hf: Mapping[str, Any]) -> LMConfig:
    """Read a parsed ``config.json``.

    Args:
        hf: its fields; those of transformers 4 and of 5 are understood.

    Returns:
        The configuration.

    Raises:
        UserError: for a family, a field or a value that is not supported, naming it.

    >>> config_from_hf({"model_type": "rwkv"})
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: model_type is 'rwkv'; supported are ...
    """
    kind = str(hf.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(
            f"model_type is {kind!r}; supported are {', '.join(sorted(FAMILIES))}; "
            "convert the model to one of these forms"
        )
    fields = Fields(hf)
    config = FAMILIES[kind].from_hf(fields)
    fields.close()
    _check(config)
    return config


def _check(config: LMConfig) -> None:
    if config.activation not in ("silu", "gelu", "gelu_new", "relu"):
        raise UserError(
            f"activation is {config.activation!r}; supported are silu, gelu, gelu_new and relu; "
            "use another checkpoint"
        )


def config_to_hf(config: LMConfig) -> dict[str, Any]:
    """Write the fields of a ``config.json``, the inverse of `config_from_hf`.

    Args:
        config: the model.

    Returns:
        Fields that transformers reads.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> config_from_hf(config_to_hf(config)) == config
    True
    """
    family = FAMILIES[config.model_type]
    eos = list(config.eos_ids)
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **family.to_hf(config),
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_id,
    }
