"""A captioner that writes on from a prefix: the language model of DA4LG's task VGC.

Axes: ``B`` rows, ``M`` prefix vectors, ``T`` tokens, ``D`` width of the language model, ``V``
pieces of its vocabulary.

Reference: arXiv 2407.02846; the prefix is ClipCap's (arXiv 2111.09734).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.models import gpt2


class Captioner(NamedTuple):
    """A language model that is told what to write by vectors before the text.

    Attributes:
        width: D, of each prefix vector.
        length: M.
        init: key -> parameters, for a captioner that is trained; None for a frozen one, whose
            parameters are then `frozen["captioner"]`.
        logits: (parameters, prefix [B, M, D], tokens [B, T]) -> [B, T, V], at the places that
            predict each token: the first is predicted from the prefix alone.

    >>> captioner = gpt2_captioner(gpt2.tiny(), length=2)
    >>> captioner.width, captioner.length, captioner.init is None
    (32, 2, True)
    """

    width: int
    length: int
    init: Callable[[Any], Any] | None
    logits: Callable[[Any, Any, Any], Any]


# What stands in for GPT-2 where nobody has its weights: trained with the rest.
SMALL = gpt2.GPT2Config(vocab_size=512, n_positions=64, n_embd=256, n_layer=4, n_head=8)


def gpt2_captioner(config: gpt2.GPT2Config, *, length: int = 10, frozen: bool = True) -> Captioner:
    """Make a captioner of a GPT-2, frozen as DA4LG's is, or small and trained (`SMALL`).

    Reconstruction: known is a frozen GPT-2 that writes the description from visual features; that
    they come as ten prefix vectors is ClipCap's way and chosen here.

    Args:
        config: the model; `frozen["captioner"]` holds its parameters under its checkpoint's names.
        length: M.
        frozen: whether its weights stay as they are.

    Raises:
        UserError: for a length that leaves no place for text; by ``logits``, for a text too long.

    Reference: arXiv 2407.02846; arXiv 2111.09734, section 3.

    >>> captioner = gpt2_captioner(gpt2.tiny(), length=2, frozen=False)
    >>> import jax
    >>> tokens, key = jnp.zeros((1, 5), int), jax.random.key(0)
    >>> run = lambda: captioner.logits(captioner.init(key), jnp.zeros((1, 2, 32)), tokens)
    >>> jax.eval_shape(run).shape
    (1, 5, 256)
    """
    if not 1 <= length < config.n_positions:
        raise UserError(
            f"the prefix has {length} vectors and the model {config.n_positions} positions; "
            "expected at least one of each and place for text; choose a length between"
        )

    def logits(
        params: Any, prefix: Float[Array, "B M D"], tokens: Integer[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        n_tokens = tokens.shape[1]
        if length + n_tokens > config.n_positions:
            raise UserError(
                f"{length} prefix vectors and {n_tokens} tokens are more than the captioner's "
                f"{config.n_positions} positions; shorten the descriptions or the prefix"
            )
        x = jnp.concatenate([prefix, params["wte"]["weight"][tokens]], 1)
        return gpt2.decode(params, config, x)[:, length - 1 : -1]

    init = None if frozen else lambda key: gpt2.init(key, config)
    return Captioner(config.n_embd, length, init, logits)
