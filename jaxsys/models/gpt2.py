"""GPT-2 as pure functions over a dictionary that is its own checkpoint.

The dotted paths of the parameters are the Hugging Face names without the ``transformer.`` prefix,
and every matrix keeps the checkpoint's orientation: GPT-2's ``Conv1D`` weights are [in, out].

Axes: ``B`` batch, ``T`` tokens, ``V`` vocabulary, ``D`` model width, ``F`` feed-forward width,
``H`` heads, ``C`` head width.

Reference: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key, UInt32

from jaxsys.core.errors import UserError
from jaxsys.core.tree import path_key, unflatten

Params = dict[str, Any]


@dataclass(frozen=True)
class GPT2Config:
    """Describe a GPT-2 with the field names of its Hugging Face ``config.json``.

    The defaults are those of the smallest published model (124 million parameters). There is no
    dropout: models of this library are trained for at most a few passes over their text.

    Raises:
        UserError: for a size below 1 or a width that the heads do not divide.

    >>> GPT2Config(n_embd=64, n_head=4).n_inner_or_default
    256
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}; a GPT-2 needs at least 1; raise it"
                )
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd is {self.n_embd} and n_head is {self.n_head}; every head needs the same "
                "whole width; choose n_embd as a multiple of n_head"
            )

    @property
    def n_inner_or_default(self) -> int:
        """Give the feed-forward width F: ``n_inner``, or four times the model width."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner


def from_depth(n_layer: int, vocab_size: int = 256, n_positions: int = 128) -> GPT2Config:
    """Derive a whole model from its depth: one head of width 64 per layer, D = 64 · n_layer.

    GPT-2 itself follows this rule at n_layer = 12 (768 wide, 12 heads).

    Args:
        n_layer: number of blocks.
        vocab_size: V; 256 for text read as bytes.
        n_positions: longest sequence in tokens.

    Returns:
        The configuration.

    >>> config = from_depth(12, vocab_size=50257, n_positions=1024)
    >>> config == GPT2Config()
    True
    """
    return GPT2Config(vocab_size, n_positions, n_embd=64 * n_layer, n_layer=n_layer, n_head=n_layer)


def small_bytes() -> GPT2Config:
    """Give the 3.3-million-parameter model for byte text: 4 layers, 256 wide, 128 positions.

    >>> small_bytes().n_embd, small_bytes().n_layer, small_bytes().vocab_size
    (256, 4, 256)
    """
    return from_depth(4)


def tiny() -> GPT2Config:
    """Give a model of 35 thousand parameters for tests: 2 layers, 32 wide, 32 positions.

    >>> tiny().n_embd
    32
    """
    return GPT2Config(vocab_size=256, n_positions=32, n_embd=32, n_layer=2, n_head=2)


def parameter_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """List every tensor of the checkpoint by its dotted name, in the order of first use.

    Args:
        config: the model.

    Returns:
        Name to shape; ``lm_head.weight`` is present only when the embeddings are not tied.

    >>> parameter_shapes(tiny())["h.1.mlp.c_fc.weight"]
    (32, 128)
    """
    d, f = config.n_embd, config.n_inner_or_default
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, d),
        "wpe.weight": (config.n_positions, d),
    }
    for i in range(config.n_layer):
        block_shapes = {
            "ln_1.weight": (d,),
            "ln_1.bias": (d,),
            "attn.c_attn.weight": (d, 3 * d),
            "attn.c_attn.bias": (3 * d,),
            "attn.c_proj.weight": (d, d),
            "attn.c_proj.bias": (d,),
            "ln_2.weight": (d,),
            "ln_2.bias": (d,),
            "mlp.c_fc.weight": (d, f),
            "mlp.c_fc.bias": (f,),
            "mlp.c_proj.weight": (f, d),
            "mlp.c_proj.bias": (d,),
        }
        shapes.update({f"h.{i}.{name}": shape for name, shape in block_shapes.items()})
    shapes.update({"ln_f.weight": (d,), "ln_f.bias": (d,)})
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def init(key: Key[Array, ""] | UInt32[Array, "2"], config: GPT2Config) -> Params:
    """Draw initial parameters as GPT-2 did.

    Weights and embeddings are N(0, σ²) with σ = ``initializer_range``; the two projections that
    write into the residual stream have σ / √(2 · n_layer) (Radford et al. 2019, section 2.3);
    biases are 0 and normalisation gains 1. Each tensor's key is folded from its own name, so a
    tensor's value depends on neither the other tensors nor their order.

    Args:
        key: random key.
        config: the model.

    Returns:
        Nested dictionary of float32 arrays, shaped as ``parameter_shapes`` says.

    >>> params = init(jax.random.key(0), tiny())
    >>> params["h"]["0"]["attn"]["c_attn"]["weight"].shape
    (32, 96)
    """
    return unflatten(
        {
            name: _init_leaf(path_key(key, name), config, name, shape)
            for name, shape in parameter_shapes(config).items()
        }
    )


def _init_leaf(key, config: GPT2Config, name: str, shape: tuple[int, ...]) -> Array:
    if name.endswith(".bias"):
        return jnp.zeros(shape, jnp.float32)
    if len(shape) == 1:
        return jnp.ones(shape, jnp.float32)
    std = config.initializer_range
    if name.endswith("c_proj.weight"):
        std /= math.sqrt(2 * config.n_layer)
    return std * jax.random.normal(key, shape, jnp.float32)


def apply(
    params: Params, config: GPT2Config, tokens: Integer[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Compute the logits of the token that follows each position.

    Layers run in a Python loop, so that the jaxpr shows them one after the other.

    Args:
        params: as from ``init``.
        config: the model.
        tokens: [B, T] token indices below ``vocab_size``, T at most ``n_positions``.

    Returns:
        [B, T, V] logits.

    Raises:
        UserError: when the sequence is longer than the model has positions.

    >>> tokens = jnp.zeros((2, 5), jnp.int32)
    >>> apply(init(jax.random.key(0), tiny()), tiny(), tokens).shape
    (2, 5, 256)
    """
    n_tokens = tokens.shape[1]
    if n_tokens > config.n_positions:
        raise UserError(
            f"got sequences of {n_tokens} tokens; the model has {config.n_positions} positions; "
            "shorten them or raise n_positions"
        )
    return decode(params, config, params["wte"]["weight"][tokens])


def decode(params: Params, config: GPT2Config, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Compute logits from vectors that stand where the tokens' embeddings would (a prefix, say).

    Args:
        params: as from ``init``.
        config: the model.
        x: [B, T, D], T at most ``n_positions``; the embeddings of the positions are added here.

    Returns:
        [B, T, V] logits.

    >>> params = init(jax.random.key(0), tiny())
    >>> jax.eval_shape(lambda: decode(params, tiny(), jnp.zeros((2, 5, 32)))).shape
    (2, 5, 256)
    """
    shape = (*x.shape[:2], config.vocab_size)
    x = x + params["wpe"]["weight"][None, : x.shape[1]]
    for i in range(config.n_layer):
        x = block(params["h"][str(i)], config, x)
    x = _layer_norm(params["ln_f"], config, x)
    head = params["wte" if config.tie_word_embeddings else "lm_head"]["weight"]
    # One axis of rows, as in `_conv1d`; the head is [V, D], so both contract on their last axis.
    logits = jnp.einsum("ND,VD->NV", x.reshape(-1, config.n_embd), head)
    return logits.reshape(shape)


def block(params: Params, config: GPT2Config, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Run one transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        params: the subtree ``h.<i>``.
        config: the model.
        x: [B, T, D] residual stream.

    Returns:
        [B, T, D] residual stream after the block.

    >>> params = init(jax.random.key(0), tiny())
    >>> block(params["h"]["0"], tiny(), jnp.zeros((1, 3, 32))).shape
    (1, 3, 32)
    """
    x = x + _attention(params["attn"], config, _layer_norm(params["ln_1"], config, x))
    hidden = _conv1d(params["mlp"]["c_fc"], _layer_norm(params["ln_2"], config, x))
    return x + _conv1d(params["mlp"]["c_proj"], jax.nn.gelu(hidden, approximate=True))


def loss(
    params: Params, config: GPT2Config, tokens: Integer[Array, "B T_plus_1"]
) -> Float[Array, ""]:
    """Average the cross-entropy of each next token, in nats per token.

    Args:
        params: as from ``init``.
        config: the model.
        tokens: [B, T+1]; the first T of each row are read, the last T are predicted.

    Returns:
        Scalar mean over B · T predictions; log V for a model that knows nothing.

    >>> tokens = jnp.zeros((2, 6), jnp.int32)
    >>> abs(float(loss(init(jax.random.key(0), tiny()), tiny(), tokens)) - math.log(256)) < 0.5
    True
    """
    logits = apply(params, config, tokens[:, :-1])
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def _attention(params: Params, config: GPT2Config, x: Array) -> Array:
    n_batch, n_tokens, d = x.shape
    qkv = _conv1d(params["c_attn"], x).reshape(n_batch, n_tokens, 3, config.n_head, -1)
    q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # each [B, H, T, C]
    scores = jnp.einsum("BHQC,BHKC->BHQK", q * (q.shape[-1] ** -0.5), k)
    causal = jnp.tril(jnp.ones((n_tokens, n_tokens), bool))[None, None]
    scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("BHQK,BHKC->BHQC", jax.nn.softmax(scores, axis=-1), v)
    return _conv1d(params["c_proj"], jnp.moveaxis(mixed, 1, 2).reshape(n_batch, n_tokens, d))


def _conv1d(params: Params, x: Array) -> Array:
    # Two axes only: XLA:CPU takes the gradient of the weight, a contraction over B and T, about
    # twice as fast when those two are one axis.
    rows = x.reshape(-1, x.shape[-1]) @ params["weight"] + params["bias"][None]
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _layer_norm(params: Params, config: GPT2Config, x: Array) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + config.layer_norm_epsilon)
    return normal * params["weight"][None, None] + params["bias"][None, None]
