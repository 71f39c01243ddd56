"""Line up what belongs to a network's layers in slots, the places that can hold a layer.

A NAS-Bench-201 network has them in network order, and within a cell in the order of `EDGES`: stem;
N·6 edges; 3 of a reduction; N·6; 3; N·6; classifier: 98 for N = 5. Axis ``S``: slots.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxsys.nas.network import NetworkConfig, init
from jaxsys.nas.space import BY_TARGET, CONV1, CONV3


def gate_nodes(tree: dict[str, Any]) -> Float[Array, "S"]:
    """Line up a tree shaped like the gates, less images and channels, in the order of slots.

    >>> config = NetworkConfig(4, 1)
    >>> from jaxsys.nas.network import ones_gates
    >>> gates = jax.tree.map(lambda v: v.mean((-2, -1)), ones_gates(config, 2))
    >>> gate_nodes(gates).shape
    (26,)
    """
    parts = [tree["stem"][None]]
    for s in range(3):
        parts.append(tree["stages"][str(s)].reshape(-1))
        if s < 2:
            parts.append(tree["reductions"][str(s)])
    return jnp.concatenate([*parts, tree["head"][None]])


def presence(arch: Any, config: NetworkConfig) -> Bool[Array, "S"]:
    """Tell which slots hold a layer.

    >>> int(presence(jnp.array([2, 0, 1, 3, 4, 2]), NetworkConfig()).sum())
    53
    """
    conv = jnp.tile((arch == CONV3) | (arch == CONV1), config.cells)
    one, three = jnp.ones(1, bool), jnp.ones(3, bool)
    return jnp.concatenate([one, conv, three, conv, three, conv, one])


def sizes(arch: Any, config: NetworkConfig) -> Float[Array, "S"]:
    """Count the weights of each slot's layer, 0 where there is none.

    >>> sizes(jnp.array([2, 0, 1, 3, 4, 2]), NetworkConfig())[:4].tolist()
    [432.0, 2304.0, 0.0, 0.0]
    """
    ones = jax.eval_shape(lambda: init(jax.random.key(0), config))
    return nodes(jax.tree.map(lambda v: jnp.ones(v.shape), ones), arch)


def nodes(
    tree: dict[str, Any], arch: Any, reduce: Callable[[Any], Any] = jnp.sum
) -> Float[Array, "S"]:
    """Reduce a tree shaped like the parameters to one number for each slot.

    Args:
      tree: per-weight scores.
      arch: which of an edge's two weights counts.
      reduce: `array -> scalar`, applied to each layer's weights (biases and norms left out).

    Returns:
      Values, 0 where there is no layer.

    >>> config = NetworkConfig(4, 1)
    >>> ones = jax.eval_shape(lambda key: init(key, config), jax.random.key(0))
    >>> jax.eval_shape(nodes, ones, jnp.zeros(6, jnp.int32)).shape
    (26,)
    """
    parts = [reduce(tree["stem"]["w"])[None]]
    each = jax.vmap(jax.vmap(reduce))
    for s in range(3):
        stage = tree["stages"][str(s)]
        three, one = each(stage["w3"]), each(stage["w1"])
        held = jnp.broadcast_to(arch, three.shape)
        chosen = jnp.where(held == CONV3, three, jnp.where(held == CONV1, one, 0))
        parts.append(chosen.reshape(-1))
        if s < 2:
            p = tree["reductions"][str(s)]
            parts.append(jnp.stack([reduce(p[name]["w"]) for name in ("a", "b", "down")]))
    return jnp.concatenate([*parts, reduce(tree["head"]["w"])[None]])


def packed_order(config: NetworkConfig) -> np.ndarray:
    """Return the slots in the order of the released code: edges of a cell by target node.

    >>> packed_order(NetworkConfig(4, 1))[:7].tolist()
    [0, 1, 2, 4, 3, 5, 6]
    """
    order = [0]
    for s in range(3):
        for _ in range(config.cells):
            first = len(order)
            order += [first + e for e in BY_TARGET]
        if s < 2:
            order += range(len(order), len(order) + 3)
    return np.array([*order, len(order)])
