"""The operation graph of any JAX loss, and the order in which parameter leaves are used.

A function is traced once to a jaxpr and calls of `jit` are inlined; `jaxsys.core.stages` cuts it.

Equations that depend on no data (masks, casts of parameters) belong to the first stage that needs
them, so that casting all parameters at the top of a loss does not defeat the cut.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from jaxsys.core.errors import UserError


class _Graph(NamedTuple):
    """A flat jaxpr with what the cut needs to know of it."""

    eqns: list[Any]
    leaf_vars: list[Any]
    data_vars: list[Any]
    consts: dict[Any, Any]
    outvars: list[Any]
    on_data: set[Any]  # variables that depend on data
    uses: list[set[int]]  # per equation on data: leaves that meet data in it


class Node(NamedTuple):
    """A block of equations that is never cut.

    Attributes:
      name: of the block or the primitive, unique in the graph.
      flops: floating-point operations of one forward pass, loop bodies times their trip counts.
      leaves: indices of the parameter leaves that it reads, in flattening order.
      inputs: indices of the nodes that make what it reads, all smaller than its own.
      output_bytes: bytes that later nodes read, each value once.
      saved_bytes: bytes that its backward pass keeps from its forward pass, parameters left out.

    >>> Node("h.0", 1e6, (0, 1), (), 1024, 4096).name
    'h.0'
    """

    name: str
    flops: float
    leaves: tuple[int, ...]
    inputs: tuple[int, ...]
    output_bytes: int
    saved_bytes: int


class Edge(NamedTuple):
    """A value that one node makes and another reads.

    A value with readers in several later stages is sent once to each stage, so count a pair of
    value and stage once.

    Attributes:
      source: index of the node that makes it.
      target: index of the node that reads it, larger than ``source``.
      n_bytes: its size.
      value: its name, the same in every process that traces the same function.
      differentiable: whether a cotangent of the same size travels back.

    >>> Edge(0, 1, 1024, 7).differentiable
    True
    """

    source: int
    target: int
    n_bytes: int
    value: int
    differentiable: bool = True


class Dag(NamedTuple):
    """The operation graph of a loss, nodes in topological order; a stage is a run of nodes.

    Attributes:
      nodes: the blocks.
      edges: one per value and block that reads it.
      leaf_bytes: size of each parameter leaf, in flattening order.
      leaf_paths: dotted path of each.
      uncounted: names of nodes with a loop of unknown length, whose body is counted once.

    >>> Dag((), (), (4,), ("w",)).leaf_paths
    ('w',)
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    leaf_bytes: tuple[int, ...]
    leaf_paths: tuple[str, ...]
    uncounted: tuple[str, ...] = ()


def _bind(eqn: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Apply one equation: the only place that depends on how JAX stores an equation."""
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]


def _evaluate(eqns: Sequence[Any], env: dict[Any, Any], *, inline: bool = False) -> None:
    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for eqn in eqns:
        values = [read(v) for v in eqn.invars]
        if inline and eqn.primitive.name in ("jit", "pjit", "closed_call"):
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            scope = dict(zip(inner.jaxpr.constvars, inner.consts, strict=True))
            scope.update(zip(inner.jaxpr.invars, values, strict=True))
            _evaluate(inner.jaxpr.eqns, scope, inline=True)
            outs = [v.val if isinstance(v, jex.Literal) else scope[v] for v in inner.jaxpr.outvars]
        else:
            outs = _bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))


def _trace(fn: Callable[..., Any], params: Any, data: tuple[Any, ...]) -> _Graph:
    flat, treedef = jax.tree.flatten((params, data))
    n_leaves = len(jax.tree.leaves(params))

    def flat_fn(*args: Any) -> Any:
        p, d = jax.tree.unflatten(treedef, args)
        return fn(p, *d)

    outer = jax.make_jaxpr(flat_fn)(*flat)
    if len(outer.jaxpr.outvars) != 1 or getattr(outer.out_avals[0], "shape", None) != ():
        raise UserError(
            f"the loss returns {[a.str_short() for a in outer.out_avals]}; expected one scalar; "
            "return the loss alone"
        )

    def inlined(*args: Any) -> Any:
        env = dict(zip(outer.jaxpr.constvars, outer.consts, strict=True))
        env.update(zip(outer.jaxpr.invars, args, strict=True))
        _evaluate(outer.jaxpr.eqns, env, inline=True)
        out = outer.jaxpr.outvars[0]
        return out.val if isinstance(out, jex.Literal) else env[out]

    closed = jax.make_jaxpr(inlined)(*flat)
    jaxpr = closed.jaxpr
    leaf_vars, data_vars = list(jaxpr.invars[:n_leaves]), list(jaxpr.invars[n_leaves:])
    on_data = set(data_vars)
    origin: dict[Any, set[int]] = {v: {i} for i, v in enumerate(leaf_vars)}
    uses: list[set[int]] = []
    for eqn in jaxpr.eqns:
        inputs = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        leaves = set().union(*(origin.get(v, set()) for v in inputs)) if inputs else set()
        if any(v in on_data for v in inputs):
            on_data.update(eqn.outvars)
            uses.append(leaves)
        else:
            origin.update((v, leaves) for v in eqn.outvars)
            uses.append(set())
    consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    return _Graph(
        list(jaxpr.eqns), leaf_vars, data_vars, consts, list(jaxpr.outvars), on_data, uses
    )


def first_use(loss_fn: Callable[..., Any], params: Any, *data: Any) -> tuple[int, ...]:
    """Tell when each parameter leaf is first used on data.

    Args:
      loss_fn: ``loss_fn(params, *data) -> scalar``.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      *data: the other arguments, likewise.

    Returns:
      Per leaf, in flattening order, the index of the equation that first joins it with data. A leaf
      that never meets data (or is unused) gets the number of equations.

    >>> import jax.numpy as jnp
    >>> p = {"b": jnp.ones((3, 1)), "a": jnp.ones((2, 3))}
    >>> first_use(lambda p, x: jnp.sum((x @ p["a"]) @ p["b"]), p, jnp.ones((1, 2)))
    (0, 1)
    """
    graph = _trace(loss_fn, params, data)
    return _first_use(graph)


def _first_use(graph: _Graph) -> tuple[int, ...]:
    first = [len(graph.eqns)] * len(graph.leaf_vars)
    for index, leaves in enumerate(graph.uses):
        for leaf in leaves:
            first[leaf] = min(first[leaf], index)
    return tuple(first)


def _assign(graph: _Graph, groups: Sequence[Sequence[int]]) -> list[int | None]:
    """Give every equation its stage; `None` where nothing uses it."""
    first = _first_use(graph)
    starts = [min(first[j] for j in group) for group in groups]
    if any(later < earlier for earlier, later in itertools.pairwise(starts)):
        raise UserError(
            f"the groups start at equations {starts}; expected the order of first use; sort the "
            "groups with first_use"
        )
    stage_of: list[int | None] = [None] * len(graph.eqns)
    needed_by: dict[Any, int] = {
        v: len(groups) - 1 for v in graph.outvars if not isinstance(v, jex.Literal)
    }
    for index in reversed(range(len(graph.eqns))):
        eqn = graph.eqns[index]
        consumers = [needed_by[v] for v in eqn.outvars if v in needed_by]
        if not consumers:
            continue
        if any(v in graph.on_data for v in eqn.outvars):
            stage = max((k for k, start in enumerate(starts) if start <= index), default=0)
        else:
            stage = min(consumers)
        stage_of[index] = stage
        for v in eqn.invars:
            if not isinstance(v, jex.Literal):
                needed_by[v] = min(stage, needed_by.get(v, stage))
    return stage_of
