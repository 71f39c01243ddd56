"""Facts kept beside a model, found again by the likeness of texts.

An encoder is any function from texts to vectors, ``encode(texts) -> [N, E]``. The one here averages
the model's own hidden states; a sentence encoder is passed in its place where one is at hand.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable, Edited, Info, Request, check_requests
from jaxsys.edit.editable import check_length, round_up
from jaxsys.models import lm

Encoder = Callable[[Sequence[str]], np.ndarray]


class Memory(NamedTuple):
    """Hold the facts edited so far, the newest last.

    Attributes:
      requests: the edits.
      codes: [N, E] of their prompts.

    >>> Memory((), np.zeros((0, 4))).requests
    ()
    """

    requests: tuple[Request, ...]
    codes: Any


def own_encoder(model: Editable, params: Any, layer: int = 0) -> Encoder:
    """Make an encoder of a model: the mean over tokens of the residual stream, of length one.

    Args:
      model: configuration and tokenizer.
      params: of the model; keep to those from before the edits.
      layer: before which block; 0 takes the embeddings alone, an average of words.

    Raises:
      UserError: for a layer that the model lacks.

    >>> from jaxsys.data import ByteTokenizer
    >>> config = lm.LMConfig("llama", 256, 8, 1, 2, 2, 4, 12, 64)
    >>> encode = own_encoder(
    ...     Editable(config, ByteTokenizer()), lm.init(jax.random.key(0), config))
    >>> encode(["Rome is big", "Oslo"]).shape
    (2, 8)
    """
    if not 0 <= layer <= model.config.layers:
        raise UserError(
            f"layer {layer} is asked for; the model has {model.config.layers} blocks; choose "
            f"0 to {model.config.layers}"
        )

    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = [model.tokenizer.encode(text) for text in texts]
        most = max((len(row) for row in rows), default=1)
        check_length(model, most)
        length = min(round_up(max(most, 1), 16), model.config.max_positions)
        tokens = np.zeros((len(rows), length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            mask[i, : len(row)] = True
        return np.asarray(_mean_state(params, tokens, mask, config=model.config, layer=layer))

    return encode


@partial(jax.jit, static_argnames=("config", "layer"))
def _mean_state(params, tokens, mask, *, config, layer):
    x = lm.embed(params, config, tokens)
    for i in range(layer):
        x = lm.block(lm.layer(params, config, i), config, i, x)[0]
    mean = (x.astype(jnp.float32) * mask[:, :, None]).sum(axis=1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-9)


def remember(encode: Encoder, state: Memory | None, requests: Sequence[Request]) -> Memory:
    """Add requests; one whose prompt is already there takes the old one's place.

    Args:
      encode: texts to vectors.
      state: the facts so far; None for none.
      requests: new ones.

    Raises:
      UserError: for requests that cannot be edited, or an encoder that gives something else than
        one vector of finite numbers for each text.

    >>> encode = lambda texts: np.ones((len(texts), 2))
    >>> memory = remember(encode, None, [Request("Rome is", "Rome", "big")])
    >>> remember(encode, memory, [Request("Rome is", "Rome", "old")]).requests[0].target
    'old'
    """
    check_requests(requests)
    new = checked_codes(encode, [request.prompt for request in requests])
    old = Memory((), new[:0]) if state is None else state
    if old.codes.shape[1] != new.shape[1]:
        raise UserError(
            f"the memory holds codes of {old.codes.shape[1]} numbers and the encoder gives "
            f"{new.shape[1]}; use one encoder for all edits"
        )
    prompts = {request.prompt.strip() for request in requests}
    stay = [i for i, r in enumerate(old.requests) if r.prompt.strip() not in prompts]
    kept = tuple(old.requests[i] for i in stay)
    return Memory((*kept, *requests), np.concatenate([old.codes[stay], new]))


def encoder_of(model: Editable, config: Any, params: Any) -> Encoder:
    """Give the encoder of a method with a memory: the one in its config, or the model's own.

    >>> from types import SimpleNamespace
    >>> encoder_of(Editable(None, None), SimpleNamespace(encoder=len, layer=0), {})
    <built-in function len>
    """
    return config.encoder or own_encoder(model, params, config.layer)


def edit_memory(
    model: Editable,
    config: Any,
    params: Any,
    requests: Sequence[Request],
    stats: Any = None,
    state: Memory | None = None,
) -> Edited:
    """Put requests into the memory; the parameters stay what they are.

    Args:
      model: configuration and tokenizer.
      config: `serac.SERAC` or `ike.IKE`.
      params: not changed.
      requests: one whose prompt is in the memory takes the old one's place.
      stats: not used.
      state: the memory so far; None for none.

    Returns:
      The same parameters, the memory as state; how it answers is for `serac.answering_serac` and
      `ike.answering_ike`.

    Raises:
      UserError: for requests that cannot be edited, or an encoder that gives no vectors.

    >>> from jaxsys.edit.ike import IKE
    >>> config = IKE(encoder=lambda texts: np.ones((len(texts), 2)))
    >>> facts = [Request("Rome is in", "Rome", "France")]
    >>> len(edit_memory(Editable(None, None), config, {}, facts).state.requests)
    1
    """
    del stats
    memory = remember(encoder_of(model, config, params), state, requests)
    return Edited(params, memory, Info({}, {"entries": len(memory.requests)}))


def checked_codes(encode: Encoder, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
    """Encode texts and refuse what is no matrix of finite numbers.

    Raises:
      UserError: if the encoder gives such.

    >>> checked_codes(lambda texts: np.zeros(3), ["a"])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the encoder gives an array of shape (3,) for 1 texts; ...
    """
    codes = np.asarray(encode(texts), np.float32)
    if codes.ndim != 2 or len(codes) != len(texts) or not np.isfinite(codes).all():
        raise UserError(
            f"the encoder gives an array of shape {codes.shape} for {len(texts)} texts; expected "
            "one vector of finite numbers for each; correct the encoder"
        )
    return codes


def squared_distances(
    code: Float[np.ndarray, "E"], codes: Float[np.ndarray, "N E"]
) -> Float[np.ndarray, "N"]:
    """Compute ‖e(x) − e(x_i)‖² to every fact.

    >>> squared_distances(np.zeros(2), np.array([[3.0, 4.0]]))
    array([25.])
    """
    return np.square(codes - code[None]).sum(axis=1)
