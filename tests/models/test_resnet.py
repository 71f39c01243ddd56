"""The residual network: its shape, its purity, and that it learns the digits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsys.core import tree
from jaxsys.core.errors import UserError
from jaxsys.data.images import digits, train_valid
from jaxsys.models import resnet

APPLY = jax.jit(resnet.apply, static_argnums=0)
LOSS = jax.jit(resnet.loss, static_argnums=0)


@functools.cache
def build(config, seed=0):
    return resnet.split(resnet.ResNet(config, rngs=nnx.Rngs(seed)))


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3)])
def test_logits_have_a_row_per_image(side, channels):
    config = resnet.ResNetConfig(n_channels=channels, n_classes=7, width=8)
    graphdef, params = build(config)
    logits = APPLY(graphdef, params, jnp.ones((3, side, side, channels)))
    assert logits.shape == (3, 7)
    assert np.all(np.isfinite(logits))


def test_the_depth_dial_counts_weighted_layers():
    """Convolutions off the shortcuts plus the linear layer: 6n + 2, He et al. section 4.2."""
    for n in (1, 3):
        _, params = build(resnet.ResNetConfig(blocks_per_stage=n, width=8))
        kernels = [p for p in tree.paths(params) if p.endswith("kernel") and "shortcut" not in p]
        assert len(kernels) == 6 * n + 2


def test_parameter_count_of_resnet_20():
    _, params = build(resnet.ResNetConfig(n_channels=3, blocks_per_stage=3))
    count = sum(x.size for x in jax.tree.leaves(params))
    convolutions = 27 * 16 + 9 * (6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    shortcuts = 16 * 32 + 32 * 64
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert count == convolutions + shortcuts + norms + 64 * 10 + 10


def test_images_do_not_influence_one_another():
    graphdef, params = build(resnet.ResNetConfig(width=8))
    images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    together = APPLY(graphdef, params, images)
    alone = APPLY(graphdef, params, images[2:3])
    np.testing.assert_allclose(together[2:3], alone, rtol=1e-4, atol=1e-5)


def test_loss_is_the_mean_cross_entropy():
    graphdef, params = build(resnet.ResNetConfig(width=8))
    images = jax.random.uniform(jax.random.key(0), (5, 8, 8, 1))
    labels = jnp.array([0, 3, 9, 1, 1])
    logits = np.asarray(APPLY(graphdef, params, images), np.float64)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = -np.mean([np.log(probability[i, c]) for i, c in enumerate(labels.tolist())])
    np.testing.assert_allclose(LOSS(graphdef, params, (images, labels)), want, rtol=1e-4)


def test_it_learns_the_digits_by_plain_gradient_descent():
    train, valid = train_valid(digits())
    graphdef, params = build(resnet.ResNetConfig(width=8))

    @jax.jit
    def step(params, batch):
        value, grads = jax.value_and_grad(lambda p: resnet.loss(graphdef, p, batch))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    @jax.jit
    def validate(params):
        batch = (jnp.asarray(valid.images), jnp.asarray(valid.labels))
        hits = jnp.argmax(resnet.apply(graphdef, params, batch[0]), -1) == batch[1]
        return resnet.loss(graphdef, params, batch), jnp.mean(hits)

    before, _ = validate(params)
    assert 2.0 < float(before) < 4.0
    for i in range(40):
        rows = slice(i * 32 % 1400, i * 32 % 1400 + 32)
        batch = (jnp.asarray(train.images[rows]), jnp.asarray(train.labels[rows]))
        params, value = step(params, batch)
        assert bool(jnp.isfinite(value))
    after, accuracy = validate(params)
    assert float(after) < 0.5 * float(before)
    assert float(accuracy) > 0.7


def test_replicas_may_be_stacked():
    """The parameter tree maps over a leading axis, as local SGD needs."""
    graphdef, params = build(resnet.ResNetConfig(width=8))
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    batch = (jnp.ones((2, 3, 8, 8, 1)), jnp.zeros((2, 3), jnp.int32))
    losses = jax.jit(jax.vmap(lambda p, b: resnet.loss(graphdef, p, b)))(stacked, batch)
    first = LOSS(graphdef, params, jax.tree.map(lambda x: x[0], batch))
    np.testing.assert_allclose(losses[0], first, rtol=1e-4)


def test_mistakes_are_said_in_one_sentence():
    with pytest.raises(UserError, match="multiple of 8"):
        resnet.ResNetConfig(width=12)
    with pytest.raises(UserError, match="state that are not parameters"):
        resnet.split(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("name", "count", "depth"),
    [("resnet18", 11_689_512, 18), ("resnet50", 25_557_032, 50), ("resnet101", 44_549_160, 101)],
)
def test_published_networks_have_their_published_sizes(name, count, depth):
    """torchvision's parameter counts, for 1,000 classes."""
    _, init = resnet.named(name)
    shapes = tree.flatten(jax.eval_shape(init, jax.random.key(0)))
    assert sum(x.size for x in shapes.values()) == count
    assert resnet.NAMED[name].depth == depth
    kernels = [p for p in shapes if p.endswith("kernel") and "shortcut" not in p]
    assert len(kernels) == depth


@pytest.mark.parametrize("bottleneck", [False, True])
def test_deep_networks_halve_the_image_where_they_should(bottleneck):
    config = resnet.DeepConfig((1, 2, 1, 1), bottleneck=bottleneck, width=4, groups=2, n_classes=3)
    for small, last in ((False, (1, 1)), (True, (4, 4))):
        model = nnx.eval_shape(
            lambda small=small: resnet.DeepResNet(
                dataclasses.replace(config, small_images=small), rngs=nnx.Rngs(0)
            )
        )
        graphdef, params = resnet.split(model)

        def before_head(params, x, graphdef=graphdef):
            net = nnx.merge(graphdef, params)
            x = net.stem(x)
            if net.pooled:
                x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
            for block in net.blocks:
                x = block(x)
            return x

        images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        out = jax.eval_shape(before_head, params, images)
        assert out.shape == (2, *last, 32 * (4 if bottleneck else 1))


def test_deep_networks_refuse_impossible_shapes():
    with pytest.raises(UserError, match="multiple of the groups"):
        resnet.DeepConfig((1, 1, 1, 1), width=48)
    with pytest.raises(UserError, match="four stages"):
        resnet.DeepConfig((1, 0, 1, 1))
    with pytest.raises(UserError, match="resnet18, resnet50, resnet101"):
        resnet.named("resnet34")
