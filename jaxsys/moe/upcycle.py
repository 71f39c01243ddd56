"""Sparse upcycling: a dense model whose feed-forward parts become mixtures of copies of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, path_key, unflatten
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import expert_roles
from jaxsys.moe.contract import Dims, MoESpec
from jaxsys.moe.model import check_layers, ffn_of, mixtures, without_ffn


def upcycle(
    params: Mapping[str, Any],
    config: lm.LMConfig,
    spec: MoESpec,
    experts: int,
    key: jax.Array,
    *,
    layers: Sequence[int] | None = None,
    noise: float = 0.0,
    gate_scale: float = 1.0,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Turn blocks of a dense model into mixtures of E copies of their feed-forward part.

    Without noise, and where a token's weights add up to one and nobody is dropped, the result is
    the dense model, whatever the gate says.

    Args:
        params: the dense model's.
        config: the dense model.
        spec: the mixtures' parts; the experts must have the model's form (`swiglu` for Llama's,
            `gpt_ffn` for GPT-2's, of the same activation).
        experts: E.
        key: random key of the gates and the noise.
        layers: blocks that become mixtures; all by default.
        noise: standard deviation added to each expert's own matrices, relative to theirs, so that
            experts part sooner.
        gate_scale: factor on the gate's ``weight``; small, a token's choices start nearly even.
        scale: factor on what experts add; the reciprocal of the sum of a token's weights for a gate
            whose weights do not add up to one.

    Returns:
        Parameters for `model.apply`, in the dense model's dtype.

    Raises:
        UserError: for experts of another form than the model's, or blocks that are not there.

    Reference: arXiv 2212.05055.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> config = lm.LMConfig("llama", 19, 8, 1, 2, 2, 4, 12, 16)
    >>> dense = lm.init(jax.random.key(0), config)
    >>> upcycle(dense, config, spec, 3, jax.random.key(1))["moe"]["0"]["experts"]["up"].shape
    (3, 8, 12)
    """
    chosen = check_layers(config, layers)
    dims = Dims(config.width, config.ffn_width, experts)
    moe = {}
    for i in chosen:
        own_key = path_key(key, f"moe.{i}")
        dense = ffn_of(params, config, i)
        _check_form(dense, spec, config)
        copies = {}
        for name, leaf in dense.items():
            every = jnp.broadcast_to(leaf[None], (experts, *leaf.shape))
            if noise and leaf.ndim == 2:
                drawn = jax.random.normal(path_key(own_key, name), every.shape)
                every = every + (noise * jnp.std(leaf) * drawn).astype(leaf.dtype)
            copies[name] = every * scale if name.startswith("down") else every + 0
        gate = spec.gate.init(path_key(own_key, "gate"), dims)
        if "weight" in gate:
            gate = {**gate, "weight": gate["weight"] * gate_scale}
        moe[str(i)] = {"gate": gate, "experts": copies}
        if spec.shared is not None:
            shared = spec.shared.init(path_key(own_key, "shared"), replace(dims, experts=1))
            moe[str(i)]["shared"] = shared
    return {**without_ffn(params, config, chosen), "moe": moe}


def _check_form(dense: Mapping[str, Array], spec: MoESpec, config: lm.LMConfig) -> None:
    wanted, got = set(spec.experts.hidden_axis), set(dense)
    if wanted != got:
        raise UserError(
            f"the experts are made of {', '.join(sorted(wanted))} and the {config.model_type} "
            f"model's feed-forward part of {', '.join(sorted(got))}; expected the same; choose "
            "swiglu() for Llama's form, gpt_ffn() for GPT-2's"
        )


def to_mixtral(
    params: Mapping[str, Any], config: lm.LMConfig, k: int
) -> tuple[dict[str, Any], lm.LMConfig]:
    """Name a model's parameters as Mixtral's, for `models.lm`, transformers and others.

    Args:
        params: of a Llama-form model all of whose blocks are mixtures with GShard's or another
            gate that is softmax(KeepTopK(x W)) without noise, without shared experts.
        config: the dense model around.
        k: experts of a token.

    Returns:
        Parameters and configuration of `models.lm`.

    Raises:
        UserError: for a model that Mixtral's form does not hold.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> config = lm.LMConfig("llama", 19, 8, 1, 2, 2, 4, 12, 16)
    >>> dense = lm.init(jax.random.key(0), config)
    >>> to_mixtral(upcycle(dense, config, spec, 3, jax.random.key(1)), config, 2)[1].experts
    3
    """
    numbers = mixtures(params)
    first = params["moe"][str(numbers[0])]
    plain = config.model_type in ("llama", "mistral") and not config.qkv_bias
    whole = len(numbers) == config.layers and set(first) == {"gate", "experts"}
    fits = "weight" in first["gate"] and "gate" in first["experts"] and "bias" not in first["gate"]
    if not (plain and whole and fits):
        raise UserError(
            "Mixtral's form holds Llama's blocks, each with a softmax gate over the chosen experts "
            f"and SwiGLU; got a {config.model_type} model with mixtures in {len(numbers)} of "
            f"{config.layers} blocks of {', '.join(sorted(first))}; save this one in its own form"
        )
    experts, _, hidden = first["experts"]["up"].shape
    mixture = replace(
        config,
        model_type="mixtral",
        experts=experts,
        experts_per_token=k,
        expert_width=hidden,
    )
    flat = flatten({name: tree for name, tree in params.items() if name != "moe"})
    roles = dict(zip(("gate", "up", "down"), expert_roles(layout_of(mixture)), strict=True))
    for i in numbers:
        base = f"{lm.layer_prefix(mixture, i)}.{layout_of(mixture).moe}"
        own = params["moe"][str(i)]
        flat[f"{base}.gate.weight"] = own["gate"]["weight"].astype(own["experts"]["up"].dtype)
        for role, name in roles.items():
            for e in range(experts):
                flat[f"{base}.experts.{e}.{name}.weight"] = own["experts"][role][e].T
    return unflatten(flat), mixture
