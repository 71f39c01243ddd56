"""Mediator: average the layers where experts agree, route those where they conflict.

Denoise, measure conflict by layer, choose the layers to route, average the others; a routed layer
is one dense part for all plus a sparse part for each expert. At a request, a router's weights blend
the sparse parts (`router`, `routed.Server`); `artefact` keeps all of it in one folder.

Reconstruction: the paper's body could not be read. Established are the averaging of layers below a
conflict threshold, routed layers kept as one dense and N sparse experts, task-level routing with
weights from uncertainty, and a denoising step. Every formula here is our reading of that, and every
choice a parameter.

Reference: arXiv 2502.04411.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import canonicalize_dtype

from jaxsys.core.errors import UserError
from jaxsys.core.tree import path_key
from jaxsys.merge.conflict import (
    DEFINITIONS,
    Conflicts,
    Definition,
    as_flat,
    conflicts,
    layer_name,
    task_vectors,
)
from jaxsys.merge.routed import Cost, Routed, cost
from jaxsys.merge.sparse import Bits, Layout, count_kept, encode


@dataclass(frozen=True)
class LayerChoice:
    """Say which layers are routed, from their conflict d_l.

    Reconstruction: a reviewer describes the k most conflicting layers, another misses a threshold.

    Attributes:
      rule: ``gaussian``: d_l > μ + value σ over the layers; ``quantile``: d_l above that quantile;
        ``topk``: the value layers of most conflict; ``absolute``: d_l > value.
      value: λ, q, k or t.

    Raises:
      UserError: for another rule, or a value that the rule cannot take.

    >>> LayerChoice("topk", 2).value
    2
    """

    rule: Literal["gaussian", "quantile", "topk", "absolute"] = "gaussian"
    value: float | int = 1.0

    def __post_init__(self) -> None:
        known = ("gaussian", "quantile", "topk", "absolute")
        whole = self.rule != "topk" or (self.value >= 0 and self.value == int(self.value))
        share = self.rule != "quantile" or 0 <= self.value <= 1
        if self.rule not in known or not whole or not share:
            raise UserError(
                f"layers are chosen by {self.rule!r} with {self.value}; expected gaussian, "
                "quantile with a share, topk with a count, or absolute; change them"
            )


@dataclass(frozen=True)
class MediatorConfig:
    """Say how Mediator is built.

    Reconstruction: the defaults are ours.

    Attributes:
      quantile: q of the denoising before conflict is measured; 0 for none.
      conflict: definition of d_l.
      choice: which layers are routed.
      density: ρ of a sparse part.
      sparsify: ``magnitude``, or ``dare``: places drawn at random, values rescaled.
      dense: what a routed layer's dense part is: the ``mean`` of the experts, or the ``base``.
      bits: of a sparse value: 32, 16, 8, 4 or 2.
      layout: of sparse parts, see `sparse.encode`.

    Raises:
      UserError: for a density outside (0, 1] or an unknown word.

    >>> MediatorConfig(density=0.05).bits
    16
    """

    quantile: float = 0.8
    conflict: Definition = "pairwise_sign"
    choice: LayerChoice = field(default_factory=LayerChoice)
    density: float | int = 0.1
    sparsify: Literal["magnitude", "dare"] = "magnitude"
    dense: Literal["mean", "base"] = "mean"
    bits: Bits = 16
    layout: Layout = "auto"

    def __post_init__(self) -> None:
        count_kept(1, self.density)
        words = {
            "conflict": (self.conflict, DEFINITIONS),
            "sparsify": (self.sparsify, ("magnitude", "dare")),
            "dense": (self.dense, ("mean", "base")),
            "layout": (self.layout, ("auto", "mask", "index")),
        }
        for name, (word, known) in words.items():
            if word not in known:
                raise UserError(f"{name} is {word!r}; expected one of {', '.join(known)}")


class Mediated(NamedTuple):
    """Hold what came of building.

    Attributes:
      routed: what is stored and served.
      layers: names of the routed layers.
      conflicts: by tensor and layer.
      cost: bytes and work.

    >>> Mediated._fields
    ('routed', 'layers', 'conflicts', 'cost')
    """

    routed: Routed
    layers: tuple[str, ...]
    conflicts: Conflicts
    cost: Cost


def choose_layers(d: Mapping[str, float], choice: LayerChoice) -> tuple[str, ...]:
    """Pick the layers to route.

    Args:
      d: conflict by layer.
      choice: rule and value.

    Returns:
      Names, in the order of `d`.

    >>> choose_layers({"a": 0.1, "b": 0.9, "c": 0.2}, LayerChoice("gaussian", 1.0))
    ('b',)
    """
    values = np.array(list(d.values()), np.float64)
    if not values.size:
        return ()
    if choice.rule == "topk":
        most = np.argsort(-values, kind="stable")[: int(choice.value)]
        picked = np.isin(np.arange(values.size), most)
    elif choice.rule == "quantile":
        picked = values > np.quantile(values, choice.value)
    elif choice.rule == "gaussian":
        picked = values > values.mean() + choice.value * values.std()
    else:
        picked = values > choice.value
    return tuple(layer for layer, yes in zip(d, picked, strict=True) if yes)


def mediate(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    config: MediatorConfig = MediatorConfig(),
    *,
    key: jax.Array | None = None,
    dtype: Any = None,
    layer_of: Callable[[str], str] = layer_name,
    found: Conflicts | None = None,
) -> Mediated:
    """Build Mediator from experts of one base, a leaf at a time.

    Averaged layer: θ̄_l = θ_0,l + (1/N) Σ τ_n,l. Routed layer: dense part θ̄_l (or θ_0,l), sparse
    part s_n = sparsify(θ_n − θ̄_l, ρ).

    Reconstruction: see the module.

    Args:
      base: parameters that all experts began with: a tree, or a flat checkpoint (memory maps do).
      models: N experts.
      config: all choices.
      key: for DARE.
      dtype: of the dense parts; the base's by default.
      layer_of: path to layer.
      found: conflicts measured before, to save the first pass; they must be of these models.

    Returns:
      What is stored, and what it was chosen by.

    Raises:
      UserError: if the models are not of one form, or DARE lacks a key.

    Reference: arXiv 2502.04411.

    >>> base = {"h": {"0": {"w": np.zeros(2)}, "1": {"w": np.zeros(2)}}}
    >>> a = {"h": {"0": {"w": np.ones(2)}, "1": {"w": np.ones(2)}}}
    >>> b = {"h": {"0": {"w": np.ones(2)}, "1": {"w": -np.ones(2)}}}
    >>> mediate(base, [a, b], MediatorConfig(choice=LayerChoice("absolute", 0.5))).layers
    ('h.1',)
    """
    if config.sparsify == "dare" and key is None:
        raise UserError("sparsify is 'dare' and there is no key; it draws at random; give a key")
    flat, others = as_flat(base), [as_flat(model) for model in models]
    found = found or conflicts(flat, others, quantile=config.quantile, layer_of=layer_of)
    layers = choose_layers(found.of_layers(config.conflict), config.choice)
    shared, parts = {}, {}
    for path, origin, stack in task_vectors(flat, others):
        mean = stack.mean(0)
        routed = layer_of(path) in layers
        if routed and config.dense == "base":
            mean = np.zeros_like(mean)
        target = canonicalize_dtype(flat[path].dtype if dtype is None else dtype)
        dense = jnp.asarray(origin + mean).astype(target)
        shared[path] = dense
        if routed:
            # Of what is stored: a part makes up for the rounding of the dense leaf too.
            rest = origin[None] + stack - np.asarray(dense.astype(jnp.float32))[None]
            parts[path] = encode(
                rest,
                config.density,
                layout=config.layout,
                bits=config.bits,
                keys=_keys(key, path, len(others)) if config.sparsify == "dare" else None,
            )
    routed_family = Routed(shared, parts)
    return Mediated(routed_family, layers, found, cost(routed_family))


def _keys(key: jax.Array | None, path: str, n: int) -> list[jax.Array]:
    assert key is not None
    own = path_key(key, path)
    return [jax.random.fold_in(own, i) for i in range(n)]
