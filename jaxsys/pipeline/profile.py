"""Measure a fleet on the spot: every device's speed on the model's own blocks, and every link.

All devices are timed at the same time, since they may share a machine; links one after the other,
since each number must belong to one. A few steps of a real pipeline over all devices come last
(`pipeline.trial`). What is found is what `work_of` and `make_plan` take.
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
from jaxsys.pipeline.estimate import Costs, Overheads, costs_of, fit_speed
from jaxsys.pipeline.job import Setup
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.probe import gather, measure_links
from jaxsys.pipeline.programs import (
    FEW,
    MANY,
    codec_programs,
    node_programs,
    split_encode,
    time_program,
    time_programs,
)
from jaxsys.pipeline.timing import predict
from jaxsys.pipeline.trial import Trials, at_speeds, fit_trials, trial_plans
from jaxsys.pipeline.work import Work, work_of

_BACKWARD_RATIO = 2.0  # FLOPs of a backward per FLOP of its forward
_BESIDE = 4  # numbers of a device before its nodes' seconds
_ROUNDS = 3  # of all measurements but those of links


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

    def predict(self, graph: Dag, plan: Plan) -> Timeline:
        """Simulate a step.

        Args:
          graph: as for `work`.
          plan: the plan.

        Returns:
          The timeline.
        """
        return predict(plan, self.costs(graph, plan), self.fleet)

    def costs(self, graph: Dag, plan: Plan) -> Costs:
        """Estimate what a micro-batch takes.

        Args:
          graph: as for `work`.
          plan: the plan.
        """
        return costs_of(self.work(graph), self.fleet, plan, overheads=self.overheads)

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
        )


class Own(NamedTuple):
    """What one device found out about itself, in its own seconds.

    Attributes:
      memory_bytes: what a stage may use.
      codec_s: of encoding a dense byte, of a byte that is kept beside, and of decoding a byte, [3].
      node_s: of each node's forward and backward alone, [N, 2].

    >>> Own(1e9, np.zeros(3), np.ones((2, 2))).row().shape
    (8,)
    """

    memory_bytes: float
    codec_s: Float[np.ndarray, "3"]
    node_s: Float[np.ndarray, "N 2"]

    def row(self) -> Float[np.ndarray, "M"]:
        """Lay all numbers in a row."""
        return np.array([self.memory_bytes, *self.codec_s, *self.node_s.reshape(-1)])


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
      optimizer: of the trial steps, whose update is timed too, if given.
      throttle: makes this device as slow as the one that it stands for.
      on_event: told what is measured next.

    Returns:
      The profile on process 0, None on the others.

    >>> profile.__name__  # compiles a model: see tests/pipeline/test_profile.py
    'profile'
    """
    on_event("compiling")
    session = Session(setup, micro_batches, transport, granularity, optimizer, throttle)
    gather(transport, np.zeros(1), 0)
    on_event("timing the blocks, alone and in trial steps")
    for _ in range(_ROUNDS):
        session.sample()
    links = measure_links(transport, on_event)
    return session.profile(links, memory_bytes, sites)


class Session:
    """Rounds of measurements in one process, which may take turns with something else.

    A machine's speed may drift by a quarter within a minute; what is to be compared with a profile
    is measured in turns with it.

    Args:
      setup: as for `profile`.
      micro_batches: as for `profile`.
      transport: as for `profile`.
      granularity: as for `profile`.
      optimizer: as for `profile`.
      throttle: as for `profile`.

    >>> Session.__name__  # compiles a model: see tests/pipeline/test_profile.py
    'Session'
    """

    def __init__(
        self,
        setup: Setup,
        micro_batches: int,
        transport: Transport,
        granularity: str = "layer",
        optimizer: optax.GradientTransformation | None = None,
        throttle: Throttle = FULL_SPEED,
    ) -> None:
        specs = setup.micro_batch(micro_batches)
        self._graph = dag(setup.loss_fn, setup.shapes(), *specs, granularity=granularity)
        n, size = len(self._graph.nodes), transport.size
        self._transport, self._throttle = transport, throttle
        self._programs = node_programs(setup, micro_batches, n, granularity)
        self._largest = max((edge.n_bytes for edge in self._graph.edges), default=4)
        ends = [codec_programs(self._largest, ratio) for ratio in (FEW, MANY)]
        self._codecs = [ends[0][0], ends[1][0], ends[0][1]]
        self._forms = {id(each[0]): each for each in self._programs}
        self._node_s: list[list[tuple[float, float]]] = []
        self._codec_s: list[list[float]] = []
        self._plans = trial_plans(n, size, micro_batches) if n >= size else ()
        self._trials = (
            Trials(setup, self._plans, transport, granularity, optimizer, throttle)
            if self._plans
            else None
        )

    def sample(self) -> None:
        """Time all programs once more, and a trial step of each plan; all devices together."""
        self._node_s.append([time_programs(each, self._throttle) for each in self._forms.values()])
        self._codec_s.append([time_program(each, self._throttle) for each in self._codecs])
        if self._trials is not None:
            self._trials.step()

    def profile(
        self,
        links: tuple[Float[np.ndarray, "P P"], Float[np.ndarray, "P P"], Sequence[str]],
        memory_bytes: float | None = None,
        sites: Sequence[int] = (),
    ) -> Profile | None:
        """Put together what all devices have measured.

        Args:
          links: what `measure_links` gives.
          memory_bytes: as for the function `profile`.
          sites: as for the function `profile`.

        Returns:
          The profile on process 0, None on the others.
        """
        by_form = dict(zip(self._forms, np.median(self._node_s, axis=0), strict=True))
        few, many, decode = (np.median(self._codec_s, axis=0) / self._largest).tolist()
        own = Own(
            memory_bytes or free_bytes(self._transport.size),
            np.array([*split_encode(few, many), decode]),
            np.array([by_form[id(each[0])] for each in self._programs]),
        )
        everyone = gather(self._transport, own.row(), 1)
        trials = None
        if self._trials is not None:
            trials = gather(self._transport, self._trials.seconds(), 2)
        if self._transport.rank != 0:
            return None
        found = assemble(self._graph, everyone, *links, sites)
        return found if trials is None else tried(found, self._graph, self._plans, trials)


def tried(
    found: Profile, graph: Dag, plans: Sequence[Plan], trials: Float[np.ndarray, "P K 5"]
) -> Profile:
    """Bring a profile of programs that run alone to what they take in a worker.

    Args:
      found: that profile.
      graph: of the model.
      plans: of the trials.
      trials: seconds, busy and late share of each device under each plan, of `trial.Trials`.

    Returns:
      The profile.

    >>> from jaxsys.core.graph import Node
    >>> graph = Dag((Node("a", 1e6, (), (), 0, 0),), (), (), ())
    >>> row = Own(1e9, np.zeros(3), np.array([[1e-3, 2e-3]])).row()
    >>> found = assemble(graph, row[None], np.zeros((1, 1)), np.ones((1, 1)))
    >>> slower = tried(found, graph, trial_plans(1, 1, 2), np.array([[[2e-3, 4e-3, 0, 1, 0]]]))
    >>> np.round(np.array(slower.node_s) * 1e3, 3).tolist()
    [[2.0, 4.0]]
    """
    fitted = fit_trials(found.work(graph), found.fleet, found.overheads, plans, trials)
    slower = found.reference_flops_s / float(fitted.speed_flops_s[0])
    said = f"trial steps: a forward or backward is up to {fitted.worst:.0%} off after the fit"
    return dataclasses.replace(
        found,
        fleet=at_speeds(found.fleet, fitted.speed_flops_s),
        node_s=tuple((f * slower, b * slower) for f, b in found.node_s),
        reference_flops_s=float(fitted.speed_flops_s[0]),
        overheads=fitted.overheads,
        notes=(*found.notes, said),
    )


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
    >>> rows = [Own(1e9, k * np.ones(3), k * np.array([[1e-3, 2e-3]])).row() for k in (1, 2)]
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
    beside = everyone[:, 1:_BESIDE] * (speeds / reference)[:, None]
    codec_s = np.median(beside, axis=0)
    overheads = Overheads(reference, 0.0, 0.0, *codec_s.tolist())
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
