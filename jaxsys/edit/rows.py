"""Requests as padded rows with their answers, and the loss of the answers from any block on."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable, Request, check_requests
from jaxsys.edit.editable import Encoded, advance, begin, encode, round_up
from jaxsys.models import lm
from jaxsys.models.lm.taps import Intervention, local, local_changes

_MOST_TARGET = 64


class Answers(NamedTuple):
    """Say which token each of a row's places is to be followed by.

    Attributes:
      at: [B, M] places in the row; 0 where there are fewer than M.
      ids: [B, M] tokens that should follow them.
      mask: [B, M] 1.0 for real ones, 0.0 for padding.

    >>> Answers(jnp.zeros((1, 2), int), jnp.ones((1, 2), int), jnp.ones((1, 2))).ids.shape
    (1, 2)
    """

    at: Int[Array, "B M"]
    ids: Int[Array, "B M"]
    mask: Float[Array, "B M"]


class Rows(NamedTuple):
    """Hold requests before one of a model's blocks.

    Attributes:
      x: [B, T, D] residual stream before block ``layer``.
      layer: the next block.
      prompt_end: [B] place of the prompt's last token.
      answers: what should follow.

    >>> Rows(jnp.zeros((1, 2, 4)), 0, jnp.ones(1, int), None).layer
    0
    """

    x: Float[Array, "B T D"]
    layer: int
    prompt_end: Int[Array, "B"]
    answers: Any  # Answers; an array's place when trees are mapped


def checked(model: Editable, requests: Sequence[Request]) -> list[Encoded]:
    """Check a batch of requests and encode it.

    Raises:
      UserError: as `check_requests` and `encode`, and for a target of over 64 tokens.

    >>> from jaxsys.data import ByteTokenizer
    >>> facts = [Request("Rome is in", "Rome", "France")]
    >>> len(checked(Editable(None, ByteTokenizer()), facts)[0].ids)
    17
    """
    check_requests(requests)
    encoded = [encode(model, request) for request in requests]
    for request, row in zip(requests, encoded, strict=True):
        if len(row.ids) - row.split > _MOST_TARGET:
            raise UserError(
                f"the target {request.target[:60]!r} has {len(row.ids) - row.split} tokens; "
                f"expected at most {_MOST_TARGET}; shorten it"
            )
    return encoded


def rows_of(
    model: Editable,
    params: Any,
    encoded: Sequence[Encoded],
    layer: int = 0,
    loss: Literal["target", "last"] = "target",
    *,
    at_least: tuple[int, int] = (0, 0),
) -> Rows:
    """Lay encoded requests out and run the blocks below ``layer``, once.

    Args:
      model: its configuration is used.
      params: of the model.
      encoded: from `encode`.
      layer: the first block not to be run.
      loss: ``target``: each token of the target follows the prompt and the target's tokens before
        it. ``last``: all of them follow the prompt's last token, which reads the prompt alone.
      at_least: (T, M) to pad to, so that one program serves several batches.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = lm.init(jax.random.key(0), config)
    >>> rows_of(Editable(config, None), params, [Encoded((5, 6, 7, 8), 0, 2)]).answers.at[0, :2]
    Array([1, 2], dtype=int32)
    """
    n, width = len(encoded), max(len(row.ids) - row.split for row in encoded)
    width = max(round_up(width, 4), at_least[1])
    at, ids, mask = np.zeros((3, n, width), np.int32)
    for i, row in enumerate(encoded):
        target = row.ids[row.split :]
        step = np.arange(len(target)) if loss == "target" else 0
        at[i, : len(target)] = row.split - 1 + step
        ids[i, : len(target)] = target
        mask[i, : len(target)] = 1
    # The last token of a target is predicted and never read.
    inputs = [row.ids[:-1] if loss == "target" else row.ids[: row.split] for row in encoded]
    most = max(round_up(max(map(len, inputs)), 8), at_least[0])
    stream = begin(model, params, inputs, min(most, model.config.max_positions))
    stream, _ = advance(model, params, stream, layer)
    answers = Answers(jnp.asarray(at), jnp.asarray(ids), jnp.asarray(mask, jnp.float32))
    ends = jnp.asarray([row.split - 1 for row in encoded], jnp.int32)
    return Rows(stream.x, layer, ends, answers)


def log_probs(
    params: Any,
    config: Any,
    x: Float[Array, "B T D"],
    at: Int[Array, "B M"],
    *,
    layer: int,
    interventions: Sequence[Intervention] = (),
    taps: Sequence[str] = (),
) -> tuple[Float[Array, "B M V"], dict[str, Array]]:
    """Run the blocks from ``layer`` on and give log-probabilities at chosen places only.

    Args:
      params: of the model.
      config: an `LMConfig`.
      x: residual stream before block ``layer``.
      at: places.
      layer: the first block to run.
      interventions: vectors to add at points of these blocks, by their full names.
      taps: points of these blocks whose activations are wanted, by their full names.

    Returns:
      Log-probabilities in float32, and the activations by name.

    >>> from functools import partial
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = jax.eval_shape(partial(lm.init, config=config), jax.random.key(0))
    >>> run = partial(log_probs, config=config, layer=1, at=jnp.zeros((1, 1), jnp.int32))
    >>> jax.eval_shape(run, params, x=jnp.ones((1, 5, 32)))[0].shape
    (1, 1, 97)
    """
    found = {}
    for i in range(layer, config.layers):
        prefix = lm.layer_prefix(config, i)
        x, _, here = lm.block(
            lm.layer(params, config, i),
            config,
            i,
            x,
            taps=local(taps, prefix),
            interventions=local_changes(interventions, prefix),
        )
        found |= {f"{prefix}.{p}".replace(".:", ":"): here[p] for p in here}
    chosen = jnp.take_along_axis(x, at[:, :, None], axis=1)
    logits = lm.head(params, config, chosen)
    return jax.nn.log_softmax(logits.astype(jnp.float32)), found


def mean_nll(
    log_p: Float[Array, "B M V"], ids: Int[Array, "B M"], mask: Float[Array, "B M"]
) -> Float[Array, "B"]:
    """Average −log p over each row's tokens: −(1/|o|) Σ log p(o_t).

    >>> log_p = jnp.log(jnp.full((1, 2, 4), 0.25))
    >>> mean_nll(log_p, jnp.zeros((1, 2), jnp.int32), jnp.array([[1.0, 0.0]])).round(3)
    Array([1.386], dtype=float32)
    """
    chosen = jnp.take_along_axis(log_p, ids[:, :, None], axis=-1)[..., 0]
    return -(chosen * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1.0)
