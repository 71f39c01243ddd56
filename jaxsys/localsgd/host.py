"""Partial local SGD with real overlap on CPU: the host schedules compute and communication.

One XLA:CPU program runs its collectives in line with its compute, so the step is cut into programs:
a forward and a backward per layer on the compute device, one exchange per message on the wire
(`jaxsys.localsgd.wire`). The mathematics is that of `jaxsys.localsgd.step`; on accelerators use
that module's single program instead.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from jaxsys.core import stages
from jaxsys.core.mesh import REPLICA
from jaxsys.core.timeline import Span
from jaxsys.core.tree import Layer
from jaxsys.localsgd.exchange import average_moments, gather, messages, split
from jaxsys.localsgd.step import (
    Due,
    LossFn,
    State,
    apply_due,
    init_state,
    scatter,
    update_norms,
)
from jaxsys.localsgd.strategy import Strategy
from jaxsys.localsgd.wire import Message, Wire

COMPUTE, WIRE = "compute", "communication"


class HostInfo(NamedTuple):
    """Diagnostics of one step of `overlapped_local_sgd`.

    Attributes:
      loss: this worker's loss before the step.
      update_norm: 2-norm of the inner update of each layer, [L].
      step_s: seconds from the start of the step until its new parameters were ready.
      wait_s: seconds for which the step did nothing but wait for communication.
      comm_s: seconds for which the wire was at work on the messages that this step used.
      spans: what ran when, seconds since the step began.
    """

    loss: jax.Array
    update_norm: jax.Array
    step_s: float
    wait_s: float
    comm_s: float
    spans: tuple[Span, ...]


class Overlapped(NamedTuple):
    """The functions of a host-scheduled run.

    Attributes:
      init: ``(params, key) -> State`` of this worker.
      step: ``(state, batch, due) -> (State, HostInfo)``.
      settle: ``state -> state`` with every message still under way put into ``in_flight``; call it
        before saving.
      params: ``state ->`` this worker's parameters.
    """

    init: Callable[[Any, jax.Array], State]
    step: Callable[[State, Any, Due], tuple[State, HostInfo]]
    settle: Callable[[State], State]
    params: Callable[[State], Any]


class _Clock:
    """Record the spans of one step, each from the end of the one before."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.spans: list[Span] = []
        self.wait_s = 0.0

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.spans.append(Span(name, COMPUTE, self.last - self.began, now - self.began))
        self.last = now

    def waited(self) -> None:
        now = time.perf_counter()
        self.wait_s += now - self.last
        self.last = now

    def sent(self, name: str, message: Message) -> None:
        span = Span(name, WIRE, message.start_s - self.began, message.end_s - self.began)
        self.spans.append(span)


class _Mailbox:
    """The messages under way, by layer."""

    def __init__(self, wire: Wire, layers: Sequence[Layer], strategy: Strategy, sizes: list[int]):
        self.wire, self.layers, self.strategy = wire, layers, strategy
        self.sizes = [sum(sizes[j] for j in layer.leaves) for layer in layers]
        self.under_way: dict[int, tuple[tuple[int, ...], Future[Message]]] = {}

    def post(self, group: tuple[int, ...], leaves: Sequence[Any], state: State) -> None:
        future = self.wire.send(
            group,
            self.strategy.codec,
            [leaves[j] for i in group for j in self.layers[i].leaves],
            gather(state.anchors, group),
            gather(state.residuals, group),
            state.key,
            state.step,
        )
        self.under_way.update((i, (group, future)) for i in group)

    def collect(
        self, wanted: Sequence[int], state: State, clock: _Clock | None = None
    ) -> tuple[dict[int, jax.Array], State]:
        """Wait for the messages that hold the wanted layers; returns each layer's mean."""
        means: dict[int, jax.Array] = {}
        residuals = list(state.residuals)
        for i in wanted:
            if i not in self.under_way:
                continue
            group, future = self.under_way[i]
            message = future.result()
            sizes = [self.sizes[member] for member in group]
            means |= scatter(message.mean, group, sizes)
            if message.lost is not None:
                for member, lost in scatter(message.lost, group, sizes).items():
                    residuals[member] = lost
            for member in group:
                del self.under_way[member]
            if clock is not None:
                name = self.layers[group[0]].name if len(group) == 1 else "all layers"
                clock.sent(f"sync {name}", message)
        return means, state._replace(residuals=tuple(residuals))


def overlapped_local_sgd(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    layers: Sequence[Layer],
    strategy: Strategy,
    staged: stages.StagedLoss,
    wire: Wire,
) -> Overlapped:
    """Build partial local SGD for one worker process, with communication hidden behind compute.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      optimizer: any optax transformation.
      layers: groups of leaves in backward order.
      strategy: what is averaged, when and how.
      staged: the loss cut at these layers (`cut_loss`); strategies may share one.
      wire: this process's wire; strategies may share one.

    Returns:
      The functions of the run; results equal those of `partial_local_sgd` up to rounding.

    >>> import jax.numpy as jnp
    >>> from jaxsys.core.mesh import device_pair, replica_mesh
    >>> first = jax.devices()[:1]
    >>> one = device_pair()._replace(comm=first[0], comm_mesh=replica_mesh(first))
    >>> loss = lambda p, x: jnp.sum((p["w"] - x) ** 2)
    >>> p, layers = {"w": jnp.zeros(1)}, [Layer("w", (0,))]
    >>> alg = overlapped_local_sgd(loss, optax.sgd(0.5), layers, Strategy(period=1),
    ...                            cut_loss(loss, p, jnp.ones(1), layers), Wire(one))
    >>> s = alg.init(p, jax.random.key(0))
    >>> alg.step(s, jnp.ones(1), Due((0,), (0,)))[0].params["w"].tolist()
    [1.0]
    """
    gradients = strategy.sends == "gradients"

    @jax.jit
    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any, jax.Array, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        local = optax.apply_updates(params, updates) if strategy.rule == "post" else None
        return updates, opt_state, update_norms(updates, layers), local

    @partial(jax.jit, static_argnums=3)
    def finish(state: State, means: Any, updates: Any, due: Due) -> State:
        state = state._replace(step=state.step + 1)
        return apply_due(state, means, updates, due, layers, strategy)

    mailboxes: list[_Mailbox] = []

    def init(params: Any, key: jax.Array) -> State:
        state = init_state(params, optimizer, layers, strategy, key)
        return jax.device_put(state, wire.pair.compute)

    def step(state: State, batch: Any, due: Due) -> tuple[State, HostInfo]:
        leaves, treedef = jax.tree.flatten(state.params)
        if not mailboxes:
            mailboxes.append(_Mailbox(wire, layers, strategy, [x.size for x in leaves]))
        box, clock = mailboxes[0], _Clock()
        if strategy.launch == "eager":
            for group in messages(strategy, due.send):
                box.post(group, leaves, state)
        tape = staged.forward(state.params, batch)
        jax.block_until_ready(tape.loss)
        clock.mark("forward")
        grads: list[Any] = [None] * len(leaves)
        for layer_done in _backward(staged, tape, grads, layers, clock):
            if strategy.launch == "gated" and layer_done in due.send:
                box.post((layer_done,), grads if gradients else leaves, state)
        means: dict[int, jax.Array] = {}
        if gradients:
            if strategy.launch == "after":
                box.post(due.send, grads, state)
            averaged, state = box.collect(due.send, state, clock)
            for i, vector in averaged.items():
                _fill(grads, split(vector, grads, [layers[i]]))
            clock.waited()
        updates, opt_state, norms, local = update(
            jax.tree.unflatten(treedef, grads), state.opt_state, state.params
        )
        jax.block_until_ready(updates)
        clock.mark("tail update")
        if not gradients:
            if strategy.launch == "after" and due.send:
                box.post(due.send, leaves if local is None else jax.tree.leaves(local), state)
            means, state = box.collect(due.apply, state, clock)
            clock.waited()
        if due.moments:
            opt_state = wire.run(_moments(due.moments), opt_state)
        apply = () if gradients else due.apply
        state = finish(state._replace(opt_state=opt_state), means, updates, Due((), apply))
        jax.block_until_ready(state.params)
        clock.mark("tail apply")
        comm_s = sum(s.end_s - s.start_s for s in clock.spans if s.stream == WIRE)
        step_s = clock.last - clock.began
        return state, HostInfo(tape.loss, norms, step_s, clock.wait_s, comm_s, tuple(clock.spans))

    def settle(state: State) -> State:
        if not mailboxes or not state.in_flight:
            return state
        means, state = mailboxes[0].collect(sorted(mailboxes[0].under_way), state)
        return state._replace(
            in_flight=tuple(means.get(i, v) for i, v in enumerate(state.in_flight))
        )

    return Overlapped(init, step, settle, lambda state: state.params)


def cut_loss(
    loss_fn: LossFn, params: Any, batch: Any, layers: Sequence[Layer]
) -> stages.StagedLoss:
    """Cut a loss at its layers, one stage per layer in forward order.

    >>> import jax.numpy as jnp
    >>> loss = lambda p, x: jnp.sum((p["w"] - x) ** 2)
    >>> len(cut_loss(loss, {"w": jnp.zeros(1)}, jnp.ones(1), [Layer("w", (0,))]).stages)
    1
    """
    return stages.cut(loss_fn, params, (batch,), [layer.leaves for layer in reversed(layers)])


def _backward(
    staged: stages.StagedLoss,
    tape: stages.Tape,
    grads: list[Any],
    layers: Sequence[Layer],
    clock: _Clock,
) -> Iterator[int]:
    """Run the backward programs, filling ``grads`` and yielding layers as they become complete.

    One program is always queued behind the one that runs, so the compute device never idles.
    """
    missing = [set(layer.leaves) for layer in layers]

    def arrived(stage: int, done: dict[int, Any]) -> list[int]:
        jax.block_until_ready(done)
        clock.mark(f"backward {layers[len(layers) - 1 - stage].name}")
        _fill(grads, done)
        complete = []
        for i, leaves in enumerate(missing):
            if leaves & done.keys():
                leaves -= done.keys()
                if not leaves:
                    complete.append(i)
        return complete

    ahead: tuple[int, dict[int, Any]] | None = None
    for item in staged.backward(tape):
        if ahead is not None:
            yield from arrived(*ahead)
        ahead = item
    if ahead is not None:
        yield from arrived(*ahead)


_MOMENTS: dict[tuple[str, ...], Callable[[Any], Any]] = {}


def _moments(globs: tuple[str, ...]) -> Callable[[Any], Any]:
    """Give the averaging of some moments one identity, so that its program is compiled once."""
    return _MOMENTS.setdefault(globs, lambda opt_state: average_moments(opt_state, globs, REPLICA))


def _fill(grads: list[Any], done: dict[int, Any]) -> None:
    for j, grad in done.items():
        grads[j] = grad
