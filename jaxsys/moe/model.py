"""Decoder language models whose feed-forward parts are mixtures of experts.

The parameters are the dense checkpoint's, without the feed-forward modules that a mixture stands
in the place of, and ``moe``: one layer's parameters (see `layer.init`) per such block, by its
number.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, path_key, unflatten
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import subtree
from jaxsys.models.lm.moe import feed_forward
from jaxsys.models.lm.taps import Probe
from jaxsys.moe import layer
from jaxsys.moe.contract import Axes, Dims, Info, MoEPlan, MoESpec, Routed

HERE = Axes()


class Output(NamedTuple):
    """Hold what `apply` computes.

    Attributes:
        logits: of the token that follows each position.
        infos: of each mixture, first block first.

    >>> Output._fields
    ('logits', 'infos')
    """

    logits: Float[Array, "B T V"]
    infos: tuple[Info, ...]


def mixtures(params: Mapping[str, Any]) -> tuple[int, ...]:
    """List the blocks that are mixtures.

    >>> mixtures({"moe": {"10": {}, "2": {}}})
    (2, 10)
    """
    return tuple(sorted(int(i) for i in params["moe"]))


def init(
    key: jax.Array,
    config: lm.LMConfig,
    spec: MoESpec,
    dims: Dims,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Draw a model's parameters.

    Args:
        key: random key.
        config: the dense model around the mixtures.
        spec: every mixture's parts.
        dims: every mixture's sizes; the width must be the model's.
        layers: blocks that are mixtures; all by default.

    Returns:
        Parameters.

    Raises:
        UserError: for a width that is not the model's, or a block that is not there.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> config = lm.LMConfig("llama", 19, 8, 2, 2, 2, 4, 8, 16)
    >>> mixtures(init(jax.random.key(0), config, spec, Dims(8, 8, 3), layers=[1]))
    (1,)
    """
    if dims.width != config.width:
        raise UserError(
            f"the mixtures are {dims.width} wide and the model {config.width}; expected one width; "
            "change dims"
        )
    chosen = check_layers(config, layers)
    params = without_ffn(lm.init(key, config), config, chosen)
    moe = {str(i): layer.init(path_key(key, f"moe.{i}"), spec, dims) for i in chosen}
    return {**params, "moe": moe}


def check_layers(config: lm.LMConfig, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Give the blocks that are to be mixtures, all by default.

    Raises:
        UserError: for none, one that is not there, or a model that has mixtures already.

    >>> check_layers(lm.LMConfig("llama", 19, 8, 2, 2, 2, 4, 8, 16), None)
    (0, 1)
    """
    if config.experts:
        raise UserError(
            f"the {config.model_type} model has {config.experts} experts of its own; expected a "
            "dense model; take one"
        )
    chosen = tuple(range(config.layers)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or not all(0 <= i < config.layers for i in chosen):
        raise UserError(
            f"the mixtures are to stand in blocks {list(layers or ())}; expected some from 0 to "
            f"{config.layers - 1}; change layers"
        )
    return chosen


def without_ffn(
    params: Mapping[str, Any], config: lm.LMConfig, layers: Sequence[int]
) -> dict[str, Any]:
    """Leave out the feed-forward modules of some blocks.

    >>> config = lm.LMConfig("llama", 19, 8, 1, 2, 2, 4, 8, 16)
    >>> params = without_ffn(lm.init(jax.random.key(0), config), config, [0])
    >>> "mlp" in params["model"]["layers"]["0"]
    False
    """
    layout = layout_of(config)
    modules = [path for path in (layout.gate, layout.up, layout.down) if path]
    gone = tuple(f"{lm.layer_prefix(config, i)}.{path}." for i in layers for path in modules)
    flat = flatten(params)
    return unflatten({name: flat[name] for name in flat if not name.startswith(gone)})


def apply(
    params: Mapping[str, Any],
    config: lm.LMConfig,
    spec: MoESpec,
    tokens: Integer[Array | np.ndarray, "B T"],
    plan: MoEPlan | None = None,
    *,
    axes: Axes = HERE,
    key: jax.Array | None = None,
) -> Output:
    """Compute the logits of the token that follows each position.

    Args:
        params: as from `init`.
        config: the dense model around the mixtures; static under jit.
        spec: every mixture's parts; static under jit.
        tokens: this rank's sequences.
        plan: one `LayerPlan` per mixture; by default nothing is cut.
        axes: of the mesh around; no tensor axis, as every rank holds whole sequences.
        key: for the gates' noise, this rank's own.

    Returns:
        Logits and what the mixtures tell.

    Raises:
        UserError: for a plan of another number of layers, or a tensor axis.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> config = lm.LMConfig("llama", 19, 8, 2, 2, 2, 4, 8, 16)
    >>> params = init(jax.random.key(0), config, spec, Dims(8, 8, 3))
    >>> apply(params, config, spec, jnp.ones((1, 5), jnp.int32)).logits.shape
    (1, 5, 19)
    """
    return _run(params, config, spec, tokens, plan, axes, key)[0]


def routes(
    params: Mapping[str, Any],
    config: lm.LMConfig,
    spec: MoESpec,
    tokens: Integer[Array | np.ndarray, "B T"],
) -> tuple[Routed, ...]:
    """Tell where every mixture sends every token, without noise.

    Args:
        params: as in `apply`, as are the others.

    Returns:
        What each mixture's gate gives, first block first.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> config = lm.LMConfig("llama", 19, 8, 1, 2, 2, 4, 8, 16)
    >>> params = init(jax.random.key(0), config, spec, Dims(8, 8, 3))
    >>> routes(params, config, spec, jnp.ones((1, 5), jnp.int32))[0].experts.shape
    (5, 2)
    """
    _, reads = _run(params, config, spec, tokens, None, HERE, None)
    gates = [params["moe"][str(i)]["gate"] for i in mixtures(params)]
    return tuple(
        spec.gate.route(gate, spec.hooks.before_moe_start(h), None, ())
        for gate, h in zip(gates, reads, strict=True)
    )


def _run(
    params: Mapping[str, Any],
    config: lm.LMConfig,
    spec: MoESpec,
    tokens: Array | np.ndarray,
    plan: MoEPlan | None,
    axes: Axes,
    key: jax.Array | None,
) -> tuple[Output, list[Array]]:
    """Run the model; beside its output, what each mixture reads."""
    numbers = mixtures(params)
    plan = MoEPlan((layer.ONE,) * len(numbers)) if plan is None else plan
    if len(plan.layers) != len(numbers):
        raise UserError(
            f"the plan has {len(plan.layers)} layers and the model {len(numbers)} mixtures; "
            "expected one of each; plan anew"
        )
    if axes.tensor is not None:
        raise UserError(
            f"the tensor axis is {axes.tensor!r}, but the attention of this model is not sharded; "
            "expected None; use the data and expert axes"
        )
    layout, infos, reads = layout_of(config), [], []
    x = lm.embed(params, config, jnp.asarray(tokens))
    for i in range(config.layers):
        own = lm.layer(params, config, i)
        x, h = lm.half_block(own, config, i, x)
        if i in numbers:
            noise = None if key is None else jax.random.fold_in(key, i)
            at = plan.layers[len(infos)]
            y, info = layer.apply(params["moe"][str(i)], h, spec, at, axes=axes, key=noise)
            infos.append(info)
            reads.append(h)
        else:
            names = (layout.gate, layout.up, layout.down)
            y = feed_forward(own, config, names, h, Probe((), ()), in_out=layout.in_out)
        x = x + y
    return Output(lm.head(params, config, x), tuple(infos)), reads


def loss(
    params: Mapping[str, Any],
    config: lm.LMConfig,
    spec: MoESpec,
    tokens: Integer[Array | np.ndarray, "B T"],
    plan: MoEPlan | None = None,
    *,
    axes: Axes = HERE,
    key: jax.Array | None = None,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], tuple[Info, ...]]]:
    """Average the cross-entropy of this rank's next tokens and add the mixtures' own losses.

    Args:
        params: as in `apply`, as are the others.
        tokens: all but the last of each row are read, all but the first predicted.

    Returns:
        The sum, to be minimised; and beside it the cross-entropy alone, in nats per token, and
        what the mixtures tell.

    >>> from jaxsys.moe.experts import swiglu
    >>> from jaxsys.moe.gates import noisy_top_k
    >>> from jaxsys.moe.order import sparse_order
    >>> spec = MoESpec(noisy_top_k(2), sparse_order(), swiglu())
    >>> config = lm.LMConfig("llama", 19, 8, 1, 2, 2, 4, 8, 16)
    >>> params = init(jax.random.key(0), config, spec, Dims(8, 8, 3))
    >>> total, (nats, _) = loss(params, config, spec, jnp.ones((1, 6), jnp.int32))
    >>> bool(total > nats)
    True
    """
    tokens = jnp.asarray(tokens)
    out = apply(params, config, spec, tokens[:, :-1], plan, axes=axes, key=key)
    logits = out.logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    nats = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)
    total = nats + sum((info.loss for info in out.infos), jnp.zeros(()))
    return total, (nats, out.infos)


def ffn_of(params: Mapping[str, Any], config: lm.LMConfig, i: int) -> dict[str, Array]:
    """Give block i's feed-forward matrices as [in, out], and biases, by the experts' names.

    >>> config = lm.LMConfig("llama", 19, 8, 1, 2, 2, 4, 12, 16)
    >>> ffn_of(lm.init(jax.random.key(0), config), config, 0)["down"].shape
    (12, 8)
    """
    layout = layout_of(config)
    own = lm.layer(params, config, i)
    found = {}
    for role in ("gate", "up", "down"):
        path = getattr(layout, role)
        if not path:
            continue
        module = subtree(own, path)
        found[role] = module["weight"] if layout.in_out else module["weight"].T
        if "bias" in module:
            found[f"{role}_bias"] = module["bias"]
    return found
