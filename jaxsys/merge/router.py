"""From a prompt to weights of experts: a trained head or their own uncertainty; then a blend.

The head reads mean-pooled hidden states of the shared model, which is there anyway. Without
training, each expert's mean predictive entropy (or loss) over the prompt says how foreign the
prompt is to it. Either gives logits, calibrated by one temperature; their posterior decides
between one expert and a blend.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxsys.core.errors import UserError


class Router(NamedTuple):
    """Hold a trained head: standardised features, layers with ReLU between, a temperature.

    Attributes:
      mean: [D] of the features it was trained on.
      scale: [D] their standard deviation.
      layers: (weight [out, in], bias [out]) of each layer; one layer is a linear head.
      temperature: T, by which logits are divided.

    >>> layers = ((jnp.eye(2), jnp.zeros(2)),)
    >>> posterior(Router(jnp.zeros(2), jnp.ones(2), layers, jnp.ones(())), jnp.zeros((1, 2)))[0, 0]
    Array(0.5, dtype=float32)
    """

    mean: Float[Array, "D"]
    scale: Float[Array, "D"]
    layers: tuple[tuple[Array, Array], ...]
    temperature: Float[Array, ""]


@dataclass(frozen=True)
class HeadConfig:
    """Say how a head is trained: Adam on all prompts at once.

    Attributes:
      hidden: width of a hidden layer; 0 for a linear head.
      steps: of Adam.
      lr: learning rate.
      weight_decay: of the weights.

    >>> HeadConfig().hidden
    0
    """

    hidden: int = 0
    steps: int = 300
    lr: float = 0.02
    weight_decay: float = 1e-2


@dataclass(frozen=True)
class BlendConfig:
    """Say how a posterior becomes weights.

    Reconstruction: that weights come from the task's uncertainty is established; the threshold and
    the sharpening are our reading.

    Attributes:
      threshold: U_0; below this uncertainty the likeliest expert serves alone.
      top_k: how many experts a blend keeps; None keeps all.
      temperature: T of w ∝ p^(1/T).

    Raises:
      UserError: for a number of experts below 1 or a temperature that is not positive.

    >>> BlendConfig().top_k is None
    True
    """

    threshold: float = 0.5
    top_k: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or (self.top_k is not None and self.top_k < 1):
            raise UserError(
                f"top_k is {self.top_k} and temperature {self.temperature}; expected at least 1 "
                "(or None) and a positive number; change them"
            )


def pool(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Average hidden states over the tokens of each prompt.

    >>> pool(jnp.array([[[1.0], [3.0], [9.0]]]), jnp.array([[True, True, False]])).tolist()
    [[2.0]]
    """
    counts = mask.astype(jnp.float32)[..., None]
    total = jnp.sum(hidden.astype(jnp.float32) * counts, axis=1)
    return total / jnp.maximum(jnp.sum(counts, axis=1), 1.0)


def head_logits(router: Router, features: Float[Array, "B D"]) -> Float[Array, "B N"]:
    """Compute a head's logits, before the temperature.

    >>> head = Router(jnp.zeros(1), jnp.ones(1), ((jnp.ones((2, 1)), jnp.zeros(2)),), jnp.ones(()))
    >>> head_logits(head, jnp.ones((1, 1))).tolist()
    [[1.0, 1.0]]
    """
    x = (features - router.mean[None]) / router.scale[None]
    *inner, (weight, bias) = router.layers
    for matrix, shift in inner:
        x = jax.nn.relu(x @ matrix.T + shift[None])
    return x @ weight.T + bias[None]


def posterior(router: Router, features: Float[Array, "B D"]) -> Float[Array, "B N"]:
    """Give p(n | x) = softmax(logits / T).

    >>> head = Router(jnp.zeros(1), jnp.ones(1), ((jnp.ones((2, 1)), jnp.zeros(2)),), jnp.ones(()))
    >>> posterior(head, jnp.ones((1, 1))).tolist()
    [[0.5, 0.5]]
    """
    return jax.nn.softmax(head_logits(router, features) / router.temperature, axis=-1)


def train_head(
    features: Float[Array | np.ndarray, "M D"],
    labels: Int[Array | np.ndarray, "M"],
    experts: int,
    config: HeadConfig = HeadConfig(),
    *,
    key: Key[Array, ""],
    held_out: float = 0.25,
) -> Router:
    """Train a head by cross-entropy, then calibrate its temperature on prompts set aside.

    Args:
      features: pooled hidden states of prompts.
      labels: which expert's task each prompt is of.
      experts: N.
      config: how.
      key: of the start and of which prompts are set aside.
      held_out: their share.

    Returns:
      The head.

    Raises:
      UserError: with labels outside 0 to N − 1, or too few prompts.

    >>> x, y = np.array([[-1.0], [1.0]] * 8), np.array([0, 1] * 8)
    >>> head = train_head(x, y, 2, HeadConfig(steps=50), key=jax.random.key(0))
    >>> posterior(head, jnp.array([[-1.0], [1.0]])).argmax(1).tolist()
    [0, 1]
    """
    x, y = np.asarray(features, np.float32), np.asarray(labels, np.int64)
    if len(y) < 4 or y.min() < 0 or y.max() >= experts:
        raise UserError(
            f"there are {len(y)} prompts with labels {sorted(set(y.tolist()))} for {experts} "
            f"experts; expected four or more, labelled 0 to {experts - 1}; give such prompts"
        )
    start_key, order_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(order_key, len(y)))
    aside = order[: max(int(held_out * len(y)), 1)]
    rest = order[aside.size :]
    scale = np.maximum(x[rest].std(0), 1e-3 * max(float(x[rest].std()), 1e-6))
    widths = [x.shape[1], *([config.hidden] if config.hidden else []), experts]
    layers = []
    for i, (wide, out) in enumerate(itertools.pairwise(widths)):
        part = jax.random.fold_in(start_key, i)
        layers.append((jax.random.normal(part, (out, wide)) / np.sqrt(wide), jnp.zeros(out)))
    start = Router(jnp.asarray(x[rest].mean(0)), jnp.asarray(scale), tuple(layers), jnp.ones(()))
    trained = _fit_head(start, jnp.asarray(x[rest]), jnp.asarray(y[rest]), config)
    logits = head_logits(trained, jnp.asarray(x[aside]))
    return trained._replace(temperature=jnp.float32(calibrate(np.asarray(logits), y[aside])))


@partial(jax.jit, static_argnames="config")
def _fit_head(start: Router, x: Array, y: Array, config: HeadConfig) -> Router:
    optimizer = optax.adamw(config.lr, weight_decay=config.weight_decay)

    def loss(layers: Any) -> Array:
        logits = head_logits(start._replace(layers=layers), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(state: Any, _: None) -> tuple[Any, None]:
        layers, memory = state
        updates, memory = optimizer.update(jax.grad(loss)(layers), memory, layers)
        return (optax.apply_updates(layers, updates), memory), None

    state = (start.layers, optimizer.init(start.layers))
    (layers, _), _ = jax.lax.scan(step, state, None, length=config.steps)
    return start._replace(layers=layers)


def calibrate(logits: Float[np.ndarray, "M N"], labels: Int[np.ndarray, "M"]) -> float:
    """Find the temperature with the least cross-entropy, between 1/20 and 20.

    Args:
      logits: of prompts that training has not seen, or −u of `prompt_uncertainty`.
      labels: their tasks.

    Returns:
      T; far from a border, the cross-entropy has one minimum in 1/T.

    Reference: Guo et al., arXiv 1706.04599.

    >>> calibrate(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([0, 1]))
    20.0
    """
    logits = np.asarray(logits, np.float64)

    def loss(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        top = scaled.max(1, keepdims=True)
        lse = top[:, 0] + np.log(np.exp(scaled - top).sum(1))
        return float((lse - scaled[np.arange(len(labels)), labels]).mean())

    grid = np.linspace(np.log(0.05), np.log(20.0), 241)
    return float(round(np.exp(grid[int(np.argmin([loss(g) for g in grid]))]), 6))


def prompt_uncertainty(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    kind: Literal["entropy", "nll"] = "entropy",
) -> Float[Array, "B"]:
    """Measure how foreign a prompt is to the expert whose logits these are.

    u = mean over the prompt's predicted tokens of the predictive entropy, or of −log p(token).

    Args:
      logits: of the expert.
      tokens: of the prompts.
      mask: tokens that are no padding.
      kind: entropy or nll.

    Returns:
      u of each prompt, in nats.

    >>> u = prompt_uncertainty(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), int), jnp.ones((1, 3), bool))
    >>> round(float(u[0]), 4)
    1.3863
    """
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    if kind == "entropy":
        each = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    else:
        each = -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    counts = (mask[:, 1:] & mask[:, :-1]).astype(jnp.float32)
    return jnp.sum(each * counts, axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1.0)


def uncertainty_logits(
    apply_fn: Callable[[Any, Array, Array], Array],
    params_of: Callable[[int], Any],
    experts: int,
    tokens: Array,
    mask: Array,
    kind: Literal["entropy", "nll"] = "entropy",
) -> Float[Array, "B N"]:
    """Give −u_n of each prompt under every expert; costs N forward passes of the prompt.

    Args:
      apply_fn: (params, tokens, mask) to logits.
      params_of: expert's number to its parameters.
      experts: N.
      tokens: [B, T] prompts.
      mask: [B, T] what is no padding.
      kind: see `prompt_uncertainty`.

    >>> apply_fn = lambda p, tokens, mask: jnp.zeros((*tokens.shape, 4)).at[..., 0].set(p)
    >>> tokens = jnp.zeros((1, 3), int)
    >>> u = uncertainty_logits(apply_fn, [0.0, 9.0].__getitem__, 2, tokens, tokens == 0)
    >>> bool(u[0, 1] > u[0, 0])
    True
    """
    rows = [
        prompt_uncertainty(apply_fn(params_of(n), tokens, mask), tokens, mask, kind)
        for n in range(experts)
    ]
    return -jnp.stack(rows, axis=1)


def uncertainty(p: Float[Array, "B N"]) -> Float[Array, "B"]:
    """Measure a posterior's uncertainty, U = −Σ p_n log p_n / log N; 0 for one expert.

    >>> uncertainty(jnp.array([[0.5, 0.5], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    n = p.shape[-1]
    if n == 1:
        return jnp.zeros(p.shape[:-1])
    return jnp.sum(jax.scipy.special.entr(p), axis=-1) / jnp.log(float(n))


def blend(
    p: Float[Array, "B N"], config: BlendConfig = BlendConfig()
) -> tuple[Float[Array, "B N"], Float[Array, "B"]]:
    """Turn posteriors into weights: one expert where they are sure, else a blend.

    U < U_0: one-hot at the likeliest; else the top k with w ∝ p^(1/T).

    Reconstruction: see `BlendConfig`.

    Args:
      p: posteriors.
      config: U_0, k and T.

    Returns:
      Weights that sum to 1, and U.

    Reference: arXiv 2502.04411.

    >>> w, _ = blend(jnp.array([[0.99, 0.01], [0.6, 0.4]]), BlendConfig(threshold=0.3))
    >>> [[round(float(x), 2) for x in row] for row in w]
    [[1.0, 0.0], [0.6, 0.4]]
    """
    n = p.shape[-1]
    unsure = uncertainty(p)
    k = min(config.top_k or n, n)
    order = jnp.argsort(-p, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    mixed = jnp.where(rank < k, p ** (1.0 / config.temperature), 0.0)
    mixed = mixed / jnp.sum(mixed, axis=-1, keepdims=True)
    alone = (rank == 0).astype(p.dtype)
    return jnp.where((unsure < config.threshold)[:, None], alone, mixed), unsure
