"""Every space's network, whose architecture is data, against plain networks of one architecture."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.nas import darts, nb101, proxies_activation, vit
from jaxsys.nas.darts_network import DartsConfig
from jaxsys.nas.darts_network import cell_model as darts_model
from jaxsys.nas.model import Model
from jaxsys.nas.nb101_network import Nb101Config
from jaxsys.nas.nb101_network import cell_model as nb101_model
from jaxsys.nas.output import Output, Site
from jaxsys.nas.score import PROXIES, score
from jaxsys.nas.vit import VitConfig
from jaxsys.nas.vit_network import transformer_model

FAST = {"xla_backend_optimization_level": 0}  # compiling takes longer than running
IMAGES = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)), jnp.float32)
VIT = VitConfig((8, 10, 12), (1, 2, 3), (1, 2), (1.5, 2.0), 4)


def nb101_cells():
    """Input to output alone; the benchmark's first cell; three vertices abreast; a drawn one."""
    first = [[0, 1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 1]]
    first += [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1], [0] * 7]
    direct = [[0, 1, 1, 1, 1], *[[0, 0, 0, 0, 1]] * 3, [0] * 5]
    return np.stack(
        [
            nb101.encode([[0, 1], [0, 0]], ["input", "output"]),
            nb101.encode(first, [0, 4, 2, 4, 4, 3, 1]),
            nb101.encode(direct, [0, 4, 3, 2, 1]),
            nb101.sample(1, seed=4)[0],
        ]
    )


def darts_cells():
    """Every operation with both strides, then two at random."""
    all_of = np.zeros((2, 8, 2), int)
    all_of[:, :, 0] = range(8)
    all_of[:, :, 1] = [0, 1, 0, 1, 1, 0, 0, 1]
    return np.concatenate([all_of[None].astype(np.int32), darts.sample(2)])


SPACES = {
    "nb101": (
        nb101_cells(),
        partial(nb101_model, config=Nb101Config(5, 2)),
        "nas_bench_101",
        {},
        partial(nb101.params_m, channels=5, modules=2),
    ),
    "darts": (
        darts_cells(),
        partial(darts_model, config=DartsConfig(2, 4)),
        "darts_network",
        {"cells": 4},
        partial(darts.params_m, channels=2, cells=4),
    ),
    "vit": (
        vit.sample(4, config=VIT),
        partial(transformer_model, config=VIT),
        "transformer",
        {"config": VIT},
        partial(vit.params_m, config=VIT),
    ),
}


def drawn(make, arch):
    """Draw every weight, norm and bias, those that no layer of the architecture uses included."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: make(arch).init(key), jax.random.key(0))
    return jax.tree.map(lambda v: jnp.asarray(0.4 * rng.normal(size=v.shape) + 0.1, "f4"), shapes)


def as_numpy(array):
    return np.asarray(array, np.float64)


@pytest.mark.parametrize("name", SPACES)
def test_one_program_equals_plain_networks(name, plain):
    archs, make, network, sizes, params_m = SPACES[name]
    network = partial(getattr(plain, network), **sizes)
    theta = drawn(make, archs[0])
    absolute = jax.tree.map(jnp.abs, theta)

    def one(arch, theta, absolute):
        model = make(arch)
        bare = model.forward(absolute, jnp.abs(IMAGES[:1]), norm=False)
        weights = model.nodes(jax.tree.map(jnp.ones_like, theta))
        logits = model.logits(theta, IMAGES)
        return logits, jnp.log(bare.logits) + bare.log_scale, weights, model.present

    run = jax.jit(one, compiler_options=FAST)
    for arch in archs:
        logits, log_sum, weights, present = run(arch, theta, absolute)
        used = plain.Weights()
        images = np.asarray(IMAGES, np.float64)
        expected = network(jax.tree.map(as_numpy, theta), arch, images, used)
        np.testing.assert_allclose(logits, expected, atol=2e-3 * np.abs(expected).max())
        bare = plain.Weights(norm=False)
        total = network(jax.tree.map(as_numpy, absolute), arch, np.abs(images[:1]), bare)
        np.testing.assert_allclose(log_sum, np.log(total), atol=1e-3)
        assert used.count() == round(float(params_m(arch)) * 1e6)
        assert weights.sum() == used.count(2)
        assert ((weights > 0) == present).all()
    assert run._cache_size() == 1  # the architecture is data


ABSENT_ANYWHERE = ("params", "flops", "l2_norm", "naswot", "zen", "meco")
FROM_GRADIENTS = ("grad_norm", "snip", "plain", "jacob_cov", "epe_nas", "synflow")
OTHERWISE = ("synflow", "naswot", "zen", "az_progressivity", "az_trainability")


def scored(name, proxies):
    archs, make, *_ = SPACES[name]
    key = jax.random.key(0)

    def one(arch):
        model = make(arch)
        labels = jnp.arange(len(IMAGES))
        return score(model, model.init(key), IMAGES, labels, key, proxies), model.present

    run = jax.jit(one, compiler_options=FAST)
    for arch in archs[-2:]:
        scores, present = run(arch)
        for proxy, s in scores.items():
            assert np.isfinite(s.total), proxy
            if s.nodes is None:
                continue
            assert np.isfinite(s.nodes).all(), proxy
            if not proxy.startswith("az_"):
                assert (np.asarray(s.nodes)[~np.asarray(present)] == 0).all(), proxy
            if proxy not in OTHERWISE:
                np.testing.assert_allclose(s.total, np.sum(s.nodes), rtol=1e-3, atol=1e-4)


def test_some_proxies_of_a_transformer():
    scored("vit", ("params", "flops", "naswot", "fisher", "synflow"))


@pytest.mark.slow
def test_every_proxy_of_a_transformer():
    scored("vit", PROXIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nb101", "darts"])
@pytest.mark.parametrize(
    "proxies", [ABSENT_ANYWHERE, FROM_GRADIENTS, ("fisher",), ("grasp", "zico"), PROXIES[-3:]]
)
def test_every_proxy_of_cells(name, proxies):
    scored(name, proxies)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_vmap_over_architectures_equals_one_by_one(name):
    archs, make, *_ = SPACES[name]
    theta = drawn(make, archs[0])
    run = jax.jit(lambda arch: make(arch).logits(theta, IMAGES), compiler_options=FAST)
    many = jax.jit(jax.vmap(lambda arch: make(arch).logits(theta, IMAGES)), compiler_options=FAST)
    one = np.stack([run(a) for a in archs])
    np.testing.assert_allclose(many(archs), one, atol=2e-3 * np.abs(one).max())


def test_masks_leave_absent_channels_out_of_statistics():
    """Proxies that look at channels see the present ones only, as a network without others has."""
    x = jax.random.normal(jax.random.key(3), (4, 6, 6, 5))
    wide = jnp.concatenate([x, jnp.zeros((4, 6, 6, 3))], -1)
    mask = jnp.array([1.0] * 5 + [0.0] * 3)
    run = [proxies_activation.naswot, proxies_activation.zen, proxies_activation.meco]
    found = []
    for value, m in ((x, None), (wide, mask)):

        def forward(theta, images, *, observe, value=value, m=m):
            site = Site(relu=True, norm=True, rectified=m, outputs=m)
            seen = observe(value, value, site)[None]
            return Output(None, None, None, jnp.ones((4, 2, 2, 1)) * images.sum(), seen)

        model = Model(lambda key: 0, lambda p, x: x, lambda tree: 0, jnp.ones(1, bool), forward)

        @partial(jax.jit, compiler_options=FAST)
        def all_three(images, model=model):
            key = jax.random.key(0)
            return [f(model, {"w": jnp.ones((2, 2))}, images, None, key).nodes for f in run]

        found.append(all_three(jnp.ones((4, 6, 6, 3))))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)
