"""The small network against NumPy, its training against a loop by hand, and its own benchmark."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.errors import UserError
from jaxsys.nas import proxies, search, small, space, tables
from jaxsys.nas.model import cross_entropy
from jaxsys.nas.rank import kendall_tau
from jaxsys.nas.small import SmallConfig, small_model
from jaxsys.nas.train import TrainConfig, trainer

NET = SmallConfig(channels=3, cells=2, n_classes=4)
# One path: 3×3 on (1,2), 1×1 on (2,4), and a skip beside it.
CELL = jnp.array([2, 1, 0, 1, 3, 1])
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(6, 4, 4, 1)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 3, 0, 1])


@pytest.fixture(scope="module")
def theta():
    shapes = jax.eval_shape(partial(small.init, config=NET), jax.random.key(0))
    return jax.tree.map(lambda v: jnp.asarray(0.5 * RNG.normal(size=v.shape), jnp.float32), shapes)


def _conv(x, w, stride=1):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((*x.shape[:3], w.shape[-1]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = np.einsum("byxc,yxcd->bd", padded[:, i : i + 3, j : j + 3], w)
    return out[:, ::stride, ::stride]


def _norm(p, y):
    y = (y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5)
    return y * p["scale"] + p["bias"]


def test_forward_is_the_network_by_hand(theta):
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), theta)
    x = _norm(p["stem"], _conv(np.asarray(IMAGES, np.float64), p["stem"]["w"], 2))
    for n in range(2):
        q = {k: v[n] for k, v in p["cells"].items()}
        edge = lambda e, q=q: {k: q[k][e] for k in ("scale", "bias")}  # noqa: E731
        inner = _norm(edge(0), _conv(np.maximum(x, 0), q["w3"][0]))
        x = x + _norm(edge(4), np.maximum(inner, 0) @ q["w1"][4])
    pooled = np.maximum(_norm(p["last"], x), 0).mean((1, 2))
    logits = pooled @ p["head"]["w"] + p["head"]["bias"]
    found = small_model(CELL, NET).forward(theta, IMAGES)
    np.testing.assert_allclose(found.logits, logits, rtol=2e-4, atol=2e-4)
    assert [f.shape for f in found.features] == [(6, 2, 2, 3)] * 3


def test_synflow_is_conserved_along_a_single_path(theta):
    """Without branches every layer's sum of |θ|·∂R/∂|θ| is R itself."""
    model = small_model(jnp.array([1, 1, 2, 1, 1, 1]), NET)
    score = jax.jit(lambda p: proxies.synflow(model, p, IMAGES, LABELS, None))(theta)
    held = np.asarray(model.present)
    assert held.tolist() == [e in (0, 3, 9, 13) for e in range(14)]
    np.testing.assert_allclose(score.nodes[held], score.nodes[0], rtol=1e-5)
    assert (score.nodes[~held] == 0).all()


def test_hooks_of_the_model(theta):
    model = small_model(CELL, NET)

    @jax.jit
    def hooks(p):
        features = model.forward(p, IMAGES).features
        seeds = [jnp.cos(f) for f in features[1:]]
        return (
            proxies.fisher(model, p, IMAGES, LABELS, None),
            features,
            model.pull(p, features, seeds),
        )

    fisher, features, pulled = hooks(theta)
    assert ((fisher.nodes > 0) == model.present).all()
    assert len(pulled) == 2
    step = 1e-2 * np.sin(np.arange(features[0].size)).reshape(features[0].shape)
    own = {k: np.asarray(v[0], np.float64) for k, v in theta["cells"].items()}

    def block(x):
        edge = lambda e: {k: own[k][e] for k in ("scale", "bias")}  # noqa: E731
        inner = _norm(edge(0), _conv(np.maximum(x, 0), own["w3"][0]))
        return x + _norm(edge(4), np.maximum(inner, 0) @ own["w1"][4])

    x, g = (np.asarray(v, np.float64) for v in (features[0], pulled[0][0]))
    change = (g * (block(x + step * 1e-3) - block(x - step * 1e-3))).sum() / 2e-3
    np.testing.assert_allclose((pulled[0][1] * step).sum(), change, rtol=1e-2, atol=1e-3)


def test_training_is_adam():
    net, config = SmallConfig(2, n_classes=4), TrainConfig(epochs=3, batch=6, lr=0.1)
    make = partial(small_model, config=net)
    cells, seeds = jnp.stack([CELL, jnp.ones(6, CELL.dtype)]), jnp.array([0, 1])
    held = [(IMAGES[:4], LABELS[:4])]
    found = trainer(make, IMAGES, LABELS, held, config)(cells, seeds)
    at_once = trainer(make, IMAGES, LABELS, held, config, batching="vmap")
    assert jax.eval_shape(at_once, cells, seeds).loss.shape == found.loss.shape == (2, 2, 1)
    model, params = make(CELL), small.init(jax.random.key(1), net)
    optimizer = optax.adamw(optax.cosine_decay_schedule(0.1, 3), weight_decay=0.0)
    state = optimizer.init(params)
    step = jax.jit(
        jax.value_and_grad(lambda p: cross_entropy(model.logits(p, IMAGES), LABELS))
    )  # a batch is the whole set, whose order changes nothing
    for _ in range(3):
        value, g = step(params)
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
    logits = model.logits(params, IMAGES[:4])
    np.testing.assert_allclose(found.train_loss[0, 1], value, atol=2e-4)
    np.testing.assert_allclose(found.loss[0, 1, 0], cross_entropy(logits, LABELS[:4]), atol=5e-4)
    # Nothing flows through the second cell: the classifier's bias alone cannot tell images apart.
    assert np.ptp(found.accuracy[1]) == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SmallConfig(channels=0), "size below 1"),
        (lambda: TrainConfig(epochs=0), "at least 1 epoch"),
        (
            lambda: trainer(
                partial(small_model, config=NET), IMAGES, LABELS, [], TrainConfig(batch=7)
            ),
            "more than 6 images",
        ),
    ],
)
def test_mistakes_are_told(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_the_benchmark_can_be_repeated():
    table = tables.load("digits")
    distinct = np.unique(space.to_index(space.canonical(space.all_cells())))
    index = space.to_index(table.cells)
    assert len(index) == len(np.unique(index)) >= 2000
    assert np.isin(index, distinct).all()
    for name in table.columns:
        assert np.isfinite(table.column(name)).all()
    assert kendall_tau(*table.column("test_seeds").T) > 0.6
    assert kendall_tau(table.column("valid"), table.column("test")) > 0.8
    np.testing.assert_allclose(table.column("test_seeds").mean(1), table.column("test"), atol=1e-3)


def test_a_cell_that_a_table_lacks_has_the_value_of_the_one_that_computes_the_same():
    table = tables.Table(np.array([[1, 1, 2, 1, 1, 1]]), {"acc": np.array([7.0])})
    evaluate = search.from_table(table, "acc")
    assert evaluate(np.array([[1, 1, 2, 3, 1, 1], [0, 1, 2, 2, 1, 1]])).tolist() == [7.0, 7.0]
    with pytest.raises(UserError, match="does not hold"):
        evaluate(np.array([[0, 1, 2, 2, 0, 1]]))
