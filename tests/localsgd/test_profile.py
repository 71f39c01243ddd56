"""What a profile predicts: jitter costs those who wait in every step; a run's own times rescale."""

import dataclasses

import numpy as np
import pytest

from jaxsys.core.cost import LinearCost
from jaxsys.localsgd import profiling
from jaxsys.localsgd.profile import Profile, Weather
from jaxsys.localsgd.strategy import presets
from jaxsys.localsgd.wire import Wire

LINK = LinearCost(0.01, 1e-3, 1.0, 0.0, 3)
STILL = Profile(("b", "a"), (40, 60), (0.1, 0.2), (0.3, 0.4), 0.5, LINK, 4, jitter_s=0.0)
SHAKY = Profile(("b", "a"), (40, 60), (0.1, 0.2), (0.3, 0.4), 0.5, LINK, 4, jitter_s=0.3)


@pytest.mark.parametrize("name", presets(2))
def test_jitter_costs_those_who_wait_in_every_step(name):
    strategy = presets(2)[name]
    more_s = SHAKY.plan(strategy).compute_s - STILL.plan(strategy).compute_s
    always = {"ssgd", "wfbp", "equal", "dreamddp", "dreamddp-nofill", "best"}
    assert more_s == pytest.approx(0.3 if name in always else 0.0)


def test_a_run_that_met_what_was_measured_predicts_the_same():
    whole_s = SHAKY.message_s(100)
    same = SHAKY.rescaled(Weather(1.5, whole_s, 0.3))
    twice = SHAKY.rescaled(Weather(3.0, 2 * whole_s, 0.6))
    for strategy in presets(2).values():
        plan = SHAKY.plan(strategy)
        assert same.plan(strategy).predicted_s == pytest.approx(plan.predicted_s)
        assert twice.plan(strategy, plan.phases).predicted_s == pytest.approx(2 * plan.predicted_s)


def test_what_hides_behind_compute_slows_it_by_its_share():
    shared = dataclasses.replace(STILL, sharing=0.5)
    for strategy in presets(2).values():
        alone, plan = STILL.plan(strategy), shared.plan(strategy)
        assert (plan.phases, plan.wait_s) == (alone.phases, alone.wait_s)
        hidden_s = (sum(plan.comm_s) - sum(plan.wait_s)) / 2 if len(plan.phases) == 2 else None
        if hidden_s is not None:
            assert plan.predicted_s == pytest.approx(alone.predicted_s + 0.5 * hidden_s)


def test_it_survives_its_json():
    assert Profile.from_json(SHAKY.to_json()) == SHAKY


class _Wire(Wire):
    workers = 4

    def __init__(self) -> None:
        pass


def test_a_link_that_explains_nothing_is_said_so_and_its_median_rate_used(monkeypatch):
    noise = iter(np.random.default_rng(0).uniform(0.01, 1.0, 1000))
    monkeypatch.setattr(profiling, "_exchange_s", lambda *_: float(next(noise)))
    link, points, reason = profiling.measure_link(_Wire(), 1000, 100_000)
    assert "explains the times poorly" in reason
    assert link.alpha_s == 0
    assert link.beta_s_per_unit == pytest.approx(np.median([s / b for b, s in points]))


def test_a_line_is_found_and_no_reason_given(monkeypatch):
    monkeypatch.setattr(profiling, "_exchange_s", lambda wire, n, first: 0.002 + 1e-7 * n)
    link, points, reason = profiling.measure_link(_Wire(), 1000, 10_000_000)
    assert reason == ""
    assert link.alpha_s == pytest.approx(0.002, rel=1e-3)
    assert all(link(b) == pytest.approx(s, rel=1e-3) for b, s in points)
