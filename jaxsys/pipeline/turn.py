"""One step of one worker: its actions in order, and the messages between them."""

import itertools
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.cluster.throttle import Throttle
from jaxsys.cluster.transport import Key, Transport
from jaxsys.core.split import SplitBackward, split_backward
from jaxsys.core.stages import StagedLoss
from jaxsys.core.timeline import Span
from jaxsys.pipeline import codec, messages
from jaxsys.pipeline.clock import Clock
from jaxsys.pipeline.messages import BACKWARD, FORWARD, LOSS, MEAN, SHARED, Route
from jaxsys.pipeline.plan import Plan

Wanted = tuple[int, Key]  # a message that is waited for: its sender and key
Run = Generator[Wanted, None, Any]


class State(NamedTuple):
    """What a worker keeps from step to step.

    Attributes:
        params: path to each parameter leaf that its stages read.
        opt_state: path to the optimiser's state for that leaf alone.
        residuals: what compression has taken from gradients so far, by link and value.
        step: steps made.

    >>> State({}, {}, {}, 3).step
    3
    """

    params: dict[str, Any]
    opt_state: dict[str, Any]
    residuals: dict[str, Any]
    step: int


class StepInfo(NamedTuple):
    """What one worker's step gave and took.

    Attributes:
        loss: mean loss over all micro-batches of all chains, before the update.
        step_s: seconds from the start of the step to its end.
        busy_s: seconds of them at work on programs.
        wait_s: seconds of them waiting for messages.
        sent_bytes: receiving rank to bytes handed to the transport, headers included.
        spans: what ran when, in seconds since the start; streams are ``stage 2`` and so on.
        late_share: of a backward that came after its message had left, the median; 0 where a
            message waits for its values by itself, without a throttle.

    >>> StepInfo(0.5, 1.0, 0.6, 0.4, {1: 80}, ()).wait_s
    0.4
    """

    loss: float
    step_s: float
    busy_s: float
    wait_s: float
    sent_bytes: dict[int, int]
    spans: tuple[Span, ...]
    late_share: float = 0.0


class Part(NamedTuple):
    """One worker's part of a plan.

    Attributes:
        staged: the cut loss.
        plan: the plan.
        transport: to the other workers.
        chain: index of the chain that the worker belongs to.
        worker: its index in the chain.
        stages: that it runs.
        paths: path of each leaf that it holds, by leaf index.
        shared: leaves that other workers of the chain hold too, to the first stage of each.
        routes_in: stage to the routes that end there.
        routes_out: stage to the routes that begin there.
        loss_stage: stage that makes the loss.
        error_feedback: whether cotangents carry over what compression took.
        splits: stage to its backward in two programs, once made.
        throttle: makes this worker as slow as the device that it stands for.

    >>> Part._fields[:3]
    ('staged', 'plan', 'transport')
    """

    staged: StagedLoss
    plan: Plan
    transport: Transport
    chain: int
    worker: int
    stages: tuple[int, ...]
    paths: dict[int, str]
    shared: dict[int, tuple[int, ...]]
    routes_in: dict[int, list[Route]]
    routes_out: dict[int, list[Route]]
    loss_stage: int
    error_feedback: bool
    splits: dict[int, SplitBackward]
    throttle: Throttle


class Turn:
    """One step of one worker; its methods give generators that pause before they wait.

    Args:
        part: the worker's part of the plan.
        state: before the step.
        batches: data leaves of each micro-batch.

    Attributes:
        residuals: of compression, after what has been sent so far.
        clock: times so far.

    >>> Turn.forward.__name__
    'forward'
    """

    def __init__(self, part: Part, state: State, batches: list[list[Any]]) -> None:
        self.part, self.plan, self.staged = part, part.plan, part.staged
        self.rank = part.transport.rank
        self.leaves = {j: state.params[path] for j, path in part.paths.items()}
        self.residuals, self.number = dict(state.residuals), state.step
        self.batches = batches
        self.clock = Clock(part.throttle)
        self.before = dict(part.transport.sent_bytes)
        self.local: dict[Key, list[Any]] = {}  # between stages of this worker
        self.pullbacks: dict[tuple[int, int], Any] = {}
        self.rests: dict[tuple[int, int], Any] = {}
        self.grads: dict[int, list[Any]] = {}
        self.losses: dict[int, Any] = {}

    # Messages between stages.

    def _wire(self, route: Route, backward: bool) -> tuple[tuple[int, ...], float]:
        if backward:
            return route.returned, route.ratio_backward
        return route.names, route.ratio_forward

    def _key(self, route: Route, backward: bool, i: int) -> Key:
        ends = (route.target, route.source) if backward else (route.source, route.target)
        return (BACKWARD if backward else FORWARD, self.number, i, *ends)

    def _rank(self, stage: int) -> int:
        return messages.rank_of(self.plan, self.part.chain, stage)

    def _specs(self, route: Route, backward: bool) -> list[tuple[Any, ...]]:
        names, ratio = self._wire(route, backward)
        return [
            codec.part_specs(route.specs[v].shape, route.specs[v].dtype, ratio, self.plan.codec)
            for v in names
        ]

    def expect(self, route: Route, backward: bool, i: int) -> None:
        """Let a message's bytes move before it is asked for."""
        source = self._rank(route.target if backward else route.source)
        if source != self.rank:
            specs = list(itertools.chain(*self._specs(route, backward)))
            self.part.transport.expect(source, self._key(route, backward, i), specs)

    def post(self, route: Route, backward: bool, i: int, values: dict[int, Any]) -> list[Any]:
        """Send values, encoded; gives what the stage's work is not done without."""
        names, ratio = self._wire(route, backward)
        key = self._key(route, backward, i)
        to = self._rank(route.source if backward else route.target)
        found = [_plain(values[v]) for v in names]
        if to == self.rank:
            self.local[key] = found
            return found
        feedback = backward and self.part.error_feedback
        parts: list[Any] = []
        for v, x in zip(names, found, strict=True):
            slot = f"{route.target}.{route.source}.{v}" if feedback else None
            parts += self.encode(x, ratio, slot)
        self.send(to, key, parts)
        return parts

    def send(self, to: int, key: Key, arrays: Sequence[Any]) -> None:
        """Hand a message over, not before a slower device would have made it."""
        if self.part.throttle.share < 1:
            jax.block_until_ready(arrays)
            self.part.throttle.pay()
            self.clock.sent = time.perf_counter()
        self.part.transport.send(to, key, arrays)

    def done(self, name: str, s: int, arrays: Any) -> None:
        """Wait for what stage s made, as long as a slower device would take, and note the time."""
        jax.block_until_ready(arrays)
        self.part.throttle.pay()
        self.clock.worked(name, s)

    def encode(self, x: Any, ratio: float, slot: str | None) -> tuple[Any, ...]:
        """Encode a value, with error feedback where it has a slot and loses anything."""
        kind = codec.form(x.shape, x.dtype, ratio, self.plan.codec).kind
        if slot is None or kind == "dense":
            return codec.encode(x, ratio, self.plan.codec)
        residual = self.residuals[slot] if slot in self.residuals else jnp.zeros_like(x)
        parts, self.residuals[slot] = codec.feedback(x, residual, ratio, self.plan.codec)
        return parts

    def take(self, route: Route, backward: bool, i: int) -> Run:
        """Wait for a message and decode it: name to value."""
        names, ratio = self._wire(route, backward)
        key = self._key(route, backward, i)
        source = self._rank(route.target if backward else route.source)
        if source == self.rank:
            return dict(zip(names, self.local.pop(key), strict=True))
        specs = self._specs(route, backward)
        parts = yield from self.receive(source, key, list(itertools.chain(*specs)))
        taken = iter(parts)
        found = {}
        for v, spec in zip(names, specs, strict=True):
            own = tuple(itertools.islice(taken, len(spec)))
            like = route.specs[v]
            found[v] = codec.decode(own, like.shape, like.dtype, ratio, self.plan.codec)
        return found

    def receive(self, source: int, key: Key, specs: Sequence[Any]) -> Run:
        """Pause, then wait for a message."""
        yield source, key
        found = self.part.transport.receive(source, key, specs)
        self.clock.waited()
        return found

    # The three actions of a schedule.

    def forward(self, s: int, i: int) -> Run:
        """Run stage s forward on micro-batch i."""
        stage = self.staged.stages[s]
        env = dict(self.staged.constants)
        env.update(zip(self.staged.data_names, self.batches[i], strict=True))
        for route in self.part.routes_in[s]:
            found = yield from self.take(route, False, i)
            env.update((v, _as_made(x, stage.shapes[v])) for v, x in found.items())
        outs, pullback = stage.forward(
            [self.leaves[j] for j in stage.leaves],
            [env[v] for v in stage.upstream],
            [env[v] for v in stage.other],
        )
        values = dict(zip(stage.outputs, outs, strict=True))
        sent = [self.post(route, False, i, values) for route in self.part.routes_out[s]]
        if s == self.part.loss_stage:
            self.losses[i] = values[self.staged.loss_name]
        self.pullbacks[s, i] = pullback
        self.done(f"forward {i}", s, (outs, sent))

    def backward(self, s: int, i: int) -> Run:
        """Run stage s backward; under ``zero-bubble`` as far as the cotangents of its inputs."""
        stage = self.staged.stages[s]
        seeds: dict[int, Any] = {}
        for route in self.part.routes_out[s]:
            if route.returned:
                found = yield from self.take(route, True, i)
                for v, x in found.items():
                    seeds[v] = seeds[v] + x if v in seeds else x
        if s == self.part.loss_stage:
            seeds[self.staged.loss_name] = jnp.ones_like(self.losses[i])
        cotangents = [_seed(seeds.get(v), stage.shapes[v]) for v in stage.outputs]
        pullback = self.pullbacks.pop((s, i))
        if self.plan.order == "zero-bubble":
            if s not in self.part.splits:
                self.part.splits[s] = split_backward(pullback, cotangents)
            upstream, self.rests[s, i] = self.part.splits[s].inputs(pullback, cotangents)
            done: Any = self.rests[s, i]
        else:
            leaf_grads, upstream = stage.backward(pullback, cotangents)
            done = self._accumulate(s, leaf_grads)
        values = dict(zip(stage.upstream, upstream, strict=True))
        sent = [self.post(r, True, i, values) for r in self.part.routes_in[s] if r.returned]
        self.done(f"backward {i}", s, (done, upstream, sent))

    def weight(self, s: int, i: int) -> Run:
        """Make the gradients of stage s that its backward left for later."""
        leaf_grads = self.part.splits[s].weights(self.rests.pop((s, i)))
        self.done(f"weight {i}", s, self._accumulate(s, leaf_grads))
        yield from ()

    def _accumulate(self, s: int, grads: Iterable[Any]) -> list[Any]:
        before = self.grads.get(s)
        self.grads[s] = list(grads) if before is None else added(before, list(grads))
        return self.grads[s]

    # What follows the last action.

    def sums(self) -> dict[int, Any]:
        """Add up each leaf's gradient over this worker's stages."""
        total: dict[int, Any] = {}
        for s in self.part.stages:
            for j, grad in zip(self.staged.stages[s].leaves, self.grads[s], strict=True):
                total[j] = total[j] + grad if j in total else grad
        return total

    def shared(self, grads: dict[int, Any]) -> Run:
        """Add the gradients of the leaves that other workers of the chain read too."""
        sent: dict[int, tuple[Any, ...]] = {}
        for j, stages in self.part.shared.items():
            ratio = messages.shared_ratio(self.plan, stages)
            slot = f"leaf.{self.part.paths[j]}.{self.part.worker}"
            sent[j] = self.encode(grads[j], ratio, slot)
            for other in self._sharers(stages):
                key = (SHARED, self.number, j, self.part.worker, other)
                self.send(self._rank(other), key, sent[j])
        for j, stages in self.part.shared.items():
            like = grads[j]
            how = (messages.shared_ratio(self.plan, stages), self.plan.codec)
            specs = codec.part_specs(like.shape, like.dtype, *how)
            total = None
            for stage in stages:  # all add up in one order
                other = stage % self.plan.n_workers
                parts = sent[j]
                if other != self.part.worker:
                    key = (SHARED, self.number, j, other, self.part.worker)
                    parts = yield from self.receive(self._rank(other), key, specs)
                part = codec.decode(tuple(parts), like.shape, like.dtype, *how)
                total = part if total is None else total + part
            grads[j] = total
        return {self.part.paths[j]: grad for j, grad in grads.items()}

    def _sharers(self, stages: Sequence[int]) -> list[int]:
        return [w for w in (s % self.plan.n_workers for s in stages) if w != self.part.worker]

    def mean_over_chains(self, grads: dict[str, Any]) -> Run:
        """Add the gradients of all chains: chunk r is added up by chain r, which tells the sum."""
        flat, treedef = jax.tree.flatten(grads)
        n, me = len(self.plan.chains), self.part.chain
        rows = _to_rows(flat, n)
        row = jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)
        ranks = [r * self.plan.n_workers + self.part.worker for r in range(n)]

        def send(phase: int, r: int, x: Any) -> None:
            self.send(ranks[r], (MEAN, self.number, phase, me, r), [x])

        def receive(phase: int, r: int) -> Run:
            return self.receive(ranks[r], (MEAN, self.number, phase, r, me), [row])

        for r in range(n):
            if r != me:
                send(0, r, rows[r])
        total = None
        for r in range(n):
            part = rows[me] if r == me else jnp.asarray((yield from receive(0, r))[0])
            total = part if total is None else total + part
        for r in range(n):
            if r != me:
                send(1, r, total)
        done: list[Any] = []
        for r in range(n):
            done.append(total if r == me else (yield from receive(1, r))[0])
        return jax.tree.unflatten(treedef, _from_rows(done, flat))

    def tell_loss(self) -> Run:
        """Let every process know the loss."""
        n_chains, n_workers = len(self.plan.chains), self.plan.n_workers
        teller = self.part.loss_stage % n_workers
        own = None
        if self.part.worker == teller:
            own = np.mean(
                [np.float32(self.losses[i]) for i in sorted(self.losses)], dtype=np.float32
            )
            for other in range(n_chains * n_workers):
                if other != self.rank:
                    key = (LOSS, self.number, 0, self.part.chain, other)
                    self.part.transport.send(other, key, [own])
        spec, losses = [jax.ShapeDtypeStruct((), np.float32)], []
        for chain in range(n_chains):
            if own is not None and chain == self.part.chain:
                losses.append(own)
                continue
            key = (LOSS, self.number, 0, chain, self.rank)
            found = yield from self.receive(chain * n_workers + teller, key, spec)
            losses.append(found[0])
        return float(np.mean(losses, dtype=np.float32))

    def info(self, loss: float) -> StepInfo:
        """Sum the step up."""
        after, clock = self.part.transport.sent_bytes, self.clock
        sent = {peer: n - self.before[peer] for peer, n in after.items() if n > self.before[peer]}
        step_s = time.perf_counter() - clock.began
        late = float(np.median(clock.late)) if clock.late else 0.0
        spans = tuple(clock.spans)
        return StepInfo(loss, step_s, clock.busy_s, clock.wait_s, sent, spans, late)


@jax.jit
def added(a: list[Any], b: list[Any]) -> list[Any]:
    """Add gradients to those of earlier micro-batches.

    >>> [x.tolist() for x in added([jnp.ones(2)], [jnp.arange(2.0)])]
    [[1.0, 2.0]]
    """
    return [x + y for x, y in zip(a, b, strict=True)]


def _plain(x: Any) -> Any:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _as_made(x: Any, spec: Any) -> Any:
    if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(x, impl=str(spec.dtype).removeprefix("key<")[:-1])
    return x


def _seed(cotangent: Any, spec: Any) -> Any:
    if not jnp.issubdtype(spec.dtype, jnp.inexact):
        return np.zeros(spec.shape, jax.dtypes.float0)
    return jnp.zeros(spec.shape, spec.dtype) if cotangent is None else cotangent


@jax.jit
def _concatenated(flat: list[Any]) -> Any:
    return jnp.concatenate([x.reshape(-1).astype(jnp.result_type(*flat)) for x in flat])


def _to_rows(flat: list[Any], n: int) -> Any:
    vector = _concatenated(flat)
    return jnp.pad(vector, (0, -vector.size % n)).reshape(n, -1)


def _from_rows(rows: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    vector = jnp.concatenate([jnp.asarray(row) for row in rows])
    found, begin = [], 0
    for x in like:
        found.append(vector[begin : begin + x.size].reshape(x.shape).astype(x.dtype))
        begin += x.size
    return found
