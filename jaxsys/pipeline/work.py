"""A graph's costs as sums over its nodes, ready for cutting it anywhere."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsys.core.errors import UserError
from jaxsys.core.graph import Dag


class Value(NamedTuple):
    """One value that later nodes read.

    >>> Value(0, 400, (1, 3)).targets
    (1, 3)
    """

    source: int
    n_bytes: int
    targets: tuple[int, ...]
    differentiable: bool = True


class Work(NamedTuple):
    """Hold a graph's costs as prefix sums, for one micro-batch; see `work_of`.

    Position p lies before node p; a stage is a pair of positions ``a < b``.

    Attributes:
        names: of the nodes, [N].
        forward: FLOPs of the forward pass before each position, [N + 1].
        total: FLOPs of forward and backward before each position, [N + 1].
        saved: bytes of residuals before each position, [N + 1].
        params: bytes of parameters before each position, once per node that reads them, [N + 1].
        ties: parameters read by two nodes: (earlier node, later node, bytes), [K, 3].
        values: what nodes hand to later nodes.
        cut_bytes: bytes of the values that cross each position, each once, [N + 1].

    >>> "cut_bytes" in Work._fields
    True
    """

    names: tuple[str, ...]
    forward: Float[np.ndarray, "M"]
    total: Float[np.ndarray, "M"]
    saved: Float[np.ndarray, "M"]
    params: Float[np.ndarray, "M"]
    ties: Float[np.ndarray, "K 3"]
    values: tuple[Value, ...]
    cut_bytes: Float[np.ndarray, "M"]

    @property
    def n_nodes(self) -> int:
        """Number of nodes N."""
        return len(self.names)


def work_of(
    dag: Dag, *, backward_ratio: float | int = 2.0, node_s=None, reference_flops_s: float | int = 1
) -> Work:
    """Summarise a graph for planning.

    Args:
        dag: the graph of the loss on one micro-batch.
        backward_ratio: FLOPs of a backward per FLOP of its forward.
        node_s: measured seconds of each node's forward and backward on a reference device, [N, 2];
            they then take the place of FLOPs.
        reference_flops_s: speed of that device, to which other speeds relate.

    Returns:
        The work.

    Raises:
        UserError: ``node_s`` of another shape or with a negative time.

    >>> from jaxsys.core.graph import Dag, Edge, Node
    >>> nodes = [Node("a", 10.0, (0,), (), 8, 8), Node("b", 20.0, (0,), (0,), 4, 8)]
    >>> work = work_of(Dag(tuple(nodes), (Edge(0, 1, 8, 0),), (100,), ("w",)))
    >>> work.total.tolist(), work.cut_bytes.tolist(), work.params.tolist()
    ([0.0, 30.0, 90.0], [0.0, 8.0, 0.0], [0.0, 100.0, 200.0])
    """
    nodes = dag.nodes
    forward = np.array([node.flops for node in nodes], np.float64)
    backward = backward_ratio * forward
    if node_s is not None:
        times = np.asarray(node_s, np.float64)
        if times.shape != (len(nodes), 2) or not np.all(np.isfinite(times) & (times >= 0)):
            raise UserError(
                f"node_s has shape {times.shape}; it must be ({len(nodes)}, 2), seconds of each "
                "node's forward and backward, none negative; measure again"
            )
        forward, backward = (times * reference_flops_s).T
    grouped: dict[int, list] = {}
    for edge in dag.edges:
        found = grouped.setdefault(edge.value, [edge.source, edge.n_bytes, set(), True])
        found[2].add(edge.target)
        found[3] = edge.differentiable
    values = tuple(Value(s, n, tuple(sorted(t)), d) for s, n, t, d in grouped.values())
    last: dict[int, int] = {}
    ties = []
    for i, node in enumerate(nodes):
        for leaf in node.leaves:
            if leaf in last:
                ties.append((last[leaf], i, dag.leaf_bytes[leaf]))
            last[leaf] = i
    params = [sum(dag.leaf_bytes[leaf] for leaf in node.leaves) for node in nodes]
    return Work(
        names=tuple(node.name for node in nodes),
        forward=_prefix(forward),
        total=_prefix(forward + backward),
        saved=_prefix([node.saved_bytes for node in nodes]),
        params=_prefix(params),
        ties=np.array(ties, np.float64).reshape(-1, 3),
        values=values,
        cut_bytes=crossing(values, [value.n_bytes for value in values], len(nodes)),
    )


def _prefix(values) -> Float[np.ndarray, "M"]:
    return np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])


def crossing(values: Sequence[Value], sizes, n_nodes: int) -> Float[np.ndarray, "M"]:
    """Add up the sizes of the values that cross each position.

    Args:
        values: the values.
        sizes: what each takes, in the order of the values.
        n_nodes: number of nodes N.

    Returns:
        Sums, [N + 1].

    >>> crossing([Value(0, 8, (2,)), Value(1, 4, (2,))], [8, 4], 3).tolist()
    [0.0, 8.0, 12.0, 0.0]
    """
    steps = np.zeros(n_nodes + 2)
    if values:
        sizes = np.asarray(sizes, np.float64)
        np.add.at(steps, [value.source + 1 for value in values], sizes)
        np.add.at(steps, [max(value.targets) + 1 for value in values], -sizes)
    return np.maximum(np.cumsum(steps)[: n_nodes + 1], 0.0)


def chain_work(
    flops, cut_bytes, *, leaf_bytes=None, saved_bytes=None, backward_ratio: float | int = 2.0
) -> Work:
    """Make the work of a plain chain of nodes, each reading the one before it only.

    Args:
        flops: forward FLOPs of each node, [N].
        cut_bytes: bytes that each node but the last hands on, [N − 1].
        leaf_bytes: parameters of each node, [N]; none if left out.
        saved_bytes: residuals of each node, [N]; none if left out.
        backward_ratio: FLOPs of a backward per FLOP of its forward.

    Returns:
        The work, as `work_of` would make it.

    >>> work = chain_work([1, 2], [8])
    >>> work.total.tolist(), work.cut_bytes.tolist()
    ([0.0, 3.0, 9.0], [0.0, 8.0, 0.0])
    """
    n = len(flops)
    none = np.zeros(n)
    forward = _prefix(flops)
    values = tuple(Value(i, int(size), (i + 1,)) for i, size in enumerate(cut_bytes))
    return Work(
        names=tuple(f"node {i}" for i in range(n)),
        forward=forward,
        total=(1 + backward_ratio) * forward,
        saved=_prefix(none if saved_bytes is None else saved_bytes),
        params=_prefix(none if leaf_bytes is None else leaf_bytes),
        ties=np.zeros((0, 3)),
        values=values,
        cut_bytes=crossing(values, [value.n_bytes for value in values], n),
    )
