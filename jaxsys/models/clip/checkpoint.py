"""CLIP on disk: folders of transformers, and files in OpenAI's form, which open_clip writes too.

OpenAI's form has other names, keeps query, key and value in one matrix, and the two projections
lie [in, out]. It says nothing of the heads, which are 64 wide in all of its models, nor of the
activation, which `open_clip_config.json` names where open_clip wrote the file.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.core.checkpoint import read_safetensors
from jaxsys.core.errors import UserError
from jaxsys.models.clip.config import ClipConfig, Tower, config_from_hf, config_to_hf, shapes
from jaxsys.models.encoder import save_folder, to_tree
from jaxsys.models.lm.load import read_config

_HEAD_WIDTH = 64
_KIND = "a CLIP with both towers"
_OPENAI_SIGN = "visual.conv1.weight"
# Sizes that OpenAI's archives carry beside the tensors.
_SIZES = ("input_resolution", "context_length", "vocab_size")
_FIXED = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d{1,4})\.(.+?)[._](weight|bias)")


def load(
    path: str | Path, *, activation: str | None = None, dtype: Any = None
) -> tuple[dict[str, Any], ClipConfig]:
    """Load a CLIP.

    Args:
        path: a folder of transformers (``config.json`` beside safetensors), or safetensors in
            OpenAI's form, alone or in a folder with ``open_clip_config.json``.
        activation: of a file in OpenAI's form; None takes what `open_clip_config.json` says, or
            without that file OpenAI's own ``quick_gelu``.
        dtype: of the parameters; None keeps the file's.

    Returns:
        Nested dict whose dotted paths are the names of the Hugging Face form, and the model.

    Raises:
        UserError: for files that are absent, damaged, or of another model.

    >>> import jax, tempfile
    >>> from jaxsys.models.clip import init
    >>> config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4, vocab_size=9)
    >>> folder = tempfile.mkdtemp()
    >>> _ = save(folder, init(jax.random.key(0), config), config)
    >>> load(folder)[1] == config
    True
    """
    path = Path(path)
    tensors = read_safetensors(path)
    beside = path if path.is_dir() else path.parent
    if _OPENAI_SIGN in tensors:
        described = beside / "open_clip_config.json"
        fields = read_config(described) if described.is_file() else {}
        config, tensors = from_openai(tensors, fields)
        if activation is not None:
            config = replace(
                config,
                vision=replace(config.vision, activation=activation),
                text=replace(config.text, activation=activation),
            )
    else:
        if activation is not None:
            raise UserError(
                f"activation is {activation!r}, and {path} has a config.json that names its own; "
                "leave it out"
            )
        config = config_from_hf(read_config(beside / "config.json"))
        buffers = ".embeddings.position_ids"
        tensors = {name: x for name, x in tensors.items() if not name.endswith(buffers)}
    return to_tree(tensors, shapes(config), str(path), _KIND, dtype), config


def save(path: str | Path, params: Mapping[str, Any], config: ClipConfig) -> list[Path]:
    """Write a folder that transformers loads as ``CLIPModel``.

    Args:
        path: the folder; it is made where it is absent.
        params: the model; merge adapters before (`jaxsys.models.lora.merge`).
        config: the model.

    Returns:
        The files.

    Raises:
        UserError: when the tensors are not those of the configuration.

    >>> import tempfile
    >>> config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4, vocab_size=9)
    >>> save(tempfile.mkdtemp(), {}, config)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: this tree does not fit its configuration: missing: ...
    """
    return save_folder(path, params, shapes(config), config_to_hf(config), _KIND)


def from_openai(
    tensors: Mapping[str, np.ndarray], open_clip: Mapping[str, Any]
) -> tuple[ClipConfig, dict[str, np.ndarray]]:
    """Rename the tensors of OpenAI's form, split the fused ones, and read off the sizes.

    Args:
        tensors: name to array.
        open_clip: the fields of ``open_clip_config.json``, or none.

    Returns:
        The model, and its tensors by their names in the Hugging Face form.

    Raises:
        UserError: for tensors of another architecture.

    >>> from_openai({"visual.conv1.weight": np.ones((8, 3, 4, 4))}, {})
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: this CLIP in OpenAI's form lacks ...
    """
    renamed: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name not in _SIZES and not name.endswith("attn_mask"):
            renamed |= _rename(name, array)
    return _sizes(renamed, open_clip), renamed


def _rename(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    if name == "logit_scale" and array.size == 1:
        # open_clip can be told to keep it as a vector.
        return {name: array.reshape(())}
    if name in _FIXED:
        flip = name in ("visual.proj", "text_projection") and array.ndim == 2
        return {_FIXED[name]: array.T if flip else array}
    module, _, kind = name.rpartition(".")
    if module in _NORMS:
        return {f"{_NORMS[module]}.{kind}": array}
    found = _BLOCK.fullmatch(name)
    if found is not None:
        visual, i, part, kind = found.groups()
        block = f"{'vision' if visual else 'text'}_model.encoder.layers.{i}"
        if part in _PARTS:
            return {f"{block}.{_PARTS[part]}.{kind}": array}
        if part == "attn.in_proj" and array.shape[0] % 3 == 0:
            thirds = np.split(array, 3)
            return {
                f"{block}.self_attn.{which}_proj.{kind}": third
                for which, third in zip("qkv", thirds, strict=True)
            }
    raise UserError(
        f"tensor {name[:80]!r} is in no CLIP of OpenAI's form with a vision transformer; expected "
        "names such as visual.conv1.weight; use another checkpoint"
    )


def _sizes(tensors: Mapping[str, np.ndarray], open_clip: Mapping[str, Any]) -> ClipConfig:
    quick, vision_width, text_heads = _described(open_clip)
    activation = "quick_gelu" if quick else "gelu"

    def tower(kind: str, head_width: int, heads: int | None) -> Tower:
        blocks = f"{kind}_model.encoder.layers."
        ffn_width, width = _shape(tensors, f"{blocks}0.mlp.fc1.weight", 2)
        layers = {name.split(".")[3] for name in tensors if name.startswith(blocks)}
        return Tower(
            width, len(layers), heads or max(1, width // head_width), ffn_width, activation
        )

    side = _shape(tensors, "vision_model.embeddings.patch_embedding.weight", 4)[-1]
    places = _shape(tensors, "vision_model.embeddings.position_embedding.weight", 2)[0]
    vocab = _shape(tensors, "text_model.embeddings.token_embedding.weight", 2)[0]
    return ClipConfig(
        vision=tower("vision", vision_width, None),
        text=tower("text", _HEAD_WIDTH, text_heads),
        projection_width=_shape(tensors, "visual_projection.weight", 2)[0],
        image_size=side * math.isqrt(max(1, places - 1)),
        patch_size=side,
        vocab_size=vocab,
        max_positions=_shape(tensors, "text_model.embeddings.position_embedding.weight", 2)[0],
        # The last of the vocabulary, as the tokenizer has it.
        eos_id=vocab - 1,
    )


def _shape(tensors: Mapping[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    found = tensors.get(name)
    if found is None or found.ndim != ndim or 0 in found.shape:
        what = "lacks" if found is None else f"has a shape {found.shape} of"
        raise UserError(
            f"this CLIP in OpenAI's form {what} {name} (as the Hugging Face form calls it); "
            "expected both towers whole; download the file again"
        )
    return found.shape


def _described(open_clip: Mapping[str, Any]) -> tuple[bool, int, int | None]:
    """Read the activation, the width of vision heads and the number of text heads."""
    model = open_clip.get("model_cfg", {})
    model = model if isinstance(model, dict) else {"vision_cfg": None}
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    if isinstance(vision, dict) and isinstance(text, dict):
        # OpenAI's own files come without such a description.
        quick = model.get("quick_gelu", not open_clip)
        width, heads = vision.get("head_width", _HEAD_WIDTH), text.get("heads")
        sizes = [width, 1 if heads is None else heads]
        if isinstance(quick, bool) and all(type(size) is int and size > 0 for size in sizes):
            return quick, width, heads
    raise UserError(
        "open_clip_config.json does not describe a CLIP with model_cfg.vision_cfg and text_cfg; "
        "expected the file that open_clip wrote beside the weights; mend or remove it"
    )
