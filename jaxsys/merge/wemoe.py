"""WEMoE: the feed-forward weights of each layer are blended by a gate that reads the request.

Reconstruction: in the paper a layer's gate reads what enters the layer while the model runs. Here
all gates read it in one pass of the merged model that the gates begin with, so that a request's
weights are known before it runs, and are made and kept like those of every other routed merge.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.dtypes import canonicalize_dtype
from jaxtyping import Array, Bool, Float, Key

from jaxsys.core.errors import UserError
from jaxsys.core.tree import match
from jaxsys.merge.conflict import as_flat, check_family, layer_name, task_vectors
from jaxsys.merge.routed import Routed, materialise
from jaxsys.merge.sparse import Dense


class Gate(NamedTuple):
    """Hold a two-layer ReLU gate.

    >>> gate = init_gates(jax.random.key(0), ["h.0"], 4, 2)["h.0"]
    >>> gate.bias_out.tolist()
    [0.30000001192092896, 0.30000001192092896]
    """

    weight_in: Float[Array, "D D"]
    bias_in: Float[Array, "D"]
    weight_out: Float[Array, "N D"]
    bias_out: Float[Array, "N"]


@dataclass(frozen=True)
class GateConfig:
    """Say how gates are trained.

    Attributes:
      steps: of Adam; 1,000 in the paper, which finds 200 to be enough.
      lr: learning rate.

    >>> GateConfig().steps
    200
    """

    steps: int = 200
    lr: float = 1e-3


def wemoe(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    patterns: Sequence[str] = ("*.mlp.*",),
    scale: float | int = 0.3,
    dtype: Any = None,
) -> Routed:
    """Build WEMoE: θ_0 + Σ_n g_n τ_n for feed-forward weights, θ_0 + λ Σ_n τ_n for the others.

    Args:
      base: θ_0, a tree or a flat checkpoint.
      models: N experts.
      patterns: globs over the paths of weights that are gated.
      scale: λ.
      dtype: stored; the base's by default.

    Returns:
      The family; its weights are a mapping from path to [N], see `gate_weights`.

    Raises:
      UserError: if the models are not of one form, or no path matches.

    Reference: Tang et al., arXiv 2402.00433.

    >>> wemoe({"h.0.mlp.w": np.zeros(2)}, [{"h.0.mlp.w": np.ones(2)}]).parts["h.0.mlp.w"].values
    Array([[1., 1.]], dtype=float32)
    """
    flat, others = as_flat(base), [as_flat(model) for model in models]
    check_family(flat, others)
    names = tuple(flat)
    gated = {names[i] for pattern in patterns for i in match(names, pattern)}
    if not gated:
        raise UserError(
            f"no tensor matches {', '.join(patterns)}; expected globs over paths such as "
            f"{names[0]!r}; correct the patterns"
        )
    shared, parts = {}, {}
    for path, origin, stack in task_vectors(flat, others):
        target = canonicalize_dtype(flat[path].dtype if dtype is None else dtype)
        start = origin if path in gated else origin + scale * stack.sum(0)
        shared[path] = jnp.asarray(start).astype(target)
        if path in gated:
            parts[path] = Dense(jnp.asarray(stack).astype(target))
    return Routed(shared, parts)


def init_gates(
    key: Key[Array, ""], layers: Sequence[str], width: int, experts: int, *, start: float = 0.3
) -> dict[str, Gate]:
    """Make gates whose output is `start` for every expert, but for small random terms.

    Args:
      key: random key.
      layers: their names, as `layer_name` gives them.
      width: D of what they read.
      experts: N.
      start: bias of the output.

    >>> sorted(init_gates(jax.random.key(0), ["h.0", "h.1"], 4, 2))
    ['h.0', 'h.1']
    """
    gates = {}
    for i, layer in enumerate(layers):
        one, two = jax.random.split(jax.random.fold_in(key, i))
        gates[layer] = Gate(
            jax.random.normal(one, (width, width)) / np.sqrt(width),
            jnp.zeros(width),
            0.01 * jax.random.normal(two, (experts, width)) / np.sqrt(width),
            jnp.full(experts, start),
        )
    return gates


def gate_weights(
    gates: Mapping[str, Gate],
    hidden: Mapping[str, Float[Array, "B T D"]],
    mask: Bool[Array, "B T"],
    paths: Sequence[str],
    *,
    layer_of: Callable[[str], str] = layer_name,
) -> dict[str, Float[Array, "N"]]:
    """Compute the weights of every gated leaf: g(h) averaged over the tokens of the request.

    Args:
      gates: by layer.
      hidden: what enters each layer's feed-forward block, by layer.
      mask: tokens that are no padding.
      paths: of the gated leaves.
      layer_of: path to layer.

    >>> gates = init_gates(jax.random.key(0), ["h.0"], 4, 2)
    >>> h, mask = {"h.0": jnp.zeros((1, 3, 4))}, jnp.ones((1, 3), bool)
    >>> [round(float(g), 2) for g in gate_weights(gates, h, mask, ["h.0.mlp.w"])["h.0.mlp.w"]]
    [0.3, 0.3]
    """
    counts = mask.astype(jnp.float32)
    share = counts / jnp.maximum(jnp.sum(counts), 1.0)
    found = {}
    for layer, gate in gates.items():
        h = jax.nn.relu(hidden[layer] @ gate.weight_in.T + gate.bias_in[None, None])
        g = h @ gate.weight_out.T + gate.bias_out[None, None]
        found[layer] = jnp.einsum("btn,bt->n", g, share)
    return {path: found[layer_of(path)] for path in paths}


def train_gates(
    gates: Mapping[str, Gate],
    routed: Routed,
    hidden_fn: Callable[[Any, Any], tuple[Mapping[str, Array], Array]],
    entropy_fn: Callable[[Any, Any], jax.Array],
    batch_at: Callable[[int], Any],
    config: GateConfig = GateConfig(),
) -> tuple[dict[str, Gate], tuple[float, ...]]:
    """Train gates by Adam on the entropy of predictions, without labels.

    Args:
      gates: to begin with.
      routed: from `wemoe`; frozen.
      hidden_fn: (params, batch) to the inputs of the feed-forward blocks by layer, and the mask.
      entropy_fn: (params, batch) to the mean entropy of predictions.
      batch_at: step to a batch; all its rows are one request.
      config: how.

    Returns:
      The gates, and the entropy of each step.

    >>> routed = wemoe({"h.0.mlp.w": np.zeros(1)}, [{"h.0.mlp.w": np.ones(1)}])
    >>> hidden_fn = lambda p, x: ({"h.0": jnp.ones((1, 1, 2))}, jnp.ones((1, 1), bool))
    >>> loss = lambda p, x: jnp.sum((p["h"]["0"]["mlp"]["w"] - x) ** 2)
    >>> gates = init_gates(jax.random.key(0), ["h.0"], 2, 1)
    >>> _, losses = train_gates(gates, routed, hidden_fn, loss, lambda i: 1.0, GateConfig(50, 0.05))
    >>> losses[-1] < 0.01
    True
    """
    paths = tuple(routed.parts)
    reference = materialise(routed, even_weights(routed, 0.3))
    optimizer = optax.adam(config.lr)

    @jax.jit
    def step(gates: Any, memory: Any, routed: Routed, reference: Any, batch: Any) -> Any:
        hidden, mask = hidden_fn(reference, batch)

        def objective(gates: Any) -> Array:
            weights = gate_weights(gates, hidden, mask, paths)
            return entropy_fn(materialise(routed, weights), batch)

        loss, grads = jax.value_and_grad(objective)(gates)
        updates, memory = optimizer.update(grads, memory, gates)
        return optax.apply_updates(gates, updates), memory, loss

    trained: dict[str, Gate] = dict(gates)
    memory, losses = optimizer.init(trained), []
    for i in range(config.steps):
        trained, memory, loss = step(trained, memory, routed, reference, batch_at(i))
        losses.append(float(loss))
    return trained, tuple(losses)


def even_weights(routed: Routed, value: float) -> dict[str, Array]:
    """Give every gated leaf the same weight for all experts, as the gates begin with.

    >>> routed = wemoe({"h.0.mlp.w": np.zeros(1)}, [{"h.0.mlp.w": np.ones(1)}])
    >>> even_weights(routed, 0.5)["h.0.mlp.w"].tolist()
    [0.5]
    """
    counts = {path: jax.tree.leaves(part)[0].shape[0] for path, part in routed.parts.items()}
    return {path: jnp.full(n, value, jnp.float32) for path, n in counts.items()}
