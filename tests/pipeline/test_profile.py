"""Profiles of a fleet: speeds and links against known ones."""

import threading
import time

import numpy as np
import optax
import pytest

from jaxsys.cluster.transport import in_memory, message_bytes
from jaxsys.core.graph import Dag, Edge, Node, dag
from jaxsys.pipeline import probe, programs
from jaxsys.pipeline import profile as profiles
from jaxsys.pipeline.devices import Device, Fleet
from jaxsys.pipeline.estimate import Overheads, costs_of
from jaxsys.pipeline.job import Task, set_up
from jaxsys.pipeline.planner import make_plan
from jaxsys.pipeline.profile import Own, Profile, assemble, tried
from jaxsys.pipeline.trial import at_speeds, trial_plans


class _Slow:
    """A transport whose links are busy for as long as a message's bytes take."""

    def __init__(self, inner, bytes_per_s):
        self._inner, self._bytes_per_s = inner, bytes_per_s
        self.rank, self.size, self.sent_bytes = inner.rank, inner.size, inner.sent_bytes
        self._free_s = [0.0] * self.size

    def send(self, to, key, arrays):
        now = time.perf_counter()
        seconds = message_bytes(arrays) / self._bytes_per_s[self.rank][to]
        self._free_s[to] = max(now, self._free_s[to]) + seconds
        threading.Timer(self._free_s[to] - now, self._inner.send, (to, key, arrays)).start()

    def receive(self, source, key, specs):
        return self._inner.receive(source, key, specs)

    def expect(self, source, key, specs): ...

    def close(self, lost=None): ...


def test_links_are_told_apart_and_directions_too(monkeypatch):
    """Rates of 1 to 90 MB/s on three links, one of them faster on its way back."""
    monkeypatch.setattr(probe, "_LINK_S", 0.004)
    rates = np.array([[1, 1, 30], [10, 1, 90], [30, 90, 1]]) * 1e6
    found = {}

    def work(end):
        found[end.rank] = probe.measure_links(_Slow(end, rates))

    threads = [threading.Thread(target=work, args=(end,)) for end in in_memory(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    latency_s, bytes_per_s, _ = found[0]
    off = ~np.eye(3, dtype=bool)
    # short messages on fast links are at the mercy of a busy machine; the slow link is not
    assert 0.3 * rates[0, 1] < bytes_per_s[0, 1] < 2 * rates[0, 1]
    assert bytes_per_s[0, 1] == bytes_per_s[off].min()
    assert np.all(latency_s[off] >= 0)
    assert all(np.array_equal(found[p][1], bytes_per_s) for p in range(3))


def _graph(flops):
    return Dag(tuple(Node(f"n{i}", f, (), (), 4, 4) for i, f in enumerate(flops)), (), (), ())


def test_speeds_and_node_times_that_flops_explain_are_found_exactly():
    flops, speeds = np.array([1e6, 2e6, 4e6, 8e6]), np.array([1e9, 4e9, 5e8])
    rows = [
        Own(
            1e9,
            np.arange(1.0, 4.0) * 1e-9 * 1e9 / s,
            np.stack([flops / s, 2 * flops / s], axis=1),
        ).row()
        for s in speeds
    ]
    found = assemble(_graph(flops), np.array(rows), np.zeros((3, 3)), np.ones((3, 3)))
    np.testing.assert_allclose(found.fleet.speed_flops_s, speeds)
    np.testing.assert_allclose(found.node_s, np.stack([flops, 2 * flops], axis=1) / 1e9)
    assert found.overheads == pytest.approx([1e9, 0, 0, 1e-9, 2e-9, 3e-9, 0, 0, 0])
    assert "r² 1.000" in found.notes[0]
    work = found.work(_graph(flops))
    np.testing.assert_allclose(np.diff(work.total), 3 * flops)


def test_node_times_that_flops_do_not_explain_are_kept_and_said():
    """A device's total is predicted exactly whatever its nodes take each."""
    flops = np.array([1e6, 1e6, 1e6])
    node_s = np.array([[1.0, 2], [9, 2], [1, 5]])
    rows = np.array([Own(1.0, np.zeros(3), k * node_s).row() for k in (1, 2)])
    found = assemble(_graph(flops), rows, np.zeros((2, 2)), np.ones((2, 2)), ["kept"])
    assert found.notes[0] == "kept"
    assert "do not explain" in found.notes[1]
    total = np.array(found.node_s).sum() * found.reference_flops_s
    np.testing.assert_allclose(total / found.fleet.speed_flops_s, [20, 40])


def test_what_workers_take_beside_their_programs_is_found_from_trial_steps():
    """Known speeds, calls, codecs and bytes make the trials' times, and come out of them again."""
    graph = _graph([1e6] * 9)
    edges = tuple(Edge(i, i + 1, 40_000, i) for i in range(8))
    graph = graph._replace(edges=edges, leaf_bytes=(1000,))
    graph = graph._replace(nodes=tuple(n._replace(leaves=(0,)[: i == 1])
                                       for i, n in enumerate(graph.nodes)))  # fmt: skip
    alone = Fleet(
        (Device("a", 1e9, 1e9), Device("b", 5e8, 1e9), Device("c", 1e9, 1e9)),
        np.zeros((3, 3)), np.ones((3, 3)),
    )  # fmt: skip
    profile = Profile(alone, ((1e-3, 2e-3),) * 9, 1e9, Overheads(1e9, 0, 0, 1e-8, 1e-7, 1e-9), ())
    plans = trial_plans(9, 3, 4)
    truth = at_speeds(alone, np.array([8e8, 3e8, 5e8]))
    beside = Overheads(8e8, 2e-4, 2e-4, 1e-8, 1e-7, 1e-9, 1e-6, 3e-9, 0.05)
    work = profile.work(graph)
    costs = [costs_of(work, truth, plan, overheads=beside) for plan in plans]
    measured = np.zeros((3, len(plans), 5))
    for k, (plan, c, share) in enumerate(zip(plans, costs, (0.2, 1.0, 1.0), strict=True)):
        by_stage = np.array([c.forward_s, c.backward_s, c.update_s, (share,) * 3, (0.05,) * 3]).T
        measured[list(plan.devices), k] = by_stage
    found = tried(profile, graph, plans, measured)
    np.testing.assert_allclose(found.fleet.speed_flops_s, truth.speed_flops_s, rtol=1e-2)
    np.testing.assert_allclose(found.overheads, beside, rtol=1e-2)
    for plan, cost in zip(plans, costs, strict=True):
        again = found.costs(graph, plan)
        np.testing.assert_allclose(again.forward_s, cost.forward_s, rtol=1e-2)


def test_trials_that_disagree_count_by_how_busy_they_were():
    graph = _graph([1e6] * 4)
    profile = Profile(
        Fleet((Device("a", 1e9, 1e9), Device("b", 1e9, 1e9)), np.zeros((2, 2)), np.ones((2, 2))),
        ((1e-3, 2e-3),) * 4, 1e9, Overheads(1e9), (),
    )  # fmt: skip
    plans = trial_plans(4, 2, 2)
    # By device: two nodes each, mostly idle and at work; then one on the first, three on the other.
    measured = [
        [[2.4e-3, 4.8e-3, 0, 0.1, 0], [2e-3, 4e-3, 0, 0.9, 0], [1e-3, 2e-3, 0, 0.9, 0]],
        [[2.4e-3, 4.8e-3, 0, 0.1, 0], [2e-3, 4e-3, 0, 0.9, 0], [3e-3, 6e-3, 0, 0.9, 0]],
    ]
    found = tried(profile, graph, plans, np.array(measured))
    forward = found.costs(graph, plans[1]).forward_s
    np.testing.assert_allclose(forward, 2e-3, rtol=0.02)


def test_a_profile_is_read_back():
    fleet = Fleet(
        (Device("w0", 1e9, 1e9), Device("w1", 2e9, 1e9)), np.zeros((2, 2)), np.ones((2, 2))
    )
    profile = Profile(fleet, ((0.1, 0.2), (0.3, 0.4)), 1e9, Overheads(1e9, *[1e-9] * 8), ("kept",))
    assert Profile.from_json(profile.to_json()) == profile


def test_a_model_is_profiled_in_one_process(monkeypatch):
    """All nodes get times, nodes of one form the same programs, and a plan can be made of it."""
    monkeypatch.setattr(programs, "_WINDOW_S", 0.0)
    monkeypatch.setattr(profiles, "_ROUNDS", 1)
    setup = set_up(Task(blocks=2, width=8, heads=2, length=4, batch=2))
    found = profiles.profile(setup, 2, in_memory(1)[0], memory_bytes=1e9, optimizer=optax.sgd(0.1))
    graph = dag(setup.loss_fn, setup.shapes(), *setup.micro_batch(2))
    assert len(found.node_s) == len(graph.nodes)
    assert np.all(np.array(found.node_s) > 0)
    plan = make_plan(found.work(graph), found.fleet, micro_batches=2, method="exact")
    assert plan.predicted_s == pytest.approx(2 * np.array(found.node_s).sum())
    beside = make_plan(
        found.work(graph), found.fleet, micro_batches=2, method="exact", overheads=found.overheads
    )
    calls = found.overheads.forward_call_s + found.overheads.backward_call_s
    update = found.overheads.update_s_per_byte * sum(graph.leaf_bytes)
    assert update > 0
    assert beside.predicted_s == pytest.approx(plan.predicted_s + 2 * calls + update)
    every = programs.node_programs(setup, 2, len(graph.nodes))
    assert len({id(forward) for forward, _ in every}) < len(every)
