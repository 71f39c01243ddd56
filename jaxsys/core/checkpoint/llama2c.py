"""The checkpoints of llama2.c: seven integers and then every number as float32."""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsys.core.checkpoint._mapping import map_file
from jaxsys.core.errors import UserError

_HEADER = struct.Struct("<7i")
# Wider than any model: keeps the arithmetic of sizes away from absurdity.
_MOST = 1 << 24
_LAYERS = "model.layers."
_TABLES = "rotary tables"


class Llama2cHeader(NamedTuple):
    """Hold the seven integers of a llama2.c file.

    Attributes:
      dim: model width D.
      hidden_dim: feed-forward width F.
      n_layers: blocks L.
      n_heads: query heads H, each of D / H.
      n_kv_heads: key and value heads K.
      vocab_size: V, positive; its sign in the file says whether the head is tied.
      seq_len: longest text T that the rotary tables of the file cover.
      tied: whether the output matrix is the embedding.

    >>> Llama2cHeader(64, 172, 5, 8, 4, 512, 512, True).head_width
    8
    """

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool

    @property
    def head_width(self) -> int:
        """Give the width C of one head."""
        return self.dim // self.n_heads


def read_llama2c(path: str | Path) -> tuple[Llama2cHeader, dict[str, np.ndarray]]:
    """Map a llama2.c checkpoint under the names that a Llama has in the Hugging Face form.

    Matrices are [out, in] as in the file. Query and key rows are in llama2.c's order, which suits
    rotary embeddings on adjacent pairs, not on halves. The rotary tables of the file are left out.

    Args:
      path: of the ``.bin`` file.

    Returns:
      The header, and read-only float32 views of the mapped file by name; ``lm_head.weight`` only
      where the head is not tied.

    Raises:
      UserError: if the header is absurd or the file's size is not what the header asks for.

    Reference: github.com/karpathy/llama2.c, the legacy export (version 0).

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.bin"
    >>> head = _HEADER.pack(4, 6, 1, 2, 1, 3, 2)
    >>> _ = file.write_bytes(head + np.zeros(148, np.float32).tobytes())
    >>> read_llama2c(file)[1]["model.layers.0.self_attn.k_proj.weight"].shape
    (2, 4)
    """
    path = Path(path)
    data = map_file(path, least_bytes=_HEADER.size)
    header = _check(path, _HEADER.unpack_from(data))
    pieces = _pieces(header)
    wanted = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in pieces)
    if data.size != wanted:
        raise UserError(
            f"{path} has {data.size} bytes where its header asks for {wanted}; it is truncated or "
            "not of llama2.c's first format; download or export it again"
        )
    numbers = data[_HEADER.size :].view("<f4")
    tensors, here = {}, 0
    for name, shape in pieces:
        array = numbers[here : here + math.prod(shape)].reshape(shape)
        here += array.size
        if name.startswith(_LAYERS):
            for i, one in enumerate(array):
                tensors[f"{_LAYERS}{i}.{name.removeprefix(_LAYERS)}"] = one
        elif name != _TABLES:
            tensors[name] = array
    return header, tensors


def _check(path: Path, numbers: tuple[int, ...]) -> Llama2cHeader:
    dim, hidden, layers, heads, kv_heads, vocab, length = numbers
    header = Llama2cHeader(dim, hidden, layers, heads, kv_heads, abs(vocab), length, vocab > 0)
    positive = all(0 < n <= _MOST for n in header[:-1])
    if not (positive and dim % heads == 0 and heads % kv_heads == 0 and header.head_width % 2 == 0):
        raise UserError(
            f"{path} is no llama2.c checkpoint: its header reads {numbers}, where sizes must be "
            "positive, heads must divide the width and key heads the heads; check the file"
        )
    return header


def _pieces(h: Llama2cHeader) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Give names and shapes of the arrays in the order of the file, blocks stacked."""
    depth, kv_dim = h.n_layers, h.head_width * h.n_kv_heads
    pieces = (
        ("model.embed_tokens.weight", (h.vocab_size, h.dim)),
        (f"{_LAYERS}input_layernorm.weight", (depth, h.dim)),
        (f"{_LAYERS}self_attn.q_proj.weight", (depth, h.dim, h.dim)),
        (f"{_LAYERS}self_attn.k_proj.weight", (depth, kv_dim, h.dim)),
        (f"{_LAYERS}self_attn.v_proj.weight", (depth, kv_dim, h.dim)),
        (f"{_LAYERS}self_attn.o_proj.weight", (depth, h.dim, h.dim)),
        (f"{_LAYERS}post_attention_layernorm.weight", (depth, h.dim)),
        (f"{_LAYERS}mlp.gate_proj.weight", (depth, h.hidden_dim, h.dim)),
        (f"{_LAYERS}mlp.down_proj.weight", (depth, h.dim, h.hidden_dim)),
        (f"{_LAYERS}mlp.up_proj.weight", (depth, h.hidden_dim, h.dim)),
        ("model.norm.weight", (h.dim,)),
        (_TABLES, (h.seq_len, h.head_width)),
    )
    return pieces if h.tied else (*pieces, ("lm_head.weight", (h.vocab_size, h.dim)))
