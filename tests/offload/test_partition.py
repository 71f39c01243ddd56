"""Column splits against a grid, against bisection and against a linear programme."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import linprog

from jaxsys.offload.partition import Whole, brute_force, split, split_layer, terms_of, whole
from jaxsys.offload.types import Machine, Part, Processor

seconds = st.floats(0.01, 10.0)
launch = st.sampled_from([0.0, 0.01, 0.5])
modules = st.builds(Whole, seconds, seconds, seconds, st.floats(0.0, 5.0), launch, launch, launch)
shares = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@settings(max_examples=60, deadline=None)
@given(modules, shares)
def test_the_closed_form_is_never_beaten_on_a_grid(module, resident):
    found = split(module, resident)
    assert found.cpu + found.stream + resident == pytest.approx(1.0)
    _, best = brute_force([module], [resident], steps=100)
    assert found.predicted_s <= best + 1e-9
    # Nor is it below what the grid can come near to.
    slope = max(module.cpu_s, module.link_s, module.accelerator_s) / 100
    assert found.predicted_s >= best - slope - 1e-9


@settings(max_examples=60, deadline=None)
@given(modules, shares)
def test_bisection_finds_the_closed_form(module, resident):
    plain = module._replace(cpu_launch_s=0.0, link_launch_s=0.0, accelerator_launch_s=0.0)
    splits, terms = split_layer([plain], [resident])
    assert max(terms) == pytest.approx(split(plain, resident).predicted_s, rel=1e-6, abs=1e-9)
    assert splits[0].cpu + splits[0].stream + resident == pytest.approx(1.0)


def programme_s(layer, resident) -> float:
    """The least maximum of the four terms by a linear programme in x_c and T."""
    n = len(layer)
    rows, right = [], []
    for sign, name in ((1, "cpu_s"), (-1, "link_s"), (-1, "accelerator_s")):
        rows.append([sign * getattr(w, name) for w in layer] + [-1.0])
        cold = [1.0 if name == "accelerator_s" else 1.0 - g for g in resident]
        full = sum(c * getattr(w, name) for c, w in zip(cold, layer, strict=True))
        right.append(0.0 if sign > 0 else -full)
    bounds = [(0.0, 1.0 - g) for g in resident] + [(0.0, None)]
    found = linprog([0.0] * n + [1.0], A_ub=np.array(rows), b_ub=right, bounds=bounds)
    dram = sum((1.0 - g) * w.dram_s for w, g in zip(layer, resident, strict=True))
    return max(found.fun, dram)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), shares), min_size=1, max_size=6), seconds, seconds)
def test_bisection_equals_a_linear_programme_where_ratios_agree(sizes, cpu, link):
    # Modules of different size on one machine: all ratios of CPU to link are the same.
    layer = [Whole(n * cpu, n * link, 0.05 * n * link, 0.02 * n * cpu) for n, _ in sizes]
    resident = [g for _, g in sizes]
    _, terms = split_layer(layer, resident)
    assert max(terms) == pytest.approx(programme_s(layer, resident), rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(seconds, seconds, shares), min_size=2, max_size=2))
def test_bisection_is_never_beaten_on_a_grid_when_the_accelerator_is_fast(given_layer):
    layer = [Whole(c, p, 1e-3 * p) for c, p, _ in given_layer]
    resident = [g for *_, g in given_layer]
    _, terms = split_layer(layer, resident)
    _, best = brute_force(layer, resident, steps=12)
    assert max(terms) <= best * (1 + 1e-6) + 1e-9


def test_a_memory_that_feeds_only_the_cpu_leaves_nothing_to_gain():
    module = Whole(4.0, 4.0, 0.1, dram_s=4.0)
    assert split(module).predicted_s == 4.0
    assert split(module._replace(dram_s=0.0)).predicted_s == 2.0


def test_launches_decide_whether_it_is_worth_it():
    small = Whole(1.0, 1.0, 0.1, link_launch_s=2.0)
    assert split(small)[:2] == (1.0, 0.0)
    assert split(small._replace(link_launch_s=0.1)).stream > 0.4


def test_a_slow_accelerator_gives_columns_back_to_the_cpu():
    # Copying is free; what is resident keeps the accelerator busy, so the CPU computes more.
    module = Whole(3.0, 0.1, 3.0)
    assert split(module).cpu == pytest.approx(0.5)
    assert terms_of([module], [0.5], [0.5], [0.0]).accelerator_s == 1.5


def test_whole_takes_rates_of_the_kind_and_the_roofline():
    machine = Machine(Processor(100.0, 50.0, 1e9), Processor(400.0, 1e4, 1e9), 25.0, 0.5)
    expert = Part(0, "expert", 200, 400.0, 8)
    assert whole(expert, machine)[:3] == (8.0, 8.0, 0.5)  # the CPU is bound by arithmetic
    assert whole(expert._replace(flops_per_token=50.0), machine).cpu_s == 2.0
    assert whole(expert, machine, 8).cpu_s == 64.0
    assert whole(expert, replace(machine, accelerator=None)).link_s == 0.0
