"""A baseline in closed form: kernel ridge regression from what is seen to what would be said.

    p(o) = Σ_i k(o, o_i) a_i,    A = (K + λ I)⁻¹ Q,    s(l, o) = −½ ‖q(l) − p(o)‖²

q(l) is the whitened vector of a text, Q holds those of the training texts beside the objects that
they are of, and k is the mean of Gaussian kernels on pooled views. No pair of objects is ever
compared in fitting, so few objects suffice, and nothing is drawn at random.

Axes: ``B`` rows, ``K`` candidates, ``V`` views, ``D`` image width, ``L`` text width, ``N`` pairs of
an object and its text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.ground import views
from jaxsys.ground.contract import Batch
from jaxsys.ground.match import need
from jaxsys.ground.tables import Rows, Tables, check
from jaxsys.ground.whiten import Whitening, whiten


@dataclass(frozen=True)
class RidgeConfig:
    """Describe the regression.

    Attributes:
        pooling: of the views, a kernel each.
        penalty: λ; the kernels are 1 where two objects look the same.
        floor: of the whitening of texts; see `jaxsys.ground.whiten.whiten`.

    Raises:
        UserError: for a penalty that is not positive.

    >>> RidgeConfig().pooling
    ('mean', 'max')
    """

    pooling: tuple[views.Pooling, ...] = ("mean", "max")
    penalty: float = 0.1
    floor: float = 0.01

    def __post_init__(self) -> None:
        if self.penalty <= 0:
            raise UserError(f"penalty is {self.penalty}; expected a positive number; raise it")


def fit(config: RidgeConfig, tables: Tables, rows: Rows) -> dict[str, Any]:
    """Fit the regression to the objects that are meant, each with its texts.

    Args:
        config: kernels and penalty.
        tables: with `views`.
        rows: with answers.

    Returns:
        Parameters for `scores`.

    Raises:
        UserError: for rows that cannot be used, or tables without views.

    >>> eye = np.eye(3, dtype=np.float32)
    >>> tables = Tables(np.ones((3, 1), bool), eye, np.arange(3), eye[:, None])
    >>> rows = Rows(np.array([[0, 1], [1, 2], [2, 0]]), np.arange(3), np.zeros(3, int))
    >>> params = fit(RidgeConfig(penalty=0.01), tables, rows)
    >>> params["weights"].shape  # three objects, two directions in which their texts differ
    (3, 2)
    """
    check(tables, rows)
    answer = np.asarray(rows.answer)[:, None]
    meant = np.take_along_axis(np.asarray(rows.objects), answer, 1)[:, 0]
    pairs = np.unique(np.stack([meant, np.asarray(rows.text)], 1), axis=0)
    seen = np.asarray(need(tables.views, "views"))[pairs[:, 0]]
    said = np.asarray(tables.text)[pairs[:, 1]]
    to = whiten(said, config.floor)
    parts, weights = _solve(config, seen, np.asarray(tables.mask)[pairs[:, 0]], to(said))
    return {"parts": parts, "weights": weights, "text": to._asdict()}


@partial(jax.jit, static_argnums=0)
def _solve(config: RidgeConfig, seen: Any, mask: Any, said: Any) -> Any:
    parts = []
    for x in _pooled(config, seen[:, None], mask[:, None]):
        x = x[:, 0]
        mean, scale = jnp.mean(x, 0), 1 / (jnp.std(x, 0) + 1e-3)
        own = (x - mean[None]) * scale[None]
        width = jnp.maximum(jnp.median(_distances(own, own)), 1e-6)  # 0 where most look alike
        parts.append({"mean": mean, "scale": scale, "own": own, "width": width})
    own = sum(jnp.exp(-_distances(x["own"], x["own"]) / x["width"]) for x in parts) / len(parts)
    return parts, jnp.linalg.solve(own + config.penalty * jnp.eye(len(said)), said)


def scores(
    config: RidgeConfig,
    trainable: Mapping[str, Any],
    frozen: Any,
    batch: Batch,
    *,
    key: Any = None,
    train: bool = False,
) -> Float[Array, "B K"]:
    """Score the candidates: how near the predicted text is to the description.

    Args:
        config: as for `fit`.
        trainable: from `fit`.
        frozen: not looked at.
        batch: with `views`.
        key: not looked at.
        train: not looked at.

    >>> config, one = RidgeConfig(pooling=("mean",)), jnp.ones((1, 1))
    >>> part = {"mean": one[0], "scale": one[0], "own": one, "width": 1.0}
    >>> params = {"parts": [part], "weights": one, "text": {"mean": one[0], "matrix": one}}
    >>> batch = Batch(one, jnp.ones((1, 2, 1), bool), jnp.ones((1, 2, 1, 1)))
    >>> jax.eval_shape(lambda: scores(config, params, {}, batch)).shape
    (1, 2)
    """
    seen, mask = jnp.asarray(need(batch.views, "views")), jnp.asarray(batch.mask)
    kernel: Any = 0.0
    for part, x in zip(trainable["parts"], _pooled(config, seen, mask), strict=True):
        x = (x - part["mean"][None, None]) * part["scale"][None, None]
        kernel += jnp.exp(-_distances(x, part["own"]) / part["width"]) / len(config.pooling)
    guess = jnp.einsum("BKN,NL->BKL", kernel, trainable["weights"])
    text = Whitening(**trainable["text"])(jnp.asarray(batch.text))
    return -0.5 * jnp.sum((guess - text[:, None]) ** 2, -1)


def _pooled(config: RidgeConfig, seen: Array, mask: Array) -> list[Array]:
    return [views.pool(seen, mask, kind) for kind in config.pooling]


def _distances(x: Array, own: Array) -> Array:
    """Give squared distances of [..., D] to [N, D]."""
    product = jnp.einsum("...d,nd->...n", x, own)
    own_squares = jnp.sum(own**2, -1).reshape(*(1,) * (x.ndim - 1), -1)
    return jnp.maximum(jnp.sum(x**2, -1)[..., None] + own_squares - 2 * product, 0.0)
