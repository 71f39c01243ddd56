"""Measure a fleet on the spot: every device's speed on the model's own blocks, and every link.

All devices are timed at the same time, since they may share a machine; links one after the other,
since each number must belong to one. What is found is what `work_of` and `make_plan` take.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float

from jaxsys.cluster.throttle import FULL_SPEED, Throttle
from jaxsys.cluster.transport import Transport
from jaxsys.core.cost import PoorFitError
from jaxsys.core.graph import Dag, dag
from jaxsys.core.timeline import Timeline
from jaxsys.pipeline.devices import Device, Fleet
from jaxsys.pipeline.estimate import Overheads, costs_of, fit_speed
from jaxsys.pipeline.job import Setup
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.probe import gather, host_s_per_byte, measure_links
from jaxsys.pipeline.programs import (
    FEW,
    MANY,
    alone_between,
    codec_programs,
    middle,
    node_programs,
    split_calls,
    split_encode,
    stage_programs,
    time_program,
    time_programs,
    update_program,
)
from jaxsys.pipeline.timing import predict
from jaxsys.pipeline.work import Work, work_of

_BACKWARD_RATIO = 2.0  # FLOPs of a backward per FLOP of its forward
_OVERHEADS = 7  # fields of `Overheads` that are measured
_BESIDE = 2 + _OVERHEADS  # numbers of a device before its nodes' seconds
_ROUNDS = 4  # of the fixed point in `Profile.predict`


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was measured of a fleet and a model on it.

    Attributes:
      fleet: devices with the speed that they reached on the model, and links.
      node_s: seconds of each node's forward and backward on a device of `reference_flops_s`, for
        one micro-batch, [N, 2].
      reference_flops_s: that speed.
      overheads: seconds of what stages do beside their nodes there; codecs by top-k.
      notes: what was out of the ordinary, such as times on no line.
      alone: of each device, its seconds with all others idle over those with all at work, [P]; 1
        where each has a machine of its own.

    >>> fleet = Fleet((Device("w0", 1e9, 1e9),), [[0]], [[1]])
    >>> profile = Profile(fleet, ((0.1, 0.2),), 1e9, Overheads(1e9, 1e-4), ())
    >>> Profile.from_json(profile.to_json()) == profile
    True
    """

    fleet: Fleet
    node_s: tuple[tuple[float, float], ...]
    reference_flops_s: float
    overheads: Overheads
    notes: tuple[str, ...]
    alone: tuple[float, ...] = ()

    def predict(self, graph: Dag, plan: Plan) -> Timeline:
        """Simulate a step, devices that share a machine faster while others idle.

        A device p of which the others are at work for a share ``u_p`` of the step, on average,
        takes ``1 − (1 − a_p) (1 − u_p)`` of its seconds, with a from `alone`; u is that of the
        timeline which follows from it, found by repetition. What messages take of a device counts
        for the share of the step for which it is itself at work; the rest falls into its waiting.

        Reconstruction: ours.

        Args:
          graph: as for `work`.
          plan: the plan.

        Returns:
          The timeline.
        """
        work, nothing = self.work(graph), self.overheads._replace(message_s_per_byte=0.0)
        whole = costs_of(work, self.fleet, plan, overheads=self.overheads)
        bare = costs_of(work, self.fleet, plan, overheads=nothing)
        timeline = predict(plan, whole, self.fleet)
        if whole == bare and min(self.alone, default=1.0) == 1.0:
            return timeline
        names = [self.fleet.devices[d].name for d in plan.devices]
        alone = np.array([self.alone[d] if self.alone else 1.0 for d in plan.devices])
        for _ in range(_ROUNDS):
            busy = {n: timeline.busy_s(n) / timeline.makespan_s for n in dict.fromkeys(names)}
            rest = [[u for n, u in busy.items() if n != name] for name in names]
            share = np.array([np.mean(each) if each else 0.0 for each in rest])
            own = np.array([busy[name] for name in names])
            mixed = whole.mixed(bare, own).scaled(1 - (1 - alone) * (1 - share))
            timeline = predict(plan, mixed, self.fleet)
        return timeline

    def work(self, graph: Dag) -> Work:
        """Summarise a graph with the measured seconds in place of FLOPs.

        Args:
          graph: of the same model, micro-batch and granularity.
        """
        return work_of(graph, node_s=self.node_s, reference_flops_s=self.reference_flops_s)

    def to_json(self) -> str:
        """Write the profile as one JSON object."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps(found | {"fleet": json.loads(self.fleet.to_json())})

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """Read what `to_json` wrote."""
        found = json.loads(text)
        return cls(
            Fleet.from_json(json.dumps(found["fleet"])),
            tuple((float(f), float(b)) for f, b in found["node_s"]),
            float(found["reference_flops_s"]),
            Overheads(*map(float, found["overheads"])),
            tuple(found["notes"]),
            tuple(map(float, found["alone"])),
        )


class Own(NamedTuple):
    """What one device found out about itself, in its own seconds.

    Attributes:
      memory_bytes: what a stage may use.
      alone: seconds with all others idle over those with all at work.
      overheads: as in `Overheads`, without the speed, [7].
      node_s: of each node's forward and backward, [N, 2].

    >>> Own(1e9, 1.0, np.zeros(7), np.ones((2, 2))).row().shape
    (13,)
    """

    memory_bytes: float
    alone: float
    overheads: Float[np.ndarray, "K"]
    node_s: Float[np.ndarray, "N 2"]

    def row(self) -> Float[np.ndarray, "M"]:
        """Lay all numbers in a row."""
        return np.array([self.memory_bytes, self.alone, *self.overheads, *self.node_s.reshape(-1)])


def profile(
    setup: Setup,
    micro_batches: int,
    transport: Transport,
    *,
    granularity: str = "layer",
    memory_bytes: float | None = None,
    sites: Sequence[int] = (),
    optimizer: optax.GradientTransformation | None = None,
    throttle: Throttle = FULL_SPEED,
    on_event: Callable[[str], None] = lambda _: None,
) -> Profile | None:
    """Measure this device and its links, together with all others.

    Args:
      setup: the model.
      micro_batches: parts that a step's examples are dealt out to.
      transport: joins the devices, one process each.
      granularity: of the graph's nodes.
      memory_bytes: what a stage may use on this device; what is free, shared evenly, by default.
      sites: of the devices, where all messages between two sites share one link.
      optimizer: whose update is timed too, if given.
      throttle: makes this device as slow as the one that it stands for.
      on_event: told what is measured next.

    Returns:
      The profile on process 0, None on the others.

    >>> profile.__name__  # compiles a model: see tests/pipeline/test_profile.py
    'profile'
    """
    graph = dag(setup.loss_fn, setup.shapes(), *setup.micro_batch(micro_batches),
                granularity=granularity)  # fmt: skip
    n = len(graph.nodes)
    on_event("compiling")
    programs = node_programs(setup, micro_batches, n, granularity)
    begin, end = middle(n)
    (several,) = stage_programs(setup, micro_batches, *alone_between(begin, end, n), granularity)
    largest = max((edge.n_bytes for edge in graph.edges), default=4)
    few, decode = codec_programs(largest, FEW)
    many, _ = codec_programs(largest, MANY)
    update, updated_bytes = update_program(graph, setup, optimizer)
    gather(transport, np.zeros(1), 0)
    on_event("timing the blocks")
    single = np.array([time_programs(each, throttle) for each in programs])
    together = np.array(time_programs(several, throttle))
    call_s, node_s = split_calls(single, together, begin, end)
    encode_s = [time_program(each, throttle) / largest for each in (few, many)]
    overheads = np.array(
        [
            *call_s,
            *split_encode(*encode_s),
            time_program(decode, throttle) / largest,
            time_program(update, throttle) / updated_bytes,
            host_s_per_byte(transport, throttle),
        ]
    )
    alone_s = np.zeros(2)
    for p in range(transport.size):
        gather(transport, np.zeros(1), 2 + p)
        if p == transport.rank:
            alone_s = np.array(time_programs(several, throttle))
    own = Own(
        memory_bytes or free_bytes(transport.size),
        min(1.0, float(alone_s.sum() / together.sum())),
        overheads,
        node_s,
    )
    everyone = gather(transport, own.row(), 1)
    latency_s, bytes_per_s, notes = measure_links(transport, on_event)
    if transport.rank != 0:
        return None
    return assemble(graph, everyone, latency_s, bytes_per_s, notes, sites)


def assemble(
    graph: Dag,
    everyone: Float[np.ndarray, "P M"],
    latency_s: Float[np.ndarray, "P P"],
    bytes_per_s: Float[np.ndarray, "P P"],
    notes: Sequence[str] = (),
    sites: Sequence[int] = (),
) -> Profile:
    """Make a profile of what all devices found.

    A device's speed is λ·S: the FLOPs of the model's nodes, forward and backward, over the seconds
    that they took; where a line through the nodes' times explains them, its r² says how well FLOPs
    alone would have done. A node's seconds are the median of the devices', each brought to the
    reference speed. Of the two directions of a link the slower one counts for both, since
    communities need links without a direction.

    Args:
      graph: of the model.
      everyone: of each device what `Own.row` gives.
      latency_s: of the links.
      bytes_per_s: of the links.
      notes: to be kept.
      sites: of the devices, if known.

    Returns:
      The profile.

    >>> from jaxsys.core.graph import Node
    >>> graph = Dag((Node("a", 1e6, (), (), 0, 0),), (), (), ())
    >>> rows = [Own(1e9, 1.0, k * np.ones(7), k * np.array([[1e-3, 2e-3]])).row() for k in (1, 2)]
    >>> found = assemble(graph, np.array(rows), np.zeros((2, 2)), np.ones((2, 2)))
    >>> found.fleet.speed_flops_s.tolist(), found.node_s
    ([1000000000.0, 500000000.0], ((0.001, 0.002),))
    """
    flops = np.array([node.flops for node in graph.nodes])
    node_s = everyone[:, _BESIDE:].reshape(len(everyone), len(flops), 2)
    total = (1 + _BACKWARD_RATIO) * flops.sum()
    speeds = total / node_s.sum((1, 2))
    reference = float(speeds[0])
    scaled = np.median(node_s * (speeds / reference)[:, None, None], axis=0)
    said = list(notes)
    try:
        line = fit_speed((1 + _BACKWARD_RATIO) * flops, scaled.sum(1))
        said.append(f"seconds on FLOPs of the nodes: r² {line.r2:.3f}")
    except (PoorFitError, ValueError) as error:
        said.append(f"FLOPs alone do not explain the nodes' times ({error})")
    devices = tuple(
        Device(f"w{p}", float(speed), float(row[0]))
        for p, (speed, row) in enumerate(zip(speeds, everyone, strict=True))
    )
    beside = everyone[:, 2:_BESIDE] * (speeds / reference)[:, None]
    overheads = Overheads(reference, *np.median(beside, axis=0).tolist())
    return Profile(
        Fleet(
            devices,
            np.maximum(latency_s, latency_s.T),
            np.minimum(bytes_per_s, bytes_per_s.T),
            tuple(sites),
        ),
        tuple((float(f), float(b)) for f, b in scaled),
        reference,
        overheads,
        tuple(said),
        tuple(everyone[:, 1].tolist()),
    )


def free_bytes(sharers: int) -> float:
    """Tell what a stage may use on this device: an accelerator's memory, or a part of the host's.

    Args:
      sharers: processes on a host of which each counts on its part.

    >>> free_bytes(2) > 0
    True
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / max(sharers, 1)
