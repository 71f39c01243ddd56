"""Plans against every assignment of whole parts, and what every plan must keep to."""

import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parent))

from offload_shapes import LLAMA, MIXTRAL, machine

from jaxsys.core.errors import UserError
from jaxsys.models.lm.config import LMConfig
from jaxsys.offload.parts import cache_bytes, parts_of, workspace_bytes
from jaxsys.offload.plan import describe, make_plan
from jaxsys.offload.predict import predict, predicted_prefill_s
from jaxsys.offload.types import Machine, Part, Plan, Processor

SMALL = LMConfig("mixtral", 64, 16, 1, 4, 2, 4, 24, 64, experts=3, experts_per_token=2,
                 expert_width=24)  # fmt: skip
rate = st.floats(1.0, 100.0)
# Not machines: type checks draw from `random`, which hypothesis does not allow while it draws.
rates_of = st.tuples(rate, rate, rate, rate)


def made(rates):
    hbm, link, cpu, dram = rates
    return machine(hbm, link, cpu, max(cpu, dram))


def everywhere(sizes, rates, budget, buffer):
    """The least time of all 3^P ways to place whole blocks: kept, copied over, computed."""
    hbm, link, cpu, dram = (r * 1e9 for r in rates)
    seconds = [
        {"g": n / hbm, "p": max(n / link, n / dram, n / hbm), "c": n / min(cpu, dram)}
        for n in sizes
    ]
    best = float("inf")
    for ways in product("gpc", repeat=len(sizes)):
        here = sum(n for n, way in zip(sizes, ways, strict=True) if way == "g")
        if here + buffer * ("p" in ways) <= budget:
            best = min(best, sum(s[way] for s, way in zip(seconds, ways, strict=True)))
    return best


@pytest.mark.parametrize(
    ("rates", "kept"),
    [
        ((90.0, 5.0, 10.0, 20.0), 3),
        ((90.0, 30.0, 10.0, 80.0), 0),
        ((90.0, 30.0, 10.0, 80.0), 3),
        ((20.0, 15.0, 10.0, 12.0), 1),
        ((20.0, 15.0, 10.0, 12.0), 8),
    ],
)
def test_no_placement_of_eight_blocks_beats_the_plan(rates, kept):
    """All 3^8 of them; blocks of unequal size, which the plan may cut and the search may not."""
    device = machine(*rates)
    sizes = [(8 + i % 3) * 10**7 for i in range(8)]
    parts = [Part(0, "mlp", n, 1e6, 1024) for n in sizes]
    buffer = 2 * max(sizes)
    budget = buffer + kept * max(sizes)
    found = make_plan(parts, device, budget, prompt_tokens=0)
    best = everywhere(sizes, rates, budget, buffer)
    assert found.predicted_s <= best * (1 + 1e-9)


@pytest.mark.parametrize(("link", "kept"), [(2.0, 2), (40.0, 5)])
def test_residency_of_eight_experts_is_the_best_of_all(link, kept):
    """Whole experts of unequal use: keeping the most frequent ones is best, by 3^8 placements."""
    device = machine(90.0, link, 10.0, 50.0)
    often = (0.5, 0.1, 0.3, 0.05, 0.45, 0.25, 0.15, 0.2)
    parts = [Part(0, "expert", 10**8, 1e6, 1024, e, f) for e, f in enumerate(often)]
    budget = (kept + 2) * 10**8
    found = make_plan(parts, device, budget, prompt_tokens=0, cut_experts=False)
    kept_best = {often[e] for e in range(8) if found.resident[e]}
    assert kept_best == set(sorted(often, reverse=True)[: len(kept_best)])
    # With the same buffers, so that copies decided about at run time are open to both.
    shapes = [
        Plan(tuple(parts), tuple(1024 * x for x in here), (0,) * 8, ("accelerator",),
             buffer_bytes=found.buffer_bytes)
        for here in product((0, 1), repeat=8)
        if sum(here) * 10**8 + found.buffer_bytes <= budget
    ]  # fmt: skip
    best = min(predict(plan, device)[0] for plan in shapes)
    assert found.predicted_s <= best * (1 + 1e-9)


@settings(max_examples=8, deadline=None)
@given(rates_of, st.floats(0.0, 1.3), st.sampled_from([None, True, False]), st.booleans())
def test_every_plan_keeps_to_its_budget_and_beats_the_cpu_alone(rates, share, cut, prompt):
    device = made(rates)
    parts = parts_of(SMALL)
    kept, room = cache_bytes(SMALL, 32), workspace_bytes(SMALL, 8, 32)
    budget = room + share * sum(part.n_bytes for part in parts)
    options = {"cache_bytes": kept, "workspace_bytes": room, "cut_experts": cut, "column_step": 4}
    plan = make_plan(parts, device, budget, **options, prompt_tokens=64 * prompt)
    assert plan.accelerator_bytes <= plan.budget_bytes == int(budget)
    for i, part in enumerate(parts):
        assert min(plan.resident[i], plan.stream[i], plan.on_cpu(i)) >= 0
        if part.kind == "attention":
            assert (plan.cache_on[part.layer] == "accelerator") == bool(plan.resident[i])
        if part.kind == "expert" and cut is False:
            assert plan.resident[i] in (0, part.columns)
            assert plan.stream[i] == 0
    alone = make_plan(parts, device, 0, cache_bytes=kept)
    assert not any(alone.resident)
    assert not any(alone.stream)

    def judged(found):
        more = predicted_prefill_s(found, device, 64) if prompt else 0.0
        return more + 128 * found.predicted_s

    assert judged(plan) <= judged(alone) * (1 + 1e-9)
    # The limit adds what is resident to the misses; a run may overlap them, so it may be nearer.
    assert plan.limit_s > 0
    assert Plan.from_json(plan.to_json()) == plan
    assert describe(plan, device).count("\n") > 6


@settings(max_examples=3, deadline=None)
@given(rates_of)
def test_more_memory_slows_no_plan(rates):
    """But for the steps of three whole experts: a fill in order is not a search over all fills."""
    device = made(rates)
    parts = parts_of(SMALL)
    total = sum(part.n_bytes for part in parts)
    times = [
        make_plan(parts, device, share * total, prompt_tokens=0, column_step=4).predicted_s
        for share in (0.0, 0.4, 1.5)
    ]
    assert all(b <= 1.1 * a for a, b in pairwise(times))


def test_plans_of_published_shapes():
    device = machine(900, 25, 55, 65)
    for config, share in ((MIXTRAL, 0.25), (LLAMA, 0.5)):
        config = replace(config, layers=4)
        parts = parts_of(config, weight_bytes=2)
        kept = cache_bytes(config, 2048, number_bytes=2)
        budget = share * sum(part.n_bytes for part in parts)
        plan = make_plan(parts, device, budget, cache_bytes=kept)
        assert 0.95 * budget < plan.accelerator_bytes <= budget
        assert plan.cache_on == ("accelerator",) * config.layers
        # Not below what nothing can beat.
        assert plan.predicted_s > 0.5 * plan.limit_s
        alone = make_plan(parts, replace(device, accelerator=None), budget)
        assert plan.predicted_s < alone.predicted_s


def test_a_budget_below_the_workspace_is_refused_by_how_much():
    parts, device = parts_of(SMALL), machine(9, 9, 9, 9)
    with pytest.raises(UserError, match=r"needs 500, 200 more; raise the budget"):
        make_plan(parts, device, 300, workspace_bytes=500)
    with pytest.raises(UserError, match=r"needs 600 bytes .* 100 too few"):
        Plan((Part(0, "mlp", 600, 1.0, 8),), (8,), (0,), ("cpu",), budget_bytes=500)
    # Without an accelerator a budget is not asked for.
    alone = make_plan(parts, Machine(Processor(1.0, 1.0, 1.0)), 0)
    assert alone.accelerator_bytes == 0
