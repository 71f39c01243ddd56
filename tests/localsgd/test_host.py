"""The host-scheduled step in real processes equals the pure step under vmap."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.cluster import launch
from jaxsys.core.mesh import over_replicas
from jaxsys.localsgd.layers import find_layers
from jaxsys.localsgd.step import due, partial_local_sgd

sys.path.insert(0, str(Path(__file__).parent))
import host_cases

WORKERS = 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("host")
    worker = Path(__file__).with_name("host_worker.py")
    lines = []
    report = launch(
        [sys.executable, str(worker), str(out)], WORKERS, on_line=lambda i, line: lines.append(line)
    )
    assert report.exit_code == 0, "\n".join(lines[-20:])
    return [np.load(out / f"{i}.npz") for i in range(WORKERS)]


@pytest.mark.parametrize("name", list(host_cases.STRATEGIES))
def test_processes_equal_vmap(measured, name):
    strategy = host_cases.STRATEGIES[name]
    params, batches = host_cases.start(WORKERS)
    layers = find_layers(host_cases.loss_fn, params, batches[0, 0])
    assert [layer.name for layer in layers] == ["c", "b", "a"]
    phases = host_cases.phases(strategy, len(layers))
    algorithm = partial_local_sgd(host_cases.loss_fn, optax.adam(1e-2), layers, strategy)
    one = algorithm.init(params, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.stack([x] * WORKERS), one)
    programs, losses = {}, []
    for i in range(host_cases.STEPS):
        d = due(phases, strategy, i)
        if d not in programs:
            programs[d] = over_replicas(lambda s, b, d=d: algorithm.step(s, b, d), "vmap")
        state, info = programs[d](state, jnp.asarray(batches[i]))
        losses.append(np.asarray(info.loss))
    # One rounding error can flip a stochastic rounding, so coded runs agree less closely.
    rtol = 2e-5 if strategy.codec == "f32" else 2e-2
    for worker in range(WORKERS):
        got = measured[worker]
        np.testing.assert_allclose(got[f"{name}/losses"], np.array(losses)[:, worker], rtol=rtol)
        for j, leaf in enumerate(jax.tree.leaves(state.params)):
            np.testing.assert_allclose(
                got[f"{name}/{j}"], np.asarray(leaf[worker]), rtol=rtol, atol=rtol
            )


def test_unequal_workers_are_named(measured):
    for got in measured:
        assert "worker 1 has other parameters than worker 0, first at 'w'" in str(got["mismatch"])
