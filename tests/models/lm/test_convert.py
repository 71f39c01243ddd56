"""Conversion keeps every number; loading and converting take the memory of one tensor."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.tree import flatten
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 61, 32, 2, 4, 2, 8, 48, 64, bos_id=1, eos_ids=(2,))

MEASURE = """
import sys, threading, time
from pathlib import Path
import jax, numpy as np
from jaxsys.core.tree import flatten
from jaxsys.models import lm

def anonymous_bytes():
    line = next(t for t in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in t)
    return int(line.split()[1]) * 1024

def watch():
    while running:
        peaks.append(anonymous_bytes())
        time.sleep(0.0005)

source, target = sys.argv[1:]
jax.block_until_ready(jax.device_put(np.ones(16)))
lm.load_config(source)
running, peaks = True, [anonymous_bytes()]
watcher = threading.Thread(target=watch)
watcher.start()
if target:
    files = lm.convert(source, target, dtype="float16")
else:
    params = jax.block_until_ready(lm.load(source)[0])
peaks.append(anonymous_bytes())
running = False
watcher.join()
if not target:  # and the numbers are there
    assert float(np.asarray(flatten(params)["model.norm.weight"])[0]) == 1.0
print(max(peaks) - peaks[0])
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """Write about 120 MB in shards of at most 25 MB, its largest tensor 8 MB."""
    folder = tmp_path_factory.mktemp("sharded")
    config = lm.LMConfig("llama", 4096, 512, 8, 8, 8, 64, 1408, 64)
    named = lm.shapes(config)
    assert max(leaf.size for leaf in named.values()) * 4 == 8 << 20
    files = lm.write_folder(
        folder, config, named, lambda n: np.ones(named[n].shape, np.float32), 25_000_000
    )
    assert len(files) > 5
    assert sum(file.stat().st_size for file in files) > 110_000_000
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("what", ["load", "convert"])
def test_no_more_than_one_tensor_is_in_anonymous_memory(sharded, tmp_path, what):
    target = str(tmp_path / "out") if what == "convert" else ""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(sharded), target],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert int(done.stdout) <= 8 << 20


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
