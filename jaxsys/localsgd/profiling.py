"""Measure a running job: seconds of each layer's forward, backward and message; fit the link.

All workers measure at the same time, since they share cores and links, and the slowest worker
counts, because every exchange waits for it.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.cost import LinearCost, PoorFitError, fit_linear
from jaxsys.core.stages import StagedLoss
from jaxsys.localsgd.codec import codec_bytes
from jaxsys.localsgd.host import Overlapped
from jaxsys.localsgd.profile import Compute, Weather
from jaxsys.localsgd.step import Due, State
from jaxsys.localsgd.wire import Message, Wire

_ATTEMPTS = 4


def measure_compute(
    run: Overlapped,
    staged: StagedLoss,
    params: Any,
    batch: Any,
    wire: Wire,
    *,
    rounds: int = 12,
    on_round: Callable[[int], None] = lambda _: None,
) -> Compute:
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
) -> tuple[LinearCost, list[tuple[float, float]], str]:
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
      The line over bytes sent by a worker, the points (bytes, seconds), and, where these lie on no
      line, the reason, the line being then one through zero with their median rate.
    """
    if wire.workers == 1:
        return LinearCost(0.0, 0.0, 1.0, 0.0, 0), [], ""  # one worker alone sends nothing
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
    reason = ""
    for _ in range(_ATTEMPTS):  # more points help where the machine is busy
        for elements in sizes:
            sent = float(codec_bytes(elements, "f32", wire.workers))
            points += [(sent, exchange_s(elements)) for _ in range(repeats)]
        medians = {b: float(np.median([s for n, s in points if n == b])) for b, _ in points}
        try:
            return fit_linear(list(medians), list(medians.values())), points, ""
        except PoorFitError as error:
            reason = str(error)
    rate = float(np.median([s / b for b, s in points]))
    return LinearCost(0.0, rate, 0.0, 1.0, len(points)), points, reason


def measure_sharing(
    run: Overlapped,
    params: Any,
    batch: Any,
    wire: Wire,
    message_s: Callable[[int], float],
    step_s: float,
    *,
    pairs: int = 3,
) -> float:
    """Compare steps behind which the wire is kept busy with steps behind which it is idle.

    Four of the ones and four of the others take turns, so that neither sees another machine.

    Args:
      run: a strategy's functions.
      params: this worker's parameters.
      batch: a batch of the size that will be used.
      wire: to keep busy.
      message_s: parameters in a message to its seconds, equal on all workers.
      step_s: seconds of an idle step, equal on all workers.
      pairs: turns of each.

    Returns:
      Seconds lost per second of communication, 0 to 1: the median over the pairs.
    """
    if wire.workers == 1:
        return 0.0  # one worker alone sends nothing
    state = run.init(params, jax.random.key(0))
    elements = max(1, sum(int(x.size) for x in jax.tree.leaves(params)) // 8)
    count = int(min(256, np.ceil(4 * step_s / max(message_s(elements), 1e-9))))
    rows = []
    for k in range(2 * pairs + 1):  # the first compiles the message
        wire.gather(np.zeros(1, np.float32))
        busy = k % 2 == 0
        under_way = [_send(wire, elements) for _ in range(count * busy)]
        begin_s = time.perf_counter()
        for _ in range(4):
            state, _ = run.step(state, batch, Due((), ()))
        end_s = time.perf_counter()
        spans = [(m.start_s, min(m.end_s, end_s)) for m in (f.result() for f in under_way)]
        rows.append((end_s - begin_s, sum(max(0.0, b - max(a, begin_s)) for a, b in spans)))
    took, overlap = wire.gather(np.array(rows, np.float32)).transpose(2, 1, 0)  # [rounds, R]
    idle_s, busy_s = took[1::2].max(1), took[2::2].max(1)
    lost = (busy_s - idle_s) / np.maximum(np.median(overlap[2::2], axis=1), 1e-9)
    return float(np.clip(np.median(lost), 0.0, 1.0))


def _send(wire: Wire, elements: int) -> Future[Message]:
    """Send that many ones, as a group with a number that no layer has and no other size shares."""
    key_data = jax.random.key_data(jax.random.key(0))
    return wire.send((10**6 + elements,), "f32", [jnp.ones(elements)], None, None, key_data, 0)


def _exchange_s(wire: Wire, elements: int, first: int) -> float:
    """Return the seconds of an exchange right behind one of `first`; the same on all workers."""
    wire.gather(np.zeros(1, np.float32))
    behind = [_send(wire, n) for n in (first, elements)]
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
