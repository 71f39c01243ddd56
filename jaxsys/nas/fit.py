"""Train predictors, many seeds in one program, and predict with uncertainty.

Axes: ``N`` architectures, ``K`` seeds (each with its own training set, initialisation and order).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.nas.losses import mixture
from jaxsys.nas.predictor import Predictor


@dataclass(frozen=True)
class FitConfig:
    """Describe the training.

    Attributes:
      losses: added up; see `losses.LOSSES`.
      alpha: steepness of diff_kendall.
      epochs: at most.
      batch: architectures in a step; the last, smaller batch of an epoch is left out.
      lr: peak of Adam's rate, which falls to 0 along a cosine.
      weight_decay: added to the gradient, as Adam's option in the released code.
      valid_fraction: share of the training set kept to choose the best epoch by its loss; 0 trains
        on all and keeps the last epoch.
      patience: epochs without a better one in any seed before the run ends; 0 never ends early.
      round: epochs between looks at `patience`.

    >>> FitConfig().losses
    ('mse', 'pair')
    """

    losses: tuple[str, ...] = ("mse", "pair")
    alpha: float = 0.5
    epochs: int = 300
    batch: int = 10
    lr: float = 1e-4
    weight_decay: float = 1e-3
    valid_fraction: float = 0.0
    patience: int = 0
    round: int = 25

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or not 0 <= self.valid_fraction < 1:
            raise UserError(
                f"{self}: epochs of at least 1, batches of at least 2 and a valid_fraction below 1 "
                "are needed; correct it"
            )


class Fitted(NamedTuple):
    """Predictors after training.

    Attributes:
      params: stacked over K.
      mean: `[K]` of the training targets, which were standardised.
      std: `[K]`.
      losses: `[K, epochs]` mean training loss.

    >>> Fitted._fields
    ('params', 'mean', 'std', 'losses')
    """

    params: Any
    mean: Any
    std: Any
    losses: Any


class _Best(NamedTuple):
    params: Any
    loss: Any
    epoch: Any


def fit(
    predictor: Predictor,
    inputs: dict[str, Any],
    targets: Float[np.ndarray, "N"] | Float[np.ndarray, "K N"],
    rows: Integer[np.ndarray, "K n"],
    config: FitConfig | None = None,
    *,
    seed: int = 0,
) -> Fitted:
    """Train one predictor for each row of training indices.

    Args:
      predictor: from `predictor.make`.
      inputs: arrays with leading axis N.
      targets: what is to be ranked, such as validation accuracy; one for all seeds, or `[K, N]`.
      rows: the architectures that each seed trains on.
      config: losses, steps and rates.
      seed: of initialisation and order; seed k of the K uses `seed + k`.

    Raises:
      UserError: for targets that are not finite or all equal, or a batch above n.

    >>> line = Predictor(lambda key: jnp.zeros(1), lambda p, inputs, key: inputs["nodes"] @ p)
    >>> x, y = np.arange(10.0)[:, None] - 4.5, np.arange(10.0)
    >>> found = fit(line, {"nodes": x}, y, np.arange(10)[None], FitConfig(("mse",), lr=0.01))
    >>> found.losses.shape, bool(found.losses[0, -1] < 0.01)
    ((1, 300), True)
    """
    config = config or FitConfig()
    y = np.asarray(targets, np.float64)
    y = y[rows] if y.ndim == 1 else np.take_along_axis(y, rows, 1)
    if not np.isfinite(y).all() or (np.ptp(y, axis=1) == 0).any():
        raise UserError(
            "the training targets hold a number that is not finite or are all equal; expected at "
            "least two distinct accuracies for each seed; choose other architectures"
        )
    n_valid = round(config.valid_fraction * rows.shape[1])
    if rows.shape[1] - n_valid < config.batch:
        raise UserError(
            f"{rows.shape[1] - n_valid} architectures are left to train on and a batch has "
            f"{config.batch}; expected at least one batch; lower the batch"
        )
    mean, std = y.mean(1), y.std(1)
    scaled = jnp.asarray((y - mean[:, None]) / std[:, None], jnp.float32)
    taken = {name: jnp.asarray(v)[rows] for name, v in inputs.items()}
    start, advance = _program(predictor, config, rows.shape[1], n_valid)
    keys = jax.vmap(jax.random.key)(jnp.arange(seed, seed + len(rows)))
    state, losses = start(keys), []
    for first in range(0, config.epochs, config.round):
        epochs = jnp.arange(first, min(first + config.round, config.epochs))
        state, found = advance(state, taken, scaled, epochs)
        losses.append(np.asarray(found))
        waited = epochs[-1] - np.asarray(state[2].epoch).max()
        if config.patience and n_valid and waited >= config.patience:
            break
    params = state[2].params if n_valid else state[0]
    return Fitted(params, jnp.asarray(mean), jnp.asarray(std), np.concatenate(losses, 1))


def _program(predictor: Predictor, config: FitConfig, n: int, n_valid: int) -> Any:
    steps = (n - n_valid) // config.batch
    loss_of = mixture(config.losses, alpha=config.alpha)
    rate = optax.cosine_decay_schedule(config.lr, config.epochs * steps)
    optimizer = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(rate))

    def loss(params: Any, x: Any, y: Any, key: Any) -> Any:
        return loss_of(predictor.apply(params, x, key), y)

    def start(key: Any) -> Any:
        k1, k2 = jax.random.split(key)
        params = predictor.init(k1)
        best = _Best(params, jnp.inf, jnp.zeros((), jnp.int32))
        return params, optimizer.init(params), best, k2

    def one_step(x: Any, y: Any, carry: Any, inputs: Any) -> Any:
        params, state = carry
        picked, key = inputs
        rows = {name: v[picked] for name, v in x.items()}
        value, g = jax.value_and_grad(loss)(params, rows, y[picked], key)
        updates, state = optimizer.update(g, state, params)
        return (optax.apply_updates(params, updates), state), value

    def one_epoch(x: Any, y: Any, carry: Any, epoch: Any) -> Any:
        params, state, best, key = carry
        k1, k2 = jax.random.split(jax.random.fold_in(key, epoch))
        order = n_valid + jax.random.permutation(k1, n - n_valid)
        picked = order[: steps * config.batch].reshape(steps, config.batch)
        keys = jax.random.split(k2, steps)
        (params, state), values = jax.lax.scan(
            partial(one_step, x, y), (params, state), (picked, keys)
        )
        if n_valid:
            held = {name: v[:n_valid] for name, v in x.items()}
            value = loss(params, held, y[:n_valid], None)
            better = value < best.loss
            new = _Best(params, value, epoch)
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)
        return (params, state, best, key), jnp.mean(values)

    def advance(carry: Any, x: Any, y: Any, epochs: Any) -> Any:
        return jax.lax.scan(partial(one_epoch, x, y), carry, epochs)

    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(advance, (0, 0, 0, None)))


def predict(
    predictor: Predictor,
    fitted: Fitted,
    inputs: dict[str, Any],
    *,
    draws: int = 0,
    seed: int = 0,
    block: int = 1024,
) -> tuple[Float[np.ndarray, "K N"], Float[np.ndarray, "K N"]]:
    """Predict the target of every architecture.

    Args:
      predictor: from `predictor.make`.
      fitted: from `fit`.
      inputs: arrays with leading axis N.
      draws: of the Bayesian weights and of dropout, averaged; 0 uses means. One draw is nearest to
        the released evaluation, which draws weights but no dropout.
      seed: of the draws.
      block: architectures at a time; bounds memory.

    Returns:
      Mean and standard deviation over draws, in units of the targets; the latter is 0 without.

    >>> line = Predictor(lambda key: jnp.zeros(1), lambda p, inputs, key: inputs["nodes"] @ p)
    >>> fitted = Fitted(params=jnp.ones((1, 1)), mean=jnp.ones(1), std=jnp.ones(1), losses=None)
    >>> predict(line, fitted, {"nodes": np.arange(3.0)[:, None]})[0].tolist()
    [[1.0, 2.0, 3.0]]
    """
    keys = [None] if draws == 0 else list(jax.random.split(jax.random.key(seed), draws))
    n = len(next(iter(inputs.values())))

    @jax.jit
    def run(params: Any, x: Any, key: Any) -> Any:
        return jax.vmap(lambda p: predictor.apply(p, x, key))(params)

    found = []
    for key in keys:
        parts = []
        for i in range(0, n, block):
            rows = {name: jnp.asarray(v[i : i + block]) for name, v in inputs.items()}
            parts.append(np.asarray(run(fitted.params, rows, key)))
        found.append(np.concatenate(parts, 1))
    stacked = np.stack(found) * np.asarray(fitted.std)[:, None] + np.asarray(fitted.mean)[:, None]
    return stacked.mean(0), stacked.std(0)


def boosted_trees(
    features: Float[np.ndarray, "N F"],
    targets: Float[np.ndarray, "N"] | Float[np.ndarray, "K N"],
    rows: Integer[np.ndarray, "K n"],
) -> Float[np.ndarray, "K N"]:
    """Fit gradient-boosted trees with scikit-learn and predict every architecture.

    Raises:
      UserError: when scikit-learn is not installed.

    >>> x = np.arange(20.0)[:, None]
    >>> boosted_trees(x, x[:, 0], np.arange(20)[None]).shape
    (1, 20)
    """
    try:
        from sklearn.ensemble import GradientBoostingRegressor
    except ImportError as error:
        raise UserError(
            "scikit-learn, which holds the boosted trees, is not installed; expected the extra "
            "'vision'; run: pip install 'jaxsys[vision]'"
        ) from error
    found = []
    wanted = np.broadcast_to(targets, (len(rows), len(features)))
    for k, (own, y) in enumerate(zip(rows, wanted, strict=True)):
        model = GradientBoostingRegressor(
            n_estimators=300,
            learning_rate=0.05,
            max_depth=4,
            subsample=0.8,
            max_features="sqrt",
            random_state=k,
        )
        found.append(model.fit(features[own], y[own]).predict(features))
    return np.stack(found)
