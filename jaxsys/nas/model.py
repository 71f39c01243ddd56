"""What a proxy needs to know of a network: a few functions, most of which may be left out."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsys.core.errors import UserError
from jaxsys.nas import network, slots
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.output import Output, Site


class Model(NamedTuple):
    """A network as proxies see it.

    Attributes:
      init: key -> parameters.
      logits: (parameters, images `[B, Y, X, C]`) -> `[B, classes]`.
      nodes: (tree shaped like the parameters, reduce) -> `[S]`, one number for each layer's slot.
      present: `[S]`, which slots hold a layer.
      forward: (parameters, images, **options) -> `output.Output`, with the options `gates`,
        `observe` and `norm` of `network.apply`; proxies of activations need it.
      gates: number of images -> gates that are all 1, whose last axes are images and channels.
      gate_nodes: (means over the last two axes of a tree shaped like the gates) -> `[S]`, means
        over those channels that exist.
      pull: (parameters, features, cotangents) -> the cotangents of each block's output and input.
      blocks: which of the features exist, the last ones being copies otherwise; None: all do.

    >>> cell_model(jnp.array([2, 0, 1, 3, 4, 2]), NetworkConfig(4, 1)).present.shape
    (26,)
    """

    init: Callable[[Any], Any]
    logits: Callable[[Any, Any], Any]
    nodes: Callable[..., Any]
    present: Any
    forward: Callable[..., Output] | None = None
    gates: Callable[[int], Any] | None = None
    gate_nodes: Callable[[Any], Any] | None = None
    pull: Callable[[Any, Any, Any], Any] | None = None
    blocks: Any = None


def cell_model(arch: Any, config: NetworkConfig) -> Model:
    """Make the model of a NAS-Bench-201 cell; the cell may be traced.

    >>> model = cell_model(jnp.array([2, 0, 1, 3, 4, 2]), NetworkConfig(4, 1))
    >>> params = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.logits, params, jnp.ones((2, 8, 8, 3))).shape
    (2, 10)
    """

    def forward(params: Any, images: Any, **options: Any) -> Output:
        return network.apply(params, arch, images, **options)

    return Model(
        init=partial(network.init, config=config),
        logits=lambda params, images: forward(params, images).logits,
        nodes=lambda tree, reduce=jnp.sum: slots.nodes(tree, arch, reduce),
        present=slots.presence(arch, config),
        forward=forward,
        gates=partial(network.ones_gates, config),
        gate_nodes=slots.gate_nodes,
        pull=partial(network.pull_blocks, arch),
    )


def dense_model(widths: tuple[int, ...] = (3, 4, 2)) -> Model:
    """Make a small ReLU network on `[B, 1, 1, C]` images: the example of a whole `Model`.

    Args:
      widths: of the input, the hidden layers and the output.

    >>> model = dense_model()
    >>> model.forward(model.init(jax.random.key(0)), jnp.ones((5, 1, 1, 3))).logits.shape
    (5, 2)
    """
    pairs = tuple(pairwise(widths))

    def init(key: Any) -> Any:
        keys = jax.random.split(key, len(pairs))
        return [jax.random.normal(k, p) for k, p in zip(keys, pairs, strict=True)]

    def layer(i: int, w: Any, x: Any) -> Any:
        return (jax.nn.relu(x) if i else x) @ w

    def forward(
        params: Any, images: Any, *, gates: Any = None, observe: Any = None, norm: bool = True
    ) -> Output:
        x, features, seen = images, [], []
        for i, w in enumerate(params):
            y = layer(i, w, x)
            y = y if gates is None else y * gates[i][:, None, None, :]
            if observe is not None:
                seen.append(observe(x, y, Site(relu=i > 0, norm=False)))
            features.append(y)
            x = y
        observed = jax.tree.map(lambda *v: jnp.stack(v), *seen) if seen else None
        return Output(x[:, 0, 0], jnp.zeros(()), features, x, observed)

    def pull(params: Any, features: Any, cotangents: Any) -> list[tuple[Any, Any]]:
        found = []
        for i, g in enumerate(cotangents, 1):
            back = jax.vjp(partial(layer, i, params[i]), features[i - 1])[1]
            found.append((g, back(g)[0]))
        return found

    return Model(
        init=init,
        logits=lambda params, images: forward(params, images).logits,
        nodes=lambda tree, reduce=jnp.sum: jnp.stack([reduce(v) for v in tree]),
        present=jnp.ones(len(pairs), bool),
        forward=forward,
        gates=lambda batch: [jnp.ones((batch, c)) for c in widths[1:]],
        gate_nodes=jnp.stack,
        pull=pull,
    )


def any_model(init: Callable[[Any], Any], logits: Callable[[Any, Any], Any]) -> Model:
    """Make the model of any function of parameters and inputs; each matrix or kernel is a node.

    Args:
      init: key -> parameters, any pytree.
      logits: (parameters, inputs) -> `[B, classes]`.

    >>> model = any_model(lambda key: {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)},
    ...                   lambda p, x: x @ p["w"] + p["b"])
    >>> model.nodes(model.init(None)).tolist()
    [6.0]
    """

    def nodes(tree: Any, reduce: Callable[[Any], Any] = jnp.sum) -> Any:
        return jnp.stack([reduce(leaf) for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf) >= 2])

    shapes = jax.eval_shape(init, jax.random.key(0))
    layers = sum(leaf.ndim >= 2 for leaf in jax.tree.leaves(shapes))
    if not layers:
        raise UserError(
            "the network has no matrix among its parameters; proxies score layers with weights; "
            "pass parameters with leaves of two or more dimensions"
        )
    return Model(init, logits, nodes, jnp.ones(layers, bool))


def needs(model: Model, part: str, proxy: str) -> Any:
    """Return a part of the model that may have been left out.

    Raises:
      UserError: naming the proxy that cannot do without.

    >>> needs(any_model(lambda key: jnp.ones((2, 2)), lambda p, x: x @ p), "gates", "fisher")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: proxy 'fisher' needs the model's `gates`, which is missing; ...
    """
    found = getattr(model, part)
    if found is None:
        raise UserError(
            f"proxy {proxy!r} needs the model's `{part}`, which is missing; expected a model such "
            "as cell_model makes; pass that function to Model or leave the proxy out"
        )
    return found


def cross_entropy(logits: Float[Array, "B K"], labels: Any) -> Float[Array, ""]:
    """Average the cross-entropy of the right class, in nats.

    >>> round(float(cross_entropy(jnp.zeros((1, 2)), jnp.array([1]))), 4)
    0.6931
    """
    chosen = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def masked(values: Float[Array, "S"], present: Bool[Array, "S"]) -> Float[Array, "S"]:
    """Put 0 where no layer is.

    >>> masked(jnp.array([1.0, jnp.nan]), jnp.array([True, False])).tolist()
    [1.0, 0.0]
    """
    return jnp.where(present, values, 0.0)
