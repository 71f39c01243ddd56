"""The models that a recipe names, opened: tensors by name, mapped from files."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.core.checkpoint import read_safetensors
from jaxsys.core.errors import UserError
from jaxsys.merge.adapters import AdaptedTensors, read_adapter, split_reference
from jaxsys.merge.tokenizers import TokenizerRule, read_tokenizer
from jaxsys.merge.vocabulary import (
    EmbeddingPlan,
    ModelRows,
    embedding_plan,
    has_token_rows,
    settle_tied,
)
from jaxsys.models.lm.load import read_config

# What configurations call the number of layers.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_NUMBER = re.compile(r"^(.*?\.)(\d+)(\..+)$")
_EMBEDDINGS = re.compile(r"(^|\.)(embed\w*|wte|wpe|tok_embeddings|word_embeddings)\.")


class Source(NamedTuple):
    """Hold one opened model.

    Attributes:
      name: as the recipe calls it.
      folder: of its other files; None for a lone safetensors file.
      tensors: by name; mapped, or made when asked for (with a LoRA adapter).
      shapes: shape and dtype by name.
      config: its config.json, or nothing.

    >>> Source("a", None, {}, {}, {}).folder is None
    True
    """

    name: str
    folder: Path | None
    tensors: Mapping[str, Any]
    shapes: dict[str, jax.ShapeDtypeStruct]
    config: dict[str, Any]


def open_source(reference: str) -> Source:
    """Open a model by its reference: a folder, a safetensors file, or either with ``+lora``.

    Args:
      reference: as recipes write it.

    Raises:
      UserError: for what is absent, damaged or of another form.

    >>> open_source("nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the model nowhere is neither a folder nor a safetensors file; ...
    """
    path, lora = split_reference(reference)
    place = Path(path)
    if not (place.is_dir() or place.suffix == ".safetensors" or place.name.endswith(".json")):
        raise UserError(
            f"the model {path} is neither a folder nor a safetensors file; download it and give "
            "its folder"
        )
    tensors: Mapping[str, Any] = read_safetensors(place)
    if lora is not None:
        tensors = AdaptedTensors(tensors, read_adapter(lora))
    shapes = (
        tensors.shapes
        if isinstance(tensors, AdaptedTensors)
        else {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tensors.items()}
    )
    folder = place if place.is_dir() else None
    has_config = folder is not None and (folder / "config.json").is_file()
    config = read_config(folder / "config.json") if folder and has_config else {}
    return Source(reference, folder, tensors, shapes, config)


def settle_sources(
    sources: Sequence[Source], base: int, rule: TokenizerRule | None
) -> tuple[list[Source], EmbeddingPlan | None, bool | None]:
    """Bring vocabularies and tied embeddings of all models together.

    Args:
      sources: all models.
      base: which of them gives the tokenizer.
      rule: of the recipe.

    Returns:
      The sources, with tied matrices named where others have them; how rows move, or None; and
      whether the result's embeddings are tied, or None where no configuration says it.

    Raises:
      UserError: as `embedding_plan`.

    >>> settle_sources([Source("a", None, {}, {}, {})], 0, None)[1:]
    (None, None)
    """
    tied: bool | None = None
    embeds = [next((n for n in s.shapes if _is_embedding(n)), None) for s in sources]
    known = all(s.config for s in sources)
    if known and len(set(embeds)) == 1 and embeds[0] is not None:
        ties = [bool(s.config.get("tie_word_embeddings", _has_no_head(s))) for s in sources]
        if any(ties) and "lm_head.weight" in {n for s in sources for n in s.shapes}:
            tensors, tied = settle_tied([s.tensors for s in sources], ties, embeds[0])
            shapes, _ = settle_tied([s.shapes for s in sources], ties, embeds[0])
            sources = [
                s._replace(tensors=t, shapes=h)
                for s, t, h in zip(sources, tensors, shapes, strict=True)
            ]
    models = []
    for source, embed in zip(sources, embeds, strict=True):
        if embed is None:
            if rule is None:
                return list(sources), None, tied
            raise UserError(f"{source.name} has no embedding; a tokenizer rule needs one in each")
        file = source.folder / "tokenizer.json" if source.folder else None
        own = read_tokenizer(file) if file is not None and file.is_file() else None
        models.append(ModelRows(source.name, source.shapes[embed].shape[0], own))
    return list(sources), embedding_plan(models, base, rule), tied


def _has_no_head(source: Source) -> bool:
    return "lm_head.weight" not in source.shapes


def _is_embedding(name: str) -> bool:
    return has_token_rows(name) and not is_output(name)


def is_output(name: str) -> bool:
    """Say whether a tensor outside the layers stands behind them, as norms and heads do.

    >>> is_output("lm_head.weight"), is_output("model.embed_tokens.weight"), is_output("ln_f.bias")
    (True, False, True)
    """
    return "embed_out" in name or not _EMBEDDINGS.search(name)


def layer_prefix(source: Source) -> tuple[str, int]:
    """Find what stands before the number of a layer, and how many layers there are.

    Args:
      source: a model of any family: its tensors are named ``<prefix><number>.<rest>``.

    Returns:
      The prefix with its dot, and the number of layers.

    Raises:
      UserError: if no list of tensors, or more than one, numbers from 0 to the configured count.

    >>> shapes = {f"h.{i}.w": jax.ShapeDtypeStruct((1,), "float32") for i in range(3)}
    >>> layer_prefix(Source("a", None, {}, shapes, {}))
    ('h.', 3)
    """
    found: dict[str, set[int]] = {}
    for name in source.shapes:
        parts = split_layer(name)
        if parts:
            found.setdefault(parts[0], set()).add(parts[1])
    count = next((source.config[k] for k in LAYER_COUNTS if k in source.config), None)
    fits = {
        prefix: len(numbers)
        for prefix, numbers in found.items()
        if numbers == set(range(len(numbers))) and count in (None, len(numbers))
    }
    if len(fits) != 1:
        raise UserError(
            f"{source.name} has {len(fits)} stacks of layers ({', '.join(fits) or 'none'}) where "
            "slices need exactly one; merge it whole with models instead of slices"
        )
    return next(iter(fits.items()))


def split_layer(name: str) -> tuple[str, int, str] | None:
    """Split a tensor's name at its first number.

    >>> split_layer("model.layers.3.mlp.experts.0.w"), split_layer("ln.w")
    (('model.layers.', 3, '.mlp.experts.0.w'), None)
    """
    found = _NUMBER.match(name)
    return (found[1], int(found[2]), found[3]) if found else None


def output_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """Give the text of the merged model's config.json.

    Args:
      config: of the base or first model.
      changes: ``layers``, ``dtype``, ``rows`` and ``tied``, those that are known.

    >>> output_config({"n_layer": 2, "dtype": "float32"}, {"layers": 3, "dtype": "bfloat16"})
    '{\\n  "n_layer": 3,\\n  "dtype": "bfloat16"\\n}\\n'
    """
    result = dict(config)
    if changes.get("layers") is not None:
        keys = [key for key in LAYER_COUNTS if key in result] or [LAYER_COUNTS[0]]
        for key in keys:
            result[key] = changes["layers"]
        for key, value in config.items():
            # Kinds of attention by layer and their like no longer fit.
            if isinstance(value, list) and len(value) == config.get(keys[0]) != changes["layers"]:
                raise UserError(
                    f"config.json lists {key} for each of {len(value)} layers, and the slices make "
                    f"{changes['layers']}; that is not supported; take slices of as many layers"
                )
    if changes.get("dtype") is not None:
        keys = [key for key in ("dtype", "torch_dtype") if key in result] or ["torch_dtype"]
        result |= dict.fromkeys(keys, str(np.dtype(changes["dtype"])))
    if changes.get("rows") is not None:
        result["vocab_size"] = changes["rows"]
    if changes.get("tied") is not None:
        result["tie_word_embeddings"] = changes["tied"]
    return json.dumps(result, indent=2) + "\n"
