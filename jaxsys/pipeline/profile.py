"""Measure a fleet on the spot: every device's speed on the model's own blocks, and every link.

All devices are timed at the same time, since they may share a machine; links one after the other,
since each number must belong to one. What is found is what `work_of` and `make_plan` take.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsys.cluster.transport import Transport
from jaxsys.core.cost import PoorFitError
from jaxsys.core.graph import Dag, dag
from jaxsys.core.stages import StagedLoss, cut_at
from jaxsys.pipeline import codec
from jaxsys.pipeline.devices import Device, Fleet
from jaxsys.pipeline.estimate import fit_speed
from jaxsys.pipeline.job import Setup
from jaxsys.pipeline.probe import gather, measure_links
from jaxsys.pipeline.work import Work, work_of

_WINDOW_S = 0.25  # of one timed program: long against the periods of a CPU quota
_BACKWARD_RATIO = 2.0  # FLOPs of a backward per FLOP of its forward


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was measured of a fleet and a model on it.

    Attributes:
      fleet: devices with the speed that they reached on the model, and links.
      node_s: seconds of each node's forward and backward on a device of `reference_flops_s`, for
        one micro-batch, [N, 2].
      reference_flops_s: that speed.
      codec_s_per_byte: seconds of encoding or decoding a dense byte by top-k there.
      notes: what was out of the ordinary, such as times on no line.

    >>> fleet = Fleet((Device("w0", 1e9, 1e9),), [[0]], [[1]])
    >>> profile = Profile(fleet, ((0.1, 0.2),), 1e9, 0.0, ())
    >>> Profile.from_json(profile.to_json()) == profile
    True
    """

    fleet: Fleet
    node_s: tuple[tuple[float, float], ...]
    reference_flops_s: float
    codec_s_per_byte: float
    notes: tuple[str, ...]

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
            float(found["codec_s_per_byte"]),
            tuple(found["notes"]),
        )


class Own(NamedTuple):
    """What one device found out about itself: node seconds [N, 2], bytes, codec seconds a byte."""

    node_s: Float[np.ndarray, "N 2"]
    memory_bytes: float
    codec_s_per_byte: float


def profile(
    setup: Setup,
    micro_batches: int,
    transport: Transport,
    *,
    granularity: str = "layer",
    memory_bytes: float | None = None,
    sites: Sequence[int] = (),
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
    largest = max((edge.n_bytes for edge in graph.edges), default=4)
    coder = _codec_program(largest)
    gather(transport, np.zeros(1), 0)
    on_event("timing the blocks")
    own = Own(
        np.array([[_time(forward), _time(backward)] for forward, backward in programs]),
        memory_bytes or free_bytes(transport.size),
        _time(coder) / (2 * largest),
    )
    mine = np.array([own.memory_bytes, own.codec_s_per_byte, *own.node_s.reshape(-1)])
    everyone = gather(transport, mine, 1)
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
      everyone: of each device its memory, its codec's seconds per byte, and forward and backward
        seconds of the nodes in turn.
      latency_s: of the links.
      bytes_per_s: of the links.
      notes: to be kept.
      sites: of the devices, if known.

    Returns:
      The profile.

    >>> from jaxsys.core.graph import Node
    >>> graph = Dag((Node("a", 1e6, (), (), 0, 0),), (), (), ())
    >>> rows = np.array([[1e9, 0.0, 1e-3, 2e-3], [1e9, 0.0, 2e-3, 4e-3]])
    >>> found = assemble(graph, rows, np.zeros((2, 2)), np.ones((2, 2)))
    >>> found.fleet.speed_flops_s.tolist(), found.node_s
    ([1000000000.0, 500000000.0], ((0.001, 0.002),))
    """
    flops = np.array([node.flops for node in graph.nodes])
    node_s = everyone[:, 2:].reshape(len(everyone), len(flops), 2)
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
    codec_s = float(np.median(everyone[:, 1] * speeds / reference))
    return Profile(
        Fleet(
            devices,
            np.maximum(latency_s, latency_s.T),
            np.minimum(bytes_per_s, bytes_per_s.T),
            tuple(sites),
        ),
        tuple((float(f), float(b)) for f, b in scaled),
        reference,
        codec_s,
        tuple(said),
    )


def node_programs(
    setup: Setup, micro_batches: int, n_nodes: int, granularity: str = "layer"
) -> list[tuple[Callable[[], Any], Callable[[], Any]]]:
    """Compile every node's forward and backward alone, with arrays to run them on.

    Args:
      setup: the model.
      micro_batches: parts that a step's examples are dealt out to.
      n_nodes: nodes of the graph.
      granularity: of the graph's nodes.

    Returns:
      A pair of functions for each node; nodes of one form share theirs.

    >>> node_programs.__name__  # compiles a model: see tests/pipeline/test_profile.py
    'node_programs'
    """
    specs = setup.micro_batch(micro_batches)
    boundaries = tuple(range(1, n_nodes))
    staged = cut_at(setup.loss_fn, setup.shapes(), specs, boundaries, granularity=granularity)
    first = [x[: s.shape[0]] for x, s in zip(
        jax.tree.leaves(setup.data(0)), jax.tree.leaves(specs), strict=True)]  # fmt: skip
    leaves = jax.tree.leaves(setup.shapes())
    known: dict[Any, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    found = []
    for stage in staged.stages:
        values = _values(staged, stage, first, leaves)
        key = (id(stage.forward), *(x.shape for part in values for x in part))
        if key not in known:
            known[key] = _programs(stage, values)
        found.append(known[key])
    return found


def _values(staged: StagedLoss, stage: Any, first: Sequence[Any], leaves: Sequence[Any]) -> Any:
    data = dict(zip(staged.data_names, first, strict=True))

    def value(name: int) -> jax.Array:
        if name in staged.constants or name in data:
            return jnp.asarray(staged.constants[name] if name in staged.constants else data[name])
        return _ones(stage.shapes[name])

    return (
        [_ones(leaves[j]) for j in stage.leaves],
        [value(name) for name in stage.upstream],
        [value(name) for name in stage.other],
    )


def _ones(spec: Any) -> jax.Array:
    # far from 0, where arithmetic on some processors is slow, and small, so that nothing overflows
    inexact = jnp.issubdtype(spec.dtype, jnp.inexact)
    return jnp.full(spec.shape, 0.01 if inexact else 0, spec.dtype)


def _programs(stage: Any, values: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    outputs, pullback = stage.forward(*values)
    seeds = [
        _ones(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)
        for x in outputs
    ]

    def forward() -> Any:
        return stage.forward(*values)[0]

    def backward() -> Any:
        return stage.backward(pullback, seeds)

    jax.block_until_ready(backward())
    return forward, backward


def _codec_program(n_bytes: int) -> Callable[[], Any]:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(max(n_bytes // 4, 64)), jnp.float32)

    def both_ends() -> Any:
        return codec.round_trip(x, 16.0, "topk")

    jax.block_until_ready(both_ends())
    return both_ends


def _time(program: Callable[[], Any]) -> float:
    """Average seconds over a window: under a CPU quota single runs are all or nothing."""
    start_s, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start_s < _WINDOW_S:
        jax.block_until_ready(program())
        count += 1
    return (time.perf_counter() - start_s) / count


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
