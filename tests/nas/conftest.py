"""One small network for all tests of this folder; drawn by NumPy, since nothing is to compile."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.nas import network
from jaxsys.nas.network import NetworkConfig


@pytest.fixture(scope="session")
def theta():
    """Parameters of 4 channels and one cell a stage."""
    shapes = jax.eval_shape(lambda key: network.init(key, NetworkConfig(4, 1)), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        fan_in = np.prod(leaf.shape[-4:-1] if path[-1].key in ("w", "w3") else leaf.shape[-2:-1])
        values = {"scale": 1 + 0.1 * noise, "bias": 0.1 * noise}
        return jnp.asarray(values.get(path[-1].key, noise / np.sqrt(fan_in)), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="session")
def plain():
    """Load the networks in plain NumPy that stand beside the tests."""
    spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
