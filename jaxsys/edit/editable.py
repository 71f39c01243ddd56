"""What editing needs of a model: tokens, the lookup place, what stands there, the edited matrix.

The matrix is the one that a feed-forward block ends with, y = W k: the key k is its input, the
value y its output. Families keep it as [out, in] or, GPT-2, as [in, out]; only this module knows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable, Request, subject_span
from jaxsys.evaluate.score import encode_pair
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of
from jaxsys.models.lm.layout import join, subtree


class Encoded(NamedTuple):
    """Hold a prompt with its answer in token ids.

    Attributes:
      ids: of prefix, prompt and target.
      lookup: index of the subject's last token.
      split: index of the target's first token.

    >>> Encoded((5, 6, 7), lookup=0, split=2).ids[2:]
    (7,)
    """

    ids: tuple[int, ...]
    lookup: int
    split: int


def encode(model: Editable, request: Request, prefix: str = "") -> Encoded:
    """Encode ``prefix. prompt target`` and find the subject's last token.

    Args:
      model: its tokenizer is used.
      request: the target gets a space before it.
      prefix: text that stands before the prompt, joined by a full stop and a space; "" for none.

    Raises:
      UserError: if the prompt does not name the subject, or the target has no token.

    >>> from jaxsys.data import ByteTokenizer
    >>> request = Request("Rome is in", "Rome", "France")
    >>> encode(Editable(None, ByteTokenizer()), request, "So").lookup
    7
    """
    _, stop = subject_span(request)
    before = f"{prefix}. " if prefix else ""
    text = before + request.prompt.rstrip()
    pair = encode_pair(model.tokenizer, text, " " + request.target.strip())
    if not pair.continuation:
        raise UserError(
            f"the target {request.target[:60]!r} has no token of its own after "
            f"{request.prompt[:60]!r}; expected at least one; choose another wording"
        )
    return Encoded(
        (*pair.context, *pair.continuation),
        last_token(model, text, len(before) + stop),
        len(pair.context),
    )


def last_token(model: Editable, text: str, stop: int) -> int:
    """Find the token that holds the character before ``stop``.

    >>> from jaxsys.data import ByteTokenizer
    >>> last_token(Editable(None, ByteTokenizer()), "a Rome", 6)
    5
    """
    whole, part = model.tokenizer.encode(text), model.tokenizer.encode(text[:stop])
    n = min(len(whole), len(part))
    differ = np.flatnonzero(np.asarray(whole[:n]) != np.asarray(part[:n]))
    # Where the text goes on, the last token may have grown: it still is the first that differs.
    return int(differ[0]) if differ.size else n - 1


def down_name(config: Any, layer: int) -> str:
    """Give the path of a layer's down-projection within its block.

    Raises:
      UserError: for a layer that the model lacks, or one whose feed-forward part is a mixture.

    >>> down_name(lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), 1)
    'mlp.down_proj'
    """
    if not 0 <= layer < config.layers:
        raise UserError(
            f"layer {layer} is asked for; the model has layers 0 to {config.layers - 1}; choose "
            "one of them"
        )
    if config.is_sparse(layer):
        raise UserError(
            f"layer {layer} of this {config.model_type} model is a mixture of {config.experts} "
            "experts, each with a down-projection of its own; this method edits one matrix; use "
            "a dense model or a method that changes no weights (GRACE, SERAC, IKE)"
        )
    return layout_of(config).down


def matrix_path(config: Any, layer: int) -> str:
    """Give the checkpoint's name of a layer's edited matrix.

    >>> matrix_path(lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), 1)
    'model.layers.1.mlp.down_proj.weight'
    """
    return join(lm.layer_prefix(config, layer), down_name(config, layer), "weight")


def get_matrix(config: Any, params: Mapping[str, Any], path: str) -> Float[Array, "O I"]:
    """Read a matrix of a block in the orientation of the mathematics, [out, in].

    Raises:
      UserError: if it is not an array (a quantised weight, or one with an adapter).

    >>> config = lm.LMConfig("gpt2", 97, 32, 2, 4, 4, 8, 48, 64, rope=None, prefix="")
    >>> get_matrix(config, {"h": {"w": jnp.ones((48, 32))}}, "h.w").shape
    (32, 48)
    """
    weight = subtree(params, path)
    if not hasattr(weight, "dtype") or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise UserError(
            f"{path} is a {type(weight).__name__}; expected an array of floating-point numbers; "
            "load the model without quantisation and merge adapters before editing"
        )
    return jnp.swapaxes(weight, 0, 1) if layout_of(config).in_out else jnp.asarray(weight)


def with_leaf(params: Mapping[str, Any], path: str, leaf: Any) -> dict[str, Any]:
    """Replace one leaf; everything beside its path is shared with the old tree.

    >>> with_leaf({"a": {"w": 1}, "b": 2}, "a.w", 3)
    {'a': {'w': 3}, 'b': 2}
    """
    first, _, rest = path.partition(".")
    return {**params, first: with_leaf(params[first], rest, leaf) if rest else leaf}


def add_delta(
    config: Any,
    params: Mapping[str, Any],
    path: str,
    a: Float[Array | np.ndarray, "O R"],
    b: Float[Array | np.ndarray, "I R"],
) -> dict[str, Any]:
    """Add ΔW = A Bᵀ to a matrix, in float32, keeping its dtype and orientation.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> a, b = jnp.ones((2, 1)), jnp.ones((3, 1))
    >>> add_delta(config, {"w": jnp.zeros((2, 3))}, "w", a, b)["w"].sum()
    Array(6., dtype=float32)
    """
    weight = get_matrix(config, params, path)
    new = _plus(weight, jnp.asarray(a), jnp.asarray(b))
    if layout_of(config).in_out:
        new = jnp.swapaxes(new, 0, 1)
    return with_leaf(params, path, new)


@jax.jit
def _plus(weight: Array, a: Array, b: Array) -> Array:
    delta = jnp.einsum("or,ir->oi", a, b, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + delta).astype(weight.dtype)


class Stream(NamedTuple):
    """Hold rows on their way through the blocks.

    Attributes:
      x: residual stream before block ``layer``.
      layer: the next block.
      position: the token of each row that is looked at.

    >>> Stream(jnp.zeros((1, 2, 4)), 0, jnp.ones(1, jnp.int32)).layer
    0
    """

    x: Float[Array, "B T D"]
    layer: int
    position: Int[Array, "B"]


def round_up(n: int, step: int) -> int:
    """Round up to a multiple, so that few lengths, and few programs, are in use.

    >>> round_up(9, 8)
    16
    """
    return -(-n // step) * step


def begin(
    model: Editable, params: Any, rows: Sequence[Sequence[int]], length: int | None = None
) -> Stream:
    """Embed rows of tokens, the last token of each being the one that is looked at.

    Rows are padded on the right, where no token of a causal model looks.

    Args:
      model: its configuration is used.
      params: of the model.
      rows: token ids.
      length: to pad to; the longest row rounded up to a multiple of 8 by default.

    Raises:
      UserError: for a row that is longer than the model's context.

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params = lm.init(jax.random.key(0), config)
    >>> begin(Editable(config, None), params, [(1, 2), (3,)]).position.tolist()
    [1, 0]
    """
    most = max(len(row) for row in rows)
    check_length(model, most)
    length = min(round_up(most, 8), model.config.max_positions) if length is None else length
    tokens = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    position = jnp.asarray([len(row) - 1 for row in rows], jnp.int32)
    return Stream(lm.embed(params, model.config, jnp.asarray(tokens)), 0, position)


def check_length(model: Editable, tokens: int) -> None:
    """Refuse a row that the model has no room for.

    Raises:
      UserError: naming both numbers.

    >>> check_length(Editable(lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), None), 64)
    """
    if tokens > model.config.max_positions:
        raise UserError(
            f"a prompt with its prefix and target has {tokens} tokens; the model has room for "
            f"{model.config.max_positions}; shorten it"
        )


def advance(
    model: Editable, params: Any, stream: Stream, layer: int, taps: Sequence[str] = ()
) -> tuple[Stream, dict[str, Array]]:
    """Run blocks until ``layer`` is the next one.

    Args:
      model: its configuration is used.
      params: of the model, edited or not.
      stream: rows.
      layer: where to stop; it is not run.
      taps: points of the last block that is run, relative to it (``mlp.down_proj:in``, ``:out``).

    Returns:
      The stream and each tap at the rows' positions, [B, width].

    >>> config = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> params, model = lm.init(jax.random.key(0), config), Editable(config, None)
    >>> rows = begin(model, params, [(1, 2)])
    >>> advance(model, params, rows, 1)[0].layer
    1
    """
    config, x, found = model.config, stream.x, {}
    for i in range(stream.layer, layer):
        here = tuple(taps) if i == layer - 1 else ()
        x, _, found = lm.block(lm.layer(params, config, i), config, i, x, taps=here)
    looked_at = {name: _pick(found[name], stream.position) for name in taps}
    return Stream(x, max(layer, stream.layer), stream.position), looked_at


def _pick(x: Float[Array, "B T D"], position: Int[Array, "B"]) -> Float[Array, "B D"]:
    return jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]
