"""Timing: pairing, interleaving, intervals, and a machine description that starts nothing."""

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.core import measure
from jaxsys.core.errors import UserError


def test_machine_is_frozen_and_lists_devices_when_asked():
    described = measure.machine(devices=True)
    assert described.devices is not None
    assert len(described.devices) == 8
    assert described.memory_gib > 0
    assert described.jax in str(described)
    with pytest.raises(dataclasses.FrozenInstanceError):
        described.cores = 1


def test_machine_neither_imports_jax_nor_starts_a_backend():
    program = (
        "import sys; from jaxsys.core import measure; m = measure.machine();"
        "assert m.devices is None; assert 'jax' not in sys.modules;"
        "import jax; assert measure.machine().devices is None;"
        "jax.devices(); assert measure.machine().devices"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20), st.integers(0, 5))
def test_interval_lies_within_the_samples_and_repeats(samples, seed):
    low, high = measure.bootstrap_ci(samples, n=50, seed=seed)
    assert min(samples) <= low <= high <= max(samples)
    assert (low, high) == measure.bootstrap_ci(samples, n=50, seed=seed)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = measure.bootstrap_ci(rng.normal(size=40), statistic=np.mean, level=0.9, n=200)
        hits += low <= 0 <= high
    assert 0.82 <= hits / 200 <= 0.97


def test_interleaved_runs_every_round_once_in_varying_order():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = measure.interleaved(functions, warmup=1, runs=12)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 13
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1
    assert all(len(t.seconds) == 12 and min(t.seconds) >= 0 for t in times.values())


def test_interleaved_pairs_by_round(monkeypatch):
    clock = iter(np.arange(1000.0))

    def elapsed(function):
        return function() * (1 + next(clock))

    monkeypatch.setattr(measure, "_elapsed", elapsed)
    times = measure.interleaved({"one": lambda: 1.0, "ten": lambda: 10.0}, warmup=0, runs=40)
    # The drift multiplies both within a round nearly alike, so the paired ratio stays near ten.
    got = measure.ratio(times["ten"], times["one"])
    assert 9 < got.median < 11
    assert got.ci[0] <= got.median <= got.ci[1]


def test_interleaved_waits_for_jax_outputs(monkeypatch):
    import jax

    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    measure.interleaved({"x": lambda: {"y": jnp.ones(3)}}, warmup=0, runs=2)
    assert [set(w) for w in waited] == [{"y"}, {"y"}]


def test_mistakes_are_user_errors():
    with pytest.raises(UserError, match="at least one"):
        measure.bootstrap_ci([])
    with pytest.raises(UserError, match="level"):
        measure.bootstrap_ci([1.0], level=95.0)
    with pytest.raises(UserError, match="runs is 0"):
        measure.interleaved({"a": lambda: None}, runs=0)
    one, two = measure.timing("one", [1.0]), measure.timing("two", [1.0, 2.0])
    with pytest.raises(UserError, match="paired"):
        measure.ratio(one, two)
