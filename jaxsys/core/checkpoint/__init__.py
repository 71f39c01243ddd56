"""Files of arrays: foreign checkpoints as memory maps, streamed writing, and states of runs."""

from jaxsys.core.checkpoint._mapping import advise
from jaxsys.core.checkpoint.filling import Filling
from jaxsys.core.checkpoint.gguf import GgufFile, GgufTensor, GgufTensors, read_gguf
from jaxsys.core.checkpoint.llama2c import Llama2cHeader, read_llama2c
from jaxsys.core.checkpoint.runs import RunStore
from jaxsys.core.checkpoint.safetensors import (
    SafetensorsHeader,
    read_header,
    read_safetensors,
)
from jaxsys.core.checkpoint.torch_pickle import read_torch
from jaxsys.core.checkpoint.writer import write_safetensors

__all__ = [
    "Filling",
    "GgufFile",
    "GgufTensor",
    "GgufTensors",
    "Llama2cHeader",
    "RunStore",
    "SafetensorsHeader",
    "advise",
    "read_gguf",
    "read_header",
    "read_llama2c",
    "read_safetensors",
    "read_torch",
    "write_safetensors",
]
