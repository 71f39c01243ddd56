"""Operators' floors against what JAX counts, collectives against NumPy, lines that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.bench import comm, ops, roofline
from jaxsys.core.equations import trace
from jaxsys.core.errors import UserError
from jaxsys.core.flops import count
from jaxsys.core.measure import timing
from jaxsys.core.mesh import REPLICA, over_replicas

DEVICE = jax.devices()[0]
PEAK = roofline.Peaks(1e9, 1e8, "a test's")


@pytest.fixture
def given_peaks(monkeypatch):
    monkeypatch.setattr(ops, "peaks", lambda device, dtype: PEAK)


@pytest.mark.parametrize("operator", ops.operators(ops.SMOKE), ids=lambda o: f"{o.name} {o.dtype}")
def test_operations_are_those_that_jax_counts(operator):
    call = operator.make(DEVICE)
    program = trace(call.func, *call.args)
    counted = sum(count(eqn, program.avals).flops for eqn in program.equations)
    if operator.group == "matmul":
        assert counted == operator.flops
    elif operator.name.startswith("attention"):
        assert operator.flops <= counted <= 3 * operator.flops  # the mask saves it nothing
    elif operator.group == "gather":  # the arithmetic of indices
        assert operator.flops == 0
    else:  # the least; a formula may be written with more
        assert operator.flops <= counted + 1 <= 4 * operator.flops + 1


def test_bytes_are_those_of_inputs_and_results():
    for operator in ops.operators(ops.SMOKE):
        call = operator.make(DEVICE)
        if operator.group == "gather":
            continue
        out = call()
        assert operator.n_bytes == sum(x.nbytes for x in (*call.args, out)), operator


def test_rows_have_a_floor_and_a_dtype_that_a_backend_lacks_is_a_row(given_peaks, monkeypatch):
    def refuse(device):
        def call():
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such type\nmore")

        return call

    good, bad = ops.operators(ops.Sweep(("softmax",), elements=4096, dtypes=("float32",) * 2))
    monkeypatch.setattr(ops, "operators", lambda sweep: (good, bad._replace(make=refuse)))
    rows = ops.measure(ops.Sweep(("softmax",)), runs=2)
    assert [row["status"] for row in rows] == ["ok", "not here"]
    assert rows[1]["why"] == "UNIMPLEMENTED: no such type"
    assert rows[0]["floor_s"] == pytest.approx(max(5 * 4096 / 1e9, 8 * 4096 / 1e8))
    share = rows[0]["floor_s"] / rows[0]["time"]["median_s"]
    assert rows[0]["percent_of_floor"] == pytest.approx(100 * share)


def test_peaks_of_known_devices_come_from_the_table():
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    found = roofline.peaks(Device(), jnp.bfloat16)
    assert (found.flops_per_s, found.bytes_per_s) == (989.4e12, 3.35e12)
    assert "data sheet" in found.source
    with pytest.raises(UserError, match="complex64"):
        roofline.peaks(Device(), jnp.complex64)


@pytest.mark.parametrize("name", list(comm.COLLECTIVES))
def test_collectives_do_what_they_are_called(name):
    x = np.arange(32.0, dtype=np.float32).reshape(4, 8)
    run = over_replicas(comm.COLLECTIVES[name], "vmap", axis_name=REPLICA)
    wanted = {
        "all-reduce": np.broadcast_to(x.sum(0), (4, 8)),
        "all-gather": np.broadcast_to(x.reshape(-1), (4, 32)),
        "reduce-scatter": x.sum(0).reshape(4, 2),
        "all-to-all": x.reshape(4, 4, 2).transpose(1, 0, 2).reshape(4, 8),
        "permute": np.roll(x, 1, axis=0),
    }
    assert np.array_equal(run(x), wanted[name])


def test_collectives_are_timed_over_all_devices_and_fitted():
    rows = comm.measure((1024, 4096, 16384), devices=jax.devices()[:2], runs=2)
    names = [row["flags"]["operator"] for row in rows]
    for name in comm.COLLECTIVES:
        assert names.count(name) == 4
    for row in rows:
        if row["flags"]["bytes"] is None:
            assert ("line" in row) != ("refused" in row)
        else:
            assert row["time"]["runs"] == 2


def test_a_line_that_explains_nothing_is_refused():
    noise = {n: timing("", [s]) for n, s in ((1, 3.0), (2, 2.0), (4, 1.0))}
    assert "do not grow" in comm._line(noise)["refused"]
    straight = {n: timing("", [1.0 + n]) for n in (1, 2, 4)}
    assert comm._line(straight)["line"]["beta_s_per_unit"] == pytest.approx(1.0)


@pytest.mark.parametrize("sizes", [(), (4,)])
def test_sizes_that_cannot_be_split_are_refused(sizes):
    with pytest.raises(UserError, match="devices"):
        comm.measure(sizes)


def test_sweeps_of_nonsense_are_refused():
    with pytest.raises(UserError, match="groups"):
        ops.operators(ops.Sweep(("dance",)))
    with pytest.raises(UserError, match="sizes"):
        ops.operators(ops.Sweep(sizes=(0,)))
