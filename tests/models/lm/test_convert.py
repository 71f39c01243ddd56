"""Conversion keeps every number; loading and converting take the memory of one tensor."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.tree import flatten
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 61, 32, 2, 4, 2, 8, 48, 64, bos_id=1, eos_ids=(2,))


@pytest.fixture(scope="module")
def memory(load_experiment):
    return load_experiment("models/memory.py")


@pytest.fixture(scope="module")
def sharded(memory, tmp_path_factory) -> tuple[Path, int]:
    """Write about 120 MB in shards of at most 25 MB, its largest tensor 8 MB."""
    folder = tmp_path_factory.mktemp("sharded")
    sizes = memory.write(folder, memory.SMALL, 25_000_000)
    assert sizes["shards"] >= 5
    assert sizes["file_bytes"] > 110_000_000
    assert sizes["tensor_bytes"] == 8 << 20
    return folder, sizes["tensor_bytes"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("what", ["load", "convert"])
def test_no_more_than_one_tensor_is_in_anonymous_memory(memory, sharded, tmp_path, what):
    folder, tensor_bytes = sharded
    found = memory.measure(folder, tmp_path / "out" if what == "convert" else None)
    assert found["peak_bytes"] <= tensor_bytes


def test_converted_to_another_dtype(tmp_path):
    params = lm.init(jax.random.key(0), CONFIG)
    lm.save(tmp_path / "a", params, CONFIG)
    lm.convert(tmp_path / "a", tmp_path / "b", dtype="bfloat16", shard_bytes=9000)
    loaded, config = lm.load(tmp_path / "b")
    assert config == CONFIG
    for (name, new), old in zip(flatten(loaded).items(), flatten(params).values(), strict=True):
        assert new.dtype == jnp.bfloat16, name
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old.astype(jnp.bfloat16)))


def test_a_folder_can_be_converted_in_place(tmp_path):
    params = lm.init(jax.random.key(1), CONFIG)
    lm.save(tmp_path, params, CONFIG, shard_bytes=9000)
    lm.convert(tmp_path, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    for new, old in zip(
        jax.tree.leaves(lm.load(tmp_path)[0]), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


def test_stories260k_converts_to_the_same_model(tmp_path):
    if "JAXSYS_DATA" not in os.environ:
        pytest.skip("JAXSYS_DATA does not name the folder with lm/stories260K.bin")
    source = lm.find_model("stories260k")
    lm.convert(source, tmp_path)
    (params, config), (again, config_again) = lm.load(source), lm.load(tmp_path)
    assert (config_again.layers, config_again.eos_ids) == (config.layers, config.eos_ids)
    tokens = jnp.array([[1, 403, 407, 261, 378]])
    wanted = lm.apply(params, config, tokens).logits
    np.testing.assert_array_equal(lm.apply(again, config_again, tokens).logits, wanted)
    assert int(wanted[0, -1].argmax()) != 0
