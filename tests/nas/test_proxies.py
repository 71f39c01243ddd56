"""Proxies against formulas written out on small networks, and against independent code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxsys.core.errors import UserError
from jaxsys.nas import network, proxies, proxies_activation
from jaxsys.nas.model import any_model, cell_model, cross_entropy
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.score import PROXIES, ScoreConfig, score, score_all

CONFIG = NetworkConfig(channels=4, cells=1)
ARCH = jnp.array([2, 0, 1, 3, 4, 2])
KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
LABELS = jnp.arange(8) % 4


@pytest.fixture(scope="module")
def dense():
    """Two layers on three inputs: small enough for dense Jacobians."""

    def init(key):
        k1, k2 = jax.random.split(key)
        return {"a": jax.random.normal(k1, (3, 4)), "b": jax.random.normal(k2, (4, 2))}

    def logits(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    x = jax.random.normal(jax.random.key(5), (6, 3))
    return any_model(init, logits), init(KEY), x, jnp.arange(6) % 2


@pytest.fixture(scope="module")
def found():
    model = cell_model(ARCH, CONFIG)
    theta = network.init(KEY, CONFIG)
    run = jax.jit(lambda t: score(model, t, IMAGES, LABELS, KEY, PROXIES))
    return run(theta), model, theta


def test_every_proxy_is_finite_and_zero_where_no_layer_is(found):
    scores, model, _ = found
    absent = ~np.asarray(model.present)
    for name, s in scores.items():
        assert np.isfinite(s.total), name
        if s.nodes is not None and not name.startswith("az_"):
            assert (np.asarray(s.nodes)[absent] == 0).all(), name


@pytest.mark.parametrize(
    "name",
    [
        "params",
        "flops",
        "l2_norm",
        "grad_norm",
        "snip",
        "plain",
        "grasp",
        "fisher",
        "zico",
        "meco",
        "az_expressivity",
    ],
)
def test_totals_are_sums_of_nodes(found, name):
    s = found[0][name]
    np.testing.assert_allclose(s.total, np.sum(s.nodes), rtol=1e-4, atol=1e-5)


def test_gradient_scores_by_hand(dense):
    model, theta, x, y = dense
    g = jax.grad(lambda p: cross_entropy(model.logits(p, x), y))(theta)
    s = proxies.gradient_scores(model, theta, x, y, KEY)
    by_hand = [np.linalg.norm(g[k]) for k in "ab"]
    np.testing.assert_allclose(s["grad_norm"].nodes, by_hand, rtol=1e-5)
    by_hand = [np.abs(theta[k] * g[k]).sum() for k in "ab"]
    np.testing.assert_allclose(s["snip"].nodes, by_hand, rtol=1e-5)


def test_grasp_against_the_dense_hessian(dense):
    model, theta, x, y = dense
    flat, unravel = ravel_pytree(theta)

    def loss(v):
        return cross_entropy(model.logits(unravel(v), x), y)

    expected = -flat * (jax.hessian(loss)(flat) @ jax.grad(loss)(flat))
    got = proxies.grasp(model, theta, x, y, KEY).total
    np.testing.assert_allclose(got, expected.sum(), rtol=1e-3)


def test_fisher_from_activations_and_their_gradients():
    """The gates' derivative equals the sum over pixels of a·∂L/∂a, at the stem."""
    theta = network.init(KEY, CONFIG)
    model = cell_model(ARCH, CONFIG)
    nodes = proxies.fisher(model, theta, IMAGES, LABELS, KEY).nodes

    def loss(shift):
        weight = theta["stem"]["w"]
        a = network.conv3(IMAGES, weight)

        # The output of the stem moved by `shift`: the bias of a stem whose kernel is linear in it.
        out = a + shift
        x = network.norm2d(theta["stem"], out)
        for s in range(3):
            p = jax.tree.map(lambda v: v[0], theta["stages"][str(s)])
            x, _ = network.cell(p, ARCH, x)
            if s < 2:
                x, _ = network._reduction(theta["reductions"][str(s)], x, None, None, True)
        pooled = jax.nn.relu(network.norm2d(theta["last"], x)).mean((1, 2))
        return cross_entropy(pooled @ theta["head"]["w"] + theta["head"]["bias"][None], LABELS)

    a = network.conv3(IMAGES, theta["stem"]["w"])
    g = jax.grad(loss)(jnp.zeros_like(a))
    channel = 0.5 * jnp.mean(jnp.square(jnp.sum(a * g, (1, 2))), 0)
    np.testing.assert_allclose(nodes[0], jnp.sum(channel) * 27, rtol=1e-3)


def test_synflow_equals_float64_without_rescaling():
    theta = network.init(KEY, CONFIG)
    model = cell_model(ARCH, CONFIG)
    got = proxies.synflow(model, theta, IMAGES, LABELS, KEY)
    with jax.enable_x64(True):
        absolute = jax.tree.map(lambda v: jnp.asarray(np.abs(v), jnp.float64), theta)
        ones = jnp.ones((1, 8, 8, 3), jnp.float64)

        def total(p):
            out = network.apply(p, ARCH, ones, norm=False)
            # The scales are constants to the gradient; put back, R is what the paper defines.
            return jnp.sum(out.logits) * jnp.exp(out.log_scale)

        frozen = jax.grad(total)(absolute)
        expected = network.nodes(jax.tree.map(jnp.multiply, absolute, frozen), ARCH)
        logs = np.log(np.where(expected > 0, expected, 1.0))
    np.testing.assert_allclose(got.nodes, logs, atol=1e-3)
    np.testing.assert_allclose(got.total, np.log(np.sum(expected)), atol=1e-3)


def test_jacob_cov_against_numpy(dense):
    model, theta, x, y = dense
    g = np.asarray(jax.grad(lambda v: jnp.sum(model.logits(theta, v)))(x), np.float64)
    values = np.linalg.eigvalsh(np.corrcoef(g))
    # Rows of three numbers: three eigenvalues at most, the others 0.
    shifted = np.maximum(values, 0) + 1e-5
    got = float(proxies_activation.jacob_cov(model, theta, x, y, KEY).total)
    assert got == pytest.approx(-np.sum(np.log(shifted) + 1 / shifted), rel=0.02)


def test_epe_nas_against_loops(dense):
    model, theta, x, y = dense
    g = np.asarray(jax.grad(lambda v: jnp.sum(model.logits(theta, v)))(x), np.float64)
    expected = 0.0
    for c in range(2):
        corr = np.corrcoef(g[np.asarray(y) == c])
        expected += abs(np.sum(np.log(np.abs(corr) + 1e-5)))
    got = float(proxies_activation.epe_nas(model, theta, x, y, KEY).total)
    assert got == pytest.approx(expected, rel=1e-3)


def test_naswot_counts_agreements():
    """K_ij is the number of ReLU units in the same state for images i and j."""
    theta, model = network.init(KEY, CONFIG), cell_model(ARCH, CONFIG)
    codes = []

    def keep(x, y, site):
        if site.relu:
            codes.append(None)
        return (x > 0).sum((1, 2, 3)) * jnp.float32(site.relu)

    forward = partial(network.apply, theta, ARCH, IMAGES)
    ones = forward(observe=keep).observed  # [S, B] active units

    def both(x, y, site):
        c = (x > 0).reshape(8, -1)
        return (c[:, None] == c[None]).sum(-1) * jnp.float32(site.relu)

    kernel = np.asarray(forward(observe=both).observed.sum(0), np.float64)
    assert ones.shape == (CONFIG.slots, 8)
    got = proxies_activation.naswot(model, theta, IMAGES, LABELS, KEY).total
    assert float(got) == pytest.approx(np.linalg.slogdet(kernel)[1], rel=1e-4)


def test_zico_by_loops(dense):
    model, theta, x, y = dense
    g = [
        jax.grad(lambda p, i=i: cross_entropy(model.logits(p, x[i : i + 3]), y[i : i + 3]))(theta)
        for i in (0, 3)
    ]
    expected = sum(
        np.log(np.sum((abs(g[0][k]) + abs(g[1][k])) / abs(g[0][k] - g[1][k]))) for k in "ab"
    )
    got = proxies.zico(model, theta, x, y, KEY, batches=2).total
    assert float(got) == pytest.approx(expected, rel=1e-3)


def test_az_nas_joins_by_rank():
    columns = {"a": np.array([1.0, 3.0, 2.0]), "b": np.array([3.0, 2.0, 1.0])}
    expected = np.log([1 / 3, 1.0, 2 / 3]) + np.log([1.0, 2 / 3, 1 / 3])
    np.testing.assert_allclose(proxies_activation.az_nas(columns), expected, rtol=1e-5)


def test_blocks_devices_and_resumption_change_nothing(tmp_path):
    make = partial(cell_model, config=CONFIG)
    archs = np.array([[2, 0, 1, 3, 4, 2], [3, 3, 2, 2, 3, 1], [0, 0, 0, 4, 4, 0]] * 4)
    config = ScoreConfig(("synflow", "params"), seeds=(0, 1))
    images, labels = np.asarray(IMAGES[:2]), np.asarray(LABELS[:2])
    whole = score_all(make, archs, images, labels, config, block=16)
    assert whole is not None
    kept = {"block": 8, "folder": tmp_path / "run"}
    stopped = score_all(make, archs, images, labels, config, **kept, stop=lambda *_: True)
    assert stopped is None
    resumed = score_all(make, archs, images, labels, config, **kept)
    assert resumed is not None
    for name in config.proxies:
        np.testing.assert_allclose(resumed.totals[name], whole.totals[name], rtol=1e-5)
        np.testing.assert_allclose(resumed.nodes[name], whole.nodes[name], rtol=1e-5)
        assert whole.nodes[name].shape == (12, 2, CONFIG.slots)
    with pytest.raises(UserError, match="other settings"):
        score_all(make, archs[::-1].copy(), images, labels, config, **kept)


def test_mistakes_are_told(dense):
    model, theta, x, y = dense
    with pytest.raises(UserError, match="'snap'"):
        ScoreConfig(("snap",))
    with pytest.raises(UserError, match="'fisher' needs the model's `forward`"):
        proxies.fisher(model, theta, x, y, KEY)
    with pytest.raises(UserError, match="no matrix"):
        any_model(lambda key: jnp.zeros(3), lambda p, x: x)
