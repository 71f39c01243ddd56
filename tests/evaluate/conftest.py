"""A small causal model and tokenizer, for tests of what is done with models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.evaluate import Model, from_forward

VOCAB = 128


def forward(params, tokens):
    """Mix each token with all before it, so that contexts matter: logits [B, T, V]."""
    x = params["embed"][tokens]
    steps = jnp.arange(1, tokens.shape[1] + 1, dtype=x.dtype)[None, :, None]
    mixed = jnp.cumsum(x, axis=1) / steps
    return jnp.tanh(x + 2 * mixed) @ params["out"]


def toy_model(seed: int = 0, context: int = 96) -> Model:
    first, second = jax.random.split(jax.random.key(seed))
    params = {
        "embed": jax.random.normal(first, (VOCAB, 24)),
        "out": jax.random.normal(second, (24, VOCAB)),
    }
    return from_forward(forward, params, VOCAB, context)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


class Ascii:
    """A byte tokenizer of ASCII, with an end token 0 that begins texts too."""

    vocab_size = VOCAB
    bos_id = None
    eos_id = 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids).decode("ascii")


@pytest.fixture(scope="session")
def toy() -> Model:
    return toy_model()


@pytest.fixture(scope="session")
def ascii_tokens() -> Ascii:
    return Ascii()


@pytest.fixture(scope="session")
def by_hand(toy):
    """Score (context, continuation) one by one in NumPy: the oracle of `score`."""

    whole = jax.jit(forward)

    def scored(context, continuation):
        ids = [*map(int, context), *map(int, continuation)]
        padded = np.pad(ids[:-1], (0, toy.context + 1 - len(ids)))
        laws = log_softmax(whole(toy.params, padded[None]))[0]
        at = range(len(context) - 1, len(ids) - 1)
        values = [laws[i, ids[i + 1]] for i in at]
        return sum(values), all(laws[i].argmax() == ids[i + 1] for i in at)

    return scored
