"""Fits recover lines, survive outliers and refuse noise; all-reduce formulas against simulation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.cost import (
    ALGORITHMS,
    LinearCost,
    PoorFitError,
    allreduce_bytes,
    allreduce_s,
    allreduce_steps,
    fit_linear,
)
from jaxsys.core.errors import UserError


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0, 1e-2),
    st.floats(1e-10, 1e-7),
    st.lists(st.integers(1, 10**8), min_size=3, max_size=12, unique=True),
)
def test_an_exact_line_is_recovered(alpha, beta, sizes):
    seconds = alpha + beta * np.array(sizes, float)
    if np.ptp(seconds) < 1e-3 * seconds.max():  # too flat to tell a slope from rounding
        return
    line = fit_linear(sizes, seconds)
    np.testing.assert_allclose(line(np.array(sizes)), seconds, rtol=1e-5)
    assert line.r2 > 0.999
    assert line.alpha_s >= 0


def test_relative_errors_count_and_alpha_stays_above_zero():
    sizes = np.array([1e3, 1e4, 1e5, 1e6, 1e7])
    true = 1e-4 + 1e-8 * sizes
    rng = np.random.default_rng(0)
    seconds = np.tile(true, 9) * rng.lognormal(0, 0.05, 45)
    line = fit_linear(np.tile(sizes, 9), seconds)
    # A plain least-squares fit is ruled by the largest size and misses the latency.
    assert line.alpha_s == pytest.approx(1e-4, rel=0.1)
    assert line.beta_s_per_unit == pytest.approx(1e-8, rel=0.1)
    assert line.n == 45
    below = fit_linear([1, 2, 3, 4], [0.9, 1.95, 2.95, 4.1])
    assert below.alpha_s == 0
    assert below.beta_s_per_unit > 0


def test_outliers_do_not_turn_the_line():
    sizes = np.repeat([1.0, 2, 4, 8, 16], 5)
    seconds = 1 + sizes
    seconds[::5] *= 20  # one stray repeat of every size
    assert fit_linear(sizes, seconds)(10) == pytest.approx(11)
    lone = np.array([1.0, 2, 4, 8, 16, 32, 64])
    strayed = 1 + lone
    strayed[2] *= 1.3  # one stray size without repeats
    assert fit_linear(lone, strayed)(10) == pytest.approx(11, rel=0.02)


def test_what_explains_nothing_is_refused_with_the_reason():
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(50):
        sizes = rng.uniform(1, 100, 12)
        with pytest.raises(PoorFitError, match=r"r² .*, 12 points"):
            fit_linear(sizes, rng.lognormal(0, 1, 12))
        refused += 1
    assert refused == 50
    with pytest.raises(PoorFitError, match="do not grow"):
        fit_linear([1, 2, 3, 4], [4.0, 3, 2, 1])
    with pytest.raises(PoorFitError, match=r"do not grow|poorly"):
        fit_linear([1, 2, 3], [1.0, 1, 1])
    with pytest.raises(PoorFitError, match="2 different sizes"):
        fit_linear([1, 1, 2, 2], [1.0, 1, 2, 2])
    assert fit_linear([1, 2, 3, 4], [1.0, 2.5, 2, 4], min_r2=0.5).r2 < 0.9
    with pytest.raises(UserError, match="one time per size"):
        fit_linear([1, 2, 3], [1.0, 2])
    with pytest.raises(UserError, match="above 0"):
        fit_linear([1, 2, 3], [1.0, 2, 0])
    with pytest.raises(UserError, match="size is negative"):
        fit_linear([1, 2, -3], [1.0, 2, 3])


def test_lines_survive_dicts_and_jit():
    line = fit_linear([1, 2, 3], [1.0, 2, 3])
    assert LinearCost.from_dict(line.to_dict()) == line
    assert jax.jit(line)(jnp.array([2.0])).item() == pytest.approx(2)
    for bad in ({}, {**line.to_dict(), "x": 1}, {**line.to_dict(), "alpha_s": float("nan")}):
        with pytest.raises(UserError):
            LinearCost.from_dict(bad)
    with pytest.raises(UserError, match="beta_s_per_unit is -1"):
        LinearCost.from_dict({**line.to_dict(), "beta_s_per_unit": -1})


def ring(n_workers):
    """Play a ring all-reduce of W chunks and count steps and chunks through one link."""
    have = [[{w} for _ in range(n_workers)] for w in range(n_workers)]
    steps = 0
    for _ in range(2 * (n_workers - 1)):
        sent = [
            (w, (w - steps) % n_workers, have[w][(w - steps) % n_workers]) for w in range(n_workers)
        ]
        for w, chunk, what in sent:
            have[(w + 1) % n_workers][chunk] = have[(w + 1) % n_workers][chunk] | what
        steps += 1
    everything = set(range(n_workers))
    assert all(part == everything for worker in have for part in worker)
    return steps, steps / n_workers


def doubling(n_workers, *, halve):
    """Play recursive doubling (or halving and doubling) on a power of two."""
    have = [{w} for w in range(n_workers)]
    steps, passed, size = 0, 0.0, 1.0
    for k in range(int(math.log2(n_workers))):
        have = [have[w] | have[w ^ (1 << k)] for w in range(n_workers)]
        size = size / 2 if halve else size
        steps, passed = steps + 1, passed + size
    assert all(part == set(range(n_workers)) for part in have)
    return (2 * steps, 2 * passed) if halve else (steps, passed)


@pytest.mark.parametrize("workers", [1, 2, 4, 8, 32])
def test_formulas_equal_played_collectives(workers):
    played = {
        "ring": ring(workers),
        "recursive_doubling": doubling(workers, halve=False),
        "halving_doubling": doubling(workers, halve=True),
    }
    for algorithm, (steps, share) in played.items():
        assert allreduce_steps(workers, algorithm) == steps
        assert allreduce_bytes(1000, workers, algorithm) == pytest.approx(1000 * share)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_allreduce_time_is_jittable_and_sound_to_thousands(algorithm):
    workers = np.array([1, 2, 3, 5, 64, 1000, 4096, 5000])

    @jax.jit
    def seconds(workers, rate):
        return allreduce_s(4e9, workers, bandwidth_bits_s=rate, latency_s=1e-3, algorithm=algorithm)

    grid = jax.vmap(seconds, (None, 0))(workers, jnp.array([1e8, 1e9]))
    assert grid.shape == (2, 8)
    assert np.all(grid[:, 0] == 0)
    assert np.all(np.diff(grid, axis=1) >= 0)
    assert np.all(grid[0] >= grid[1])
    steps = allreduce_steps(workers, algorithm)
    want = steps * 1e-3 + allreduce_bytes(4e9, workers, algorithm) * 8e-8
    np.testing.assert_allclose(grid[0], want, rtol=1e-5)
    assert allreduce_steps(4096, "tree") == 24  # no rounding of the logarithm
    assert allreduce_steps(4097, "tree") == 26
    # No algorithm moves less than the bandwidth bound.
    bound = 2 * (workers - 1) / workers
    atleast = bound if algorithm != "recursive_doubling" else np.minimum(bound, 1) * (workers > 1)
    assert np.all(np.asarray(allreduce_bytes(1.0, workers, algorithm)) >= atleast - 1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"bandwidth_bits_s": 0.0}, "bandwidth_bits_s is 0.0"),
        ({"bandwidth_bits_s": float("nan")}, "bandwidth_bits_s is nan"),
        ({"latency_s": -1.0}, "latency_s is -1.0"),
        ({"n_bytes": -1}, "n_bytes is -1"),
        ({"algorithm": "magic"}, "algorithm is 'magic'"),
    ],
)
def test_bad_network_is_refused(change, says):
    arguments = {"n_bytes": 1, "workers": 2, "bandwidth_bits_s": 1e6, **change}
    with pytest.raises(UserError, match=says):
        allreduce_s(arguments.pop("n_bytes"), arguments.pop("workers"), **arguments)
