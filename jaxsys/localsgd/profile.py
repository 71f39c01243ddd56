"""Measure a running job: seconds of each layer's forward, backward and message; fit the link.

All workers measure at the same time, since they share cores and links, and the slowest worker
counts, because every exchange waits for it.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.cost import LinearCost, PoorFitError, fit_linear
from jaxsys.core.errors import UserError
from jaxsys.core.graph import StagedLoss
from jaxsys.core.tree import Layer
from jaxsys.localsgd.codec import codec_bytes
from jaxsys.localsgd.host import Overlapped
from jaxsys.localsgd.plan import SyncPlan
from jaxsys.localsgd.step import Due, State
from jaxsys.localsgd.strategy import Strategy, make_plan
from jaxsys.localsgd.wire import Wire

_ATTEMPTS = 4


class Weather(NamedTuple):
    """What a step that sends nothing, and an exchange of the whole model, take at one time.

    Attributes:
      compute_s: seconds of a step of the slowest worker.
      exchange_s: seconds of the exchange, the median of the workers.
      jitter_s: see `Profile`.
    """

    compute_s: float
    exchange_s: float
    jitter_s: float = 0.0


class Compute(NamedTuple):
    """Times of a step that sends nothing.

    Attributes:
      forward_s: seconds of each layer's forward pass, nearest the loss first, [L].
      backward_s: seconds of each layer's backward pass, in the same order, [L].
      tail_s: seconds of the optimiser step.
      jitter_s: see `Profile`.
    """

    forward_s: np.ndarray
    backward_s: np.ndarray
    tail_s: float
    jitter_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a plan is made from: measured times of one job, layers in backward order.

    Attributes:
      layers: names.
      elements: number of parameters of each layer.
      forward_s: seconds of each layer's forward pass.
      backward_s: seconds of each layer's backward pass.
      tail_s: seconds of the optimiser step.
      link: seconds of one exchange as a line over the bytes that a worker sends.
      workers: number of workers R.
      note: where it was measured.
      jitter_s: seconds that a step loses if its workers wait for each other in every step and not
        only now and then: the mean of the slowest worker's step, less the step of the worker that
        is slowest over several.

    >>> p = Profile(("w",), (10,), (1.0,), (2.0,), 0.1, LinearCost(0.01, 0.001, 1.0, 0.0, 3), 4)
    >>> p.plan(Strategy(period=1)).compute_s
    3.1
    """

    layers: tuple[str, ...]
    elements: tuple[int, ...]
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    tail_s: float
    link: LinearCost
    workers: int
    note: str = ""
    jitter_s: float = 0.0

    def message_s(self, elements: int, codec: str = "f32") -> float:
        """Predict the seconds of one exchange of that many parameters."""
        return float(self.link(codec_bytes(elements, codec, self.workers)))

    def plan(
        self, strategy: Strategy, phases: tuple[tuple[int, ...], ...] | None = None
    ) -> SyncPlan:
        """Plan a strategy with these times, or predict the given phases with them."""
        forward_s, backward_s = sum(self.forward_s), sum(self.backward_s)
        compute_s = forward_s + backward_s + self.tail_s
        slower = 1.0 + self.jitter_s / compute_s if strategy.waits_always and compute_s else 1.0
        return make_plan(
            strategy,
            [slower * s for s in self.backward_s],
            [self.message_s(n, strategy.codec) for n in self.elements],
            forward_s=slower * forward_s,
            tail_s=slower * self.tail_s,
            merged_s=self.message_s(sum(self.elements), strategy.codec),
            phases=phases,
        )

    def rescaled(self, weather: "Weather") -> "Profile":
        """Scale all compute and all communication to what a run met on the way.

        >>> link = LinearCost(0.0, 0.001, 1.0, 0.0, 3)
        >>> p = Profile(("w",), (10,), (1.0,), (2.0,), 0.0, link, 2)
        >>> p.rescaled(Weather(6.0, 2 * p.message_s(10))).plan(Strategy(period=1)).compute_s
        6.0
        """
        compute_s = sum(self.forward_s) + sum(self.backward_s) + self.tail_s
        slower = weather.compute_s / compute_s
        whole_s = self.message_s(sum(self.elements))
        link = weather.exchange_s / whole_s if whole_s else 1.0  # one worker alone sends nothing
        return dataclasses.replace(
            self,
            forward_s=tuple(slower * s for s in self.forward_s),
            backward_s=tuple(slower * s for s in self.backward_s),
            tail_s=slower * self.tail_s,
            jitter_s=weather.jitter_s,
            link=dataclasses.replace(
                self.link,
                alpha_s=link * self.link.alpha_s,
                beta_s_per_unit=link * self.link.beta_s_per_unit,
            ),
        )

    def to_json(self) -> str:
        """Write the profile as one JSON object."""
        return json.dumps(dataclasses.asdict(self) | {"link": self.link.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """Read a profile, checking it as a foreign file.

        Raises:
          UserError: it is not what `to_json` wrote.
        """
        try:
            found = json.loads(text)
            fields = {f.name for f in dataclasses.fields(cls)}
            if set(found) - fields or not fields - {"note", "jitter_s"} <= set(found):
                raise KeyError(", ".join(sorted(set(found) ^ fields)))
            vectors = {
                name: tuple(kind(x) for x in found.pop(name))
                for name, kind in (
                    ("layers", str),
                    ("elements", int),
                    ("forward_s", float),
                    ("backward_s", float),
                )
            }
            if len({len(v) for v in vectors.values()}) != 1:
                raise ValueError("its lists have different lengths")
            link = LinearCost.from_dict(found.pop("link"))
            return cls(**vectors, link=link, **found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"the profile cannot be read ({error}); expected the JSON object that a run wrote "
                "as profile.json; pass that file"
            ) from error


def measure_compute(
    run: Overlapped,
    staged: StagedLoss,
    params: Any,
    batch: Any,
    wire: Wire,
    *,
    rounds: int = 12,
    on_round: Callable[[int], None] = lambda _: None,
) -> "Compute":
    """Time steps that send nothing, on all workers at once: the very programs that a run uses.

    Workers meet before every fourth step only, as they do in a period, so that what one loses to
    its neighbours on a shared core it can make up.

    Args:
      run: a strategy's functions.
      staged: the loss, cut at its layers.
      params: this worker's parameters.
      batch: a batch of the size that will be used.
      wire: to meet and to compare workers.
      rounds: steps that count, a multiple of 4; four more come first. A layer's share is its
        median over them.
      on_round: called with the number of each round, for progress.

    Returns:
      The times, scaled so that a step takes the median of the slowest worker's fours.
    """
    state = run.init(params, jax.random.key(0))
    n = len(staged.stages)
    steps, forwards = [], []
    for k in range(4 + rounds):
        on_round(k)
        if k % 4 == 0:
            wire.gather(np.zeros(1, np.float32))
        state, info = run.step(state, batch, Due((), ()))
        spans = [s.end_s - s.start_s for s in info.spans]
        steps.append([*spans[: n + 1], sum(spans[n + 1 :])])  # forward, L backwards, the tail
    for _ in range(6):
        marks = [time.perf_counter()]

        def after(_: int, value: Any, marks: list[float] = marks) -> None:
            jax.block_until_ready(value)
            marks.append(time.perf_counter())

        staged.forward(params, batch, after_stage=after)
        forwards.append(np.diff(marks))
    everyone = wire.gather(np.array(steps[4:], np.float32))  # [R, rounds, L + 2]
    shares = np.median(everyone, axis=(0, 1))
    whole = everyone.sum(-1)  # [R, rounds]
    fours = whole.reshape(len(whole), -1, 4).mean(-1).max(0)
    times = shares * (np.median(fours) / shares.sum())
    forward = np.median(wire.gather(np.array(forwards[2:], np.float32)), axis=(0, 1))
    forward_s = forward[::-1] * (times[0] / forward.sum())
    jitter_s = float(whole.max(0).mean() - fours.mean())
    return Compute(forward_s, times[1 : n + 1], float(times[-1]), jitter_s)


def measure_link(
    wire: Wire,
    smallest: int,
    largest: int,
    *,
    repeats: int = 3,
    on_round: Callable[[int], None] = lambda _: None,
) -> tuple[LinearCost, list[tuple[float, float]]]:
    """Time exchanges of six sizes through the wire and fit seconds = α + β·bytes.

    The sizes span the messages of a run. On a fast link, where even the largest would drown in
    noise, it is doubled until an exchange takes 0.1 s or holds 16 MiB. The line goes through the
    median of each size, since a stalled exchange says nothing about the link. Every timed exchange
    follows close behind one that is not timed, as messages of a run do: what a link lets pass at
    once after a pause would flatter it.

    Args:
      wire: this process's wire.
      smallest: parameters in the smallest message.
      largest: parameters in the largest.
      repeats: exchanges of each size; one more, not counted, compiles.
      on_round: called with the number of each exchange, for progress.

    Returns:
      The fitted line over bytes sent by a worker, and the points (bytes, seconds).

    Raises:
      PoorFitError: the times do not lie on a line.
    """
    count = 0

    def exchange_s(elements: int) -> float:
        nonlocal count
        on_round(count)
        count += 1
        return _exchange_s(wire, elements, smallest)

    exchange_s(largest)
    while largest < 2**22 and exchange_s(largest) < 0.1:
        largest *= 2
        exchange_s(largest)
    sizes = np.geomspace(min(smallest, largest // 16), largest, 6).astype(int).tolist()
    for elements in sizes[:-1]:
        exchange_s(elements)
    points: list[tuple[float, float]] = []
    for attempt in range(_ATTEMPTS):  # more points help where the machine is busy
        for elements in sizes:
            sent = float(codec_bytes(elements, "f32", wire.workers))
            points += [(sent, exchange_s(elements)) for _ in range(repeats)]
        medians = {b: float(np.median([s for n, s in points if n == b])) for b, _ in points}
        try:
            return fit_linear(list(medians), list(medians.values())), points
        except PoorFitError:
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def _exchange_s(wire: Wire, elements: int, first: int) -> float:
    """Return the seconds of an exchange right behind one of `first`; the same on all workers."""
    wire.gather(np.zeros(1, np.float32))
    key_data = jax.random.key_data(jax.random.key(0))
    behind = [  # no layer has such a number, and sizes share no program
        wire.send((10**6 + n,), "f32", [jnp.ones(n)], None, None, key_data, 0)
        for n in (first, elements)
    ]
    message = behind[-1].result()
    return float(np.median(wire.gather(np.array([message.end_s - message.start_s], np.float32))))


def measure_weather(
    run: Overlapped, state: State, batches: Iterable[Any], wire: Wire
) -> tuple[State, Weather]:
    """Time a turn that sends nothing, then one exchange of the whole model.

    A run takes this turn between those of its strategies, so that predictions can be held against
    the machine as it was then, not as it was while the profile was measured.

    Args:
      run: a strategy's functions.
      state: its state, trained on without any synchronisation.
      batches: one per step.
      wire: to meet and to compare workers.

    Returns:
      The new state and the times, equal on all workers.
    """
    wire.gather(np.zeros(1, np.float32))
    steps = []
    for batch in batches:
        state, info = run.step(state, batch, Due((), ()))
        steps.append(info.step_s)
    everyone = wire.gather(np.array(steps, np.float32))  # [R, steps]
    compute_s = float(everyone.mean(1).max())
    elements = sum(int(x.size) for x in jax.tree.leaves(state.params))
    exchange_s = _exchange_s(wire, elements, max(1, elements // 50))
    return state, Weather(compute_s, exchange_s, float(everyone.max(0).mean()) - compute_s)


def make_profile(
    layers: Sequence[Layer],
    params: Any,
    compute: Compute,
    link: LinearCost,
    workers: int,
    note: str = "",
) -> Profile:
    """Put measured times together.

    >>> cost = LinearCost(0.01, 0.001, 1.0, 0.0, 3)
    >>> times = Compute(np.ones(1), np.ones(1), 0.5)
    >>> make_profile([Layer("w", (0,))], [np.ones(3)], times, cost, 2).elements
    (3,)
    """
    sizes = [int(x.size) for x in jax.tree.leaves(params)]
    return Profile(
        layers=tuple(layer.name for layer in layers),
        elements=tuple(sum(sizes[i] for i in layer.leaves) for layer in layers),
        forward_s=tuple(map(float, compute.forward_s)),
        backward_s=tuple(map(float, compute.backward_s)),
        tail_s=compute.tail_s,
        jitter_s=compute.jitter_s,
        link=link,
        workers=workers,
        note=note,
    )
