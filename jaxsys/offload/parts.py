"""Cut a language model into the parts that a plan places, and say which tensors each one holds."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, model_shapes
from jaxsys.offload.types import Part

_Key = tuple[int, str, int]  # layer, kind, expert


def part_names(config: LMConfig) -> dict[_Key, tuple[str, ...]]:
    """List the tensors of every part by their names in the checkpoint.

    A layer's norms and its router belong to its attention, which always runs with them; ``norms``
    is what follows the last layer besides the output matrix. A tied output matrix belongs to the
    head, so the embedding then holds nothing of its own.

    Args:
        config: the model.

    Returns:
        (layer, kind, expert) to names, in the order of use; layer -1 outside the layers, expert -1
        for other kinds.

    >>> config = LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> names = part_names(config)
    >>> list(names)
    [(-1, 'embed', -1), (0, 'attention', -1), (0, 'mlp', -1), (-1, 'norms', -1), (-1, 'head', -1)]
    >>> names[0, "mlp", -1][1]
    'model.layers.0.mlp.up_proj.weight'
    """
    layout = layout_of(config)
    blocks = join(config.prefix, layout.blocks) + "."
    found: dict[_Key, list[str]] = {(-1, "embed", -1): []}
    for i in range(config.layers):
        found[i, "attention", -1] = []
        for e in range(config.experts) if config.is_sparse(i) else (-1,):
            found[i, "mlp" if e < 0 else "expert", e] = []
    found |= {(-1, "norms", -1): [], (-1, "head", -1): []}
    first = {join(config.prefix, m) for m in (layout.embed, layout.positions, layout.project_in)}
    ffn = {module for module in (layout.gate, layout.up, layout.down) if module}
    for name in model_shapes(layout, config):
        module = name.rpartition(".")[0]
        if name.startswith(blocks):
            layer, _, inside = module.removeprefix(blocks).partition(".")
            _, _, number = inside.partition(f"{layout.moe}.experts.") if layout.moe else ("",) * 3
            if number:
                found[int(layer), "expert", int(number.partition(".")[0])].append(name)
            else:
                kind = "mlp" if inside in ffn else "attention"
                found[int(layer), kind, -1].append(name)
        elif module == join(config.prefix, layout.embed) and config.tied:
            found[-1, "head", -1].append(name)
        elif module in first:
            found[-1, "embed", -1].append(name)
        else:
            found[-1, "head" if module == layout.head else "norms", -1].append(name)
    return {key: tuple(names) for key, names in found.items()}


def parts_of(
    config: LMConfig,
    *,
    weight_bytes: float | int = 4,
    ffn_weight_bytes: float | int | None = None,
    sizes: Mapping[str, int] | None = None,
    frequency: Float[np.ndarray, "L E"] | None = None,
) -> tuple[Part, ...]:
    """Describe a model as parts, in the order of use.

    Args:
        config: the model.
        weight_bytes: bytes of a number; 2 in bfloat16, 1 in int8, 0.5625 in 4.5 bits.
        ffn_weight_bytes: the same for MLPs and experts where they are stored in another form.
        sizes: bytes of tensors by name where they are known, for example from the file's index.
        frequency: activations of each expert per token, [L, E], each row adding up to k; k / E
            without it.

    Returns:
        The parts. Their FLOPs are 2 for each number of a matrix; attention's products with past
        keys and values, which depend on the context, are left out.

    Raises:
        UserError: a frequency of another shape or below 0, or a size below 0.

    >>> config = LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> parts = parts_of(config, weight_bytes=2)
    >>> parts[2].kind, parts[2].n_bytes, parts[2].columns, parts[2].flops_per_token
    ('mlp', 9216, 48, 9216.0)
    """
    layout = layout_of(config)
    shapes = model_shapes(layout, config)
    if frequency is not None:
        frequency = _checked(config, np.asarray(frequency, np.float64))
    share = config.experts_per_token / config.experts if config.experts else 0.0
    found = []
    for (layer, kind, expert), names in part_names(config).items():
        per = weight_bytes
        if kind in ("mlp", "expert") and ffn_weight_bytes is not None:
            per = ffn_weight_bytes
        given = sizes or {}
        n_bytes = sum(given.get(name, math.ceil(per * math.prod(shapes[name]))) for name in names)
        matrices = [math.prod(shapes[name]) for name in names if len(shapes[name]) > 1]
        often = {"embed": 1.0 / config.vocab_size, "expert": share}.get(kind, 1.0)
        if kind == "expert" and frequency is not None:
            often = float(frequency[layer, expert])
        columns = {"mlp": config.ffn_width, "expert": config.expert_width}.get(kind, 0)
        flops = 0.0 if kind == "embed" else 2.0 * sum(matrices)
        found.append(Part(layer, kind, n_bytes, flops, columns, expert, often))  # type: ignore[arg-type]
    return tuple(found)


def _checked(config: LMConfig, frequency: np.ndarray) -> np.ndarray:
    wanted = (config.layers, config.experts)
    if frequency.shape != wanted or not (np.isfinite(frequency).all() and (frequency >= 0).all()):
        raise UserError(
            f"frequency has shape {frequency.shape}; expected activations per token of at least 0 "
            f"with shape {wanted}; pass what a trace of this model gives"
        )
    return frequency


def cache_bytes(
    config: LMConfig, n_tokens: int, *, batch: int = 1, number_bytes: float | int = 4
) -> int:
    """Count the bytes of one layer's keys and values, ``2 · B · K · S · C`` numbers.

    Args:
        config: the model.
        n_tokens: S, the most tokens a row may reach.
        batch: B.
        number_bytes: bytes of a number.

    Returns:
        Bytes of one layer.

    >>> cache_bytes(LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), 16)
    2048
    """
    return math.ceil(2 * batch * config.kv_heads * config.head_width * n_tokens * number_bytes)


def workspace_bytes(
    config: LMConfig, n_tokens: int, context: int, *, batch: int = 1, number_bytes: float | int = 4
) -> int:
    """Estimate the activations that live at once while a chunk passes the accelerator.

    The larger of the attention's (residual stream twice, queries, keys, values, and the scores of
    all heads), of a feed-forward part's (residual stream three times, gate, up and their product)
    and of the logits (float32, each row's last token).

    Args:
        config: the model.
        n_tokens: tokens of a row that pass at once.
        context: S, slots of the cache.
        batch: B.
        number_bytes: bytes of a number.

    Returns:
        Bytes.

    >>> workspace_bytes(LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), 4, 16)
    3840
    """
    rows = batch * n_tokens
    heads = (config.heads + 2 * config.kv_heads) * config.head_width + config.heads * context
    wide = max(config.expert_width, config.ffn_width)
    attention = rows * (2 * config.width + heads) * number_bytes
    ffn = rows * (3 * config.width + 3 * wide) * number_bytes
    logits = batch * (config.vocab_size + config.width) * 4
    return math.ceil(max(attention, ffn, logits))
