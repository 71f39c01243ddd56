"""Plans from end to end: methods, codecs, ratios, memory, bad fleets, real graphs."""

import dataclasses
import json
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.graph import dag
from jaxsys.core.timeline import simulate
from jaxsys.pipeline.adatopk import adaptive_ratios
from jaxsys.pipeline.codec import encoded_bytes
from jaxsys.pipeline.devices import Device, Fleet
from jaxsys.pipeline.estimate import Overheads, costs_of, fit_speed, traffic
from jaxsys.pipeline.fence import chain_order, communities
from jaxsys.pipeline.fleets import even_fleet, internet_fleet, paper_fleet
from jaxsys.pipeline.memory import Limits
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.planner import METHODS, make_plan
from jaxsys.pipeline.schedule import ORDERS
from jaxsys.pipeline.timing import closed_form_s, lower_bound_s, predict, predict_s, tasks
from jaxsys.pipeline.work import chain_work, work_of


@pytest.fixture(scope="module")
def deep():
    """A chain of unequal nodes on two sites joined by slow links, listed in turn."""
    rng = np.random.default_rng(0)
    n = 24
    work = chain_work(
        rng.uniform(1, 4, n) * 2e7, rng.integers(1, 6, n - 1) * 40_000, leaf_bytes=[1000] * n
    )
    site = np.arange(6) % 2
    rate = np.where(site[:, None] == site, 1e8, 2e6)
    speeds = [1e10, 4e10, 2e10, 1e10, 3e10, 2e10]
    devices = tuple(Device(f"d{i}", s, 1e9) for i, s in enumerate(speeds))
    return work, Fleet(devices, np.full((6, 6), 1e-4), rate)


def test_methods_rank_as_they_must(deep):
    pytest.importorskip("networkx", reason="needs the extra pipeline")
    work, fleet = deep
    plans = {m: make_plan(work, fleet, micro_batches=16, method=m) for m in METHODS}
    closed = {}
    for method, plan in plans.items():
        costs = costs_of(work, fleet, plan)
        closed[method] = closed_form_s(plan, costs, fleet)
        bound = lower_bound_s(plan, costs, fleet)
        assert plan.predicted_s == predict(plan, costs, fleet).makespan_s >= bound
        assert plan.predicted_s >= 16 * work.total[-1] / fleet.speed_flops_s.sum()
        assert Plan.from_json(plan.to_json()) == plan
        assert hash(plan) == hash(Plan.from_json(plan.to_json()))
    assert plans["exact"].devices == plans["op-fence"].devices
    assert closed["exact"] <= closed["op-fence"] * (1 + 1e-8)
    assert plans["search"].predicted_s <= plans["exact"].predicted_s
    assert plans["search"].predicted_s <= plans["op-fence"].predicted_s
    assert plans["equal-number"].predicted_s > 1.3 * plans["exact"].predicted_s
    site = [d % 2 for d in plans["op-fence"].devices]
    assert sum(a != b for a, b in pairwise(site)) == 1


def test_every_order_can_be_planned_and_auto_takes_the_fastest(deep):
    work, fleet = deep
    given = {"micro_batches": 12, "method": "exact", "devices": (0, 2, 4, 5, 3, 1)}
    plans = [
        make_plan(work, fleet, order=order, **given) for order in ORDERS if order != "interleaved"
    ]
    best = make_plan(work, fleet, order="auto", **given)
    assert best.predicted_s == min(plan.predicted_s for plan in plans)
    turns = make_plan(work, fleet, order="interleaved", chunks=2, **given)
    assert (turns.n_stages, turns.n_workers, turns.chunks) == (12, 6, 2)
    assert max(plan.memory_bytes[0] for plan in plans) == plans[0].memory_bytes[0]  # GPipe


def test_adaptive_ratios_even_out_the_links_and_r_1_is_dense(deep):
    work, fast = deep
    fleet = dataclasses.replace(fast, bytes_per_s=fast.bytes_per_s / 20)
    given = {"micro_batches": 16, "method": "exact", "devices": (0, 2, 4, 5, 3, 1)}
    dense = make_plan(work, fleet, **given)
    exact = make_plan(work, fleet, codec="topk", ratio=1.0, **given)
    assert set(exact.ratios_forward + exact.ratios_backward) == {1.0}
    assert costs_of(work, fleet, exact).messages == costs_of(work, fleet, dense).messages
    packed = make_plan(work, fleet, codec="topk", ratio=50.0, **given)
    assert packed.predicted_s < 0.5 * dense.predicted_s
    slow = {m.source: m.forward_s for m in costs_of(work, fleet, packed).messages}
    plain = dataclasses.replace(packed, ratios_forward=(), ratios_backward=())
    before = {m.source: m.forward_s for m in costs_of(work, fleet, plain).messages}
    slowest = max(before, key=before.__getitem__)
    assert slow[slowest] - 1e-4 == pytest.approx((before[slowest] - 1e-4) / 50, rel=0.02)
    assert max(slow.values()) < 1.3 * (before[slowest] / 50 + 1e-4)
    uniform = make_plan(work, fleet, codec="topk", ratio=50.0, adaptive=False, **given)
    assert set(uniform.ratios_forward) == {50.0}


@pytest.mark.parametrize("r", [2.0, 5.0, 40.0, 3000.0])
def test_the_slowest_message_takes_its_share_of_the_bytes_exactly(r):
    work = chain_work([1, 1, 1], [400_000, 4_000])
    fleet = even_fleet([1, 1, 1], bytes_per_s=1e5)
    ratios = adaptive_ratios(work, fleet, (1, 2), (0, 1, 2), r)
    n_bytes = encoded_bytes((100_000,), "float32", ratios[0], "topk")
    assert n_bytes <= 400_000 / r + 8
    # One more kept element would not fit any more.
    more = encoded_bytes((100_000,), "float32", 100_000 / (100_000 // ratios[0] + 2), "topk")
    assert more > 400_000 / r - 16
    with pytest.raises(UserError, match=r"ratio is 0\.5"):
        adaptive_ratios(work, fleet, (1, 2), (0, 1, 2), 0.5)


def test_a_boundary_goes_dense_where_coding_takes_longer_than_its_link_saves():
    """Two equal values, links of which one is twice as fast, and 1 ms of coding for a message."""
    work = chain_work([1, 1, 1], [400_000, 400_000])
    rates = np.full((3, 3), 1e9)
    rates[0, 1] = rates[1, 0] = 5e8
    fleet = Fleet(tuple(Device(f"w{p}", 1e3, 1e9) for p in range(3)), np.zeros((3, 3)), rates)
    beside = Overheads(1e3, encode_s_per_byte=2.5e-9)
    free = adaptive_ratios(work, fleet, (1, 2), (0, 1, 2), 4.0)
    assert min(free) > 1.9
    for faster, dense in ((1, (True, True)), (0.3, (False, True)), (0.02, (False, False))):
        links = dataclasses.replace(fleet, bytes_per_s=rates * faster)
        found = adaptive_ratios(work, links, (1, 2), (0, 1, 2), 4.0, overheads=beside)
        assert tuple(ratio == 1.0 for ratio in found) == dense
        assert all(a in (1.0, b) for a, b in zip(found, free, strict=True))
        plans = [
            make_plan(work, links, micro_batches=4, method="exact", devices=(0, 1, 2),
                      codec="topk", ratio=4.0, overheads=given)
            for given in (beside, Overheads())
        ]  # fmt: skip
        always = costs_of(work, links, plans[1], overheads=beside)
        assert plans[0].predicted_s <= predict_s(plans[1], always, links) * (1 + 1e-9)


def test_a_real_graph_with_a_tied_leaf_and_skips():
    def loss(params, x):
        h = jnp.tanh(x @ params["a"])
        for name in "bcd":
            h = h + jnp.tanh(h @ params[name])
        return jnp.mean((h @ params["a"].T - x) ** 2)

    params = {name: jnp.zeros((16, 16)) for name in "abcd"}
    graph = dag(loss, params, jnp.zeros((4, 16)))
    work = work_of(graph)
    fleet = even_fleet([1e6, 2e6, 1e6], bytes_per_s=1e6)
    plan = make_plan(work, fleet, micro_batches=4, method="exact", devices=(0, 1, 2))
    # Every value that crosses is sent once to each stage that reads it.
    passed = traffic(work, plan.boundaries)
    assert {s for s, _ in passed} <= {0, 1}
    assert all(s < t for s, t in passed)
    assert plan.memory_bytes[0] >= 4 * 16 * 16 * 4
    assert make_plan(graph, fleet, micro_batches=4, method="exact", devices=(0, 1, 2)) == plan
    # Measured seconds of nodes can take the place of FLOPs.
    seconds = np.stack([np.arange(1.0, work.n_nodes + 1), 2.0 * np.ones(work.n_nodes)], 1)
    timed = work_of(graph, node_s=seconds, reference_flops_s=1e6)
    slow = make_plan(timed, fleet, micro_batches=1, method="equal-number", devices=(0, 1, 2))
    edges = [0, *slow.boundaries, work.n_nodes]
    assert costs_of(timed, fleet, slow).forward_s[0] == pytest.approx(seconds[: edges[1], 0].sum())


def test_lack_of_memory_says_by_how_much(deep):
    work, fleet = deep
    tight = dataclasses.replace(
        fleet, devices=tuple(dataclasses.replace(d, memory_bytes=3000) for d in fleet.devices)
    )
    with pytest.raises(UserError, match=r"needs 3.91 KiB, 1000 B more than device 'd0'"):
        make_plan(work, tight, micro_batches=4, method="equal-number")
    few = dataclasses.replace(
        fleet, devices=tuple(dataclasses.replace(d, memory_bytes=9000) for d in fleet.devices)
    )
    with pytest.raises(UserError, match=r"hold the nodes up to 'node 11' and 46.9 KiB are left"):
        make_plan(work, few, micro_batches=4, method="exact", devices=range(6))
    # A device too small for anything is left out by the search.
    one = (dataclasses.replace(fleet.devices[0], memory_bytes=10), *fleet.devices[1:])
    pytest.importorskip("networkx", reason="needs the extra pipeline")
    plan = make_plan(work, dataclasses.replace(fleet, devices=one), micro_batches=4)
    assert 0 not in plan.devices
    assert make_plan(work, few, micro_batches=4, limits=Limits(copies=1), method="exact",
                     devices=range(6)).n_stages == 6  # fmt: skip


def test_bad_fleets_and_names_are_refused(deep, tmp_path):
    work, fleet = deep
    path = tmp_path / "fleet.json"
    found = json.loads(fleet.to_json())
    found["bytes_per_s"][0][1] = 5.0
    path.write_text(json.dumps(found))
    uneven = Fleet.load(path)
    with pytest.raises(UserError, match=r"bytes_per_s is 5\.0 from 'd0' to 'd1'"):
        Fleet.load(path, symmetric=True)
    with pytest.raises(UserError, match="links must be symmetric"):
        make_plan(work, uneven, micro_batches=4, method="op-fence")
    assert make_plan(work, uneven, micro_batches=4, method="exact", devices=range(6))
    with pytest.raises(UserError, match="24 nodes and the plan 48 stages"):
        make_plan(work, even_fleet([1] * 48), micro_batches=4, method="equal-number")
    for given, match in [
        ({"method": "best"}, "method is 'best'"),
        ({"codec": "zip"}, "codec 'zip'"),
        ({"order": "1f1b", "chunks": 2}, "only 'interleaved'"),
        ({"micro_batches": 0}, "needs at least 1"),
        ({"devices": (0, 0)}, "must name some of the 6 devices once each"),
    ]:
        with pytest.raises(UserError, match=match):
            make_plan(work, fleet, **{"micro_batches": 4, **given})
    for change, match in [
        ({"sites": [0]}, "sites has 1 entries for 6"),
        ({"latency_s": [[0]]}, r"must be \(6, 6\)"),
        ({"extra": 1}, "fleet has the unknown field extra"),
        ({"devices": [{"name": "x"}]}, "device 0 of the fleet lacks speed_flops_s"),
        ({"devices": []}, "a fleet has 0 devices"),
        ({"sites": ["a"] * 6}, "wrong kind"),
    ]:
        with pytest.raises(UserError, match=match):
            Fleet.from_json(json.dumps({**json.loads(fleet.to_json()), **change}))
    with pytest.raises(UserError, match=r"2\.00 times the peak"):
        fit_speed([1e9, 2e9, 4e9], [0.1, 0.2, 0.4], peak_flops_s=5e9)


def test_plans_that_contradict_themselves_are_refused():
    good = json.loads(Plan(4, (1, 3), (2, 0, 1), micro_batches=8).to_json())
    for change, match in [
        ({"boundaries": [3, 1]}, "ascending"),
        ({"devices": [0, 0, 1]}, "a device of its own"),
        ({"ratios_forward": [0.5, 1.0]}, "numbers of at least 1"),
        ({"replicas": [[3, 4, 2]]}, "share a device"),
        ({"codec": "zip"}, "codec 'zip'"),
        ({"micro_batches": 0}, "must be at least 1"),
        ({"memory_bytes": [1]}, "3 sizes"),
        ({"devices": None}, "wrong kind"),
        ({"more": 1}, "unknown field more"),
    ]:
        with pytest.raises(UserError, match=match):
            Plan.from_json(json.dumps({**good, **change}))
    for name in good:  # also those that have a default
        with pytest.raises(UserError, match=f"lacks {name};"):
            Plan.from_json(json.dumps({k: v for k, v in good.items() if k != name}))
    assert Plan.from_json(json.dumps({**good, "replicas": [[3, 4, 5]]})).chains[1] == (3, 4, 5)


def test_communities_are_the_sites_of_a_drawn_fleet():
    pytest.importorskip("networkx", reason="needs the extra pipeline")
    fleet = paper_fleet(1)
    groups = communities(fleet)
    assert sorted(d for group in groups for d in group) == list(range(48))
    for group in groups:  # never across sites
        assert len({fleet.devices[d].name[:2] for d in group}) == 1
    chain = chain_order(fleet, groups)
    assert sorted(chain) == list(range(48))
    sites = [fleet.devices[d].name[:2] for d in chain]
    assert sum(a != b for a, b in pairwise(sites)) == 2
    machines = [fleet.devices[d].name[:4] for d in chain]
    assert sum(a != b for a, b in pairwise(machines)) <= 15
    assert fleet == paper_fleet(1) != paper_fleet(2)
    many = internet_fleet(200, 0)
    assert sum(len(group) for group in communities(many)) == 200
    assert np.array_equal(many.bytes_per_s, many.bytes_per_s.T)


def test_chain_order_finds_the_shortest_row_of_a_line():
    place = np.random.default_rng(0).permutation(12)
    distance = np.abs(place[:, None] - place).astype(float)
    devices = tuple(Device(f"d{i}", 1, 1) for i in range(12))
    fleet = Fleet(devices, distance, np.full((12, 12), 1e9))
    order = [int(place[d]) for d in chain_order(fleet, [range(12)], message_bytes=0)]
    assert order in (list(range(12)), list(range(12))[::-1])


def test_tasks_keep_a_step_of_the_plan(deep):
    work, fleet = deep
    plan = make_plan(work, fleet, micro_batches=5, method="equal-compute")
    timeline = simulate(tasks(plan, costs_of(work, fleet, plan), fleet))
    assert timeline.makespan_s == plan.predicted_s
    busy = sum(timeline.busy_s(device.name) * device.speed_flops_s for device in fleet.devices)
    assert busy == pytest.approx(5 * work.total[-1])
