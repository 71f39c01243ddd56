"""Proxies against formulas written out on small networks, and against independent code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxsys.core.errors import UserError
from jaxsys.nas import network, proxies, proxies_activation, slots
from jaxsys.nas.model import any_model, cell_model, cross_entropy, dense_model
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.score import PROXIES, ScoreConfig, score, score_all

CONFIG = NetworkConfig(channels=4, cells=1)
FAST = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
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


QUICK = ("params", "flops", "l2_norm", "naswot")
# Of these a total is no sum of nodes.
OTHERWISE = ("synflow", "naswot", "zen", "az_progressivity", "az_trainability")


def scores_of_a_cell(names, theta):
    model = cell_model(ARCH, CONFIG)
    run = jax.jit(lambda t: score(model, t, IMAGES, LABELS, KEY, names), compiler_options=FAST)
    return run(theta), ~np.asarray(model.present)


def check_scores(scores, absent):
    """Every score is finite, zero where no layer is, and its total the sum of its nodes."""
    for name, s in scores.items():
        assert np.isfinite(s.total), name
        if s.nodes is None:
            continue
        if not name.startswith("az_"):
            assert (np.asarray(s.nodes)[absent] == 0).all(), name
        if name not in OTHERWISE:
            np.testing.assert_allclose(s.total, np.sum(s.nodes), rtol=1e-4, atol=1e-5)


def test_scores_of_a_cell(theta):
    scores, absent = scores_of_a_cell(QUICK, theta)
    assert set(scores) == set(QUICK)
    check_scores(scores, absent)


@pytest.mark.slow
def test_scores_from_gradients_of_a_cell(theta):
    check_scores(*scores_of_a_cell(("grad_norm", "snip", "plain", "jacob_cov"), theta))


def test_every_score_of_a_dense_network():
    model = dense_model((3, 64, 64, 4))
    x = jax.random.normal(KEY, (8, 1, 1, 3))
    scores = score(model, model.init(KEY), x, LABELS, KEY, PROXIES)
    check_scores(scores, np.zeros(3, bool))


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


@pytest.mark.slow
def test_fisher_of_a_cell_from_activations_and_their_gradients(theta):
    """The gates' derivative equals the sum over pixels of a·∂L/∂a, at the stem."""
    model = cell_model(ARCH, CONFIG)
    nodes = jax.jit(lambda t: proxies.fisher(model, t, IMAGES, LABELS, KEY).nodes)(theta)

    @jax.jit
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


def test_fisher_by_hand():
    """Of the last layer, whose output a is the logits: ½·mean_n (a·∂L/∂a)², for each weight."""
    model = dense_model((3, 4, 2))
    theta, x, y = model.init(KEY), jax.random.normal(KEY, (5, 1, 1, 3)), jnp.arange(5) % 2
    a = model.logits(theta, x)
    g = jax.grad(lambda a: cross_entropy(a, y))(a)
    expected = 4 * np.sum(0.5 * np.mean(np.square(a * g), 0))
    got = proxies.fisher(model, theta, x, y, KEY).nodes[1]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.slow
def test_synflow_equals_float64_without_rescaling(theta):
    model = cell_model(ARCH, CONFIG)
    got = jax.jit(lambda t: proxies.synflow(model, t, IMAGES, LABELS, KEY))(theta)
    with jax.enable_x64(True):
        absolute = jax.tree.map(lambda v: jnp.asarray(np.abs(v), jnp.float64), theta)
        ones = jnp.ones((1, 8, 8, 3), jnp.float64)

        @jax.jit
        @jax.grad
        def gradient(p):
            out = network.apply(p, ARCH, ones, norm=False)
            # The scales are constants to the gradient; put back, R is what the paper defines.
            return jnp.sum(out.logits) * jnp.exp(out.log_scale)

        product = jax.tree.map(jnp.multiply, absolute, gradient(absolute))
        expected = np.asarray(slots.nodes(product, ARCH))
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


def test_naswot_counts_agreements(theta):
    """K_ij is the number of ReLU units in the same state for images i and j."""
    model = cell_model(ARCH, CONFIG)

    def both(x, y, site):
        c = (x > 0).reshape(8, -1)
        return (c[:, None] == c[None]).sum(-1) * jnp.float32(site.relu)

    @partial(jax.jit, compiler_options=FAST)
    def run(theta):
        kernels = network.apply(theta, ARCH, IMAGES, observe=both).observed
        return proxies_activation.naswot(model, theta, IMAGES, LABELS, KEY).total, kernels

    got, kernels = run(theta)
    kernel = np.asarray(kernels, np.float64).sum(0)
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


def scaled_model(arch):
    """A network of one matrix, scaled by the sum of its operations."""
    return any_model(
        lambda key: jax.random.normal(key, (3, 4)), lambda p, x: x.mean((1, 2)) @ p * jnp.sum(arch)
    )


def test_blocks_devices_and_resumption_change_nothing(tmp_path):
    archs = np.array([[2, 0, 1, 3, 4, 2], [3, 3, 2, 2, 3, 1], [0, 0, 0, 4, 4, 0]] * 4)
    config = ScoreConfig(("snip", "params"), seeds=(0, 1))
    images, labels = np.asarray(IMAGES), np.asarray(LABELS)
    whole = score_all(scaled_model, archs, images, labels, config, block=16)
    assert whole is not None
    by_hand = proxies.gradient_scores(
        m := scaled_model(archs[1]), m.init(jax.random.key(1)), IMAGES, LABELS, KEY
    )
    np.testing.assert_allclose(whole.totals["snip"][1, 1], by_hand["snip"].total, rtol=1e-5)
    kept = {"block": 8, "folder": tmp_path / "run"}
    stopped = score_all(scaled_model, archs, images, labels, config, **kept, stop=lambda *_: True)
    assert stopped is None
    resumed = score_all(scaled_model, archs, images, labels, config, **kept, batching="vmap")
    assert resumed is not None
    for name in config.proxies:
        np.testing.assert_allclose(resumed.totals[name], whole.totals[name], rtol=1e-5)
        np.testing.assert_allclose(resumed.nodes[name], whole.nodes[name], rtol=1e-5)
        assert whole.nodes[name].shape == (12, 2, 1)
    with pytest.raises(UserError, match="other settings"):
        score_all(scaled_model, archs[::-1].copy(), images, labels, config, **kept)


def test_mistakes_are_told(dense):
    model, theta, x, y = dense
    with pytest.raises(UserError, match="'snap'"):
        ScoreConfig(("snap",))
    with pytest.raises(UserError, match="'fisher' needs the model's `forward`"):
        proxies.fisher(model, theta, x, y, KEY)
    with pytest.raises(UserError, match="no matrix"):
        any_model(lambda key: jnp.zeros(3), lambda p, x: x)
