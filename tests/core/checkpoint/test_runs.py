"""Run state: round trips, retention, refusal of strangers, kills, and two processes."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError


class State(NamedTuple):
    params: dict
    opt: tuple
    key: jax.Array
    step: int
    rate: float
    table: np.ndarray


def _sharding(spec):
    return NamedSharding(jax.make_mesh((8,), ("r",), axis_types=(AxisType.Auto,)), spec)


def _state(seed: int) -> State:
    rng = np.random.default_rng(seed)
    sharded = jax.device_put(jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), _sharding(P("r")))
    params = {
        "h.0": {"w/ odd name": sharded, "half": jnp.asarray(rng.normal(size=4), jnp.bfloat16)},
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "second_device": jax.device_put(jnp.full(2, seed), jax.devices()[1]),
    }
    return State(
        params,
        optax.adam(1e-3).init({"w": jnp.ones(3)}),
        jax.random.split(jax.random.key(seed), 8),
        seed,
        seed + 0.1,
        rng.integers(0, 2**60, size=3),
    )


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array):
            assert x.dtype == y.dtype
            assert x.sharding == y.sharding
            assert x.committed == y.committed
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_keeps_values_types_and_shardings(tmp_path):
    store = RunStore(tmp_path / "run")
    assert store.latest() is None
    meta = {"config": {"lr": 0.1}, "plan": [[0, 1], [2]], "note": "ü"}
    store.save(3, _state(1), meta)
    state, got = store.restore(3, _state(2))
    _assert_same(state, _state(1))
    assert got == meta


def test_restore_into_shapes_alone_and_into_another_sharding(tmp_path):
    store = RunStore(tmp_path)
    store.save(0, _state(1))
    like = jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            if isinstance(x, jax.Array)
            else x
        ),
        _state(2),
    )
    state, _ = store.restore(0, like)
    assert state.key.dtype == _state(1).key.dtype
    assert (jax.random.key_data(state.key) == jax.random.key_data(_state(1).key)).all()

    moved = _state(2)
    moved.params["h.0"]["w/ odd name"] = jax.device_put(jnp.zeros((8, 3)), _sharding(P()))
    spread = jax.device_put(moved.key, _sharding(P("r")))
    state, _ = store.restore(0, moved._replace(key=spread))
    got, expected = state.params["h.0"]["w/ odd name"], _state(1).params["h.0"]["w/ odd name"]
    assert got.sharding.is_fully_replicated
    assert (np.asarray(got) == np.asarray(expected)).all()
    assert state.key.sharding == spread.sharding


def test_only_the_newest_stay_and_a_step_can_be_saved_again(tmp_path):
    store = RunStore(tmp_path, keep=2)
    for step in (1, 10, 9, 30):
        store.save(step, {"w": jnp.full(2, step)})
    assert store.steps() == (10, 30)
    assert store.latest() == 30
    store.save(30, {"w": jnp.full(2, 31)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "30"]
    assert store.restore(30, {"w": jnp.zeros(2, jnp.int32)})[0]["w"].tolist() == [31, 31]


@pytest.mark.parametrize(
    ("like", "named"),
    [
        ({"a": jnp.zeros(3), "b": {"w": jnp.zeros((2, 5))}}, r"b\.w \(float32\[2, 5\]\)"),
        ({"a": jnp.zeros(3), "b": {"w": jnp.zeros((2, 4), jnp.int32)}}, r"b\.w \(int32"),
        ({"a": jnp.zeros(3), "b": {"v": jnp.zeros((2, 4))}}, r"b\.v"),
        ({"a": jnp.zeros(3)}, r"only the checkpoint has b\.w"),
        ({"a": jnp.zeros(3), "b": {"w": jnp.zeros((2, 4))}, "c": 1}, r"lacks c \(int\)"),
        ({"a": 3.0, "b": {"w": jnp.zeros((2, 4))}}, r"a \(float\)"),
    ],
)
def test_another_model_is_refused_by_its_first_leaf(tmp_path, like, named):
    store = RunStore(tmp_path)
    store.save(0, {"a": jnp.zeros(3), "b": {"w": jnp.zeros((2, 4))}})
    with pytest.raises(UserError, match=named):
        store.restore(0, like)


def test_half_written_steps_are_ignored_and_cleared(tmp_path):
    store = RunStore(tmp_path)
    store.save(1, {"w": jnp.ones(2)})
    (tmp_path / "2.unfinished" / "state").mkdir(parents=True)
    (tmp_path / "2.unfinished" / "manifest.json").write_text("{}")
    (tmp_path / "3").mkdir()  # no manifest
    (tmp_path / "notes").mkdir()
    assert store.steps() == (1,)
    store.save(2, {"w": jnp.ones(2)})
    assert store.steps() == (1, 2)
    assert not list(tmp_path.glob("*.unfinished*"))
    assert (tmp_path / "notes").exists()


def test_a_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    store = RunStore(tmp_path, keep=1)
    store.save(1, {"w": jnp.ones(2)})

    def fail(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            store.save(2, {"w": jnp.zeros(2)})
    assert store.latest() == 1
    assert store.restore(1, {"w": jnp.zeros(2)})[0]["w"].tolist() == [1, 1]


def test_mistakes_are_user_errors(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(UserError, match="numbered from 0"):
        store.save(-1, {})
    with pytest.raises(UserError, match="keep is 0"):
        RunStore(tmp_path, keep=0)
    with pytest.raises(UserError, match=r"a\.0 is a str"):
        store.save(0, {"a": ["text"]})
    with pytest.raises(UserError, match="not JSON"):
        store.save(0, {}, {"x": object()})
    with pytest.raises(UserError, match="it has: none"):
        store.restore(4, {})
    store.save(0, {"n": 4})
    assert store.restore(0, {"n": 5}) == ({"n": 4}, {})
    (tmp_path / "0" / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        store.restore(0, {"n": 5})


WORKER = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
port, index, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, initialization_timeout=60,
                           heartbeat_timeout_seconds=20, shutdown_timeout_seconds=20)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
mesh = jax.make_mesh((4,), ("r",), axis_types=(AxisType.Auto,))
spread = NamedSharding(mesh, P("r"))

def state(scale):
    rows = np.arange(8.0, dtype=np.float32).reshape(4, 2) * scale
    return {
        "global": jax.make_array_from_callback((4, 2), spread, lambda i: rows[i]),
        "own": jnp.full(3, float(index + 1) * scale, jnp.bfloat16),
        "comm": jax.device_put(jnp.full(2, index + scale), jax.local_devices()[1]),
        "big": np.array([2**40 * (index + 1)]) * scale,
        "key": jax.random.key(10 * index + scale),
        "step": scale,
    }

store = RunStore(folder, keep=1)
for step in (1, 2):
    store.save(step, state(step), {"step": step})
    assert store.latest() == step, store.steps()
got, meta = store.restore(2, state(7))
want = state(2)
assert meta == {"step": 2}
assert got["step"] == 2
assert got["global"].sharding == spread
for a, b in zip(got["global"].addressable_shards, want["global"].addressable_shards):
    assert (np.asarray(a.data) == np.asarray(b.data)).all()
assert got["own"].dtype == jnp.bfloat16 and got["own"].tolist() == want["own"].tolist()
assert not got["own"].committed
assert got["comm"].devices() == {jax.local_devices()[1]}
assert got["comm"].tolist() == want["comm"].tolist()
assert got["big"].dtype == np.int64 and got["big"] == want["big"], got["big"]
assert (jax.random.key_data(got["key"]) == jax.random.key_data(want["key"])).all()
try:
    store.restore(2, {**state(2), "own": jnp.zeros(4)})
except UserError as error:
    assert "own" in str(error)
else:
    raise AssertionError("a wrong shape was accepted")
jax.distributed.shutdown()
print("fine")
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_save_and_restore_together(tmp_path):
    port, folder = _free_port(), tmp_path / "run"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "error"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(port), str(i), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        results = [worker.communicate(timeout=150) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], results
    assert all(out.splitlines()[-1] == "fine" for out, _ in results), results
    assert "WARNING" not in "".join(err for _, err in results), results

    # One process cannot take up what two of them hold apart.
    like = {"global": jnp.zeros((4, 2)), "own": jnp.zeros(3, jnp.bfloat16)}
    with pytest.raises(UserError, match="another model or run"):
        RunStore(folder).restore(2, like)
