"""Steps of a trial pipeline: what stages take in a worker, beside what their programs take alone.

A program that runs again and again finds its data in the caches and nothing else to do in its
process. In a worker messages come and go, values are compressed, every stage waits for others. So
a profile ends with a few steps of a real pipeline, and what its stages take there is fitted.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxsys.cluster.throttle import Throttle
from jaxsys.cluster.transport import Transport
from jaxsys.core import tree
from jaxsys.core.stages import cut_at
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import Overheads, costs_of
from jaxsys.pipeline.execute import Worker
from jaxsys.pipeline.job import Setup
from jaxsys.pipeline.memory import Limits, stage_memory
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.renumbered import Renumbered
from jaxsys.pipeline.turn import StepInfo
from jaxsys.pipeline.work import Work

FEW = 16.0  # ratio of the trial with top-k
_FIRST_STEP = 10**9  # far from the numbers of the steps of a run over the same transport
_STEPS = 10**7  # more than a trial plan makes
_FITS = 3  # what a device's overheads take depends on its speed, which is fitted too
_SURE = 0.03  # weight of codecs taking what they take alone, beside relative errors of the trials
KINDS = ("forward", "backward", "update")


def trial_plans(n_nodes: int, devices: int, micro_batches: int) -> tuple[Plan, ...]:
    """Plan trials over all devices: even parts, dense and with top-k, and uneven parts with top-k.

    The last one has the devices in reverse, so that a slow device is told from a heavy stage, and
    parts of 3/2 and 1/2 in turns, since a part of one block does not take a third of one of three.

    Args:
      n_nodes: of the graph, at least one for each device.
      devices: how many there are.
      micro_batches: in a step.

    >>> [plan.boundaries for plan in trial_plans(10, 4, 2)]
    [(2, 5, 8), (2, 5, 8), (4, 5, 9)]
    """
    even = [i / devices for i in range(1, devices)]
    uneven = [(i + i % 2 / 2) / devices for i in range(1, devices)]
    cuts, others = (
        tuple(
            min(max(round(n_nodes * share), i), n_nodes - devices + i)
            for i, share in enumerate(shares, start=1)
        )
        for shares in (even, uneven)
    )
    row, links = tuple(range(devices)), devices - 1
    dense = Plan(n_nodes, cuts, row, micro_batches=micro_batches)
    few = (FEW,) * links
    topk = Plan(n_nodes, cuts, row, micro_batches=micro_batches, codec="topk",
                ratios_forward=few, ratios_backward=few)  # fmt: skip
    if not links:
        return (dense,)
    return dense, topk, replace(topk, boundaries=others, devices=row[::-1])


class Trials:
    """Steps of trial plans, together with all other devices.

    Args:
      setup: the model.
      plans: over all devices.
      transport: joins them; process i is device i.
      granularity: of the graph's nodes.
      optimizer: of the run; updates are not timed without.
      throttle: of this device.

    >>> Trials.__name__  # compiles a model: see tests/pipeline/test_profile.py
    'Trials'
    """

    def __init__(
        self,
        setup: Setup,
        plans: Sequence[Plan],
        transport: Transport,
        granularity: str,
        optimizer: optax.GradientTransformation | None,
        throttle: Throttle,
    ) -> None:
        shapes, specs = setup.shapes(), setup.micro_batch(plans[0].micro_batches)
        cuts = {plan.boundaries for plan in plans}
        staged = {c: cut_at(setup.loss_fn, shapes, specs, c, granularity=granularity) for c in cuts}
        update = optax.sgd(0.0) if optimizer is None else optimizer
        self._workers = []
        for plan in plans:
            end = Renumbered(transport, plan.devices)
            own = staged[plan.boundaries]
            self._workers.append(Worker(own, plan, end, update, shapes, throttle=throttle))
        self._states = []
        for i, worker in enumerate(self._workers):
            params = _own_params(setup, frozenset(worker.paths.values()))
            self._states.append(worker.init(params)._replace(step=_FIRST_STEP + i * _STEPS))
        self._data, self._updates = setup.data(0), optimizer is not None
        self._infos: list[list[StepInfo]] = [[] for _ in plans]
        for i in range(len(plans)):
            self._step(i)  # compiles

    def _step(self, i: int) -> StepInfo:
        self._states[i], info = self._workers[i].step(self._states[i], self._data)
        return info

    def step(self) -> None:
        """Make two steps of each plan; the first one brings its data into the caches."""
        for i, infos in enumerate(self._infos):
            self._step(i)
            infos.append(self._step(i))

    def seconds(self) -> Float[np.ndarray, "K 5"]:
        """Give the median seconds of a forward, a backward and an update, busy and late share."""
        found = [
            (
                *span_seconds(infos),
                np.median([info.busy_s / info.step_s for info in infos]),
                np.median([info.late_share for info in infos]),
            )
            for infos in self._infos
        ]
        return np.array(found) * [1.0, 1.0, float(self._updates), 1.0, 1.0]


def _own_params(setup: Setup, own: frozenset[str]) -> dict[str, Array]:
    """Make those parameters that are named, and no others."""
    return jax.jit(
        lambda key: {k: x for k, x in tree.flatten(setup.init(key)).items() if k in own}
    )(jax.random.key(0))


def span_seconds(infos: Sequence[StepInfo]) -> list[float]:
    """Give the median seconds of one forward, one backward and the update of a worker's steps.

    >>> from jaxsys.core.timeline import Span
    >>> spans = (Span("forward 0", "stage 0", 0, 2), Span("backward 0", "stage 0", 2, 5),
    ...          Span("update", "stage 0", 5, 6))
    >>> span_seconds([StepInfo(0.5, 6.0, 6.0, 0.0, {}, spans)])
    [2.0, 3.0, 1.0]
    """
    spans = [span for info in infos for span in info.spans]
    return [
        float(np.median([s.end_s - s.start_s for s in spans if s.name.split()[0] == kind]))
        for kind in KINDS
    ]


class Fitted(NamedTuple):
    """What a profile becomes by its trials.

    Attributes:
      speed_flops_s: of each device, in a worker, [P].
      overheads: in a worker, on a device of the first one's speed.
      worst: largest relative error of a forward or backward of the trials after the fit.

    >>> Fitted(np.ones(1), Overheads(), 0.02).worst
    0.02
    """

    speed_flops_s: Float[np.ndarray, "P"]
    overheads: Overheads
    worst: float


def fit_trials(
    work: Work,
    fleet: Fleet,
    overheads: Overheads,
    plans: Sequence[Plan],
    measured: Float[np.ndarray, "P K 5"],
) -> Fitted:
    """Fit speeds, calls, codecs and messages to the seconds of trial steps.

    ``t_s = φ_p Σ node + c + e codec + h bytes`` for forwards and backwards of all stages s on their
    devices p under all plans, c, e and h the same for all devices but for their speed, none
    negative, relative errors squared; e is drawn to 1 where trials do not tell. A trial counts by
    the share of its step that devices are at work: where they mostly wait for links, stages take
    longer, and it matters less.

    Reconstruction: ours; the paper's estimator regresses short probes of single operators.

    Args:
      work: of the model, on devices of the fleet's speeds.
      fleet: with the speeds that programs reach alone.
      overheads: of the codecs alone.
      plans: of the trials.
      measured: of each device under each plan, what `Trials` gives.

    Returns:
      The fit.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> from jaxsys.pipeline.work import chain_work
    >>> plans, fleet = trial_plans(4, 2, 2), even_fleet([3.0, 3.0])
    >>> even, one, three = ([f, b, 0.0, 1.0, 0.1] for f, b in ((1.5, 2.5), (1.0, 1.5), (2.0, 3.5)))
    >>> taken = np.array([[even, even, one], [even, even, three]])
    >>> fitted = fit_trials(chain_work([1] * 4, [64] * 3), fleet, Overheads(3.0), plans, taken)
    >>> fitted.speed_flops_s.round(2).tolist(), round(fitted.overheads.forward_call_s, 2)
    ([2.0, 2.0], 0.5)
    """
    from scipy.optimize import nnls

    speeds = fleet.speed_flops_s.copy()
    target = np.concatenate(
        [measured[list(plan.devices), k, :2].T.reshape(-1) for k, plan in enumerate(plans)]
    )
    weight = np.repeat(measured[:, :, 3].mean(0), 2 * len(fleet))
    found, worst = np.ones(len(fleet) + 3), 0.0
    for _ in range(_FITS):
        now = at_speeds(fleet, speeds)
        scaled = overheads._replace(reference_flops_s=float(speeds[0]))
        columns = np.concatenate([_columns(work, now, scaled, plan) for plan in plans])
        relative = columns / target[:, None]
        prior = np.zeros((1, relative.shape[1]))
        prior[0, -2] = _SURE
        weighted = np.concatenate([relative * weight[:, None], prior])
        found, _ = nnls(weighted, np.append(weight, _SURE))
        worst = float(np.abs(relative @ found - 1).max())
        speeds = speeds / np.maximum(found[: len(fleet)], 1e-3)
    call, codec, host = found[-3:].tolist()
    slower = speeds[0] / speeds
    edges = np.array([0, *plans[0].boundaries, plans[0].n_nodes])
    n_bytes = stage_memory(work, edges[:-1], edges[1:], 0, Limits(copies=1.0))
    # First stages send no cotangents.
    late = float(np.median([share for share in measured[:, :, 4].flat if share > 0] or [0.0]))
    update = (measured[:, :, 2].mean(1) / slower).sum() / max(float(n_bytes.sum()), 1.0)
    return Fitted(
        speeds,
        Overheads(
            float(speeds[0]), call, call, overheads.encode_s_per_byte * codec,
            overheads.encode_s_per_kept * codec, overheads.decode_s_per_byte * codec,
            float(update), host, late,
        ),
        worst,
    )  # fmt: skip


def at_speeds(fleet: Fleet, speed_flops_s: Float[np.ndarray, "P"]) -> Fleet:
    """Give a fleet's devices other speeds.

    >>> from jaxsys.pipeline.fleets import even_fleet
    >>> at_speeds(even_fleet([3, 6]), np.array([1.0, 2.0])).speed_flops_s.tolist()
    [1.0, 2.0]
    """
    pairs = zip(fleet.devices, speed_flops_s, strict=True)
    return replace(fleet, devices=tuple(replace(d, speed_flops_s=float(s)) for d, s in pairs))


def _columns(work: Work, fleet: Fleet, overheads: Overheads, plan: Plan) -> np.ndarray:
    """Give the parts that each forward, then each backward, is a sum of, [2 S, P + 3]."""
    nothing = Overheads(overheads.reference_flops_s)

    def seconds(beside: Overheads) -> np.ndarray:
        costs = costs_of(work, fleet, plan, overheads=beside)
        return np.array([*costs.forward_s, *costs.backward_s])

    bare = seconds(nothing)
    own = np.tile(np.eye(len(fleet))[list(plan.devices)], (2, 1)) * bare[:, None]
    beside = [
        nothing._replace(forward_call_s=1.0, backward_call_s=1.0),
        overheads._replace(message_s_per_byte=0.0),
        nothing._replace(message_s_per_byte=1.0),
    ]
    return np.concatenate([own, *((seconds(each) - bare)[:, None] for each in beside)], axis=1)
