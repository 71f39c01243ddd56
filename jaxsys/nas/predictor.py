"""Predictors of an architecture's rank: MABN, MABN with a graph encoder, MLP, GCN.

Each is a `Predictor`: pure functions over a dict of inputs, `nodes` `[B, F]` (statistics of layers)
and `ops` `[B, 6]` (operations on the edges of a NAS-Bench-201 cell).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.models.dropout import dropout
from jaxsys.nas.modules import Attention, BayesLinear, FeedForward, Mixer
from jaxsys.nas.space import EDGES

Inputs = dict[str, Any]

# Edge e feeds edge f if e ends where f begins: the cell as a graph whose nodes are operations.
ADJACENCY = np.array([[a[1] == b[0] for b in EDGES] for a in EDGES], np.float32)


class Predictor(NamedTuple):
    """A predictor as pure functions.

    Attributes:
      init: key -> parameters.
      apply: (parameters, inputs, key or None) -> scores `[B]`; a key draws dropout and weights.

    >>> predictor = make("mlp", features=4, config=PredictorConfig(width=8))
    >>> params = predictor.init(jax.random.key(0))
    >>> inputs = {"nodes": jnp.ones((2, 4)), "ops": jnp.zeros((2, 6), int)}
    >>> predictor.apply(params, inputs, None).shape
    (2,)
    """

    init: Callable[[Any], Any]
    apply: Callable[..., Any]


@dataclass(frozen=True)
class PredictorConfig:
    """Describe the size of a predictor.

    Attributes:
      sequence: values that the mixer's first layer gives; a multiple of `segment`.
      segment: values in a segment.
      width: channels.
      depth: blocks.
      heads: of attention (graph encoder).
      head_width: of attention.
      graph_width: width of the graph encoder's nodes.
      inner: of its feed-forward parts.
      rate: of dropout.

    >>> PredictorConfig().width
    64
    """

    sequence: int = 256
    segment: int = 16
    width: int = 64
    depth: int = 2
    heads: int = 4
    head_width: int = 16
    graph_width: int = 64
    inner: int = 128
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.sequence % self.segment:
            raise UserError(
                f"sequence is {self.sequence} and segment {self.segment}; the sequence is cut into "
                "whole segments; choose a multiple"
            )


# Sizes of the released code; ours (the default) is smaller, for CPUs and small training sets.
SIZES = {
    "small": PredictorConfig(),
    "mabn": PredictorConfig(width=512, depth=4),
    "nds": PredictorConfig(sequence=752, width=1600, depth=5, rate=0.18),
    "nb201": PredictorConfig(
        width=512, depth=4, heads=6, head_width=100, graph_width=765, inner=338
    ),
    "nb101": PredictorConfig(
        width=512, depth=4, heads=6, head_width=100, graph_width=708, inner=530
    ),
}


class Mabn(nnx.Module):
    """MABN alone: the mixer, then Bayesian C→C, linear C→C/2, dropout, linear →1.

    >>> inputs = {"nodes": jnp.ones((2, 30))}
    >>> Mabn(30, PredictorConfig(width=8), rngs=nnx.Rngs(0))(inputs).shape
    (2,)
    """

    def __init__(self, features: int, config: PredictorConfig, *, rngs: nnx.Rngs):
        c = config.width
        self.mixer = _mixer(features, config, rngs)
        self.last = BayesLinear(c, c, rngs=rngs)
        self.half = nnx.Linear(c, c // 2, rngs=rngs)
        self.out = nnx.Linear(c // 2, 1, rngs=rngs)

    def __call__(self, inputs: Inputs, key: Any = None) -> Float[Array, "B"]:
        """Score architectures."""
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        h = self.last(self.mixer(inputs["nodes"], keys[0]), keys[1])
        return self.out(dropout(jax.nn.gelu(self.half(h)), 0.1, keys[2]))[:, 0]


class GraphMabn(nnx.Module):
    """ParZC's form: a PINAT-like graph encoder to whose nodes MABN's output is added.

    Reconstruction: operations are embedded, the eigenvectors of the graph's Laplacian are added,
    three attention layers see neighbours only, then `depth` transformer layers see all nodes; the
    mean over nodes passes two linear layers without bias. The published encoder's exact wiring was
    not read.

    >>> inputs = {"nodes": jnp.ones((2, 30)), "ops": jnp.zeros((2, 6), int)}
    >>> model = GraphMabn(30, PredictorConfig(width=8, depth=1), rngs=nnx.Rngs(0))
    >>> jax.eval_shape(lambda x: model(x), inputs).shape
    (2,)
    """

    def __init__(self, features: int, config: PredictorConfig, *, rngs: nnx.Rngs):
        d = config.graph_width
        self.embed = nnx.Embed(5, d, rngs=rngs)
        self.place = nnx.Linear(6, d, rngs=rngs)
        size = config.heads, config.head_width
        self.local = nnx.List([Attention(d, *size, rngs=rngs) for _ in range(3)])
        self.mixer = _mixer(features, config, rngs)
        self.spread = BayesLinear(config.width, 6 * d, rngs=rngs)
        self.attend = nnx.List([Attention(d, *size, rngs=rngs) for _ in range(config.depth)])
        self.feed = nnx.List(
            [FeedForward(d, config.inner, config.rate, rngs=rngs) for _ in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(d, rngs=rngs)
        self.half = nnx.Linear(d, d // 2, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(d // 2, 1, use_bias=False, rngs=rngs)

    def __call__(self, inputs: Inputs, key: Any = None) -> Float[Array, "B"]:
        """Score architectures."""
        keys = [None] * (2 + len(self.feed))
        if key is not None:
            keys = list(jax.random.split(key, len(keys)))
        near = (ADJACENCY + ADJACENCY.T + np.eye(6)) > 0
        h = self.embed(inputs["ops"]) + self.place(jnp.asarray(_laplacian_vectors()))[None]
        for layer in self.local:
            h = layer(h, jnp.asarray(near))
        mixed = self.spread(self.mixer(inputs["nodes"], keys[0]), keys[1])
        h = h + mixed.reshape(h.shape)
        for attend, feed, k in zip(self.attend, self.feed, keys[2:], strict=True):
            h = feed(attend(h), k)
        pooled = jnp.mean(self.norm(h), 1)
        return self.out(jax.nn.relu(self.half(pooled)))[:, 0]


class Mlp(nnx.Module):
    """A plain network on the statistics and the operations in 0/1 form: three hidden layers.

    >>> inputs = {"nodes": jnp.ones((2, 30)), "ops": jnp.zeros((2, 6), int)}
    >>> Mlp(30, PredictorConfig(width=8), rngs=nnx.Rngs(0))(inputs).shape
    (2,)
    """

    def __init__(self, features: int, config: PredictorConfig, *, rngs: nnx.Rngs):
        widths = [features + 30, *[4 * config.width] * 3]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(widths)])
        self.out = nnx.Linear(widths[-1], 1, rngs=rngs)
        self.rate = config.rate

    def __call__(self, inputs: Inputs, key: Any = None) -> Float[Array, "B"]:
        """Score architectures."""
        hot = jax.nn.one_hot(inputs["ops"], 5).reshape(inputs["ops"].shape[0], -1)
        h = jnp.concatenate([inputs["nodes"], hot], -1)
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        for layer, k in zip(self.layers, keys, strict=True):
            h = dropout(jax.nn.gelu(layer(h)), self.rate, k)
        return self.out(h)[:, 0]


class Gcn(nnx.Module):
    """A graph convolutional network on the operations, along and against the edges.

    Reference: Wen et al., arXiv 1912.00848 (predictor); the statistics are not used.

    >>> inputs = {"ops": jnp.zeros((2, 6), int)}
    >>> Gcn(0, PredictorConfig(width=8), rngs=nnx.Rngs(0))(inputs).shape
    (2,)
    """

    def __init__(self, features: int, config: PredictorConfig, *, rngs: nnx.Rngs):
        widths = [5, *[2 * config.width] * 3]
        pairs = list(pairwise(widths))
        self.along = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])
        self.against = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.LayerNorm(b, rngs=rngs) for _, b in pairs])
        # The readout keeps the nodes apart: which edge an operation is on matters here.
        self.half = nnx.Linear(6 * widths[-1], widths[-1], rngs=rngs)
        self.out = nnx.Linear(widths[-1], 1, rngs=rngs)
        self.rate = config.rate

    def __call__(self, inputs: Inputs, key: Any = None) -> Float[Array, "B"]:
        """Score architectures."""
        forward = (ADJACENCY.T + np.eye(6)) / (ADJACENCY.T + np.eye(6)).sum(1, keepdims=True)
        back = (ADJACENCY + np.eye(6)) / (ADJACENCY + np.eye(6)).sum(1, keepdims=True)
        h = jax.nn.one_hot(inputs["ops"], 5)
        for along, against, norm in zip(self.along, self.against, self.norms, strict=True):
            mixed = jnp.einsum("vu,buc->bvc", jnp.float32(forward), along(h))
            mixed += jnp.einsum("vu,buc->bvc", jnp.float32(back), against(h))
            h = jax.nn.relu(norm(mixed))
        h = jax.nn.relu(self.half(h.reshape(h.shape[0], -1)))
        return self.out(dropout(h, self.rate, key))[:, 0]


MODULES: dict[str, Any] = {"mabn": Mabn, "parzc": GraphMabn, "mlp": Mlp, "gcn": Gcn}


def make(name: str, features: int, config: PredictorConfig | None = None) -> Predictor:
    """Make a predictor by name.

    Args:
      name: mabn, parzc (MABN with the graph encoder), mlp or gcn.
      features: F.
      config: sizes.

    Raises:
      UserError: for an unknown name.

    >>> predictor = make("gcn", 0, PredictorConfig(width=8))
    >>> params = predictor.init(jax.random.key(0))
    >>> predictor.apply(params, {"ops": jnp.zeros((3, 6), int)}, None).shape
    (3,)
    """
    if name not in MODULES:
        raise UserError(f"predictor {name!r} does not exist; expected one of {', '.join(MODULES)}")
    module, sizes = MODULES[name], config or PredictorConfig()
    build = lambda rngs: module(features, sizes, rngs=rngs)  # noqa: E731
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key: Any) -> Any:
        return nnx.as_pure(nnx.split(build(nnx.Rngs(key)))[1])

    return Predictor(init, lambda params, x, key=None: nnx.merge(graphdef, params)(x, key))


def _mixer(features: int, config: PredictorConfig, rngs: nnx.Rngs) -> Mixer:
    return Mixer(
        features,
        sequence=config.sequence,
        segment=config.segment,
        width=config.width,
        depth=config.depth,
        rate=config.rate,
        rngs=rngs,
    )


def _laplacian_vectors() -> np.ndarray:
    """Return the eigenvectors of the normalised Laplacian of the undirected graph, [6, 6]."""
    near = np.maximum(ADJACENCY, ADJACENCY.T)
    # The edge from input to output has no neighbour: its row of the Laplacian is the identity's.
    scale = 1 / np.sqrt(np.maximum(near.sum(1), 1))
    _, vectors = np.linalg.eigh(np.eye(6) - near * scale[:, None] * scale[None, :])
    # The sign of an eigenvector is arbitrary: make the largest entry positive.
    largest = np.abs(vectors).argmax(0)
    return (vectors * np.sign(vectors[largest, np.arange(6)])).astype(np.float32)
