"""A traced loss: which equations may be cut apart, which are repeated, and where the others lie.

Main equations, where parameters meet data, keep their order; a cut falls between them. The others
do not decide where:

- What depends on no parameter (masks, tables of angles) or on no data (casts of parameters) is
  repeated wherever it is needed, so that neither a mask nor a copy of a parameter ever travels.
- A number that sums parameters up (a penalty) is made where these are and travels instead of them;
  so does the result of heavy work on data alone (a frozen encoder).
"""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsys.core.equations import Equation, Program, trace
from jaxsys.core.errors import UserError
from jaxsys.core.flops import Count, count

_HEAVY = 8  # operations per element written above which work on data is not repeated


class Graph(NamedTuple):
    """A traced loss with what a cut needs to know of it.

    Attributes:
      program: the equations of ``loss(*leaves, *data leaves)``.
      n_leaves: number of parameter leaves; they are the first values.
      data: numbers of the data leaves.
      kinds: per equation ``main`` (parameters meet data in it or before it), ``sum`` (made of
        parameters alone, once), ``heavy`` (work on data alone) or ``free``: repeated where it is
        needed. The first three have one place.
      reads: per equation, the leaves, data, constants and results of placed equations that it
        needs, through free ones.
      maker: number of each value that a placed equation makes, to the equation's index.
      differentiable: numbers of the values that a gradient passes.
      counts: operations of each equation.

    >>> graph = trace_loss(lambda p, x: jnp.sum(p * x), jnp.ones(2), jnp.ones(2))
    >>> graph.kinds, graph.reads[0] == {0, 1}
    (('main', 'main'), True)
    """

    program: Program
    n_leaves: int
    data: tuple[int, ...]
    kinds: tuple[str, ...]
    reads: tuple[frozenset[int], ...]
    maker: dict[int, int]
    differentiable: frozenset[int]
    counts: tuple[Count, ...]


def trace_loss(loss_fn: Callable[..., Any], params: Any, *data: Any, apart: bool = False) -> Graph:
    """Trace a loss and sort its equations.

    Args:
      loss_fn: ``loss_fn(params, *data) -> scalar``.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      *data: the other arguments, likewise.
      apart: the pieces will run in processes of their own: side effects are refused, and what is
        made of parameters alone is made by everyone who needs it. Otherwise side effects are left
        out, and it is made once.

    Returns:
      The graph.

    Raises:
      UserError: the loss is not one scalar, does not depend on its data, needs the value of an
        array while it is traced, has side effects, or loops over parameters for an unknown number
        of rounds.

    >>> trace_loss(lambda p, x: jnp.sum(p * x), jnp.ones(2), jnp.ones(2)).n_leaves
    1
    """
    flat, treedef = jax.tree.flatten((params, data))
    n_leaves = len(jax.tree.leaves(params))

    def flat_fn(*args: Any) -> Any:
        p, d = jax.tree.unflatten(treedef, args)
        return loss_fn(p, *d)

    program = trace(flat_fn, *flat)
    returned = [program.avals[v] if isinstance(v, int) else v.aval for v in program.results]
    if len(returned) != 1 or getattr(returned[0], "shape", None) != ():
        raise UserError(
            f"the loss returns {[a.str_short() for a in returned]}; expected one scalar; return "
            "the loss alone"
        )
    if apart and program.effects:
        raise UserError(
            f"the loss has side effects: {', '.join(program.effects)}; expected a pure function, "
            "whose pieces other processes can run again; remove them"
        )
    graph = _sort(program, n_leaves, apart)
    result = program.results[0]
    if not isinstance(result, int) or graph.kinds[graph.maker.get(result, -1)] != "main":
        raise UserError(
            "the loss does not depend on both its parameters and its data; expected "
            "loss(params, *data); pass the batch as an argument"
        )
    for eqn in program.equations:
        if eqn.primitive.name == "while" and graph.differentiable.intersection(eqn.outputs):
            raise UserError(
                "the loss passes parameters through a while loop, whose length is unknown and "
                "which has no backward pass; expected lax.scan or lax.fori_loop with fixed bounds; "
                "rewrite the loop"
            )
    return graph


def _sort(program: Program, n_leaves: int, apart: bool) -> Graph:
    leaves, data = set(program.inputs[:n_leaves]), program.inputs[n_leaves:]
    on_leaves, on_data, on_both = set(leaves), set(data), set[int]()
    roots = {v: frozenset((v,)) for v in (*program.inputs, *program.constants)}
    differentiable = {v for v in leaves if _inexact(program.avals[v])}
    maker: dict[int, int] = {}
    kinds, reads = [], []
    counts = tuple(count(eqn, program.avals) for eqn in program.equations)
    for index, eqn in enumerate(program.equations):
        from_leaves, from_data = (not s.isdisjoint(eqn.reads) for s in (on_leaves, on_data))
        kind, made = "free", set[int]()
        if (from_leaves and from_data) or not on_both.isdisjoint(eqn.reads):
            kind, made = "main", on_both
        elif from_leaves:
            once = not apart or _shrinks(eqn, program.avals, counts[index], on_leaves)
            kind = "sum" if once else "free"
            made = on_leaves
        elif from_data:
            dear = counts[index].flops > _HEAVY * _elements(eqn.outputs, program.avals)
            kind, made = "heavy" if dear else "free", on_data
        kinds.append(kind)
        reads.append(frozenset().union(*(roots[v] for v in eqn.reads)))
        made.update(eqn.outputs)
        roots.update((v, reads[-1] if kind == "free" else frozenset((v,))) for v in eqn.outputs)
        if kind != "free":
            maker.update(dict.fromkeys(eqn.outputs, index))
        passes = eqn.primitive.name != "stop_gradient"
        if passes and not differentiable.isdisjoint(eqn.reads):
            differentiable.update(v for v in eqn.outputs if _inexact(program.avals[v]))
    return Graph(
        program,
        n_leaves,
        tuple(data),
        tuple(kinds),
        tuple(reads),
        maker,
        frozenset(differentiable & _answered(program)),
        counts,
    )


def _answered(program: Program) -> set[int]:
    """Find the values from which a way without stop_gradient leads to a result."""
    found = {v for v in program.results if isinstance(v, int)}
    for eqn in reversed(program.equations):
        if eqn.primitive.name != "stop_gradient" and not found.isdisjoint(eqn.outputs):
            found.update(eqn.reads)
    return found


def _inexact(aval: Any) -> bool:
    return bool(jnp.issubdtype(aval.dtype, jnp.inexact))


def _elements(values: Sequence[int], avals: Sequence[Any]) -> int:
    return sum(math.prod(avals[v].shape) for v in values)


def _shrinks(eqn: Equation, avals: Sequence[Any], cost: Count, on_leaves: set[int]) -> bool:
    """Tell a reduction from a slice: both give fewer elements, only the one computes."""
    largest = max(_elements((v,), avals) for v in eqn.reads if v in on_leaves)
    return cost.flops > 0 and _elements(eqn.outputs, avals) < largest


def first_use(loss_fn: Callable[..., Any], params: Any, *data: Any) -> tuple[int, ...]:
    """Tell when each parameter leaf is first used on data.

    Args:
      loss_fn: ``loss_fn(params, *data) -> scalar``.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      *data: the other arguments, likewise.

    Returns:
      Per leaf, in flattening order, the index of the equation that first joins it with data; of a
      leaf that is only summed up (a penalty), the one that joins that sum. An unused leaf gets the
      number of equations.

    >>> p = {"b": jnp.ones((3, 1)), "a": jnp.ones((2, 3))}
    >>> first_use(lambda p, x: jnp.sum((x @ p["a"]) @ p["b"]), p, jnp.ones((1, 2)))
    (0, 1)
    """
    return leaf_starts(trace_loss(loss_fn, params, *data))


def leaf_starts(graph: Graph) -> tuple[int, ...]:
    """Tell when each leaf of a traced loss is first used on data; see `first_use`.

    >>> leaf_starts(trace_loss(lambda p, x: jnp.sum(p * x), jnp.ones(2), jnp.ones(2)))
    (0,)
    """
    none = len(graph.program.equations)
    direct, by_sum = [none] * graph.n_leaves, [none] * graph.n_leaves
    summed: dict[int, frozenset[int]] = {}  # value off data -> leaves summed up in it
    for index, eqn in enumerate(graph.program.equations):
        through = frozenset().union(*(summed.get(v, frozenset()) for v in graph.reads[index]))
        own = frozenset(v for v in graph.reads[index] if v < graph.n_leaves)
        if graph.kinds[index] == "main":
            for found, leaves in ((direct, own), (by_sum, through)):
                for leaf in leaves:
                    found[leaf] = min(found[leaf], index)
        elif graph.kinds[index] != "free":
            summed.update(dict.fromkeys(eqn.outputs, own | through))
    return tuple(a if a < none else b for a, b in zip(direct, by_sum, strict=True))


def place(graph: Graph, starts: Sequence[int]) -> tuple[int, ...]:
    """Give every placed equation its piece.

    A main equation, or a heavy one, belongs to the piece in whose range it lies; a sum of
    parameters to the last of the pieces where these are first used, or to the first piece that
    needs it if that is earlier.

    Args:
      graph: from `trace_loss`.
      starts: index of the equation with which each piece begins, ascending; the first piece also
        has what comes before.

    Returns:
      Per equation its piece, -1 for free ones.

    >>> graph = trace_loss(lambda p, x: jnp.sum(p * x), jnp.ones(2), jnp.ones(2))
    >>> place(graph, (0, 1))
    (0, 1)
    """
    n = len(graph.kinds)
    inside = [max(0, bisect.bisect_right(starts, i) - 1) for i in range(n)]
    first = leaf_starts(graph)
    home = {leaf: inside[i] for leaf, i in enumerate(first) if i < n}
    latest: dict[int, int] = {}  # value -> first piece that needs it
    for index in reversed(range(n)):
        if graph.kinds[index] == "free":
            continue
        if graph.kinds[index] == "sum":
            outputs = graph.program.equations[index].outputs
            inside[index] = min(latest[v] for v in outputs if v in latest)
        for v in graph.reads[index]:
            latest[v] = min(inside[index], latest.get(v, inside[index]))
    for index in range(n):
        if graph.kinds[index] == "sum":
            sources = [home[v] for v in graph.reads[index] if v in home]
            sources += [inside[graph.maker[v]] for v in graph.reads[index] if v in graph.maker]
            inside[index] = min(inside[index], max(sources, default=0))
    return tuple(-1 if kind == "free" else k for kind, k in zip(graph.kinds, inside, strict=True))


def pieces(graph: Graph, starts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """List the equations that each piece evaluates, free ones in every piece that needs them.

    Args:
      graph: from `trace_loss`.
      starts: as for `place`.

    Returns:
      Per piece, indices of equations in order.

    >>> def loss(p, x):
    ...     mask = jnp.arange(2.0)
    ...     return jnp.sum((p * x * mask) * mask)
    >>> graph = trace_loss(loss, jnp.ones(2), jnp.ones(2))
    >>> [e.primitive.name for e in graph.program.equations]
    ['iota', 'mul', 'mul', 'mul', 'reduce_sum']
    >>> pieces(graph, (0, 3))
    ((0, 1, 2), (0, 3, 4))
    """
    equations = graph.program.equations
    made_by = {v: i for i, eqn in enumerate(equations) for v in eqn.outputs}
    found: list[set[int]] = [set() for _ in starts]
    for index, piece in enumerate(place(graph, starts)):
        waiting = [] if piece < 0 else [index]
        while waiting:
            i = waiting.pop()
            if i not in found[piece]:
                found[piece].add(i)
                makers = (made_by[v] for v in equations[i].reads if v in made_by)
                waiting += [j for j in makers if graph.kinds[j] == "free"]
    return tuple(tuple(sorted(piece)) for piece in found)
