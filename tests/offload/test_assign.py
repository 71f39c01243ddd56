"""Assignments against all others, computed in another way, and against hand-made cases."""

from itertools import permutations, product

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jaxsys.core.errors import UserError
from jaxsys.offload.assign import ExpertCosts, assign, exact, expert_costs, makespan
from jaxsys.offload.bound import layer_bound_s
from jaxsys.offload.partition import Whole
from jaxsys.offload.rules import (
    FIDDLER,
    RELEASED,
    all_moved,
    by_tokens,
    fiddler,
    list_schedule,
    on_cpu,
)
from jaxsys.offload.types import Assignment, Machine, Part, Processor

seconds = st.floats(0.01, 10.0)
costs_of = st.builds(
    ExpertCosts, seconds, seconds, seconds, seconds, seconds, st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 0.5]),
)  # fmt: skip
layers = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=6)
RULES = (list_schedule, by_tokens, on_cpu, all_moved, fiddler, exact, assign)


def replay(places, order, counts, resident, costs) -> float:
    """Clock CPU, link and accelerator by hand; infinite where weights are missing."""
    clock = {"cpu": 0.0, "link": 0.0, "accelerator": 0.0}
    for e in order:
        n, where = counts[e], places[e]
        if where == "cpu":
            first = costs.cpu_first_s if clock["cpu"] == 0 else 0
            work = max(costs.cpu_floor_s, n * costs.cpu_token_s)
            clock["cpu"] += first + costs.cpu_launch_s + work
            continue
        if (where == "here") != resident[e]:
            return float("inf")
        if where == "moved":
            clock["link"] += costs.move_s
            clock["accelerator"] = max(clock["accelerator"], clock["link"])
        work = max(costs.accelerator_floor_s, n * costs.accelerator_token_s)
        clock["accelerator"] += costs.accelerator_launch_s + work
    return max(clock["cpu"], clock["accelerator"])


@pytest.mark.parametrize("seed", range(6))
def test_the_exact_search_equals_all_three_to_the_eighth(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 30, 8).tolist()
    resident = (rng.random(8) < 0.4).tolist()
    costs = ExpertCosts(*rng.lognormal(0, 1, 5).tolist(), 0.1, 0.1, 0.2)
    # Johnson's order for equal copies; that it is best is tested below with every order.
    order = sorted(range(8), key=lambda e: (not resident[e], -counts[e]))
    best = min(
        replay(places, order, counts, resident, costs)
        for places in product(("cpu", "here", "moved"), repeat=8)
    )
    assert exact(counts, resident, costs).predicted_s == pytest.approx(best, rel=1e-12)
    assert assign(counts, resident, costs).predicted_s == pytest.approx(best, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(layers.filter(lambda layer: len(layer) <= 4), costs_of)
def test_no_order_beats_the_one_that_is_searched(layer, costs):
    counts, resident = [n for n, _ in layer], [here for _, here in layer]
    best = min(
        replay(places, order, counts, resident, costs)
        for places in product(("cpu", "here", "moved"), repeat=len(layer))
        for order in permutations(range(len(layer)))
    )
    assert exact(counts, resident, costs).predicted_s == pytest.approx(best, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(layers, costs_of)
def test_every_rule_is_a_schedule_between_the_bound_and_its_prediction(layer, costs):
    counts, resident = [n for n, _ in layer], [here for _, here in layer]
    modules = [
        (
            Whole(
                max(costs.cpu_floor_s, costs.cpu_token_s * n),
                costs.move_s,
                max(costs.accelerator_floor_s, costs.accelerator_token_s * n),
            ),
            float(here),
        )
        for n, here in layer
    ]
    bound = layer_bound_s(modules)
    best = exact(counts, resident, costs).predicted_s
    assert best >= bound * (1 - 1e-7)
    for rule in RULES:
        found = rule(counts, resident, costs)
        taken = makespan(found, counts, resident, costs)
        assert taken >= best - 1e-9
        # Only Fiddler's prediction is without overlap.
        assert found.predicted_s >= taken - 1e-9
        if rule is not fiddler:
            assert found.predicted_s == pytest.approx(taken, rel=1e-9)
        assert sorted(found.order) == list(range(len(layer)))
        assert not any(m and here for m, here in zip(found.moved, resident, strict=True))


def test_the_list_scheduler_by_hand():
    # Two residents (9 and 2 tokens) and two misses (5 and 1): G takes the front, C the back.
    costs = ExpertCosts(0.0, 1.0, 3.0, 2.0, 0.0)
    found = list_schedule([5, 9, 1, 2], [False, True, False, True], costs)
    # Front: 9 (2 s) or back: 1 (1 s)? G + 2 > C + 1, so the CPU begins with the miss of 1 token;
    # then G takes 9 (2 ≤ 1 + 5) and 2 (4 ≤ 6); the last, 5 tokens, is copied: 3 - 4 < 0, 6 ≤ 6.
    assert found.order == (2, 1, 3, 0)
    assert found.device == ("accelerator", "accelerator", "cpu", "accelerator")
    assert found.moved == (True, False, False, False)
    assert found.predicted_s == 6.0


def test_released_constants_are_the_published_ones():
    assert [RELEASED[name].cpu_s(10) for name in ("deepseek", "mixtral", "qwen2")] == [10, 2, 8]
    assert {(c.cpu_first_s, c.accelerator_s(99), c.move_s) for c in RELEASED.values()} == {
        (0.79, 0.5, 0.418)
    }


def test_fiddler_minimises_the_sum_and_not_the_maximum():
    counts, resident = [9, 9, 9, 9], [False] * 4
    code = fiddler(counts, resident, FIDDLER)
    comment = fiddler(counts, resident, FIDDLER, "max")
    assert code.device == ("cpu",) * 4  # 63 < 70 each
    assert code.predicted_s == 252.0
    assert comment.device.count("cpu") == 2  # max(126, 140) beats 252
    assert comment.predicted_s == 266.0  # and yet, run one after another, it takes longer
    assert makespan(comment, counts, resident, FIDDLER) == 140.0
    # From 10 tokens on a copy is as fast.
    assert [fiddler([n], [False], FIDDLER).device[0] for n in (9, 10, 11)] == [
        "cpu", "accelerator", "accelerator"
    ]  # fmt: skip


def test_many_experts_are_assigned_near_the_bound():
    rng = np.random.default_rng(0)
    part = Part(0, "expert", 10**7, 2e7, 768)
    machine = Machine(Processor(5e10, 1e12, 1e9), Processor(9e11, 7e13, 1e9), 2.5e10)
    costs = expert_costs(part, machine)
    for _ in range(5):
        counts = (1 + rng.geometric(0.05, 64)).tolist()
        resident = (rng.random(64) < 0.3).tolist()
        found = assign(counts, resident, costs)
        modules = [
            (
                Whole(costs.cpu_s(n), costs.move_s, costs.accelerator_s(n)),
                float(here),
            )
            for n, here in zip(counts, resident, strict=True)
        ]
        assert found.predicted_s <= 1.1 * layer_bound_s(modules)
        assert found.predicted_s <= list_schedule(counts, resident, costs).predicted_s + 1e-12


@settings(max_examples=30, deadline=None)
@given(layers, costs_of)
def test_restrictions_are_kept_and_never_help(layer, costs):
    counts, resident = [n for n, _ in layer], [here for _, here in layer]
    free = assign(counts, resident, costs)
    for keep, move in product((True, False), repeat=2):
        found = assign(counts, resident, costs, keep=keep, move=move)
        assert found.predicted_s >= free.predicted_s - 1e-12
        assert move or not any(found.moved)
        on_the_cpu = [here for here, d in zip(resident, found.device, strict=True) if d == "cpu"]
        assert not (keep and any(on_the_cpu))


def test_what_cannot_be_is_refused():
    costs = ExpertCosts(1.0, 0.1, 1.0, 0.1, 0.0)
    with pytest.raises(UserError, match="at least one token"):
        assign([1, 0], [True, False], costs)
    with pytest.raises(UserError, match="at most 16"):
        exact([1] * 17, [False] * 17, costs)
    with pytest.raises(UserError, match="neither resident nor moved"):
        makespan(Assignment(("accelerator",), (0,), (False,)), [1], [False], costs)
    with pytest.raises(UserError, match="each expert once"):
        makespan(Assignment(("cpu", "cpu"), (0, 0), (False, False)), [1, 1], [False] * 2, costs)
    with pytest.raises(UserError, match="no accelerator"):
        expert_costs(Part(0, "expert", 1, 1.0), Machine(Processor(1, 1, 1)))
