"""The network with the architecture as data against PyTorch-like plain code and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsys.nas import layers, network, slots, space
from jaxsys.nas.network import NetworkConfig

CONFIG = NetworkConfig(channels=4, cells=1)
IMAGES = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
CELLS = ((2, 0, 1, 3, 4, 2), (3, 3, 2, 2, 3, 1), (0, 0, 0, 4, 4, 0))
ARCHS = jnp.array(CELLS)


def conv(x, w, stride=1):
    size = w.shape[0]
    pad = (size // 2, size // 2)
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain(params, ops, images):
    """The network written for one fixed cell, with XLA's own convolution and pooling."""

    def norm(p, y):
        with jax.numpy_rank_promotion("allow"):
            mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
            return (y - mean) / jnp.sqrt(var + 1e-5) * p["scale"] + p["bias"]

    def pool(x):
        def add(v):
            return jax.lax.reduce_window(v, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

        return add(x) / add(jnp.ones_like(x))

    def edge(op, x, p):
        if op == space.CONV3:
            return norm(p, conv(jax.nn.relu(x), p["w3"]))
        if op == space.CONV1:
            return norm(p, conv(jax.nn.relu(x), p["w1"][None, None]))
        return {space.SKIP: x, space.NONE: 0 * x, space.POOL: pool(x)}[op]

    x = norm(params["stem"], conv(images, params["stem"]["w"]))
    for s in range(3):
        stage = params["stages"][str(s)]
        for n in range(CONFIG.cells):
            node = {1: x, 2: 0.0, 3: 0.0, 4: 0.0}
            for e, (a, b) in enumerate(space.EDGES):
                p = {k: v[n, e] for k, v in stage.items()}
                node[b] = node[b] + edge(ops[e], node[a], p)
            x = node[4]
        if s < 2:
            p = params["reductions"][str(s)]
            inner = norm(p["a"], conv(jax.nn.relu(x), p["a"]["w"], 2))
            inner = norm(p["b"], conv(jax.nn.relu(inner), p["b"]["w"]))
            half = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            x = conv(half / 4, p["down"]["w"][None, None]) + inner
    pooled = jax.nn.relu(norm(params["last"], x)).mean((1, 2))
    return pooled @ params["head"]["w"] + params["head"]["bias"][None]


@pytest.fixture(scope="module")
def params(theta):
    return theta


LOGITS = jax.jit(lambda params, arch: network.apply(params, arch, IMAGES).logits)


@jax.jit
@jax.value_and_grad
def ours(p, arch):
    return jnp.sum(jnp.sin(network.apply(p, arch, IMAGES).logits))


@pytest.mark.parametrize("i", range(3))
def test_logits_and_gradients_equal_plain_code(params, i):
    def theirs(p):
        return jnp.sum(jnp.sin(plain(p, CELLS[i], IMAGES)))

    a, ga = ours(params, ARCHS[i])
    b, gb = jax.jit(jax.value_and_grad(theirs))(params)
    np.testing.assert_allclose(a, b, rtol=1e-4)
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3 * float(jnp.abs(y).max()) + 1e-5)


@pytest.mark.slow
def test_vmap_over_architectures_equals_map(params):
    many = jax.jit(jax.vmap(lambda arch: network.apply(params, arch, IMAGES).logits))
    one = np.stack([LOGITS(params, a) for a in ARCHS])
    np.testing.assert_allclose(many(ARCHS), one, atol=2e-4)
    assert LOGITS._cache_size() == 1  # the architecture is data


def test_gates_scale_the_channels_of_their_layer(params):
    gates = network.ones_gates(CONFIG, 8)
    run = jax.jit(lambda g: network.apply(params, ARCHS[0], IMAGES, gates=g).logits)
    plain_logits = LOGITS(params, ARCHS[0])
    np.testing.assert_allclose(run(gates), plain_logits, atol=1e-5)
    doubled = run(gates | {"head": 2 * gates["head"]})
    bias = params["head"]["bias"]
    np.testing.assert_allclose(doubled - bias[None], 2 * (plain_logits - bias[None]), atol=1e-4)


def test_without_norms_the_scale_is_only_moved(params):
    absolute = jax.tree.map(jnp.abs, params)

    @jax.jit
    def log_total(images):
        out = network.apply(absolute, ARCHS[1], images, norm=False)
        return jnp.log(out.logits.sum()) + out.log_scale

    total, other = (log_total(np.full((1, 4, 4, 3), v, np.float32)) for v in (1, 8))
    np.testing.assert_allclose(other - total, np.log(8), atol=1e-4)


def test_observations_stand_in_their_slots(params):
    def count(x, y, site):
        return jnp.float32(y.shape[-1])

    seen = jax.jit(lambda: network.apply(params, ARCHS[0], IMAGES, observe=count).observed)()
    assert seen.shape == (CONFIG.slots,)
    assert ((seen > 0) == slots.presence(ARCHS[0], CONFIG)).all()


def test_pulling_back_is_the_transpose(params):
    @jax.jit
    def both():
        features = network.apply(params, ARCHS[0], IMAGES).features
        ones = [jnp.ones_like(f) for f in features[1:]]
        pulled = network.pull_blocks(ARCHS[0], params, features, ones)
        p = jax.tree.map(lambda v: v[0], params["stages"]["0"])
        _, back = jax.vjp(lambda x: network.cell(p, ARCHS[0], x)[0], features[0])
        return pulled[0][1], back(ones[0])[0]

    np.testing.assert_allclose(*both(), atol=1e-3)


@pytest.mark.parametrize("op", range(5))
def test_each_operation_s_own_derivative(op):
    x = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))
    w3 = jax.random.normal(jax.random.key(3), (3, 3, 3, 3))
    w1 = jax.random.normal(jax.random.key(4), (3, 3))
    check_grads(
        lambda *a: layers.mix(jnp.array(op), *map(jnp.asarray, a)),
        (x, w3, w1),
        1,
        ["rev"],
        atol=0.1,
        rtol=0.1,
    )
