"""What scoring and generation ask of a model: four pure functions and their parameters.

A model of `jaxsys.models.lm` fits through `from_lm`, any other through `from_forward` (a plain
function from tokens to logits, recomputed at every step) or by filling in `Model` directly.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxsys.core.errors import UserError


class Model(NamedTuple):
    """Hold a language model as pure functions.

    The functions are static arguments of compiled programs: make them once and pass the same
    objects, not a fresh lambda for every call.

    Attributes:
      params: any pytree.
      apply: `(params, tokens [B, T], cache or None, lengths [B] or None) -> (x [B, T, D], cache)`,
        what `head` turns into logits. With a cache, row b's tokens are written at the row's end
        and only the first `lengths[b]` of them count (all, if None); the rest is padding.
      head: `(params, x [..., D]) -> logits [..., V]`, for chosen positions only.
      init_cache: `(batch, length) -> cache`, empty, with room for `length` tokens a row.
      vocab_size: V.
      context: the most tokens that a row may hold.

    >>> model = from_forward(lambda params, tokens: jax.nn.one_hot(tokens, 4), {}, 4, 16)
    >>> model.vocab_size, model.context
    (4, 16)
    """

    params: Any
    apply: Callable[..., tuple[Array, Any]]
    head: Callable[..., Array]
    init_cache: Callable[[int, int], Any]
    vocab_size: int
    context: int


class Recomputed(NamedTuple):
    """Remember the tokens themselves, the cache of a model that has none.

    >>> Recomputed(jnp.zeros((1, 4), jnp.int32), jnp.zeros(1, jnp.int32)).tokens.shape
    (1, 4)
    """

    tokens: Int32[Array, "B L"]
    length: Int32[Array, "B"]


def from_forward(
    forward: Callable[[Any, Array], Array], params: Any, vocab_size: int, context: int
) -> Model:
    """Make a model from a causal function of all tokens, which is run in full at every step.

    Args:
      forward: `(params, tokens [B, T]) -> logits [B, T, V]`, causal.
      params: any pytree.
      vocab_size: V.
      context: the most tokens that `forward` takes.

    >>> def forward(params, tokens):
    ...     return params["bigram"][tokens]
    >>> model = from_forward(forward, {"bigram": jnp.eye(3)}, 3, 8)
    >>> model.apply(model.params, jnp.array([[2]]), None, None)[0]
    Array([[[0., 0., 1.]]], dtype=float32)
    """
    return Model(params, _recompute(forward), _as_logits, _empty_tokens, vocab_size, context)


def from_lm(params: Any, config: Any, dtype: Any = None) -> Model:
    """Make a model from what `jaxsys.models.lm.load` returns.

    Args:
      params: the checkpoint's tensors, as nested dicts.
      config: the `LMConfig`.
      dtype: of the cache; that of the embedding by default.

    >>> from jaxsys.models import lm
    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> model = from_lm(lm.init(jax.random.key(0), config), config)
    >>> x, _ = model.apply(model.params, jnp.zeros((1, 2), jnp.int32), None, None)
    >>> model.head(model.params, x).shape == (1, 2, config.vocab_size)
    True
    """
    if dtype is None:
        floats = [x.dtype for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
        dtype = floats[0]
    apply, head, init_cache = _lm_functions(config, jnp.dtype(dtype))
    return Model(params, apply, head, init_cache, config.vocab_size, config.max_positions)


def check_fits(model: Model, tokens: int, what: str) -> None:
    """Refuse a row that is longer than the model's context.

    Raises:
      UserError: if it is.

    >>> check_fits(from_forward(lambda p, t: t, {}, 4, 16), 17, "the prompt")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the prompt needs 17 tokens, and the model's context holds 16; ...
    """
    if tokens > model.context:
        raise UserError(
            f"{what} needs {tokens} tokens, and the model's context holds {model.context}; "
            "ask for fewer"
        )


def _as_logits(params: Any, x: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    del params
    return x


def _empty_tokens(batch: int, length: int) -> Recomputed:
    return Recomputed(jnp.zeros((batch, length), jnp.int32), jnp.zeros(batch, jnp.int32))


@functools.lru_cache(maxsize=64)
def _recompute(forward: Callable[[Any, Array], Array]) -> Callable[..., tuple[Array, Any]]:
    def apply(params, tokens, cache, lengths):
        if cache is None:
            return forward(params, tokens), None
        batch, count = tokens.shape
        places = cache.length[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        # Padding is written too: it lies behind the row's end, which a causal model never reads.
        rows = jnp.arange(batch)[:, None]
        written = cache.tokens.at[rows, places].set(tokens, mode="drop")
        logits = forward(params, written)
        chosen = jnp.take_along_axis(logits, places[..., None], axis=1, mode="clip")
        advance = jnp.full(batch, count, jnp.int32) if lengths is None else lengths
        return chosen, Recomputed(written, cache.length + advance)

    return apply


@functools.lru_cache(maxsize=64)
def _lm_functions(config: Any, dtype: Any) -> tuple[Callable, Callable, Callable]:
    from jaxsys.models import lm

    # The last block's output is tapped, and logits are made for chosen positions only: the compiler
    # drops the logits that `apply` would make for all of them.
    last = f"{lm.layer_prefix(config, config.layers - 1)}:out"

    def apply(params, tokens, cache, lengths):
        valid = None if lengths is None else jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        out = lm.apply(params, config, tokens, cache=cache, mask=valid, taps=(last,))
        return out.taps[last], out.cache

    def head(params, x):
        logits = lm.head(params, config, x.reshape(1, -1, x.shape[-1]))
        return logits.reshape(*x.shape[:-1], logits.shape[-1])

    def init_cache(batch, length):
        return lm.init_cache(config, batch, length, dtype)

    return apply, head, init_cache
