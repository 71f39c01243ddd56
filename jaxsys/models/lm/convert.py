"""From any form of a model to a Hugging Face folder, one tensor in memory at a time."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsys.models.lm.gguf import HfTensors
from jaxsys.models.lm.init import shapes
from jaxsys.models.lm.load import open_tensors, write_folder


def convert(
    source: str | Path, folder: str | Path, *, dtype: Any = None, shard_bytes: int = 5 << 30
) -> list[Path]:
    """Write a model as a folder that transformers loads and that `load` maps without copying.

    Args:
        source: what `load` takes; it may be the folder itself.
        folder: made where it is absent.
        dtype: of the file; None keeps each tensor's (quantised tensors of a GGUF file become
            float32).
        shard_bytes: largest file.

    Returns:
        The files written.

    Raises:
        UserError: as `load`.

    >>> import tempfile
    >>> from jaxsys.models import lm
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> a, b = tempfile.mkdtemp(), tempfile.mkdtemp()
    >>> _ = lm.save(a, lm.init(jax.random.key(0), config), config)
    >>> [file.name for file in convert(a, b, dtype="bfloat16")]
    ['config.json', 'model.safetensors']
    """
    config, tensors = open_tensors(source)
    kinds = tensors.dtypes if isinstance(tensors, HfTensors) else None
    named = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, np.dtype(dtype or (kinds[name] if kinds else tensors[name].dtype))
        )
        for name, leaf in shapes(config).items()
    }

    def produce(name: str) -> np.ndarray:
        return tensors[name].astype(named[name].dtype, copy=False)

    return write_folder(folder, config, named, produce, shard_bytes)
