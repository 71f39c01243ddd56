"""What the stages of a plan take: seconds on devices of a fitted speed, bytes on their links."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsys.core.cost import fit_linear
from jaxsys.core.errors import UserError
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.memory import Limits, held_of, stage_memory
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.wire import wire_bytes
from jaxsys.pipeline.work import Value, Work, chain_work, work_of

__all__ = [
    "NO_OVERHEADS",
    "Costs",
    "Limits",
    "Message",
    "Overheads",
    "Speed",
    "Value",
    "Work",
    "chain_work",
    "costs_of",
    "fit_speed",
    "held_of",
    "stage_memory",
    "traffic",
    "wire_bytes",
    "work_of",
]


class Speed(NamedTuple):
    """Say how fast a device runs, from a fit.

    Attributes:
        flops_s: FLOPs per second reached, ``λ·S``.
        efficiency: λ, the share of the peak; 1.0 where no peak was given.
        launch_s: seconds of an empty probe.
        r2: share of the variation of the times that the line explains.

    >>> Speed(5e11, 0.5, 1e-5, 0.99).efficiency
    0.5
    """

    flops_s: float
    efficiency: float
    launch_s: float
    r2: float


def fit_speed(flops, seconds, *, peak_flops_s: float | int | None = None) -> Speed:
    """Fit a device's speed to probes: ``t = c + FLOPs / (λ·S)``, slope ``1 / λ`` over ``FLOPs/S``.

    Reconstruction: the paper's estimator scales a device's peak speed by λ from a regression; that
    short probes of different size are used, robustly and with a constant, is ours.

    Args:
        flops: FLOPs of each probe, [N]; at least three different sizes.
        seconds: measured seconds, [N].
        peak_flops_s: S; without it λ is 1 and the speed is what was reached.

    Returns:
        The speed.

    Raises:
        UserError: probes that a line does not explain (`cost.fit_linear`), or a device that was
            faster than its peak.

    Reference: arXiv 2410.12707, workload estimator.

    >>> speed = fit_speed([1e9, 2e9, 4e9], [0.3, 0.5, 0.9], peak_flops_s=1e10)
    >>> round(speed.efficiency, 6), round(speed.launch_s, 6)
    (0.5, 0.1)
    """
    scale = 1.0 if peak_flops_s is None else float(peak_flops_s)
    line = fit_linear(np.asarray(flops, np.float64) / scale, seconds)
    reached = scale / line.beta_s_per_unit
    efficiency = 1.0 if peak_flops_s is None else reached / scale
    if efficiency > 1.05:
        raise UserError(
            f"the probes ran at {reached:.3g} FLOP/s, {efficiency:.2f} times the peak of "
            f"{scale:.3g}; a device cannot beat its peak; pass the right peak or leave it out"
        )
    return Speed(reached, min(1.0, efficiency), float(line.alpha_s), float(line.r2))


class Message(NamedTuple):
    """What travels between two stages for one micro-batch.

    Attributes:
        source: the earlier stage.
        target: the later stage.
        forward_bytes: bytes of the activations on the wire.
        backward_bytes: bytes of the cotangents on the wire, from target to source.
        forward_s: their seconds.
        backward_s: their seconds.

    >>> Message(0, 1, 8, 8, 0.1, 0.2).target
    1
    """

    source: int
    target: int
    forward_bytes: int
    backward_bytes: int
    forward_s: float
    backward_s: float


class Overheads(NamedTuple):
    """What stages take beside their nodes, in seconds on a device of a reference speed.

    Attributes:
        reference_flops_s: that speed, to which other devices' relate.
        forward_call_s: of each forward, whatever it holds.
        backward_call_s: of each backward.
        encode_s_per_byte: of compressing a dense byte, where it is sent, however few are kept.
        encode_s_per_kept: of each dense byte that is kept, beside.
        decode_s_per_byte: of bringing a dense byte back, where it is received.
        update_s_per_byte: of the optimiser, once a step, for each byte of parameters.
        message_s_per_byte: of handing a byte to the network or taking it from there, at each end,
            where that slows the device down.
        late_share: of a backward that follows when its message has left: gradients are added up.

    >>> Overheads().update_s_per_byte
    0.0
    """

    reference_flops_s: float = 1.0
    forward_call_s: float = 0.0
    backward_call_s: float = 0.0
    encode_s_per_byte: float = 0.0
    encode_s_per_kept: float = 0.0
    decode_s_per_byte: float = 0.0
    update_s_per_byte: float = 0.0
    message_s_per_byte: float = 0.0
    late_share: float = 0.0


NO_OVERHEADS = Overheads()


class Costs(NamedTuple):
    """What one micro-batch takes on each stage and link of a plan, and the update on each stage.

    Attributes:
        forward_s: seconds of each stage's forward, [S].
        backward_s: seconds of each stage's whole backward, [S].
        messages: what travels.
        devices: index of each stage's device, [S].
        update_s: seconds of each stage's update, once a step, [S]; none where left out.
        late_share: of a backward that follows when its message has left.

    >>> Costs((1.0,), (2.0,), (), (0,)).backward_s
    (2.0,)
    """

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    messages: tuple[Message, ...]
    devices: tuple[int, ...]
    update_s: tuple[float, ...] = ()
    late_share: float = 0.0


def costs_of(
    work: Work,
    fleet: Fleet,
    plan: Plan,
    *,
    overheads: Overheads = NO_OVERHEADS,
    dtype: str = "float32",
) -> Costs:
    """Estimate what one micro-batch of a plan takes.

    A stage takes ``FLOPs / (λ·S)`` seconds, its overheads beside, and a message
    ``α + bytes / rate``. A value read by several later stages is sent to each of them once; its
    cotangents come back from each.

    Args:
        work: the graph's costs.
        fleet: the devices and links.
        plan: which stage runs where, and how values are compressed.
        overheads: what stages take beside their nodes: calls, codecs at both ends of a compressed
            message, updates.
        dtype: type of the values, which fixes what a kept element takes.

    Returns:
        The costs of the plan's first chain.

    Raises:
        UserError: a plan for another graph or with devices that the fleet lacks.

    Reference: arXiv 2410.12707, workload estimator.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> two, work = even_fleet([3, 6], bytes_per_s=4), chain_work([1, 1], [8])
    >>> costs_of(work, two, Plan(2, (1,), (0, 1))).messages[0].forward_s
    2.0
    """
    if plan.n_nodes != work.n_nodes or max(map(max, plan.chains)) >= len(fleet):
        raise UserError(
            f"the plan is for {plan.n_nodes} nodes and devices up to {max(map(max, plan.chains))}, "
            f"but there are {work.n_nodes} nodes and {len(fleet)} devices; plan again"
        )
    edges = np.array([0, *plan.boundaries, plan.n_nodes])
    speed = fleet.speed_flops_s[list(plan.devices)]
    slower = overheads.reference_flops_s / speed
    forward = np.diff(work.forward[edges]) / speed + overheads.forward_call_s * slower
    backward = np.diff((work.total - work.forward)[edges]) / speed
    backward += overheads.backward_call_s * slower
    parameters = stage_memory(work, edges[:-1], edges[1:], 0, Limits(copies=1.0))
    update = parameters * overheads.update_s_per_byte * slower
    messages = []
    for (s, t), passed in sorted(traffic(work, plan.boundaries).items()):
        p, q = plan.devices[s], plan.devices[t]
        if p == q:
            continue
        there, back = (
            sum(
                wire_bytes(v, plan.ratio(s, t, backward=way), plan.codec, way, dtype)
                for v in passed
            )
            for way in (False, True)
        )
        message = Message(
            s, t, there, back, fleet.transfer_s(p, q, there), fleet.transfer_s(q, p, back)
        )
        messages.append(message)
        for seconds, way, n_bytes in ((forward, False, there), (backward, True, back)):
            dense = sum(v.n_bytes for v in passed if v.differentiable or not way)
            sender, receiver = (t, s) if way else (s, t)
            kept = 1 / plan.ratio(s, t, backward=way)
            encode = overheads.encode_s_per_byte + overheads.encode_s_per_kept * kept
            host = overheads.message_s_per_byte * n_bytes
            ends = (encode, overheads.decode_s_per_byte) if n_bytes < dense else (0.0, 0.0)
            seconds[sender] += (ends[0] * dense + host) * slower[sender]
            seconds[receiver] += (ends[1] * dense + host) * slower[receiver]
    return Costs(
        tuple(forward.tolist()), tuple(backward.tolist()), tuple(messages), plan.devices,
        tuple(update.tolist()) if overheads.update_s_per_byte else (), overheads.late_share,
    )  # fmt: skip


def traffic(work: Work, boundaries: Sequence[int]) -> dict[tuple[int, int], list[Value]]:
    """List the values that each pair of stages exchanges.

    Args:
        work: the graph's costs.
        boundaries: nodes at which stages 1 … S−1 begin.

    Returns:
        Values, by (source stage, target stage).

    >>> sums = [np.zeros(4)] * 4
    >>> values = (Value(0, 8, (1, 2)), Value(1, 4, (2,)))
    >>> found = traffic(Work(("a", "b", "c"), *sums, np.zeros((0, 3)), values, sums[0]), (1, 2))
    >>> {pair: [value.n_bytes for value in passed] for pair, passed in found.items()}
    {(0, 1): [8], (0, 2): [8], (1, 2): [4]}
    """
    stage = np.searchsorted(np.asarray(boundaries, int), np.arange(work.n_nodes), side="right")
    found: dict[tuple[int, int], list[Value]] = {}
    for value in work.values:
        s = int(stage[value.source])
        for t in {int(stage[i]) for i in value.targets} - {s}:
            found.setdefault((s, t), []).append(value)
    return found
