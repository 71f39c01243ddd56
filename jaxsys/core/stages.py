"""A loss cut into stages, each a forward and a backward program of its own.

Equations are cut where each group of parameter leaves is first used on data. Every stage becomes
two compiled programs: a forward one that also returns its pullback, and a backward one that applies
it; the pullback of `jax.vjp` is a pytree, so it may leave one program and enter another. Stages of
the same shape (the blocks of a transformer) share their programs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxsys.core import graph as graphs
from jaxsys.core.errors import UserError


class Stage(NamedTuple):
    """One piece of a cut loss.

    Attributes:
      leaves: indices of the parameter leaves that it reads.
      forward: ``(leaf values, upstream values, other values) -> (outputs, pullback)``, compiled.
      backward: ``(pullback, cotangents of outputs) -> (leaf gradients, upstream cotangents)``.
      upstream: names of the differentiable values that earlier stages hand over.
      other: names of integer values, data and constants.
      outputs: names of the values that it defines for later stages.
      completes: indices of the leaves whose gradient is complete once this backward has run.
      reads: ``(name, source stage)`` of every value from an earlier stage, differentiable ones
        (`upstream`) first.
      writes: name of each value that later stages read, to those stages in order.
      data: names of the data leaves that it needs; ``StagedLoss.data_names`` has their order.
      shapes: shape and dtype of every value of ``reads`` and ``writes``, and of the loss.
      owns: indices of the leaves whose first use is here.
      borrows: indices of the leaves that an earlier stage owns (tied parameters).
    """

    leaves: tuple[int, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    upstream: tuple[int, ...]
    other: tuple[int, ...]
    outputs: tuple[int, ...]
    completes: tuple[int, ...]
    reads: tuple[tuple[int, int], ...] = ()
    writes: Mapping[int, tuple[int, ...]] = MappingProxyType({})
    data: tuple[int, ...] = ()
    shapes: Mapping[int, jax.ShapeDtypeStruct] = MappingProxyType({})
    owns: tuple[int, ...] = ()
    borrows: tuple[int, ...] = ()


class Tape(NamedTuple):
    """What a forward pass leaves for the backward pass: one pullback and cotangent kind a stage."""

    loss: jax.Array
    pullbacks: list[Any]
    outputs: list[list[Any]]


class StagedLoss(NamedTuple):
    """A loss cut into stages; see `cut`."""

    stages: tuple[Stage, ...]
    constants: dict[int, Any]
    data_names: tuple[int, ...]
    loss_name: int

    def forward(
        self, params: Any, *data: Any, after_stage: Callable[[int, Any], None] | None = None
    ) -> Tape:
        """Run all stages forward.

        Args:
          params: the tree that the loss was cut for.
          *data: the remaining arguments of the loss.
          after_stage: called with (stage index, outputs) after each dispatch.

        Returns:
          The `Tape`, with the loss.
        """
        leaves = jax.tree.leaves(params)
        env: dict[int, Any] = dict(self.constants)
        env.update(zip(self.data_names, jax.tree.leaves(data), strict=True))
        pullbacks, outputs = [], []
        for i, stage in enumerate(self.stages):
            outs, pullback = stage.forward(
                [leaves[j] for j in stage.leaves],
                [env[v] for v in stage.upstream],
                [env[v] for v in stage.other],
            )
            env.update(zip(stage.outputs, outs, strict=True))
            pullbacks.append(pullback)
            outputs.append(outs)
            if after_stage is not None:
                after_stage(i, outs)
        return Tape(env[self.loss_name], pullbacks, outputs)

    def backward(self, tape: Tape) -> Iterator[tuple[int, dict[int, jax.Array]]]:
        """Run the stages backward, last first, yielding as gradients become complete.

        Yields:
          ``(stage index, {leaf index: complete gradient})`` after the dispatch of each stage.
        """
        cotangents: dict[int, Any] = {self.loss_name: jnp.ones_like(tape.loss)}
        grads: dict[int, Any] = {}
        for i in reversed(range(len(self.stages))):
            stage = self.stages[i]
            seeds = [cotangents.pop(name, None) for name in stage.outputs]
            seeds = [
                _zero_cotangent(out) if seed is None else seed
                for seed, out in zip(seeds, tape.outputs[i], strict=True)
            ]
            leaf_grads, upstream = stage.backward(tape.pullbacks[i], seeds)
            tape.pullbacks[i] = None  # residuals are freed as soon as they are used
            for j, grad in zip(stage.leaves, leaf_grads, strict=True):
                grads[j] = grads[j] + grad if j in grads else grad
            for name, value in zip(stage.upstream, upstream, strict=True):
                cotangents[name] = cotangents[name] + value if name in cotangents else value
            yield i, {j: grads.pop(j) for j in stage.completes}


def _zero_cotangent(value: Any) -> Any:
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.zeros_like(value)
    return np.zeros(value.shape, jax.dtypes.float0)


def cut(
    loss_fn: Callable[..., Any], params: Any, data: tuple[Any, ...], groups: Sequence[Sequence[int]]
) -> StagedLoss:
    """Cut a loss into one stage per group of leaves.

    Args:
      loss_fn: ``loss_fn(params, *data) -> scalar``; any JAX function.
      params: tree of arrays or of `jax.ShapeDtypeStruct`; shapes and dtypes are fixed by it.
      data: the other arguments of the loss.
      groups: leaf indices per stage, in order of first use (`first_use`), covering every leaf.

    Returns:
      The `StagedLoss`. Its gradients equal those of `jax.grad` up to the order of rounding.

    Raises:
      UserError: the loss is not one scalar, or the groups are out of order.

    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> loss = cut(lambda p, x: jnp.sum((x @ p["a"]) @ p["b"]), p, (jnp.ones((1, 2)),), [[0], [1]])
    >>> tape = loss.forward(p, jnp.ones((1, 2)))
    >>> [(i, sorted(grads)) for i, grads in loss.backward(tape)]
    [(1, [1]), (0, [0])]
    """
    graph = graphs._trace(loss_fn, params, data)
    stage_of = graphs._assign(graph, groups)
    names: dict[Any, int] = {}
    for v in [*graph.consts, *graph.data_vars, *(v for e in graph.eqns for v in e.outvars)]:
        names.setdefault(v, len(names))
    leaf_index = {v: i for i, v in enumerate(graph.leaf_vars)}
    defined_in = {
        v: k for e, k in zip(graph.eqns, stage_of, strict=True) if k is not None for v in e.outvars
    }
    loss_var = graph.outvars[0]
    wanted = {loss_var}
    for eqn, k in zip(graph.eqns, stage_of, strict=True):
        if k is not None:
            wanted.update(
                v
                for v in eqn.invars
                if not isinstance(v, jex.Literal) and defined_in.get(v, k) != k
            )
    programs: dict[Any, tuple[Any, Any]] = {}
    touched: dict[int, int] = {}
    pieces = []
    for k in range(len(groups)):
        eqns = [e for e, s in zip(graph.eqns, stage_of, strict=True) if s == k]
        piece = _piece(eqns, leaf_index, graph, wanted)
        for v in piece[0]:
            touched.setdefault(leaf_index[v], k)
        pieces.append((eqns, piece))
    stages = []
    for k, (eqns, (leaf_vars, upstream, other, outputs)) in enumerate(pieces):
        signature = _signature(eqns, leaf_vars, upstream, other, outputs)
        if signature not in programs:
            programs[signature] = _programs(eqns, leaf_vars, upstream, other, outputs)
        forward, backward = programs[signature]
        stages.append(
            Stage(
                leaves=tuple(leaf_index[v] for v in leaf_vars),
                forward=forward,
                backward=backward,
                upstream=tuple(names[v] for v in upstream),
                other=tuple(names[v] for v in other),
                outputs=tuple(names[v] for v in outputs),
                completes=tuple(sorted(j for j, first in touched.items() if first == k)),
            )
        )
    unused = [j for j in range(len(graph.leaf_vars)) if j not in touched]
    if unused:
        raise UserError(
            f"the loss does not use parameter leaves {unused}; expected every leaf to reach the "
            "loss; remove them from the tree or freeze them"
        )
    constants = {names[v]: value for v, value in graph.consts.items()}
    return StagedLoss(
        tuple(stages), constants, tuple(names[v] for v in graph.data_vars), names[loss_var]
    )


def _piece(
    eqns: Sequence[Any], leaf_index: dict[Any, int], graph: graphs._Graph, wanted: set[Any]
) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """List a stage's leaves, differentiable inputs, other inputs and outputs, in order of use."""
    local = {v for e in eqns for v in e.outvars}
    inputs = dict.fromkeys(
        v for e in eqns for v in e.invars if not isinstance(v, jex.Literal) and v not in local
    )
    leaves = [v for v in inputs if v in leaf_index]
    fixed = set(graph.data_vars) | set(graph.consts)
    upstream = [
        v
        for v in inputs
        if v not in leaf_index and v not in fixed and jnp.issubdtype(v.aval.dtype, jnp.inexact)
    ]
    other = [v for v in inputs if v not in leaf_index and v not in upstream]
    outputs = [v for e in eqns for v in e.outvars if v in wanted]
    return leaves, upstream, other, outputs


def _signature(
    eqns: Sequence[Any], leaves: list[Any], upstream: list[Any], other: list[Any], outs: list[Any]
) -> tuple[Any, ...]:
    """Describe a stage up to the names of its variables, so that equal stages share programs."""
    number: dict[Any, int] = {}
    for v in [*leaves, *upstream, *other, *(v for e in eqns for v in e.outvars)]:
        number.setdefault(v, len(number))

    def atom(v: Any) -> str:
        return f"{v.aval.str_short()}:{v.val}" if isinstance(v, jex.Literal) else f"%{number[v]}"

    def inner_consts(eqn: Any) -> list[int]:
        return [id(c) for p in eqn.params.values() for c in getattr(p, "consts", ())]

    body = tuple(
        f"{e.primitive}{e.params}{[atom(v) for v in e.invars]}{inner_consts(e)}" for e in eqns
    )
    shapes = tuple(v.aval.str_short() for v in (*leaves, *upstream, *other))
    kinds = (len(leaves), len(upstream), tuple(number[v] for v in outs))
    return body, shapes, kinds


def _programs(
    eqns: Sequence[Any], leaves: list[Any], upstream: list[Any], other: list[Any], outs: list[Any]
) -> tuple[Any, Any]:
    """Compile a stage's forward-with-pullback and its backward."""

    def forward(leaf_values: Any, upstream_values: Any, other_values: Any) -> Any:
        def run(ls: Any, us: Any) -> list[Any]:
            env = dict(zip(leaves, ls, strict=True))
            env.update(zip(upstream, us, strict=True))
            env.update(zip(other, other_values, strict=True))
            graphs._evaluate(eqns, env)
            return [env[v] for v in outs]

        return jax.vjp(run, leaf_values, upstream_values)

    return jax.jit(forward), jax.jit(lambda pullback, cotangents: pullback(cotangents))
