"""Orders of actions: complete, without circles, in flight as said, as long as closed forms say."""

import itertools

import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.pipeline.estimate import Costs, Message
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.schedule import ORDERS, actions, in_flight
from jaxsys.pipeline.timing import closed_form_s, loads, lower_bound_s, predict, shared_links

CASES = [
    (order, p, m, chunks)
    for order in ORDERS
    for p, m in itertools.product((1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 7, 8, 11, 13))
    for chunks in ((1, 2, 3) if order == "interleaved" else (1,))
]


def unit_plan(order, p, m, chunks, link_s=0.0):
    s = p * chunks
    plan = Plan(s, tuple(range(1, s)), tuple(range(p)) * chunks, order=order, micro_batches=m)
    messages = tuple(Message(i, i + 1, 1, 1, link_s, link_s) for i in range(s - 1) if p > 1)
    return plan, Costs((1.0,) * s, (2.0,) * s, messages, plan.devices)


def test_every_order_is_complete_and_never_waits_in_a_circle():
    for order, p, m, chunks in CASES:
        plan, costs = unit_plan(order, p, m, chunks, link_s=0.3)
        for worker in range(p):
            ran = actions(order, worker, p, m, chunks)
            kinds = 3 if order == "zero-bubble" else 2
            assert len(set(ran)) == len(ran) == kinds * m * chunks
            assert {a.stage % p for a in ran} == {worker}
            place = {a: k for k, a in enumerate(ran)}
            for action in ran:
                if action.kind != "forward":
                    before = "forward" if action.kind == "backward" else "backward"
                    assert place[action._replace(kind=before)] < place[action]
        assert predict(plan, costs).makespan_s > 0  # simulate refuses circles


def test_in_flight_counts_what_the_actions_hold():
    for order, p, m, chunks in CASES:
        for worker in range(p):
            last = "weight" if order == "zero-bubble" else "backward"
            held, most = 0, 0
            for action in actions(order, worker, p, m, chunks):
                held += (action.kind == "forward") - (action.kind == last)
                most = max(most, held)
            assert sum(in_flight(order, worker, p, m, chunks)) == most or (
                order == "zero-bubble" and most <= in_flight(order, worker, p, m)[0]
            ), (order, p, m, chunks, worker)


def test_unit_pipelines_take_their_textbook_time():
    for p, m in itertools.product((1, 2, 3, 4), (4, 8, 12)):
        for order in ("gpipe", "1f1b", "eager-1f1b"):
            plan, costs = unit_plan(order, p, m, 1)
            assert predict(plan, costs).makespan_s == pytest.approx((m + p - 1) * 3)
            assert closed_form_s(plan, costs) == pytest.approx((m + p - 1) * 3)
        # Interleaved: the bubble shrinks by the number of chunks (2104.04473, section 2.2).
        if m % p == 0 and p > 1:
            plan, costs = unit_plan("interleaved", p, m, 2)
            assert predict(plan, costs).makespan_s == pytest.approx(2 * m * 3 + (p - 1) * 3)
        # ZB-H1: forward, input part and weight part alike leave a third of 1F1B's bubble.
        if m >= 2 * p:
            plan, costs = unit_plan("zero-bubble", p, m, 1)
            assert predict(plan, costs).makespan_s == pytest.approx(3 * m + (p - 1))


def test_slow_links_stall_1f1b_but_not_gpipe_or_eager_1f1b():
    found = {}
    for order in ("gpipe", "1f1b", "eager-1f1b"):
        plan, costs = unit_plan(order, 4, 24, 1, link_s=1.0)
        found[order] = predict(plan, costs).makespan_s
        assert found[order] >= max(loads(plan, costs)[0]) * 24
    assert found["gpipe"] == pytest.approx(closed_form_s(plan, costs))
    assert found["eager-1f1b"] == pytest.approx(found["gpipe"], rel=0.03)
    assert found["1f1b"] > 1.35 * found["gpipe"]


def test_predictions_stay_above_the_lower_bound():
    from jaxsys.pipeline.fleets import even_fleet

    rng = np.random.default_rng(0)
    for order, p, m, chunks in CASES[::7]:
        plan, _ = unit_plan(order, p, m, chunks)
        s, speeds = p * chunks, rng.uniform(1, 5, p)
        forward = rng.uniform(0.1, 1, s)
        messages = tuple(
            Message(i, i + 1, 1, 1, *rng.uniform(0, 2, 2).tolist()) for i in range(s - 1) if p > 1
        )
        costs = Costs(tuple(forward.tolist()), tuple((2 * forward).tolist()), messages,
                      plan.devices)  # fmt: skip
        bound = lower_bound_s(plan, costs, even_fleet(speeds.tolist()))
        assert predict(plan, costs).makespan_s >= bound * (1 - 1e-12)
        assert closed_form_s(plan, costs) >= bound * (1 - 1e-12)


def test_messages_between_sites_queue_on_one_link():
    from jaxsys.pipeline.devices import Device, Fleet

    # Devices 0 and 2 stand left, 1 and 3 right: to the right go the activations of the first and
    # third boundary and the cotangents of the second.
    plan, costs = unit_plan("gpipe", 4, 6, 1, link_s=5.0)
    devices = tuple(Device(f"d{i}", 1, 1) for i in range(4))
    apart = Fleet(devices, np.zeros((4, 4)), np.ones((4, 4)))
    joined = Fleet(devices, np.zeros((4, 4)), np.ones((4, 4)), sites=(0, 1, 0, 1))
    assert set(shared_links(plan, joined).values()) == {"site 0 → site 1", "site 1 → site 0"}
    slow, fast = (predict(plan, costs, fleet).makespan_s for fleet in (joined, apart))
    assert slow > 1.3 * fast
    assert slow >= max(loads(plan, costs, joined)[1].values()) * 6
    links = shared_links(plan, joined)
    right = "site 0 → site 1"
    spans = [s for s in predict(plan, costs, joined).spans if links.get(s.stream) == right]
    assert len(spans) == 3 * 6
    first_s = min(span.start_s for span in spans)
    for now_s in [span.end_s for span in spans]:  # no more has passed than the link's rate lets
        passed = [span for span in spans if span.end_s <= now_s]
        assert 5.0 * len(passed) <= now_s - first_s + 1e-9


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("2f2b", 0, 2, 2), "must be one of gpipe"),
        (("gpipe", 2, 2, 2), "worker is 2 of 2"),
        (("gpipe", 0, 2, 0), "needs at least 1"),
        (("1f1b", 0, 2, 2, 2), "only 'interleaved'"),
    ],
)
def test_impossible_orders_are_refused(given, match):
    for function in (actions, in_flight):
        with pytest.raises(UserError, match=match):
            function(*given)
