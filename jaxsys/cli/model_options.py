"""Options of the commands that take a language model, and what they stand for."""

from typing import Annotated, Any, Literal

import tyro

ModelName = Annotated[str, tyro.conf.Positional]
Dtype = Literal["file", "float32", "bfloat16", "float16"]


def dtype_of(name: Dtype) -> Any:
    """Give the type of the parameters; None keeps what the file has."""
    import jax.numpy as jnp

    return None if name == "file" else jnp.dtype(name)


def sampling_of(config: Any) -> Any:
    """Take how tokens are drawn from a configuration that has the fields of `Sampling`."""
    from dataclasses import fields

    from jaxsys.evaluate import Sampling

    return Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})
