"""The parts of predictors as flax modules: Bayesian layers, the mixer, graph attention.

Every module is called with `key=None` for means (no dropout, weights at their means) or with a key.

Axes: ``B`` architectures, ``F`` features, ``G`` segments, ``C`` channels, ``V`` graph nodes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsys.models.dropout import dropout


def _split(key: Any, n: int) -> Any:
    return [None] * n if key is None else list(jax.random.split(key, n))


class BayesLinear(nnx.Module):
    """A linear layer whose weights are drawn at every call: W = μ + softplus(ρ)·ε, ε ~ N(0, 1).

    No bias and, as released, no divergence from a prior in the loss; μ is uniform within ±1/√F and
    ρ starts at −5 (a deviation of 0.0067).

    Reference: ParZC, arXiv 2402.02105, released code.

    >>> BayesLinear(3, 2, rngs=nnx.Rngs(0))(jnp.ones((4, 3))).shape
    (4, 2)
    """

    def __init__(self, width_in: int, width: int, *, rngs: nnx.Rngs):
        bound = width_in**-0.5
        shape = (width_in, width)
        self.mean = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.rho = nnx.Param(jnp.full(shape, -5.0))

    def __call__(self, x: Float[Array, "*b F"], key: Any = None) -> Float[Array, "*b C"]:
        """Apply a draw of the weights, or their mean."""
        weight = self.mean[...]
        if key is not None:
            noise = jax.random.normal(key, weight.shape)
            weight = weight + jax.nn.softplus(self.rho[...]) * noise
        return x @ weight


class FeedForward(nnx.Module):
    """x + dropout(Linear(dropout(GELU(Linear(LayerNorm(x)))))).

    >>> FeedForward(4, 8, 0.1, rngs=nnx.Rngs(0))(jnp.ones((2, 4))).shape
    (2, 4)
    """

    def __init__(self, width: int, inner: int, rate: float, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, inner, rngs=rngs)
        self.down = nnx.Linear(inner, width, rngs=rngs)
        self.rate = rate

    def __call__(self, x: Float[Array, "*b C"], key: Any = None) -> Float[Array, "*b C"]:
        """Apply the block."""
        k1, k2 = _split(key, 2)
        inner = dropout(jax.nn.gelu(self.up(self.norm(x))), self.rate, k1)
        return x + dropout(self.down(inner), self.rate, k2)


class Mixer(nnx.Module):
    """MABN up to its last layer: mixed architecture, Bayesian network.

    Linear F→sequence, cut into segments of 16; a Bayesian layer 16→C on each; blocks of two
    feed-forward parts with factors 4 and ½; LayerNorm; mean over segments. In the released code
    both parts mix channels and nothing mixes segments before the mean, although the second is named
    after tokens; so here.

    Reference: ParZC, arXiv 2402.02105, released code.

    >>> Mixer(30, sequence=32, width=8, depth=1, rngs=nnx.Rngs(0))(jnp.ones((2, 30))).shape
    (2, 8)
    """

    def __init__(
        self,
        features: int,
        *,
        sequence: int = 256,
        segment: int = 16,
        width: int = 512,
        depth: int = 4,
        rate: float = 0.1,
        rngs: nnx.Rngs,
    ):
        self.segment = segment
        self.embed = nnx.Linear(features, sequence, rngs=rngs)
        self.lift = BayesLinear(segment, width, rngs=rngs)
        self.blocks = nnx.List(
            [
                FeedForward(width, width * 4 if i % 2 == 0 else width // 2, rate, rngs=rngs)
                for i in range(2 * depth)
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: Float[Array, "B F"], key: Any = None) -> Float[Array, "B C"]:
        """Mix one vector of statistics for each architecture."""
        keys = _split(key, len(self.blocks) + 1)
        h = self.embed(x).reshape(x.shape[0], -1, self.segment)
        h = self.lift(h, keys[-1])
        for block, k in zip(self.blocks, keys, strict=False):
            h = block(h, k)
        return jnp.mean(self.norm(h), 1)


class Attention(nnx.Module):
    """Attention among the nodes of a graph, all of them or only neighbours, with a way around it.

    >>> Attention(8, 2, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 6, 8))).shape
    (2, 6, 8)
    """

    def __init__(self, width: int, heads: int, head_width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * heads * head_width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(heads * head_width, width, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "B V C"], mask: Any = None) -> Float[Array, "B V C"]:
        """Attend; `mask` `[V, V]` tells which nodes a node sees."""
        qkv = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        # Graphs have a handful of nodes: sums of products fuse into one loop on a CPU, where
        # thousands of products of tiny matrices would each be a call.
        scores = jnp.sum(q[:, :, None] * k[:, None], -1) / q.shape[-1] ** 0.5  # [B, V, V, H]
        if mask is not None:
            scores = jnp.where(mask[None, :, :, None], scores, -1e9)
        mixed = jnp.sum(jax.nn.softmax(scores, axis=2)[..., None] * v[:, None], 2)
        return x + self.out(mixed.reshape(*x.shape[:2], -1))
