"""Offloading as one compiled program: weights in host memory, brought over by the compiler.

What `engine` is held against. The program has static shapes, so it copies every feed-forward
weight in every pass, chosen or not, and the CPU computes nothing.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Integer

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, unflatten
from jaxsys.models import lm
from jaxsys.offload.parts import part_names


def host_weights(params: Mapping[str, Any], config: lm.LMConfig, device: Any) -> dict[str, Any]:
    """Put feed-forward weights into a device's host memory and everything else on the device.

    Args:
        params: the model.
        config: it.
        device: that runs it.

    Returns:
        The same tree.

    Raises:
        UserError: a device without page-locked host memory.

    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> own = host_weights(lm.init(jax.random.key(0), config), config, jax.devices()[0])
    >>> own["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"].sharding.memory_kind
    'pinned_host'
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise UserError(
            f"{device} has the memories {', '.join(kinds)}; expected pinned_host among them; use "
            "`make_engine`, which needs none"
        )
    names = part_names(config)
    cold = {name for key, own in names.items() if key[1] in ("mlp", "expert") for name in own}
    there = SingleDeviceSharding(device, memory_kind="pinned_host")
    here = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
    flat = flatten(params)
    return unflatten({n: jax.device_put(x, there if n in cold else here) for n, x in flat.items()})


def hosted(config: lm.LMConfig) -> Callable[[Any, Integer[Array, "B T"]], Array]:
    """Make the program: every weight is brought to the device where the compiler needs it.

    Args:
        config: the model.

    Returns:
        (params from `host_weights`, tokens) -> logits [B, T, V].

    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> own = host_weights(lm.init(jax.random.key(0), config), config, jax.devices()[0])
    >>> hosted(config)(own, jax.numpy.ones((1, 3), int)).shape
    (1, 3, 97)
    """
    return jax.jit(partial(_apply, config))


def _apply(config: lm.LMConfig, params: Any, tokens: Array) -> Array:
    params = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), params)
    return lm.apply(params, config, tokens).logits
