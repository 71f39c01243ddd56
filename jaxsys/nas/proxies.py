"""Zero-cost proxies from weights and their gradients: one number for each layer, and a total.

Every function takes a `Model`, parameters, images `[B, Y, X, C]`, labels `[B]` and a key, and
returns a `Score`. g is the gradient of the mean cross-entropy; sums run over the weights of
convolutions and linear layers, as in the usual code.

Reference: Abdelfattah et al., arXiv 2101.08134, for the set; each function names its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.nas.model import Model, cross_entropy, masked, needs


class Score(NamedTuple):
    """One proxy of one network.

    Attributes:
      total: the proxy as published.
      nodes: `[S]`, its share of each layer, 0 where there is none; None if it has no such parts.

    >>> Score(1.0, None).total
    1.0
    """

    total: Any
    nodes: Any


def _gradient(model: Model, params: Any, images: Any, labels: Any) -> Any:
    return jax.grad(lambda p: cross_entropy(model.logits(p, images), labels))(params)


def _norm(v: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.sum(jnp.square(v)))


def _summed(nodes: Float[Array, "S"]) -> Score:
    return Score(jnp.sum(nodes), nodes)


def params(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Count the weights of each layer.

    >>> from jaxsys.nas.model import any_model
    >>> m = any_model(lambda k: jnp.ones((3, 2)), lambda p, x: x @ p)
    >>> float(params(m, jnp.ones((3, 2)), None, None, None).total)
    6.0
    """
    return _summed(model.nodes(jax.tree.map(jnp.ones_like, theta)))


def flops(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Count multiply-adds on one image: a layer's weights times its output positions.

    >>> from jaxsys.nas.model import dense_model
    >>> m = dense_model()
    >>> x = jnp.ones((1, 1, 1, 3))
    >>> flops(m, m.init(jax.random.key(0)), x, None, None).nodes.tolist()
    [12.0, 8.0]
    """
    forward = needs(model, "forward", "flops")
    places = forward(
        theta, images[:1], observe=lambda x, y, site: jnp.float32(y.shape[1] * y.shape[2])
    ).observed
    return _summed(places * model.nodes(jax.tree.map(jnp.ones_like, theta)))


def l2_norm(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Sum the layers' weight norms, Σ ‖θ‖₂.

    >>> from jaxsys.nas.model import any_model
    >>> m = any_model(lambda k: jnp.ones((2, 2)), lambda p, x: x @ p)
    >>> float(l2_norm(m, jnp.ones((2, 2)), None, None, None).total)
    2.0
    """
    return _summed(model.nodes(theta, _norm))


def gradient_scores(
    model: Model, theta: Any, images: Any, labels: Any, key: Any
) -> dict[str, Score]:
    """Compute grad_norm Σ‖g‖₂, snip Σ|θ·g| and plain Σθ·g, which share one gradient.

    Reference: Lee et al., arXiv 1810.02340 (snip, whose mask gradient at 1 is θ·g).

    >>> from jaxsys.nas.model import any_model
    >>> m = any_model(lambda k: jnp.ones((3, 2)), lambda p, x: x @ p)
    >>> found = gradient_scores(m, jnp.ones((3, 2)), jnp.ones((4, 3)), jnp.zeros(4, int), None)
    >>> round(float(found["snip"].total), 4), float(found["plain"].total)
    (3.0, 0.0)
    """
    g = _gradient(model, theta, images, labels)
    product = jax.tree.map(jnp.multiply, theta, g)
    return {
        "grad_norm": _summed(model.nodes(g, _norm)),
        "snip": _summed(model.nodes(product, lambda v: jnp.sum(jnp.abs(v)))),
        "plain": _summed(model.nodes(product)),
    }


def grasp(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Compute Σ −θ·(H g), at temperature 1.

    Reference: Wang et al., arXiv 2002.07376.

    >>> from jaxsys.nas.model import any_model
    >>> m = any_model(lambda k: jnp.eye(2), lambda p, x: x @ p)
    >>> grasp(m, jnp.eye(2), jnp.eye(2), jnp.zeros(2, int), None).nodes.shape
    (1,)
    """
    g = jax.lax.stop_gradient(_gradient(model, theta, images, labels))

    def along(p: Any) -> Any:
        parts = jax.tree.map(jnp.vdot, g, _gradient(model, p, images, labels))
        return sum(jax.tree.leaves(parts))

    hg = jax.grad(along)(theta)
    return _summed(model.nodes(jax.tree.map(lambda t, h: -t * h, theta, hg)))


def fisher(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Compute Σ over weights of ½·mean_n (Σ_yx a·∂L/∂a)² of the weight's output channel.

    a is a layer's output; gates of value 1 on it have Σ_yx a·∂L/∂a as their derivative.

    Reference: Turner et al., arXiv 1906.04113.

    >>> from jaxsys.nas.model import dense_model
    >>> m = dense_model()
    >>> x = jax.random.normal(jax.random.key(1), (2, 1, 1, 3))
    >>> bool(fisher(m, m.init(jax.random.key(0)), x, jnp.zeros(2, int), None).total > 0)
    True
    """
    forward, gates = needs(model, "forward", "fisher"), needs(model, "gates", "fisher")
    g = jax.grad(lambda z: cross_entropy(forward(theta, images, gates=z).logits, labels))(
        gates(images.shape[0])
    )
    means = jax.tree.map(lambda v: 0.5 * jnp.mean(jnp.square(v), (-2, -1)), g)
    channel = needs(model, "gate_nodes", "fisher")(means)
    return _summed(masked(channel, model.present) * model.nodes(jax.tree.map(jnp.ones_like, theta)))


def synflow(model: Model, theta: Any, images: Any, labels: Any, key: Any) -> Score:
    """Compute the natural logarithm of Σ|θ·∂R/∂θ| of the network with |θ| and without norms.

    R is the sum of the outputs for one image of ones. The sum itself passes every float32 in deep
    cells; `forward` divides activations on the way and gives the logarithm of what it divided.

    Reference: Tanaka et al., arXiv 2006.05467.

    >>> from jaxsys.nas.model import any_model
    >>> m = any_model(lambda k: jnp.ones((3, 2)), lambda p, x: x @ p)
    >>> round(float(jnp.exp(synflow(m, -jnp.ones((3, 2)), jnp.ones((4, 3)), None, None).total)), 3)
    6.0
    """
    absolute = jax.tree.map(jnp.abs, theta)
    ones = jnp.ones_like(images[:1])

    def total(p: Any) -> tuple[Any, Any]:
        if model.forward is None:
            return jnp.sum(model.logits(p, ones)), 0.0
        out = model.forward(p, ones, norm=False)
        return jnp.sum(out.logits), out.log_scale

    g, log_scale = jax.grad(total, has_aux=True)(absolute)
    nodes = model.nodes(jax.tree.map(jnp.multiply, absolute, g))
    present = nodes > 0
    logs = jnp.where(present, jnp.log(jnp.where(present, nodes, 1.0)) + log_scale, 0.0)
    return Score(jnp.log(jnp.sum(nodes)) + log_scale, logs)


def zico(
    model: Model, theta: Any, images: Any, labels: Any, key: Any, *, batches: int = 4
) -> Score:
    """Compute Σ_layers ln Σ_w mean_b|g| / std_b(g) over minibatches.

    Args:
      model: the network.
      theta: parameters.
      images: `[B, Y, X, C]`, divided into minibatches.
      labels: `[B]`.
      key: not used.
      batches: how many minibatches; B must be a multiple.

    Reference: Li et al., arXiv 2301.11300, equation 14.

    >>> from jaxsys.nas.model import any_model
    >>> m = any_model(lambda k: jnp.eye(2), lambda p, x: x @ p)
    >>> zico(m, jnp.eye(2), jnp.arange(8.0).reshape(4, 2), jnp.arange(4) % 2, None).nodes.shape
    (1,)
    """
    parts = images.reshape(batches, -1, *images.shape[1:]), labels.reshape(batches, -1)
    g = jax.lax.map(lambda part: _gradient(model, theta, *part), parts)

    def ratio(v: Any) -> Any:
        std = jnp.std(v, 0)
        return jnp.where(std > 0, jnp.mean(jnp.abs(v), 0) / jnp.where(std > 0, std, 1.0), 0.0)

    sums = model.nodes(jax.tree.map(ratio, g))
    logs = jnp.where(sums > 0, jnp.log(jnp.where(sums > 0, sums, 1.0)), 0.0)
    return _summed(logs)
