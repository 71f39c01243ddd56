"""A language model with mixtures, cut at its experts for the backward loop of `reverse`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.core.tree import flatten, unflatten
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join
from jaxsys.moe import layer
from jaxsys.moe.contract import Axes, MoEPlan, MoESpec
from jaxsys.moe.dispatch import axis_size
from jaxsys.moe.model import mixtures
from jaxsys.moe.reverse import Parts, Stages, check_layers


def cut(params: Mapping[str, Any], config: lm.LMConfig) -> Parts:
    """Cut a model's parameters at its experts.

    Args:
        params: as from `model.init` or `upcycle`.
        config: the dense model around the mixtures.

    Returns:
        Embeddings; for each mixture the blocks since the last one and its gate and shared experts;
        the experts; the blocks after the last mixture and the head.

    >>> from jaxsys.moe import MoESpec, model
    >>> from jaxsys.moe.contract import Dims
    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> config = lm.LMConfig("llama", 19, 8, 2, 2, 2, 4, 8, 16)
    >>> parts = cut(model.init(jax.random.key(0), config, spec, Dims(8, 8, 3), [0]), config)
    >>> sorted(parts.last["model"]["layers"]), len(parts.experts)
    (['1'], 1)
    """
    numbers, layout = mixtures(params), layout_of(config)
    flat = flatten({name: tree for name, tree in params.items() if name != "moe"})
    ends = tuple(
        f"{name}."
        for name in (
            layout.head,
            join(config.prefix, layout.final_norm),
            *([join(config.prefix, layout.project_out)] if layout.project_out else []),
        )
    )
    bins: list[dict[str, Any]] = [{} for _ in range(len(numbers) + 2)]  # first, dense …, last
    blocks = {f"{lm.layer_prefix(config, i)}.": i for i in range(config.layers)}
    for name, leaf in flat.items():
        block = next((i for start, i in blocks.items() if name.startswith(start)), None)
        if block is not None:
            place = 1 + sum(n < block for n in numbers)
        else:
            place = len(numbers) + 1 if name.startswith(ends) else 0
        bins[place][name] = leaf
    first, *between, last = (unflatten(b) for b in bins)
    moe = [dict(params["moe"][str(i)]) for i in numbers]
    experts = tuple(m.pop("experts") for m in moe)
    dense = tuple({"lm": b, "moe": m} for b, m in zip(between, moe, strict=True))
    return Parts(first, dense, experts, last)


def paste(parts: Parts, numbers: tuple[int, ...]) -> dict[str, Any]:
    """Undo `cut`, for parameters or gradients.

    Args:
        parts: from `cut`, or gradients like it.
        numbers: the blocks that are mixtures.

    >>> paste(Parts({"a": 1}, ({"lm": {"b": 2}, "moe": {"gate": 3}},), (4,), {}), (0,))
    {'a': 1, 'b': 2, 'moe': {'0': {'gate': 3, 'experts': 4}}}
    """
    flat: dict[str, Any] = {}
    for tree in (parts.first, *(d["lm"] for d in parts.dense), parts.last):
        flat |= flatten(tree)
    moe = {
        str(i): {**dense["moe"], "experts": experts}
        for i, dense, experts in zip(numbers, parts.dense, parts.experts, strict=True)
    }
    return {**unflatten(flat), "moe": moe}


def lm_stages(
    config: lm.LMConfig,
    spec: MoESpec,
    numbers: tuple[int, ...],
    plan: MoEPlan,
    axes: Axes,
    key: jax.Array | None = None,
) -> Stages:
    """Make the functions that `reverse.value_and_grad` runs, for tokens [B, T + 1].

    The loss is the mean cross-entropy over all ranks' tokens plus the mixtures' own losses.

    Args:
        config: the dense model around the mixtures.
        spec: every mixture's parts.
        numbers: the blocks that are mixtures.
        plan: their degrees.
        axes: of the mesh; the ranks of all of them hold different sequences.
        key: for the gates' noise, this rank's own.

    Returns:
        The functions; each layer tells its `Info`.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> config = lm.LMConfig("llama", 19, 8, 2, 2, 2, 4, 8, 16)
    >>> stages = lm_stages(config, spec, (0, 1), MoEPlan(), Axes())
    >>> stages.first(lm.init(jax.random.key(0), config), jnp.ones((1, 6), int)).shape
    (1, 5, 8)
    """
    plans = check_layers(plan, len(numbers))

    def ranks() -> int:
        count = 1
        for name in axes.tokens:
            count *= axis_size(name)
        return count

    def first(params: Any, tokens: jax.Array) -> jax.Array:
        return lm.embed(params, config, tokens[:, :-1])

    def before(i: int, dense: Any, x: jax.Array) -> Any:
        for j in range(numbers[i - 1] + 1 if i else 0, numbers[i]):
            x = lm.block(lm.layer(dense["lm"], config, j), config, j, x)[0]
        x, h = lm.half_block(lm.layer(dense["lm"], config, numbers[i]), config, numbers[i], x)
        noise = None if key is None else jax.random.fold_in(key, numbers[i])
        buffer, kept = layer.prepare(dense["moe"], h, spec, plans[i], axes=axes, key=noise)
        return buffer, (x, kept)

    def after(i: int, dense: Any, out: jax.Array, kept: Any) -> Any:
        x, kept = kept
        y, info = layer.finish(dense["moe"], out, kept, spec, axes)
        return x + y, info.loss / ranks(), info

    def last(params: Any, first: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
        for j in range(numbers[-1] + 1, config.layers):
            x = lm.block(lm.layer(params, config, j), config, j, x)[0]
        whole = unflatten({**flatten(first), **flatten(params)})
        logits = lm.head(whole, config, x).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen) / ranks()

    return Stages(first, before, after, last)
