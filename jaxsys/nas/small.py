"""A one-stage network around a NAS-Bench-201 cell, small enough to train thousands of on a CPU.

A 3×3 stem with a stride, N cells of one width, normalisation, ReLU, mean over the image, one linear
layer. Apart from the stem only the cell looks beyond a pixel, so that accuracy depends on it; the
reductions of the full network would do its work on small images.

Slots ``S``: stem; N·6 edges in the order of `EDGES`; classifier.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.nas import network
from jaxsys.nas.layers import conv3, norm2d
from jaxsys.nas.model import Model
from jaxsys.nas.network import Observe, Output, Site
from jaxsys.nas.space import CONV1, CONV3


@dataclass(frozen=True)
class SmallConfig:
    """Describe what surrounds the cell.

    Attributes:
      channels: C.
      cells: N.
      stride: of the stem.
      n_classes: outputs.
      image_channels: of the input.

    >>> SmallConfig().slots
    8
    """

    channels: int = 8
    cells: int = 1
    stride: int = 2
    n_classes: int = 10
    image_channels: int = 1

    def __post_init__(self) -> None:
        if min(self.channels, self.cells, self.stride, self.n_classes, self.image_channels) < 1:
            raise UserError(f"{self} has a size below 1; every size is at least 1; raise it")

    @property
    def slots(self) -> int:
        """Count the places for a convolution or linear layer."""
        return 6 * self.cells + 2


def init(key: jax.Array, config: SmallConfig) -> dict[str, Any]:
    """Draw weights from N(0, 2/fan_in) before a ReLU and N(0, 1/fan_in) elsewhere.

    Returns:
      Nested dict; the leaves of `cells` have leading axes `[cells, 6 edges]`.

    >>> shapes = jax.eval_shape(lambda key: init(key, SmallConfig(4)), jax.random.key(0))
    >>> shapes["cells"]["w3"].shape
    (1, 6, 3, 3, 4, 4)
    """
    keys = iter(jax.random.split(key, 4))
    c, n, image = config.channels, config.cells, config.image_channels

    def draw(shape: tuple[int, ...], variance: float) -> jax.Array:
        return jax.random.normal(next(keys), shape) * variance**0.5

    def norm(*shape: int) -> dict[str, jax.Array]:
        return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}

    return {
        "stem": {"w": draw((3, 3, image, c), 1 / (9 * image))} | norm(c),
        "cells": {
            "w3": draw((n, 6, 3, 3, c, c), 2 / (9 * c)),
            "w1": draw((n, 6, c, c), 2 / c),
        }
        | norm(n, 6, c),
        "last": norm(c),
        "head": {"w": draw((c, config.n_classes), 1 / c), "bias": jnp.zeros(config.n_classes)},
    }


def ones_gates(config: SmallConfig, batch: int) -> dict[str, Any]:
    """Make gates that are all 1; see `network.ones_gates`.

    >>> ones_gates(SmallConfig(4), 2)["cells"].shape
    (1, 6, 2, 4)
    """
    return {
        "stem": jnp.ones((batch, config.channels)),
        "cells": jnp.ones((config.cells, 6, batch, config.channels)),
        "head": jnp.ones((batch, config.n_classes)),
    }


def apply(
    params: dict[str, Any],
    arch: Integer[Array, "6"],
    images: Float[Array, "B Y X C"],
    *,
    stride: int = 2,
    gates: dict[str, Any] | None = None,
    observe: Observe | None = None,
    norm: bool = True,
) -> Output:
    """Run the network of one cell; the options are those of `network.apply`.

    Args:
      params: from `init`.
      arch: operation numbers; may be traced.
      images: the batch.
      stride: of the stem.
      gates: from `ones_gates`.
      observe: called at each layer.
      norm: False leaves normalisation and biases out.

    >>> params = jax.eval_shape(lambda key: init(key, SmallConfig(4)), jax.random.key(0))
    >>> jax.eval_shape(apply, params, jnp.zeros(6, int), jnp.ones((2, 8, 8, 1))).logits.shape
    (2, 10)
    """

    def watch(inputs: Any, outputs: Any, site: Site) -> Any:
        found = None if observe is None else observe(inputs, outputs, site)
        return jax.tree.map(lambda v: v[None], found)

    stem = conv3(images, params["stem"]["w"], stride)
    stem = stem if gates is None else stem * gates["stem"][:, None, None, :]
    seen = [watch(images, stem, Site(relu=False, norm=True))]
    x = norm2d(params["stem"], stem) if norm else stem
    features = [x]
    for n in range(params["cells"]["w1"].shape[0]):
        own = jax.tree.map(lambda v, n=n: v[n], params["cells"])
        gate = None if gates is None else gates["cells"][n]
        x, found = network.cell(own, arch, x, gates=gate, observe=observe, norm=norm)
        features.append(x)
        seen.append(found)
    before = norm2d(params["last"], x) if norm else x
    logits = jnp.mean(jax.nn.relu(before), (1, 2)) @ params["head"]["w"]
    logits = logits if gates is None else logits * gates["head"]
    seen.append(watch(before, logits[:, None, None, :], Site(relu=True, norm=False)))
    observed = jax.tree.map(lambda *v: jnp.concatenate(v), *seen)
    logits = logits + params["head"]["bias"][None] if norm else logits
    return Output(logits, jnp.zeros(()), features, before, observed)


def small_model(arch: Any, config: SmallConfig) -> Model:
    """Make the model of a cell in the small network; the cell may be traced.

    >>> small_model(jnp.array([2, 0, 1, 3, 4, 2]), SmallConfig(4)).present.shape
    (8,)
    """
    forward = partial(_forward, arch, config.stride)
    conv = jnp.tile((arch == CONV3) | (arch == CONV1), config.cells)
    one = jnp.ones(1, bool)
    return Model(
        init=partial(init, config=config),
        logits=lambda params, images: forward(params, images).logits,
        nodes=partial(_nodes, arch),
        present=jnp.concatenate([one, conv, one]),
        forward=forward,
        gates=partial(ones_gates, config),
        gate_nodes=lambda tree: jnp.concatenate(
            [tree["stem"][None], tree["cells"].reshape(-1), tree["head"][None]]
        ),
        pull=partial(_pull, arch),
    )


def _forward(arch: Any, stride: int, params: Any, images: Any, **options: Any) -> Output:
    return apply(params, arch, images, stride=stride, **options)


def _nodes(arch: Any, tree: Any, reduce: Callable[[Any], Any] = jnp.sum) -> Float[Array, "S"]:
    each = jax.vmap(jax.vmap(reduce))
    three, one = each(tree["cells"]["w3"]), each(tree["cells"]["w1"])
    held = jnp.broadcast_to(arch, three.shape)
    chosen = jnp.where(held == CONV3, three, jnp.where(held == CONV1, one, 0)).reshape(-1)
    stem, head = (reduce(tree[name]["w"])[None] for name in ("stem", "head"))
    return jnp.concatenate([stem, chosen, head])


def _pull(arch: Any, params: Any, features: Any, cotangents: Any) -> list[tuple[Any, Any]]:
    pulled = []
    for n, g in enumerate(cotangents):
        own = jax.tree.map(lambda v, n=n: v[n], params["cells"])
        back = jax.vjp(lambda x, own=own: network.cell(own, arch, x)[0], features[n])[1]
        pulled.append((g, back(g)[0]))
    return pulled
