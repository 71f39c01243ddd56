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
from jaxsys.pipeline.estimate import Overheads
from jaxsys.pipeline.job import Task, set_up
from jaxsys.pipeline.planner import make_plan
from jaxsys.pipeline.profile import Own, Profile, assemble


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
            0.9,
            np.arange(1.0, 8.0) * 1e-9 * 1e9 / s,
            np.stack([flops / s, 2 * flops / s], axis=1),
        ).row()
        for s in speeds
    ]
    found = assemble(_graph(flops), np.array(rows), np.zeros((3, 3)), np.ones((3, 3)))
    np.testing.assert_allclose(found.fleet.speed_flops_s, speeds)
    np.testing.assert_allclose(found.node_s, np.stack([flops, 2 * flops], axis=1) / 1e9)
    assert found.overheads == pytest.approx([1e9, *(np.arange(1.0, 8.0) * 1e-9)])
    assert "r² 1.000" in found.notes[0]
    work = found.work(_graph(flops))
    np.testing.assert_allclose(np.diff(work.total), 3 * flops)


def test_node_times_that_flops_do_not_explain_are_kept_and_said():
    """A device's total is predicted exactly whatever its nodes take each."""
    flops = np.array([1e6, 1e6, 1e6])
    node_s = np.array([[1.0, 2], [9, 2], [1, 5]])
    rows = np.array([Own(1.0, 1.0, np.zeros(7), k * node_s).row() for k in (1, 2)])
    found = assemble(_graph(flops), rows, np.zeros((2, 2)), np.ones((2, 2)), ["kept"])
    assert found.notes[0] == "kept"
    assert "do not explain" in found.notes[1]
    total = np.array(found.node_s).sum() * found.reference_flops_s
    np.testing.assert_allclose(total / found.fleet.speed_flops_s, [20, 40])


def test_devices_of_one_machine_are_faster_while_others_idle():
    """Two stages and one micro-batch: each device is at work while the other is not."""
    fleet = Fleet(
        (Device("a", 1.0, 1e9), Device("b", 1.0, 1e9)), np.zeros((2, 2)), np.full((2, 2), 1e12)
    )
    graph = _graph([1.0, 1.0])._replace(edges=(Edge(0, 1, 4, 0),))
    plan = make_plan(graph, fleet, micro_batches=1, method="equal-number")
    node_s = ((1.0, 2.0), (1.0, 2.0))
    apart = Profile(fleet, node_s, 1.0, Overheads(), (), (1.0, 1.0)).predict(graph, plan)
    shared = Profile(fleet, node_s, 1.0, Overheads(), (), (0.8, 0.8)).predict(graph, plan)
    assert apart.makespan_s == pytest.approx(6.0)
    assert shared.makespan_s == pytest.approx(6.0 * (1 - 0.2 * 0.5))  # each is idle half the time


def test_a_profile_is_read_back():
    fleet = Fleet(
        (Device("w0", 1e9, 1e9), Device("w1", 2e9, 1e9)), np.zeros((2, 2)), np.ones((2, 2))
    )
    profile = Profile(
        fleet, ((0.1, 0.2), (0.3, 0.4)), 1e9, Overheads(1e9, *[1e-9] * 7), ("kept",), (1.0, 0.9)
    )
    assert Profile.from_json(profile.to_json()) == profile


def test_a_model_is_profiled_in_one_process(monkeypatch):
    """All nodes get times, nodes of one form the same programs, and a plan can be made of it."""
    monkeypatch.setattr(programs, "_WINDOW_S", 0.0)
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
