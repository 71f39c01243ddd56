"""The parts of score heads as flax modules: a multilayer perceptron and a transformer block.

Every module is called with ``key=None`` for no dropout, or with a key that draws it.

Axes: ``B`` rows, ``T`` tokens, ``D`` width.
"""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxsys.models.dropout import dropout


class Mlp(nnx.Module):
    """Linear layers with ReLU and dropout between them.

    >>> Mlp((4, 8, 1), 0.1, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4))).shape
    (2, 3, 1)
    """

    def __init__(self, widths: tuple[int, ...], rate: float, *, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(widths)])
        self.rate = rate

    def __call__(self, x: Float[Array, "*b D"], key: Any = None) -> Float[Array, "*b O"]:
        """Apply the layers."""
        last = len(self.layers) - 1
        keys = [None] * last if key is None else jax.random.split(key, max(last, 1))
        for layer, k in zip(list(self.layers)[:-1], keys, strict=False):
            x = dropout(jax.nn.relu(layer(x)), self.rate, k)
        return self.layers[last](x)


class Block(nnx.Module):
    """A transformer layer, normalised before: x + attention(LN x), then x + MLP(LN x) with GELU.

    >>> block = Block(8, 2, 16, 0.1, rngs=nnx.Rngs(0))
    >>> jax.eval_shape(block, jnp.ones((2, 3, 8)), jnp.ones((2, 3), bool)).shape
    (2, 3, 8)
    """

    def __init__(self, width: int, heads: int, inner: int, rate: float, *, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.down = nnx.Linear(inner, width, rngs=rngs)
        self.heads, self.rate = heads, rate

    def __call__(
        self, x: Float[Array, "B T D"], keep: Bool[Array, "B T"], key: Any = None
    ) -> Float[Array, "B T D"]:
        """Let every token attend to the tokens that `keep` marks."""
        b, t, d = x.shape
        keys = [None] * 2 if key is None else jax.random.split(key, 2)
        shape = (b, t, self.heads, d // self.heads)
        q, k, v = (part.reshape(shape) for part in jnp.split(self.qkv(self.norms[0](x)), 3, -1))
        mixed = jax.nn.dot_product_attention(q, k, v, mask=keep[:, None, None])
        x = x + dropout(self.out(mixed.reshape(b, t, d)), self.rate, keys[0])
        inner = self.down(jax.nn.gelu(self.up(self.norms[1](x)), approximate=False))
        return x + dropout(inner, self.rate, keys[1])
