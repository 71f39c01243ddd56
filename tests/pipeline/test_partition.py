"""The exact partition against brute force, heuristics against it, and memory limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.pipeline.chains import make_chains, pipeline_s, wire_of
from jaxsys.pipeline.devices import Device, Fleet
from jaxsys.pipeline.fence import op_fence
from jaxsys.pipeline.fleets import even_fleet
from jaxsys.pipeline.memory import Limits, held_of, stage_memory
from jaxsys.pipeline.orders import first_scores, search
from jaxsys.pipeline.partition import (
    DoesNotFitError,
    brute_force,
    equal_compute,
    equal_number,
    exact,
    fits,
    nearest,
)
from jaxsys.pipeline.work import Value, Work, chain_work, crossing


def draw_case(rng, n, p, *, tight=False, whole=False):
    """Draw a graph with skips and shared leaves, a fleet and its order 0 … p−1."""
    number = (lambda *size: rng.integers(1, 5, size).astype(float)) if whole else rng.exponential
    flops = number(size=n) if not whole else number(n)
    values = [Value(i, int(rng.integers(1, 30)) * 40, (i + 1,)) for i in range(n - 1)]
    for _ in range(3):  # values that skip nodes
        a, b = sorted(rng.choice(n, 2, replace=False).tolist())
        values.append(Value(a, int(rng.integers(1, 30)) * 40, tuple(range(a + 1, b + 1))))
    work = chain_work(
        flops, [0] * (n - 1), leaf_bytes=rng.integers(0, 50, n), saved_bytes=rng.integers(0, 50, n)
    )
    tie = (float(rng.integers(n // 2)), float(n - 1), 5.0)
    cut = crossing(values, [v.n_bytes for v in values], n)
    work = work._replace(values=tuple(values), cut_bytes=cut, ties=np.array([tie]))
    memory = rng.uniform(60, 700, p) if tight else np.full(p, 1e9)
    speed = number(p) if whole else rng.uniform(0.5, 4, p)
    devices = tuple(Device(f"d{i}", float(s), float(m)) for i, (s, m) in
                    enumerate(zip(speed, memory, strict=True)))  # fmt: skip
    rate = np.exp(rng.uniform(np.log(20), np.log(5000), (p, p)))
    wait = rng.choice([0.0, 0.1], (p, p))
    return work, Fleet(devices, wait, rate)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(4, 9),
    p=st.integers(1, 4),
    micro_batches=st.sampled_from([1, 2, 7, 50]),
    tight=st.booleans(),
    whole=st.booleans(),
    remat=st.booleans(),
)
def test_exact_equals_brute_force(seed, n, p, micro_batches, tight, whole, remat):
    work, fleet = draw_case(np.random.default_rng(seed), n, p, tight=tight, whole=whole)
    chains = make_chains(
        work, fleet, [range(p)], micro_batches=micro_batches, limits=Limits(remat=remat),
        duplex=remat,
    )  # fmt: skip
    try:
        wanted = brute_force(chains)[1]
    except DoesNotFitError:
        with pytest.raises(DoesNotFitError):
            exact(chains)
        return
    cuts, seconds = exact(chains)
    edges = np.array([0, *cuts, n])
    assert fits(chains, edges)
    assert seconds == pytest.approx(wanted, rel=1e-8)
    assert seconds == pytest.approx(float(pipeline_s(chains, edges[None])[0]))
    for baseline in (equal_number, equal_compute, lambda c: op_fence(c, [p])):
        other = np.array([0, *baseline(chains), n])
        assert fits(chains, other)
        assert pipeline_s(chains, other[None])[0] >= seconds * (1 - 1e-8)
    reached, _, least = first_scores(chains)
    assert least[0] * (1 - 1e-8) <= seconds <= reached[0] * (1 + 1e-8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), remat=st.booleans(), order=st.sampled_from(["gpipe", "1f1b"]))
def test_fits_is_stage_memory_within_the_device(seed, remat, order):
    rng = np.random.default_rng(seed)
    work, fleet = draw_case(rng, 8, 3, tight=True)
    limits = Limits(copies=2, remat=remat)
    chains = make_chains(work, fleet, [range(3)], micro_batches=4, order=order, limits=limits)
    held = np.array(held_of(order, 3, 4))
    for cuts in [(1, 2), (3, 6), (2, 7), (4, 5)]:
        edges = np.array([0, *cuts, 8])
        needed = [
            2 * sum_of_leaves(work, a, b)
            + (h * work.cut_bytes[a] if remat else 0)
            + (1 if remat else h) * (work.saved[b] - work.saved[a])
            for a, b, h in zip(edges[:-1], edges[1:], held, strict=True)
        ]
        assert stage_memory(work, edges[:-1], edges[1:], held, limits) == pytest.approx(needed)
        enough = bool(np.all(needed <= fleet.memory_bytes))
        assert fits(chains, edges) <= enough if remat else fits(chains, edges) == enough


def sum_of_leaves(work: Work, a, b):
    first, second, shared = work.ties[0]
    both = a <= first and second < b
    return work.params[b] - work.params[a] - (shared if both else 0)


def test_the_optimum_trades_the_sum_against_the_slowest_stage():
    # Two optima of one graph: with one micro-batch the cheap cut, with many the even one.
    work = chain_work([1, 1, 1, 1], [100, 1000, 1000], backward_ratio=0)
    fleet = even_fleet([1, 1], bytes_per_s=1000)
    cuts = [exact(make_chains(work, fleet, [(0, 1)], micro_batches=m))[0] for m in (1, 2, 5, 100)]
    assert cuts == [(1,), (1,), (2,), (2,)]


def test_nearest_moves_a_boundary_no_further_than_memory_asks():
    work = chain_work([1] * 6, [1] * 5, leaf_bytes=[10] * 6)
    fleet = even_fleet([1, 1], memory_bytes=[20, 100])
    chains = make_chains(work, fleet, [(0, 1)], micro_batches=1, limits=Limits(copies=1))
    assert equal_number(chains) == (2,)
    assert nearest(chains, np.arange(7), [1]) == (1,)
    with pytest.raises(DoesNotFitError):
        nearest(make_chains(work, fleet, [(0, 1)], micro_batches=1), np.arange(7), [1])


def test_search_finds_what_all_orders_of_all_subsets_hold():
    from itertools import combinations, permutations

    for seed in range(3):
        work, fleet = draw_case(np.random.default_rng([7, seed]), 7, 4)

        def make(orders, work=work, fleet=fleet):
            return make_chains(work, fleet, orders, micro_batches=9)

        found = search(make, range(4), n_nodes=7)[0]
        wanted = min(
            brute_force(make([order]))[1]
            for size in range(1, 5)
            for chosen in combinations(range(4), size)
            for order in permutations(chosen)
        )
        assert found.seconds == pytest.approx(wanted, rel=2e-6)


def test_local_search_improves_a_bad_start():
    rng = np.random.default_rng(3)
    work, fleet = draw_case(rng, 24, 10)

    def make(orders):
        return make_chains(work, fleet, orders, micro_batches=20)

    start = exact(make([range(10)]))[1]
    found = search(make, range(10), n_nodes=24, rounds=15, batch=24)[0]
    assert found.seconds < 0.8 * start
    assert found == search(make, range(10), n_nodes=24, rounds=15, batch=24)[0]
    assert found.seconds == pytest.approx(exact(make([found.devices]))[1], rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), ratio=st.sampled_from([2.0, 16.0, 100.0]))
def test_partition_for_adatopk_never_loses_to_the_dense_one(seed, ratio):
    rng = np.random.default_rng(seed)
    work, fleet = draw_case(rng, 8, 3)
    dense = make_chains(work, fleet, [range(3)], micro_batches=12)
    wire = wire_of(work, codec="topk", ratio=ratio, adaptive=True)
    packed = make_chains(work, fleet, [range(3)], micro_batches=12, wire=wire)
    _, seconds = exact(packed)
    edges = [[0, *exact(dense)[0], 8]]
    assert seconds <= pipeline_s(packed, edges)[0] * (1 + 1e-9)
    assert pipeline_s(packed, edges)[0] <= pipeline_s(dense, edges)[0] * (1 + 1e-9)
    assert seconds >= brute_force(packed)[1] * (1 - 1e-8)


def test_more_stages_than_nodes_and_too_much_for_brute_force_are_refused():
    with pytest.raises(UserError, match="2 nodes and the plan 3 stages"):
        make_chains(chain_work([1, 1], [1]), even_fleet([1] * 3), [range(3)], micro_batches=1)
    many = make_chains(chain_work([1] * 60, [1] * 59), even_fleet([1] * 9), [range(9)],
                       micro_batches=1)  # fmt: skip
    with pytest.raises(UserError, match="brute force tries up to a million"):
        brute_force(many)
