"""Fresh parameters."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt32

from jaxsys.core.tree import path_key, unflatten
from jaxsys.models.lm.config import LMConfig
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import model_shapes


def shapes(config: LMConfig, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """List every tensor of a model's checkpoint by its full name.

    Args:
        config: the model.
        dtype: of all tensors.

    Returns:
        Name to shape and dtype, in order of first use.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> shapes(config)["lm_head.weight"].shape
    (97, 32)
    """
    named = model_shapes(layout_of(config), config)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in named.items()}


def init(key: Key[Array, ""] | UInt32[Array, "2"], config: LMConfig, dtype=jnp.float32) -> dict:
    """Draw fresh parameters: N(0, σ²) with σ = ``init_std``, biases 0, normalisation gains 1.

    The two matrices of a block that write into the residual stream have σ / √(2 L), as in GPT-2.
    Each tensor's key is folded from its own name, so its value does not depend on the others.

    Args:
        key: random key.
        config: the model.
        dtype: of all tensors.

    Returns:
        Nested dict whose dotted paths are the checkpoint's tensor names.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = init(jax.random.key(0), config)
    >>> params["model"]["layers"]["1"]["mlp"]["down_proj"]["weight"].shape
    (32, 48)
    """
    layout = layout_of(config)
    writers = tuple(p.rsplit(".", 1)[-1] for p in (layout.out, layout.down, layout.expert_down))

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        module, _, kind = name.rpartition(".")
        if kind == "bias":
            return jnp.zeros(shape, dtype)
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        inside = f".{layout.blocks}." in f".{name}"
        std = config.init_std
        if inside and module.rsplit(".", 1)[-1] in writers:
            std /= math.sqrt(2 * config.layers)
        return (std * jax.random.normal(path_key(key, name), shape, jnp.float32)).astype(dtype)

    return unflatten({name: draw(name, leaf.shape) for name, leaf in shapes(config).items()})
