"""Simulated runs: never below the bound or a stream's work, and as predicted where that is sure."""

import sys
from functools import lru_cache
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parent))

from offload_shapes import machine

from jaxsys.core.errors import UserError
from jaxsys.models.lm.config import LMConfig
from jaxsys.offload.bound import layer_bound_s, pass_bound_s
from jaxsys.offload.partition import Whole
from jaxsys.offload.parts import cache_bytes, parts_of
from jaxsys.offload.passes import Strategy
from jaxsys.offload.plan import make_plan
from jaxsys.offload.predict import predict
from jaxsys.offload.simulate import STRATEGIES, simulate_run
from jaxsys.offload.traces import Trace, synthetic_trace
from jaxsys.offload.types import Machine, Processor

CONFIG = LMConfig("mixtral", 64, 64, 3, 4, 2, 16, 256, 64, experts=4, experts_per_token=2,
                  expert_width=256)  # fmt: skip
PARTS = parts_of(CONFIG)
TOTAL = sum(part.n_bytes for part in PARTS)


@lru_cache
def drawn(number):
    """One of a few machines with all ratios of rates; slow ones, for the parts are small."""
    rng = np.random.default_rng(number)
    hbm, link, cpu, dram = rng.lognormal(-4, 1.5, 4).tolist()
    late = (0.0, 1e-4)[number % 2]
    return machine(hbm, link, cpu, max(cpu, dram), link_latency_s=late, cpu_flops_s=1e9)


@lru_cache
def planned(device, share, cut=False):
    return make_plan(PARTS, device, share * TOTAL, cut_experts=cut, column_step=32,
                     cache_bytes=cache_bytes(CONFIG, 32))  # fmt: skip


numbers = st.integers(0, 5)


@settings(max_examples=25, deadline=None)
@given(
    numbers, st.sampled_from([0.3, 0.8]), st.sampled_from([None, *STRATEGIES]),
    st.sampled_from([1, 3]), st.integers(0, 5), st.booleans(),
)  # fmt: skip
def test_no_run_is_below_the_bound_or_its_busiest_stream(number, share, strategy, chunk, seed, cut):
    device, cut = drawn(number), cut and strategy is None
    trace = synthetic_trace(6, 3, 4, 2, sequence_tokens=4, seed=seed)
    plan = planned(device, share, cut)
    run = simulate_run(plan, device, trace, strategy, chunk=chunk)
    assert (run.pass_s >= run.bound_s * (1 - 1e-7)).all()
    assert run.pass_s.sum() >= max(run.terms) * (1 - 1e-9)
    # Streams that never wait for one another would take the sum at most.
    assert run.pass_s.sum() <= sum(run.terms) * (1 + 1e-9) + 1e-12
    assert run.tokens == 6
    assert 0 <= run.hits <= run.uses
    assert run.uses == sum(
        len(np.unique(trace.experts[b : b + chunk, layer]))
        for b in range(0, 6, chunk)
        for layer in range(3)
    )
    if strategy is not None and not strategy.overlap:
        busy = run.terms.cpu_s + run.terms.link_s + run.terms.accelerator_s
        assert run.pass_s.sum() == pytest.approx(busy)


@settings(max_examples=6, deadline=None)
@given(numbers, st.integers(0, 9))
def test_everything_resident_takes_what_is_predicted(number, seed):
    device = drawn(number)
    plan = planned(device, 2.0)
    trace = synthetic_trace(3, 3, 4, 2, seed=seed)
    if sum(plan.resident) < sum(max(part.columns, 1) for part in PARTS):
        return  # this machine's CPU is the faster one
    run = simulate_run(plan, device, trace)
    assert run.hit_rate == 1
    assert run.copied_bytes == 0
    assert run.pass_s == pytest.approx([predict(plan, device)[0]] * 3)


@settings(max_examples=6, deadline=None)
@given(numbers, st.integers(0, 9))
def test_cut_alike_every_token_takes_what_is_predicted(number, seed):
    """Where all experts are cut the same way, which of them a token visits makes no difference."""
    device = drawn(number)
    plan = planned(device, 0.5, cut=True)
    alike = {(plan.resident[i], plan.stream[i]) for i, p in enumerate(PARTS) if p.kind == "expert"}
    run = simulate_run(plan, device, synthetic_trace(3, 3, 4, 2, seed=seed))
    if len(alike) == 1:
        assert run.pass_s == pytest.approx([predict(plan, device)[0]] * 3, rel=0.02)


def test_looking_ahead_finds_what_the_trace_foretells():
    """A slow CPU, a link as fast as a layer is long, and early looks that are always right."""
    device = Machine(
        Processor(1e6, 1e12, 1e9), Processor(2e7, 1e12, 1e9), link_bytes_per_s=5e6,
        dram_bytes_per_s=1e9,
    )  # fmt: skip
    plan = planned(device, 0.6)
    trace = synthetic_trace(24, 3, 4, 2, zipf=0, topic=0, locality=0, early_accuracy=1.0, seed=2)
    named = {strategy.name: strategy for strategy in STRATEGIES}
    early, plain = named["ours, early router"], named["ours, whole experts"]
    runs = {s.name: simulate_run(plan, device, trace, s) for s in (early, plain)}
    assert runs[early.name].hit_rate > runs[plain.name].hit_rate
    assert runs[early.name].tokens_per_s > runs[plain.name].tokens_per_s


def test_a_look_ahead_is_bounded_by_the_whole_pass():
    modules = [(Whole(4.0, 12.0, 1.0, 0.5), 0.25)] * 2
    apart = pass_bound_s([1.0, 2.0], [modules, modules])
    assert apart == pytest.approx(3.0 + 2 * layer_bound_s(modules))
    assert pass_bound_s([1.0, 2.0], [modules, modules], lookahead=True) < apart
    assert pass_bound_s([1.0, 2.0], [[], []]) == 3.0
    with pytest.raises(UserError, match="one per layer"):
        pass_bound_s([1.0], [])


def test_what_cannot_be_is_refused():
    device = machine(9, 9, 9, 9)
    plan, trace = planned(device, 0.5), synthetic_trace(3, 3, 4, 2)
    with pytest.raises(UserError, match="use `predict` for a CPU alone"):
        simulate_run(plan, Machine(Processor(1, 1, 1)), trace)
    with pytest.raises(UserError, match="trace of this model"):
        simulate_run(plan, device, synthetic_trace(3, 2, 4, 2))
    empty = Trace(np.zeros((0, 3, 2), int), np.zeros(0, int), 4)
    with pytest.raises(UserError, match="expected both"):
        simulate_run(plan, device, empty, Strategy("ours"))
