"""llama2.c files: places of the arrays by an independent reading, and hostile headers."""

import contextlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsys.core.checkpoint import read_llama2c
from jaxsys.core.errors import UserError

HEADER = (4, 6, 2, 2, 1, -3, 2)


def _content(header=HEADER, numbers: int | None = None) -> bytes:
    if numbers is None:
        dim, hidden, layers, heads, kv_heads, vocab, length = header
        kv = dim // heads * kv_heads
        block = 2 * dim + 2 * dim * dim + 2 * dim * kv + 3 * dim * hidden
        numbers = abs(vocab) * dim * (1 + (vocab < 0)) + layers * block + dim
        numbers += length * dim // heads
    return struct.pack("<7i", *header) + np.arange(numbers, dtype=np.float32).tobytes()


def test_arrays_lie_where_the_format_puts_them(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(_content())
    header, tensors = read_llama2c(path)
    assert (header.vocab_size, header.tied, header.head_width) == (3, False, 2)
    numbers = np.frombuffer(path.read_bytes(), np.float32, offset=28)
    first = {name: int(array.reshape(-1)[0]) for name, array in tensors.items()}
    assert first["model.embed_tokens.weight"] == 0
    assert first["model.layers.0.input_layernorm.weight"] == 12
    assert first["model.layers.1.input_layernorm.weight"] == 16
    assert first["model.layers.1.self_attn.q_proj.weight"] == 20 + 16
    assert first["model.layers.0.self_attn.k_proj.weight"] == 20 + 32
    assert first["model.layers.0.self_attn.o_proj.weight"] == 20 + 32 + 16 + 16
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (4, 6)
    assert first["lm_head.weight"] == numbers.size - 12
    assert first["model.norm.weight"] == numbers.size - 12 - 4 - 4
    # All but the rotary tables, each once.
    assert sum(a.size for a in tensors.values()) == numbers.size - 4
    assert not any(a.flags.writeable for a in tensors.values())


def test_stories260k_has_its_parameters():
    if "JAXSYS_DATA" not in os.environ:
        pytest.skip("JAXSYS_DATA does not name the folder with lm/stories260K.bin")
    path = Path(os.environ["JAXSYS_DATA"]) / "lm" / "stories260K.bin"
    header, tensors = read_llama2c(path)
    assert header == (64, 172, 5, 8, 4, 512, 512, True)
    # The 264,128 numbers of the file less two tables of 512 x 4.
    assert sum(a.size for a in tensors.values()) == 264_128 - 2 * 512 * 4
    # Gains of a trained norm are positive, which no shifted reading would give.
    assert all((a > 0).all() for n, a in tensors.items() if "layernorm" in n)


@given(
    st.lists(
        st.sampled_from([0, 1, 2, 3, 4, 8, 2**24, 2**31 - 1, -1, -(2**31)]), min_size=7, max_size=7
    ),
    st.integers(0, 300),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_made_up_headers_never_crash(tmp_path, header, numbers):
    path = tmp_path / "m.bin"
    path.write_bytes(_content(header, numbers))
    with contextlib.suppress(UserError):
        found, tensors = read_llama2c(path)
        assert sum(a.size for a in tensors.values()) + found.seq_len * found.head_width == numbers


@pytest.mark.parametrize("cut", [1, 4, -4])
def test_a_file_of_another_size_is_refused(tmp_path, cut):
    content = _content()
    (tmp_path / "m.bin").write_bytes(content[:-cut] if cut > 0 else content + bytes(-cut))
    with pytest.raises(UserError, match="where its header asks for"):
        read_llama2c(tmp_path / "m.bin")
