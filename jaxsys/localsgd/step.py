"""Partial local SGD as a pure step over one replica, with collectives over a named axis.

The same function runs under `jax.vmap`, `jax.pmap` and `jax.shard_map`
(`jaxsys.core.mesh.over_replicas`). Axis letters: `R` replicas, `L` layers in backward order.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsys.core.mesh import REPLICA
from jaxsys.core.tree import Layer
from jaxsys.localsgd.exchange import (
    agree,
    average_moments,
    blend,
    exchange,
    gather,
    join,
    message_key,
    messages,
    split,
)
from jaxsys.localsgd.strategy import Strategy

LossFn = Callable[[Any, Any], jax.Array]


class State(NamedTuple):
    """Everything that one replica carries from step to step; Orbax saves all of it.

    Attributes:
      params: the parameters.
      opt_state: state of the inner optimiser, local to the replica.
      anchors: per layer the value last agreed on, flat; empty unless changes are sent.
      residuals: per layer what the codec lost, flat; empty without error feedback.
      outer: per layer the state of the outer optimiser; empty without one.
      in_flight: per layer the mean that was sent but not yet used, flat; empty without delay.
      step: number of steps taken, int32.
      key: data (uint32) of the codec's random key, equal on all replicas.
    """

    params: Any
    opt_state: Any
    anchors: tuple[jax.Array, ...]
    residuals: tuple[jax.Array, ...]
    outer: tuple[Any, ...]
    in_flight: tuple[jax.Array, ...]
    step: jax.Array
    key: jax.Array


class Info(NamedTuple):
    """Diagnostics of one step; they never feed back.

    Attributes:
      loss: the replica's own loss before the step, scalar.
      update_norm: 2-norm of the inner update of each layer, [L]; not finite where it went wrong.
    """

    loss: jax.Array
    update_norm: jax.Array


class Due(NamedTuple):
    """What one step has to do; hashable, so that equal steps share one compiled program.

    Attributes:
      send: layers whose exchange starts in this step, in backward order.
      apply: layers whose agreed value is used at the end of this step.
      moments: globs of the optimiser moments that are averaged in this step.
    """

    send: tuple[int, ...]
    apply: tuple[int, ...]
    moments: tuple[str, ...] = ()


class Algorithm(NamedTuple):
    """A pair of pure functions.

    Attributes:
      init: ``(params, key) -> State``.
      step: ``(state, batch, due) -> (State, Info)``; ``due`` is static.
    """

    init: Callable[[Any, jax.Array], State]
    step: Callable[[State, Any, Due], tuple[State, Info]]


def due(phases: Sequence[tuple[int, ...]], strategy: Strategy, step: int) -> Due:
    """Look up what step number ``step`` (from 0) has to do.

    >>> due(((0,), (1, 2)), Strategy(period=2), 3)
    Due(send=(1, 2), apply=(1, 2), moments=())
    """
    arrived = step - strategy.delay
    return Due(
        send=tuple(phases[step % len(phases)]),
        apply=tuple(phases[arrived % len(phases)]) if arrived >= 0 else (),
        moments=tuple(g for g, every in strategy.moment_periods if (step + 1) % every == 0),
    )


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    layers: Sequence[Layer],
    strategy: Strategy,
    key: jax.Array,
) -> State:
    """Make the state of one replica before its first step.

    >>> s = init_state({"w": jnp.ones(2)}, optax.sgd(0.1), [Layer("w", (0,))], Strategy(),
    ...                jax.random.key(0))
    >>> int(s.step), s.anchors
    (0, ())
    """
    leaves = jax.tree.leaves(params)
    vectors = tuple(join(leaves, [layer]) for layer in layers)
    outer = strategy.outer_optimizer()
    return State(
        params=params,
        opt_state=optimizer.init(params),
        anchors=vectors if strategy.anchored else (),
        residuals=tuple(jnp.zeros_like(v) for v in vectors) if strategy.error_feedback else (),
        outer=() if outer is None else tuple(outer.init(v) for v in vectors),
        in_flight=tuple(jnp.zeros_like(v) for v in vectors) if strategy.delay else (),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
    )


def update_norms(updates: Any, layers: Sequence[Layer]) -> jax.Array:
    """Compute the 2-norm of each layer of an update, [L].

    >>> update_norms({"w": jnp.array([3.0, 4.0])}, [Layer("w", (0,))]).tolist()
    [5.0]
    """
    leaves = jax.tree.leaves(updates)
    squares = [jnp.sum(jnp.square(u.astype(jnp.float32))) for u in leaves]
    return jnp.sqrt(jnp.stack([sum(squares[i] for i in layer.leaves) for layer in layers]))


def partial_local_sgd(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    layers: Sequence[Layer],
    strategy: Strategy,
    *,
    axis_name: str = REPLICA,
) -> Algorithm:
    """Build partial local SGD for any loss, any optax optimiser and any strategy.

    In step r every replica k takes its own optimiser step; of the layers l that are due,

        w_{r+1}^{k,l} = mean_j(w_r^{j,l}) - U_k(g_r^{k,l})        (rule ``pre``, released code)
        w_{r+1}^{k,l} = mean_j(w_r^{j,l} - U_j(g_r^{j,l}))        (rule ``post``, textbook)

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      optimizer: any optax transformation; its state stays local.
      layers: groups of leaves in backward order (`find_layers`).
      strategy: what is averaged, when and how.
      axis_name: the axis over which replicas are mapped.

    Returns:
      An `Algorithm`; ``due`` is a static argument of its step.

    Reference: DreamDDP, arXiv 2502.11058, partial local SGD.

    >>> from jaxsys.core.mesh import over_replicas
    >>> alg = partial_local_sgd(lambda p, x: jnp.sum((p["w"] - x) ** 2), optax.sgd(0.5),
    ...                         [Layer("w", (0,))], Strategy(period=1, rule="post", launch="after"))
    >>> s = alg.init({"w": jnp.zeros(1)}, jax.random.key(0))
    >>> s = jax.tree.map(lambda x: jnp.stack([x, x]), s)
    >>> step = over_replicas(lambda s, x: alg.step(s, x, Due((0,), (0,))), "vmap")
    >>> step(s, jnp.array([[1.0], [3.0]]))[0].params["w"].tolist()
    [[2.0], [2.0]]
    """

    def init(params: Any, key: jax.Array) -> State:
        return init_state(params, optimizer, layers, strategy, key)

    def send(
        state: State, leaves: list[Any], grads: list[Any], groups: Sequence[tuple[int, ...]]
    ) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
        """Exchange the messages of this step; returns the mean and residual of each layer."""
        means, residuals = {}, {}
        for group in groups:
            members = [layers[i] for i in group]
            vector = join(leaves, members)
            if strategy.launch == "gated" and strategy.sends == "parameters":
                own_grads = [grads[i] for layer in members for i in layer.leaves]
                vector, _ = jax.lax.optimization_barrier((vector, own_grads))
            mean, lost = exchange(
                vector,
                gather(state.anchors, group),
                gather(state.residuals, group),
                message_key(state.key, state.step, group),
                codec=strategy.codec,
                axis_name=axis_name,
            )
            sizes = [sum(leaves[j].size for j in layer.leaves) for layer in members]
            means.update(scatter(mean, group, sizes))
            if lost is not None:
                residuals.update(scatter(lost, group, sizes))
        return means, residuals

    def step(state: State, batch: Any, due: Due) -> tuple[State, Info]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
        treedef = jax.tree.structure(state.params)
        grad_leaves = jax.tree.leaves(grads)
        groups = messages(strategy, due.send)
        if strategy.sends == "gradients":
            means, residuals = send(state, grad_leaves, grad_leaves, groups)
            for i, vector in means.items():
                for j, leaf in split(vector, grad_leaves, [layers[i]]).items():
                    grad_leaves[j] = leaf
            grads = jax.tree.unflatten(treedef, grad_leaves)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        opt_state = average_moments(opt_state, due.moments, axis_name)
        info = Info(loss, update_norms(updates, layers))
        local = optax.apply_updates(state.params, updates)
        if strategy.sends == "gradients":
            state = state._replace(residuals=_put(state.residuals, residuals))
            return state._replace(params=local, opt_state=opt_state, step=state.step + 1), info
        source = jax.tree.leaves(state.params if strategy.rule == "pre" else local)
        means, residuals = send(state, source, grad_leaves, groups)
        state = state._replace(
            opt_state=opt_state, residuals=_put(state.residuals, residuals), step=state.step + 1
        )
        return apply_due(state, means, updates, due, layers, strategy), info

    return Algorithm(init, step)


def apply_due(
    state: State,
    means: dict[int, jax.Array],
    updates: Any,
    due: Due,
    layers: Sequence[Layer],
    strategy: Strategy,
) -> State:
    """Finish a step: local updates everywhere, agreed values in the layers that are due.

    Args:
      state: the state, with the parameters from before the step.
      means: mean of each layer whose exchange has just ended, flat.
      updates: the inner optimiser's updates.
      due: what this step has to do.
      layers: layers in backward order.
      strategy: the update rule, outer optimiser and mixing.

    Returns:
      The state after the step.

    >>> s = init_state({"w": jnp.ones(1)}, optax.sgd(1.0), [Layer("w", (0,))], Strategy(),
    ...                jax.random.key(0))
    >>> done = apply_due(s, {0: jnp.full(1, 5.0)}, {"w": jnp.full(1, -1.0)}, Due((0,), (0,)),
    ...                  [Layer("w", (0,))], Strategy())
    >>> done.params["w"].tolist()
    [4.0]
    """
    leaves, treedef = jax.tree.flatten(state.params)
    update_leaves = jax.tree.leaves(updates)
    new = [p + u for p, u in zip(leaves, update_leaves, strict=True)]
    in_flight = list(_put(state.in_flight, means)) if state.in_flight else means
    anchors, outer = list(state.anchors), list(state.outer)
    for i in due.apply:
        anchor = anchors[i] if anchors else None
        agreed, outer_state = agree(in_flight[i], anchor, outer[i] if outer else (), strategy)
        if anchors:
            anchors[i] = agreed
        if outer:
            outer[i] = outer_state
        for j, leaf in split(agreed, leaves, [layers[i]]).items():
            new[j] = blend(leaf, leaves[j], update_leaves[j], strategy).astype(leaves[j].dtype)
    return state._replace(
        params=jax.tree.unflatten(treedef, new),
        anchors=tuple(anchors),
        outer=tuple(outer),
        in_flight=tuple(in_flight) if state.in_flight else (),
    )


def scatter(vector: jax.Array, group: Sequence[int], sizes: Sequence[int]) -> dict[int, jax.Array]:
    """Cut the message of a group into the vectors of its layers.

    Args:
      vector: the layers' vectors end to end.
      group: their numbers.
      sizes: elements of each.

    >>> {i: v.tolist() for i, v in scatter(jnp.arange(3), (4, 2), (1, 2)).items()}
    {4: [0], 2: [1, 2]}
    """
    cuts = np.cumsum(sizes)[:-1].tolist()
    return dict(zip(group, jnp.split(vector, cuts), strict=True))


def _put(vectors: tuple[jax.Array, ...], values: dict[int, jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(values.get(i, v) for i, v in enumerate(vectors))
