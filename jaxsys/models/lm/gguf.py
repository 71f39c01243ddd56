"""Llama-form GGUF files read as Hugging Face tensors."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.core.checkpoint import GgufFile, read_gguf
from jaxsys.core.errors import UserError
from jaxsys.models.lm.config import LMConfig, Rope

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def halves(name: str, array: np.ndarray, config: LMConfig) -> np.ndarray:
    """Reorder query and key rows from adjacent rotary pairs to pairs of halves.

    Row 2i + j of a head becomes row i + j · C/2, which is where the Hugging Face form has the
    j-th member of pair i; other tensors pass unchanged.

    Args:
        name: the tensor's Hugging Face name.
        array: rows of all heads, one after another.
        config: the model.

    Returns:
        The reordered copy, or the array itself.

    >>> config = LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 4)
    >>> halves("self_attn.q_proj.weight", np.arange(4)[:, None], config)[:, 0].tolist()
    [0, 2, 1, 3]
    """
    if not name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        return array
    pairs = array.reshape(-1, config.head_width // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(array.shape)


class HfTensors(Mapping[str, np.ndarray]):
    """Give a GGUF file's tensors by Hugging Face name, each dequantised when it is asked for.

    Args:
        file: the opened file.
        config: the model.

    Attributes:
        shapes: of all tensors by name, without their data.
        dtypes: of all tensors as they are given.

    >>> from jaxsys.core.checkpoint import GgufTensor, GgufTensors
    >>> info = {"output_norm.weight": GgufTensor("F32", (4,), 0, 16)}
    >>> file = GgufFile({}, GgufTensors(np.zeros(16, np.uint8), info))
    >>> HfTensors(file, LMConfig("llama", 9, 4, 1, 1, 1, 4, 4, 4)).shapes
    {'model.norm.weight': (4,)}
    """

    def __init__(self, file: GgufFile, config: LMConfig):
        self._file, self._config = file, config
        self._names = {hf_name(name): name for name in file.tensors}
        self.shapes = {new: file.tensors.info[old].shape for new, old in self._names.items()}
        self.dtypes = {new: file.tensors.info[old].dtype for new, old in self._names.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return halves(name, self._file.tensors[self._names[name]], self._config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def hf_name(name: str) -> str:
    """Translate one GGUF tensor name.

    Raises:
        UserError: for a tensor that a plain Llama does not have.

    >>> hf_name("blk.3.ffn_down.weight")
    'model.layers.3.mlp.down_proj.weight'
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in INSIDE:
        return f"model.layers.{parts[1]}.{INSIDE[parts[2]]}.{parts[3]}"
    raise UserError(
        f"tensor {name!r} of this GGUF file is not part of a plain Llama; expected embedding, "
        "attention, feed-forward and norms only; convert the Hugging Face form instead"
    )


def gguf_config(path: str | Path) -> tuple[LMConfig, GgufFile]:
    """Read the configuration of a GGUF file of architecture ``llama``.

    Args:
        path: the file.

    Returns:
        The configuration and the opened file.

    Raises:
        UserError: for another architecture, missing sizes, or scaled rotary positions.

    >>> gguf_config("nowhere.gguf")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    file = read_gguf(path)
    meta = file.metadata
    if meta.get("general.architecture") != "llama":
        raise UserError(
            f"{path} has architecture {meta.get('general.architecture')!r}; only 'llama' is read "
            "from GGUF; convert the Hugging Face form instead"
        )

    def read(key: str, default: Any = None) -> Any:
        value = meta.get(f"llama.{key}", default)
        if value is None:
            raise UserError(f"{path} lacks llama.{key}; expected a whole model; convert it anew")
        return value

    for key, neutral in (("expert_count", 0), ("rope.scaling.type", "none")):
        if read(key, neutral) != neutral:
            raise UserError(
                f"{path} has llama.{key} = {read(key)!r}, which is not read from GGUF; expected "
                f"{neutral!r}; convert the Hugging Face form instead"
            )
    heads, width = int(read("attention.head_count")), int(read("embedding_length"))
    if heads < 1:
        raise UserError(f"{path} has {heads} attention heads; expected some; convert it anew")
    head_width = int(read("attention.key_length", width // heads))
    embedding = file.tensors.info.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} has no token_embd.weight; expected a whole model; convert it anew")
    eos = meta.get("tokenizer.ggml.eos_token_id")
    config = LMConfig(
        model_type="llama",
        vocab_size=embedding.shape[0],
        width=width,
        layers=int(read("block_count")),
        heads=heads,
        kv_heads=int(read("attention.head_count_kv", heads)),
        head_width=head_width,
        ffn_width=int(read("feed_forward_length")),
        max_positions=int(read("context_length")),
        norm_eps=float(read("attention.layer_norm_rms_epsilon")),
        rope=Rope(
            theta=float(read("rope.freq_base", 10000.0)),
            width=int(read("rope.dimension_count", head_width)),
        ),
        tied="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_ids=() if eos is None else (int(eos),),
        pad_id=meta.get("tokenizer.ggml.padding_token_id"),
    )
    return config, file


def gguf_tensors(path: str | Path) -> tuple[LMConfig, HfTensors]:
    """Open a GGUF file as a configuration and Hugging Face tensors.

    >>> gguf_tensors("nowhere.gguf")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    config, file = gguf_config(path)
    return config, HfTensors(file, config)
