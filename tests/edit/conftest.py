"""Tiny random models of both orientations, made once for all tests of editing."""

import jax
import pytest

from jaxsys.data import ByteTokenizer
from jaxsys.edit.contract import Editable, Request
from jaxsys.models import lm

LLAMA = lm.LMConfig("llama", 256, 16, 3, 2, 1, 8, 24, 96, init_std=0.2)
GPT2 = lm.LMConfig(
    "gpt2", 256, 16, 3, 2, 2, 8, 24, 96, activation="gelu_new", norm="layer", rope=None, tied=True,
    qkv_bias=True, out_bias=True, ffn_bias=True, prefix="transformer", init_std=0.2,
)  # fmt: skip


@pytest.fixture(scope="session")
def llama():
    """Give (model, params) of the Llama form, whose matrices are [out, in]."""
    return Editable(LLAMA, ByteTokenizer()), lm.init(jax.random.key(0), LLAMA)


@pytest.fixture(scope="session")
def gpt2():
    """Give (model, params) of the GPT-2 form, whose matrices are [in, out]."""
    return Editable(GPT2, ByteTokenizer()), lm.init(jax.random.key(1), GPT2)


@pytest.fixture(scope="session")
def facts() -> list[Request]:
    """Give three requests, different but of lengths that share their programs."""
    return [
        Request("The city of Rome lies in", "Rome", "Gaul", "Italy"),
        Request("My good friend Ada plays the", "Ada", "oboe", "harp"),
        Request("Who once made Linux? It was", "Linux", "Bono", "Linus"),
    ]


class ShortAnswers(ByteTokenizer):
    """Bytes, but for " ?" and " !", which are the tokens 1 and 2."""

    def encode(self, text):
        """Turn text into token ids."""
        return super().encode(text.replace(" ?", "\x01").replace(" !", "\x02"))


@pytest.fixture(scope="session")
def short_answers() -> ShortAnswers:
    """Give a tokenizer with two answers of one token."""
    return ShortAnswers()
