"""Train many small networks to the end in one program: a live space, or a table of one's own.

Axes: ``P`` architectures, ``K`` seeds, ``H`` sets of held-out images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import on_cpu
from jaxsys.nas.model import Model, cross_entropy


@dataclass(frozen=True)
class TrainConfig:
    """Describe the training of every network.

    Attributes:
      epochs: passes over the training images.
      batch: images in a step; a smaller rest of an epoch is left out.
      lr: peak of Adam's rate, which falls to 0 along a cosine.
      weight_decay: decoupled.

    >>> TrainConfig().epochs
    40
    """

    epochs: int = 40
    batch: int = 64
    lr: float = 0.02
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2:
            raise UserError(f"{self}: expected at least 1 epoch and batches of at least 2; mend it")


class Trained(NamedTuple):
    """What training P architectures with K seeds gave.

    Attributes:
      accuracy: `[P, K, H]` in 0..1.
      loss: `[P, K, H]` mean cross-entropy in nats.
      train_loss: `[P, K]` mean over the last epoch.

    >>> Trained._fields
    ('accuracy', 'loss', 'train_loss')
    """

    accuracy: Any
    loss: Any
    train_loss: Any


def trainer(
    make: Callable[[Any], Model],
    images: Float[Array, "N Y X C"],
    labels: Any,
    held: Sequence[tuple[Any, Any]],
    config: TrainConfig,
    *,
    batching: Literal["map", "vmap"] | None = None,
) -> Callable[[Any, Any], Trained]:
    """Make the jitted function that trains architectures and evaluates them.

    All seeds of one architecture are one batch; architectures come one after another, so that each
    runs its own operations only (`map`, the default on a CPU), or all at once (`vmap`). A seed
    draws the same weights and the same order of images for every architecture. Networks normalise
    by the batch they see, in evaluation the whole of a held-out set.

    Args:
      make: architecture (traced) -> model, such as `cell_model` or `small_model` with a config.
      images: for training.
      labels: `[N]`.
      held: pairs (images, labels) to evaluate on, such as validation and test.
      config: of the training.
      batching: of architectures.

    Returns:
      (architectures `[P, ...]`, seeds `[K]`) -> what came out.

    Raises:
      UserError: for a batch larger than the training set.

    >>> from functools import partial
    >>> from jaxsys.nas.small import SmallConfig, small_model
    >>> x, y = jnp.ones((8, 4, 4, 1)), jnp.zeros(8, int)
    >>> f = trainer(partial(small_model, config=SmallConfig(2)), x, y, [(x, y)], TrainConfig(1, 8))
    >>> jax.eval_shape(f, jnp.zeros((3, 6), int), jnp.zeros(2, int)).accuracy.shape
    (3, 2, 1)
    """
    n = len(images)
    steps = n // config.batch
    if not steps:
        raise UserError(f"a batch of {config.batch} is more than {n} images; lower it")
    rate = optax.cosine_decay_schedule(config.lr, config.epochs * steps)
    optimizer = optax.adamw(rate, weight_decay=config.weight_decay)

    def order(key: Any) -> Any:
        return jax.random.permutation(key, n)[: steps * config.batch].reshape(steps, config.batch)

    def one(arch: Any, seed: Any) -> Trained:
        model, key = make(arch), jax.random.key(seed)
        start = model.init(key)

        def loss(params: Any, rows: Any) -> Any:
            return cross_entropy(model.logits(params, images[rows]), labels[rows])

        def step(carry: Any, rows: Any) -> Any:
            params, state = carry
            value, g = jax.value_and_grad(loss)(params, rows)
            updates, state = optimizer.update(g, state, params)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.fold_in(key, 1), config.epochs)
        rows = jax.vmap(order)(keys).reshape(-1, config.batch)
        (params, _), values = jax.lax.scan(step, (start, optimizer.init(start)), rows)
        accuracy, final = [], []
        for x, y in held:
            logits = model.logits(params, x)
            accuracy.append(jnp.mean(jnp.argmax(logits, -1) == y))
            final.append(cross_entropy(logits, y))
        return Trained(jnp.stack(accuracy), jnp.stack(final), jnp.mean(values[-steps:]))

    chosen = batching or ("map" if on_cpu() else "vmap")

    def all_seeds(seeds: Any) -> Callable[[Any], Trained]:
        return lambda arch: jax.vmap(one, (None, 0))(arch, seeds)

    if chosen == "map":
        return jax.jit(lambda archs, seeds: jax.lax.map(all_seeds(seeds), archs))
    return jax.jit(lambda archs, seeds: jax.vmap(all_seeds(seeds))(archs))
