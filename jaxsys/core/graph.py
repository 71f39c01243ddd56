"""The operation graph of any JAX loss: its blocks, what they cost and what passes between them.

A function is traced once (`jaxsys.core.traced`); its main equations are grouped into nodes, and
`jaxsys.core.stages` cuts between nodes.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxsys.core import tree
from jaxsys.core.errors import UserError
from jaxsys.core.flops import Count
from jaxsys.core.residuals import kept, value_bytes
from jaxsys.core.traced import Graph, leaf_starts, pieces, place, trace_loss

GRANULARITIES = ("layer", "scope", "primitive")


class Node(NamedTuple):
    """A block of equations that is never cut.

    Attributes:
      name: of the block or the primitive, unique in the graph.
      flops: floating-point operations of one forward pass, loop bodies times their trip counts.
      leaves: indices of the parameter leaves that it reads, in flattening order.
      inputs: indices of the nodes that make what it reads, all smaller than its own.
      output_bytes: bytes that later nodes read, each value once.
      saved_bytes: bytes that its backward pass keeps from its forward pass, parameters left out; a
        value that several nodes keep counts for the first.

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


def dag(loss_fn: Callable[..., Any], params: Any, *data: Any, granularity: str = "layer") -> Dag:
    """Trace a loss to its operation graph.

    Args:
      loss_fn: ``loss_fn(params, *data) -> scalar``; it is traced, not run.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      *data: the other arguments, likewise: one micro-batch.
      granularity: a node for each module, the leaves that share a parent path, from its first use
        on (``layer``); for each outermost `jax.named_scope`, what lies outside belonging to the one
        before (``scope``); or for each equation (``primitive``). Between two modules there may be
        equations without parameters: the border lies where the fewest bytes cross; of several
        such places at the last, but before the next reduction.

    Returns:
      The graph, each node with its cost.

    Raises:
      UserError: unknown granularity, side effects, shapes that depend on data, a loss that is not
        one scalar, or leaves that it does not use.

    Reference: Reconstruction: FusionLLM (arXiv 2410.12707) describes nodes by operator, producers,
    users, shapes and operations; blocks, ownership and what is repeated are ours.

    >>> import jax.numpy as jnp
    >>> def loss(p, x):
    ...     return jnp.sum((x @ p["in"]["w"]) @ p["out"]["w"])
    >>> p = {"in": {"w": jnp.ones((2, 3))}, "out": {"w": jnp.ones((3, 1))}}
    >>> graph = dag(loss, p, jnp.ones((4, 2)))
    >>> [(node.name, node.flops, node.inputs) for node in graph.nodes]
    [('in', 48.0, ()), ('out', 28.0, (0,))]
    >>> graph.edges[0].n_bytes
    48
    """
    graph = trace_loss(loss_fn, params, *data, apart=True)
    paths = tree.paths(params)
    names, starts = blocks(graph, paths, granularity)
    where, parts = place(graph, starts), pieces(graph, starts)
    avals, equations = graph.program.avals, graph.program.equations
    seen, cache = set(range(graph.n_leaves)) | set(graph.program.constants), {}
    edges, nodes, uncounted = [], [], []
    for k, part in enumerate(parts):
        values = sorted(set().union(*(graph.reads[i] for i in part if where[i] >= 0)))
        crossing = [v for v in values if v in graph.maker and where[graph.maker[v]] != k]
        for v in crossing:
            n_bytes = value_bytes(avals[v])
            source = where[graph.maker[v]]
            edges.append(Edge(source, k, n_bytes, v, v in graph.differentiable))
        saved_bytes = 0
        for i in part:
            keeps = kept(equations[i], avals, graph.differentiable, cache)
            saved_bytes += keeps.extra_bytes
            saved_bytes += sum(value_bytes(avals[v]) for v in keeps.values if v not in seen)
            seen.update(keeps.values)
        cost = sum((graph.counts[i] for i in part), start=Count(0.0, False))
        uncounted += [names[k]] * cost.unknown
        leaves = tuple(v for v in values if v < graph.n_leaves)
        inputs = tuple(sorted({where[graph.maker[v]] for v in crossing}))
        nodes.append(Node(names[k], cost.flops, leaves, inputs, 0, saved_bytes))
    sent = [0] * len(nodes)
    for edge in {e.value: e for e in edges}.values():
        sent[edge.source] += edge.n_bytes
    nodes = [node._replace(output_bytes=n) for node, n in zip(nodes, sent, strict=True)]
    leaf_bytes = tuple(value_bytes(avals[v]) for v in range(graph.n_leaves))
    return Dag(tuple(nodes), tuple(edges), leaf_bytes, paths, tuple(uncounted))


def blocks(
    graph: Graph, paths: Sequence[str], granularity: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Find where the nodes of a graph begin; see `dag`.

    Args:
      graph: from `trace_loss`.
      paths: dotted path of each leaf.
      granularity: ``layer``, ``scope`` or ``primitive``.

    Returns:
      Names of the nodes, and the index of each one's first equation.

    Raises:
      UserError: as `dag`.

    >>> import jax.numpy as jnp
    >>> graph = trace_loss(lambda p, x: jnp.sum(p["w"] * x), {"w": jnp.ones(2)}, jnp.ones(2))
    >>> blocks(graph, ("w",), "primitive")
    (('mul', 'reduce_sum'), (0, 1))
    """
    if granularity not in GRANULARITIES:
        raise UserError(
            f"granularity is {granularity!r}; expected one of {', '.join(GRANULARITIES)}; choose "
            "one of them"
        )
    first = leaf_starts(graph)
    unused = [path for path, i in zip(paths, first, strict=True) if i == len(graph.kinds)]
    if unused:
        raise UserError(
            f"the loss does not use {len(unused)} of its parameters, such as {unused[0]!r}; "
            "expected every leaf to reach it; remove them from the tree or freeze them"
        )
    find = {"layer": _layers, "scope": _scopes, "primitive": _primitives}[granularity]
    found = find(graph, paths, first)
    return _unique([name for _, name in found]), tuple(start for start, _ in found)


def _main(graph: Graph) -> list[int]:
    return [i for i, kind in enumerate(graph.kinds) if kind == "main"]


def _primitives(graph: Graph, *_: Any) -> list[tuple[int, str]]:
    return [(i, graph.program.equations[i].primitive.name) for i in _main(graph)]


def _scopes(graph: Graph, *_: Any) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    main = _main(graph)
    for i in main:
        scope = graph.program.equations[i].scope
        if scope and (not found or found[-1][1] != scope):
            found.append((i if found else main[0], scope))
    if not found:
        raise UserError(
            "the loss has no jax.named_scope; granularity 'scope' needs one around every block; "
            "add them or choose 'layer'"
        )
    return found


def _layers(graph: Graph, paths: Sequence[str], first: Sequence[int]) -> list[tuple[int, str]]:
    begins: dict[int, str] = {}
    modules = [
        (min(first[i] for i in layer.leaves), layer.name) for layer in tree.modules(tuple(paths))
    ]
    for start, name in sorted(modules):
        begins.setdefault(start, name)
    alive = _bytes_alive(graph)
    main = _main(graph)
    with_leaves = [i for i in main if min(graph.reads[i], default=0) < graph.n_leaves]
    found = []
    for start, name in begins.items():
        before = bisect.bisect_left(with_leaves, start)
        low = with_leaves[before - 1] + 1 if before else start
        gap = main[bisect.bisect_left(main, low) : bisect.bisect_right(main, start)]
        found.append((_border(graph, gap, alive), name))
    return found


def _border(graph: Graph, gap: Sequence[int], alive: Sequence[int]) -> int:
    """Choose the equation with which a module begins, of those from the last module's end on."""
    fewest = min(alive[i] for i in gap)
    ties = [i for i in gap if alive[i] == fewest]
    for here, following in itertools.pairwise(ties):
        between = graph.program.equations[here:following]
        if any(e.primitive.name.startswith("reduce_") for e in between):
            return here  # statistics belong to the module that normalises with them
    return ties[-1]


def _bytes_alive(graph: Graph) -> list[int]:
    """Count, per equation, the bytes of values made before it and read by it or later."""
    change = [0] * (len(graph.kinds) + 1)
    last: dict[int, int] = {}
    for index in _main(graph):
        last.update(dict.fromkeys(graph.reads[index], index))
    for v, end in last.items():
        made = graph.maker.get(v)
        if made is not None and graph.kinds[made] != "sum":
            change[made + 1] += value_bytes(graph.program.avals[v])
            change[end + 1] -= value_bytes(graph.program.avals[v])
    return list(itertools.accumulate(change))


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return tuple(result)
