"""Train many small cell networks to the end in one program: a live space, or a table of one's own.

Axes: ``P`` architectures, ``K`` seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import on_cpu
from jaxsys.nas import network
from jaxsys.nas.model import cross_entropy
from jaxsys.nas.network import NetworkConfig


@dataclass(frozen=True)
class TrainConfig:
    """Describe the training of every network.

    Attributes:
      epochs: passes over the training images.
      batch: images in a step; a smaller rest of an epoch is left out.
      lr: peak of Adam's rate, which falls to 0 along a cosine.
      weight_decay: decoupled.

    >>> TrainConfig().epochs
    10
    """

    epochs: int = 10
    batch: int = 64
    lr: float = 5e-3
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise UserError(f"{self}: expected at least 1 epoch and batches of at least 2; mend it")


def train_cells(
    images: Float[Array, "N Y X C"],
    labels: Any,
    held: tuple[Any, ...],
    config: TrainConfig,
    net: NetworkConfig,
    *,
    batching: Literal["map", "vmap"] | None = None,
) -> Callable[[Any, Any], Float[Array, "P K H"]]:
    """Make the jitted function that trains cells and gives their accuracies.

    Networks are trained and evaluated with the statistics of the batch they see (the whole of a
    held-out set at once).

    Args:
      images: for training.
      labels: `[N]`.
      held: H pairs (images, labels) to evaluate on, such as validation and test.
      config: of the training.
      net: what surrounds the cell.
      batching: `map` (one network after another, on a CPU the default) or `vmap`.

    Returns:
      (cells `[P, 6]`, seeds `[K]`) -> accuracies in 0..1.

    Raises:
      UserError: for a batch larger than the training set.

    >>> x, y = jnp.ones((8, 4, 4, 1)), jnp.zeros(8, int)
    >>> f = train_cells(x, y, ((x, y),), TrainConfig(1, 8), NetworkConfig(2, 1, 10, 1))
    >>> jax.eval_shape(f, jnp.zeros((3, 6), int), jnp.zeros(2, int)).shape
    (3, 2, 1)
    """
    steps = len(images) // config.batch
    if not steps:
        raise UserError(f"a batch of {config.batch} is more than {len(images)} images; lower it")
    rate = optax.cosine_decay_schedule(config.lr, config.epochs * steps)
    optimizer = optax.adamw(rate, weight_decay=config.weight_decay)

    def one(cell: Any, seed: Any) -> Any:
        key = jax.random.key(seed)
        params = network.init(key, net)

        def loss(p: Any, rows: Any) -> Any:
            return cross_entropy(network.apply(p, cell, images[rows]).logits, labels[rows])

        def step(carry: Any, rows: Any) -> Any:
            params, state = carry
            g = jax.grad(loss)(params, rows)
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry: Any, key: Any) -> Any:
            rows = jax.random.permutation(key, len(images))[: steps * config.batch]
            return jax.lax.scan(step, carry, rows.reshape(steps, config.batch))

        keys = jax.random.split(jax.random.fold_in(key, 1), config.epochs)
        (params, _), _ = jax.lax.scan(epoch, (params, optimizer.init(params)), keys)

        def accuracy(x: Any, y: Any) -> Any:
            return jnp.mean(jnp.argmax(network.apply(params, cell, x).logits, -1) == y)

        return jnp.stack([accuracy(x, y) for x, y in held])

    chosen = batching or ("map" if on_cpu() else "vmap")

    def over(f: Any, xs: Any) -> Any:
        return jax.lax.map(f, xs) if chosen == "map" else jax.vmap(f)(xs)

    return jax.jit(lambda cells, seeds: over(lambda c: over(lambda s: one(c, s), seeds), cells))
