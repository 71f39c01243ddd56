"""A loss cut into stages, each a forward and a backward program of its own.

A stage is a run of the main equations of a traced loss (`jaxsys.core.traced`) with what these need.
Stages of the same shape (the blocks of a transformer) share their programs. Gradients equal those
of the whole: a stage's backward pass applies its `jax.vjp`, cotangents of a value read by several
stages are added up, and so are the gradients of a parameter that several stages read.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core import tree
from jaxsys.core.errors import UserError
from jaxsys.core.graph import blocks
from jaxsys.core.programs import Piece, Pullback, programs, signature
from jaxsys.core.traced import Graph, leaf_starts, pieces, place, trace_loss

_NONE: Mapping[int, Any] = MappingProxyType({})


class Stage(NamedTuple):
    """One piece of a cut loss; values go by the numbers that they have in all of it.

    Attributes:
      leaves: indices of the parameter leaves that it reads.
      forward: ``(leaf values, upstream values, other values) -> (outputs, pullback)``, compiled.
      backward: ``(pullback, cotangents of outputs) -> (leaf gradients, upstream cotangents)``.
      upstream: names of the differentiable values that earlier stages hand over.
      other: names of integer values, data and constants.
      outputs: names of the values that it defines for later stages, and of the loss.
      completes: indices of the leaves whose gradient is complete once this backward has run.
      reads: ``(name, source stage)`` of every value from an earlier stage, differentiable ones
        (`upstream`) first.
      writes: name of each value that later stages read, to those stages in order.
      data: names of the data leaves that it needs; ``StagedLoss.data_names`` has their order.
      shapes: shape and dtype of every value of ``reads`` and ``writes``, and of the loss.
      owns: indices of the leaves whose first use is here.
      borrows: indices of the leaves that an earlier stage owns (tied parameters).
      constants: arrays that the loss closes over, by name, where this stage reads them.
    """

    leaves: tuple[int, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    upstream: tuple[int, ...]
    other: tuple[int, ...]
    outputs: tuple[int, ...]
    completes: tuple[int, ...]
    reads: tuple[tuple[int, int], ...] = ()
    writes: Mapping[int, tuple[int, ...]] = _NONE
    data: tuple[int, ...] = ()
    shapes: Mapping[int, jax.ShapeDtypeStruct] = _NONE
    owns: tuple[int, ...] = ()
    borrows: tuple[int, ...] = ()
    constants: Mapping[int, Any] = _NONE

    def run(
        self, leaves: Mapping[int, Any], values: Mapping[int, Any]
    ) -> tuple[dict[int, Any], Pullback]:
        """Run the stage forward on named values, as a process of its own does.

        Args:
          leaves: parameter leaves by index; those of ``leaves`` are read.
          values: by name, what earlier stages handed over (``reads``) and data (``data``).

        Returns:
          Its outputs by name, and what `pull` needs.
        """
        env = {**self.constants, **values}
        outs, pullback = self.forward(
            [leaves[j] for j in self.leaves],
            [env[v] for v in self.upstream],
            [env[v] for v in self.other],
        )
        return dict(zip(self.outputs, outs, strict=True)), pullback

    def pull(
        self, pullback: Any, cotangents: Mapping[int, Any]
    ) -> tuple[dict[int, Any], dict[int, Any]]:
        """Run the stage backward on named cotangents.

        Args:
          pullback: from `run`.
          cotangents: by name, of its outputs; those that are missing are zero. Of a value with
            several readers it is the sum.

        Returns:
          Gradients by leaf index, and cotangents by name of ``upstream``.
        """
        seeds = [
            cotangents[v] if v in cotangents else zero_cotangent(self.shapes[v])
            for v in self.outputs
        ]
        leaf_grads, upstream = self.backward(pullback, seeds)
        return (
            dict(zip(self.leaves, leaf_grads, strict=True)),
            dict(zip(self.upstream, upstream, strict=True)),
        )


class Tape(NamedTuple):
    """What a forward pass leaves for the backward pass: the loss and one pullback a stage."""

    loss: jax.Array
    pullbacks: list[Any]


class StagedLoss(NamedTuple):
    """A loss cut into stages; see `cut` and `cut_at`.

    Attributes:
      stages: in forward order.
      constants: arrays that the loss closes over, by name.
      data_names: names of the data leaves, in flattening order.
      loss_name: name of the loss.
    """

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
        leaves = dict(enumerate(jax.tree.leaves(params)))
        values = dict(zip(self.data_names, jax.tree.leaves(data), strict=True))
        pullbacks = []
        for i, stage in enumerate(self.stages):
            outs, pullback = stage.run(leaves, values)
            values.update(outs)
            pullbacks.append(pullback)
            if after_stage is not None:
                after_stage(i, list(outs.values()))
        return Tape(values[self.loss_name], pullbacks)

    def backward(self, tape: Tape) -> Iterator[tuple[int, dict[int, jax.Array]]]:
        """Run the stages backward, last first, yielding as gradients become complete.

        Yields:
          ``(stage index, {leaf index: complete gradient})`` after the dispatch of each stage.
        """
        cotangents: dict[int, Any] = {self.loss_name: jnp.ones_like(tape.loss)}
        grads: dict[int, Any] = {}
        for i in reversed(range(len(self.stages))):
            stage = self.stages[i]
            seeds = {v: cotangents.pop(v) for v in stage.outputs if v in cotangents}
            leaf_grads, upstream = stage.pull(tape.pullbacks[i], seeds)
            tape.pullbacks[i] = None  # residuals are freed as soon as they are used
            _add(grads, leaf_grads)
            _add(cotangents, upstream)
            yield i, {j: grads.pop(j) for j in stage.completes}


def _add(total: dict[int, Any], more: Mapping[int, Any]) -> None:
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def zero_cotangent(value: Any) -> Any:
    """Make the cotangent of a value that nothing depends on.

    Args:
      value: array or `jax.ShapeDtypeStruct`.

    Returns:
      Zeros, of dtype float0 for integers.

    >>> zero_cotangent(jax.ShapeDtypeStruct((2,), "float32")).tolist()
    [0.0, 0.0]
    """
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.zeros(value.shape, value.dtype)
    return np.zeros(value.shape, jax.dtypes.float0)


def cut(
    loss_fn: Callable[..., Any], params: Any, data: tuple[Any, ...], groups: Sequence[Sequence[int]]
) -> StagedLoss:
    """Cut a loss into one stage per group of leaves, where each group is first used on data.

    Args:
      loss_fn: ``loss_fn(params, *data) -> scalar``; any JAX function.
      params: tree of arrays or of `jax.ShapeDtypeStruct`; shapes and dtypes are fixed by it.
      data: the other arguments of the loss.
      groups: leaf indices per stage, in order of first use (`jaxsys.core.traced.first_use`),
        covering every leaf.

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
    graph = trace_loss(loss_fn, params, *data)
    first = leaf_starts(graph)
    unused = [j for j in range(graph.n_leaves) if first[j] == len(graph.kinds)]
    if unused:
        raise UserError(
            f"the loss does not use parameter leaves {unused}; expected every leaf to reach the "
            "loss; remove them from the tree or freeze them"
        )
    starts = [min(first[j] for j in group) for group in groups]
    if any(later < earlier for earlier, later in itertools.pairwise(starts)):
        raise UserError(
            f"the groups start at equations {starts}; expected the order of first use; sort the "
            "groups with first_use"
        )
    return _stage(graph, starts, [False] * len(starts))


def cut_at(
    loss_fn: Callable[..., Any],
    params: Any,
    data: tuple[Any, ...],
    boundaries: Sequence[int],
    *,
    granularity: str = "layer",
    remat: bool | Sequence[bool] = False,
) -> StagedLoss:
    """Cut a loss between the nodes of its operation graph (`jaxsys.core.graph.dag`).

    Nothing is compiled before it runs: a process that runs one stage compiles that stage's two
    programs.

    Args:
      loss_fn: ``loss_fn(params, *data) -> scalar``; any JAX function without side effects.
      params: tree of arrays or of `jax.ShapeDtypeStruct`; shapes and dtypes are fixed by it.
      data: the other arguments of the loss: one micro-batch.
      boundaries: the nodes with which stages 1, 2, … begin, ascending.
      granularity: what a node is; see `jaxsys.core.graph.dag`.
      remat: for all stages or for each: keep only the stage's inputs, and run its forward pass
        again before its backward pass.

    Returns:
      The `StagedLoss`, one stage more than there are boundaries.

    Raises:
      UserError: boundaries out of range or out of order, more stages than nodes, or what `dag`
        refuses.

    >>> p = [jnp.ones((2, 3)), jnp.ones((3, 2)), jnp.ones((2, 1))]
    >>> def loss(p, x):
    ...     return jnp.sum(x @ p[0] @ p[1] @ p[2])
    >>> staged = cut_at(loss, p, (jnp.ones((1, 2)),), (1,))
    >>> [stage.owns for stage in staged.stages]
    [(0,), (1, 2)]
    """
    graph = trace_loss(loss_fn, params, *data, apart=True)
    _, begins = blocks(graph, tree.paths(params), granularity)
    marks = [0, *map(int, boundaries), len(begins)]
    if len(marks) - 1 > len(begins):
        raise UserError(
            f"got {len(marks) - 1} stages for {len(begins)} nodes; every stage needs a node; use "
            "fewer stages or a finer granularity"
        )
    if any(b <= a for a, b in itertools.pairwise(marks)):
        raise UserError(
            f"the boundaries are {marks[1:-1]}; expected ascending nodes between 1 and "
            f"{len(begins) - 1}; correct them"
        )
    n_stages = len(marks) - 1
    again = [remat] * n_stages if isinstance(remat, bool) else [bool(x) for x in remat]
    if len(again) != n_stages:
        raise UserError(
            f"remat has {len(again)} entries for {n_stages} stages; expected one for each or one "
            "for all; correct it"
        )
    return _stage(graph, [begins[k] for k in marks[:-1]], again)


def cut_scopes(
    loss_fn: Callable[..., Any], params: Any, data: tuple[Any, ...], names: Mapping[str, str]
) -> tuple[StagedLoss, tuple[str, ...]]:
    """Cut a loss wherever the `jax.named_scope` changes, to run each part of a model alone.

    Args:
      loss_fn: ``loss_fn(params, *data) -> scalar``.
      params: tree of arrays or of `jax.ShapeDtypeStruct`; shapes and dtypes are fixed by it.
      data: the other arguments of the loss.
      names: scope to its stages' label; what is in no such scope stays with what comes before it.

    Returns:
      The `StagedLoss`, and the label of each stage ("" where the loss begins outside of all).

    Raises:
      UserError: what `jaxsys.core.traced.trace_loss` refuses.

    >>> def loss(p, x):
    ...     with jax.named_scope("up"):
    ...         x = x @ p
    ...     with jax.named_scope("sum"):
    ...         return jnp.sum(x)
    >>> cut_scopes(loss, jnp.ones((2, 3)), (jnp.ones((1, 2)),), {"up": "a", "sum": "b"})[1]
    ('a', 'b')
    """
    graph = trace_loss(loss_fn, params, *data)
    starts, labels = [], []
    for i, (eqn, kind) in enumerate(zip(graph.program.equations, graph.kinds, strict=True)):
        label = names.get(eqn.scope, "")
        if kind == "main" and (not labels or label not in ("", labels[-1])):
            starts.append(i)
            labels.append(label)
    return _stage(graph, starts, [False] * len(starts)), tuple(labels)


def _stage(graph: Graph, starts: Sequence[int], remat: Sequence[bool]) -> StagedLoss:
    where, avals = place(graph, starts), graph.program.avals
    home = {v: where[i] for v, i in graph.maker.items()}
    parts = pieces(graph, starts)
    crossing = {
        v: [k for k, part in enumerate(parts) if home[v] != k and _needs(graph, part, v)]
        for v in sorted(set().union(*graph.reads) & set(home))
    }
    readers = {v: tuple(stages) for v, stages in crossing.items() if stages}
    (loss_name,) = graph.program.results
    wanted = {*readers, loss_name}
    found = [_piece(graph, part, k, home, wanted) for k, part in enumerate(parts)]
    owner: dict[int, int] = {}
    for k, piece in enumerate(found):
        for leaf in piece.leaves:
            owner.setdefault(leaf, k)
    known: dict[Any, Any] = {}
    stages = []
    for k, piece in enumerate(found):
        key = (remat[k], signature(piece, avals))
        if key not in known:
            known[key] = programs(piece, remat=remat[k])
        received = [v for v in (*piece.upstream, *piece.other) if v in home]
        named = dict.fromkeys((*received, *piece.outputs))
        stages.append(
            Stage(
                leaves=piece.leaves,
                forward=known[key][0],
                backward=known[key][1],
                upstream=piece.upstream,
                other=piece.other,
                outputs=piece.outputs,
                completes=tuple(sorted(j for j in piece.leaves if owner[j] == k)),
                reads=tuple((v, home[v]) for v in received),
                writes={v: readers[v] for v in piece.outputs if v in readers},
                data=tuple(v for v in piece.other if v in graph.data),
                shapes={v: jax.ShapeDtypeStruct(avals[v].shape, avals[v].dtype) for v in named},
                owns=tuple(sorted(j for j in piece.leaves if owner[j] == k)),
                borrows=tuple(sorted(j for j in piece.leaves if owner[j] != k)),
                constants={
                    v: graph.program.constants[v]
                    for v in piece.other
                    if v in graph.program.constants
                },
            )
        )
    return StagedLoss(tuple(stages), graph.program.constants, graph.data, loss_name)


def _needs(graph: Graph, part: Sequence[int], value: int) -> bool:
    return any(value in graph.program.equations[i].reads for i in part)


def _piece(
    graph: Graph, part: Sequence[int], stage: int, home: Mapping[int, int], wanted: set[int]
) -> Piece:
    """List a stage's leaves, differentiable inputs, other inputs and outputs, in order of use."""
    equations = tuple(graph.program.equations[i] for i in part)
    made = {v for e in equations for v in e.outputs}
    inputs = dict.fromkeys(v for e in equations for v in e.reads if v not in made)
    return Piece(
        equations,
        tuple(v for v in inputs if v < graph.n_leaves),
        tuple(v for v in inputs if v in home and v in graph.differentiable),
        tuple(
            v
            for v in inputs
            if v >= graph.n_leaves and not (v in home and v in graph.differentiable)
        ),
        tuple(v for e in equations for v in e.outputs if v in wanted and home.get(v) == stage),
    )
