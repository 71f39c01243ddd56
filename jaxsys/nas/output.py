"""What a network shows of itself to a proxy, in whatever space it stands."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Site(NamedTuple):
    """Say what stands around a layer that is observed.

    Attributes:
      relu: what is observed as the layer's input goes into a ReLU; right before the layer, or right
        behind it in spaces that rectify what was normalised.
      norm: its output is normalised over images.
      rectified: `[C]` 1 where a channel of that input exists; None: all do.
      outputs: `[C]` the same of its output.

    >>> Site(relu=True, norm=True).relu
    True
    """

    relu: bool
    norm: bool
    rectified: Any = None
    outputs: Any = None


class Output(NamedTuple):
    """What one forward pass gives.

    Attributes:
      logits: `[B, classes]`; divided by exp(log_scale) where norm is False.
      log_scale: natural logarithm of what was divided out on the way; 0 with normalisation.
      features: the output of the stem and of every block, in order.
      map: `[B, Y, X, C]` last features before the mean over the image.
      observed: what `observe` returned, stacked over slots `[S, ...]`; zeros where no layer is.

    >>> Output._fields[0]
    'logits'
    """

    logits: Any
    log_scale: Any
    features: Any
    map: Any
    observed: Any


Observe = Callable[[Any, Any, Site], Any]  # (inputs before ReLU, outputs, site) -> statistics


def gated(y: Any, gate: Any) -> Any:
    """Multiply `[B, Y, X, C]` by a gate `[B, C]`, if there is one.

    >>> gated(jnp.ones((1, 1, 1, 2)), jnp.array([[2.0, 3.0]])).reshape(-1).tolist()
    [2.0, 3.0]
    """
    return y if gate is None else y * gate[:, None, None, :]


def watch(observe: Observe | None, inputs: Any, outputs: Any, site: Site) -> Any:
    """Observe a layer, if anybody does.

    >>> watch(None, 1, 2, Site(relu=False, norm=False)) is None
    True
    """
    return None if observe is None else observe(inputs, outputs, site)


def rescaled(x: Any, norm: bool) -> Any:
    """Divide by the mean size, held constant, so that a network without norms cannot overflow.

    Returns:
      x and 0 with norms; otherwise the quotient and the logarithm of what it was divided by.

    >>> [round(float(v), 3) for v in rescaled(jnp.array(8.0), norm=False)]
    [1.0, 2.079]
    """
    if norm:
        return x, jnp.zeros(())
    size = jax.lax.stop_gradient(jnp.mean(jnp.abs(x)))
    size = jnp.where(size > 0, size, 1.0)
    return x / size, jnp.log(size)


def stacked(tree: Any) -> Any:
    """Give every array of a tree a leading axis of one slot.

    >>> stacked(jnp.ones(2)).shape
    (1, 2)
    """
    return jax.tree.map(lambda v: v[None], tree)
