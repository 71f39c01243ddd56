"""Who sends what to whom in one step of a pipeline, in which form, and how many bytes that is.

Everything follows from the cut loss and the plan, so all processes agree without talking, and the
bytes of a step are known before it runs (`step_bytes`).
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsys.cluster.transport import HEADER_BYTES
from jaxsys.core.stages import Stage, StagedLoss
from jaxsys.pipeline import codec
from jaxsys.pipeline.plan import Plan

# First number of a message's key; then the step, a micro-batch or leaf, source and target.
FORWARD, BACKWARD, SHARED, MEAN, LOSS, NORM = range(6)
_LOSS_BYTES = _NORM_BYTES = 4


class Route(NamedTuple):
    """What one stage hands to a later one, and gets back.

    Attributes:
        source: the earlier stage.
        target: the later stage.
        names: values that the target reads from the source.
        returned: those of them whose cotangents go back.
        ratio_forward: compression ratio of the values.
        ratio_backward: compression ratio of the cotangents.
        specs: shape and dtype of every value.

    >>> Route(0, 2, (5, 7), (5,), 1.0, 8.0, {}).returned
    (5,)
    """

    source: int
    target: int
    names: tuple[int, ...]
    returned: tuple[int, ...]
    ratio_forward: float
    ratio_backward: float
    specs: Mapping[int, jax.ShapeDtypeStruct]


def rank_of(plan: Plan, chain: int, stage: int) -> int:
    """Number the process that runs a stage: the workers of the first chain, then of the replicas.

    Args:
        plan: the plan.
        chain: 0 for the first chain, then the replicas.
        stage: index of the stage.

    Returns:
        The rank.

    >>> rank_of(Plan(4, (1, 3), (2, 0, 1), replicas=((5, 6, 7),)), 1, 2)
    5
    """
    return chain * plan.n_workers + stage % plan.n_workers


def routes(staged: StagedLoss, plan: Plan) -> tuple[Route, ...]:
    """List the pairs of stages that exchange values, ordered by source and target.

    Args:
        staged: the loss, cut as the plan says.
        plan: the plan.

    Returns:
        One route per pair, also for two stages of one device.

    >>> from jaxsys.core.stages import cut
    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> loss = cut(lambda p, x: jnp.sum((x @ p["a"]) @ p["b"]), p, (jnp.ones((1, 2)),), [[0], [1]])
    >>> [(r.source, r.target, r.returned == r.names) for r in routes(loss, Plan(2, (1,), (0, 1)))]
    [(0, 1, True)]
    """
    found = []
    for target, stage in enumerate(staged.stages):
        by_source: dict[int, list[int]] = defaultdict(list)
        for name, source in stage.reads:
            by_source[source].append(name)
        upstream = set(stage.upstream)
        for source, names in by_source.items():
            found.append(
                Route(
                    source,
                    target,
                    tuple(names),
                    tuple(name for name in names if name in upstream),
                    plan.ratio(source, target),
                    plan.ratio(source, target, backward=True),
                    {name: plain_spec(stage.shapes[name]) for name in names},
                )
            )
    return tuple(sorted(found, key=lambda route: (route.source, route.target)))


def plain_spec(spec: Any) -> jax.ShapeDtypeStruct:
    """Give shape and dtype under which a value travels; random keys travel as their words.

    >>> plain_spec(jax.random.key(0)).dtype.name
    'uint32'
    """
    if jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
        spec = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype)


def shared_leaves(staged: StagedLoss, plan: Plan) -> dict[int, tuple[int, ...]]:
    """Find the leaves that stages of several workers read (tied parameters).

    Each of these workers keeps the leaf and its optimiser's state. They exchange gradients, decode
    what all of them sent, their own included, and so make the same update bit for bit: nothing but
    gradients travels, and gradients may be compressed.

    Args:
        staged: the loss, cut as the plan says.
        plan: the plan.

    Returns:
        Leaf index to the first stage that reads it on each of these workers.

    >>> from jaxsys.core.stages import cut
    >>> p = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    >>> f = lambda p, x: jnp.sum(x @ p["a"] @ p["b"] @ p["a"])
    >>> shared_leaves(cut(f, p, (jnp.ones((1, 2)),), [[0], [1]]), Plan(2, (1,), (0, 1)))
    {0: (0, 1)}
    """
    readers: dict[int, dict[int, int]] = defaultdict(dict)
    for s, stage in enumerate(staged.stages):
        for leaf in stage.leaves:
            readers[leaf].setdefault(s % plan.n_workers, s)
    return {
        leaf: tuple(by_worker.values())
        for leaf, by_worker in sorted(readers.items())
        if len(by_worker) > 1
    }


def shared_ratio(plan: Plan, stages: Sequence[int]) -> float:
    """Compression ratio of a shared leaf's gradient: the largest on the way between its stages.

    >>> plan = Plan(4, (1, 3), (2, 0, 1), codec="topk", ratios_backward=(1.0, 8.0))
    >>> shared_ratio(plan, (0, 2))
    8.0
    """
    return plan.ratio(stages[0], stages[-1], backward=True)


def worker_leaves(staged: StagedLoss, plan: Plan, worker: int) -> tuple[int, ...]:
    """List the parameter leaves that a worker's stages read.

    Args:
        staged: the loss, cut as the plan says.
        plan: the plan.
        worker: index in its chain.

    Returns:
        Leaf indices, ascending.

    >>> from jaxsys.core.stages import cut
    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> loss = cut(lambda p, x: jnp.sum((x @ p["a"]) @ p["b"]), p, (jnp.ones((1, 2)),), [[0], [1]])
    >>> worker_leaves(loss, Plan(2, (1,), (0, 1)), 1)
    (1,)
    """
    stages: Sequence[Stage] = staged.stages[worker :: plan.n_workers]
    return tuple(sorted({leaf for stage in stages for leaf in stage.leaves}))


def loss_stage(staged: StagedLoss) -> int:
    """Find the stage that makes the loss.

    >>> from jaxsys.core.stages import cut
    >>> p = {"a": jnp.ones(2)}
    >>> loss_stage(cut(lambda p, x: jnp.sum(p["a"] * x), p, (jnp.ones(2),), [[0]]))
    0
    """
    return next(s for s, stage in enumerate(staged.stages) if staged.loss_name in stage.outputs)


def step_bytes(
    staged: StagedLoss, plan: Plan, leaves: Sequence[Any], *, clip: bool = False
) -> dict[tuple[int, int], int]:
    """Count the bytes that each process sends to each other one in a step, headers included.

    Args:
        staged: the loss, cut as the plan says.
        plan: the plan.
        leaves: parameter leaves, or their shapes and types, in flattening order.
        clip: whether the norm of the whole gradient is bounded.

    Returns:
        (sending rank, receiving rank) to bytes; pairs that exchange nothing are absent. The wire's
        own frames (on Ethernet about 66 bytes in 1,514) come on top.

    >>> from jaxsys.core.stages import cut
    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> loss = cut(lambda p, x: jnp.sum((x @ p["a"]) @ p["b"]), p, (jnp.ones((1, 2)),), [[0], [1]])
    >>> step_bytes(loss, Plan(2, (1,), (0, 1)), jax.tree.leaves(p))
    {(0, 1): 44, (1, 0): 80}
    """
    total: dict[tuple[int, int], int] = defaultdict(int)
    n_chains, n_workers = len(plan.chains), plan.n_workers
    for chain in range(n_chains):
        for route in routes(staged, plan):
            a, b = (rank_of(plan, chain, s) for s in (route.source, route.target))
            if a == b:
                continue
            there = _encoded(route, route.names, route.ratio_forward, plan)
            total[a, b] += plan.micro_batches * (HEADER_BYTES + there)
            if route.returned:
                back = _encoded(route, route.returned, route.ratio_backward, plan)
                total[b, a] += plan.micro_batches * (HEADER_BYTES + back)
        for leaf, stages in shared_leaves(staged, plan).items():
            spec = leaves[leaf]
            ratio = shared_ratio(plan, stages)
            size = codec.encoded_bytes(spec.shape, spec.dtype, ratio, plan.codec)
            ranks = [rank_of(plan, chain, s) for s in stages]
            for a in ranks:
                for b in ranks:
                    if a != b:
                        total[a, b] += HEADER_BYTES + size
        ranks = [rank_of(plan, chain, w) for w in range(n_workers if clip else 0)]
        for a, b in itertools.permutations(ranks, 2):
            total[a, b] += HEADER_BYTES + _NORM_BYTES
        told = rank_of(plan, chain, loss_stage(staged))
        for other in range(n_chains * n_workers):
            if other != told:
                total[told, other] += HEADER_BYTES + _LOSS_BYTES
    for worker in range(n_workers if n_chains > 1 else 0):
        own = [leaves[j] for j in worker_leaves(staged, plan, worker)]
        chunk = _chunk(own, n_chains) * jnp.result_type(*own).itemsize
        ranks = [chain * n_workers + worker for chain in range(n_chains)]
        for a in ranks:
            for b in ranks:
                if a != b:
                    total[a, b] += 2 * (HEADER_BYTES + chunk)
    return dict(sorted(total.items()))


def _encoded(route: Route, names: Sequence[int], ratio: float, plan: Plan) -> int:
    return sum(
        codec.encoded_bytes(route.specs[name].shape, route.specs[name].dtype, ratio, plan.codec)
        for name in names
    )


def _chunk(leaves: Sequence[Any], n_chains: int) -> int:
    return -(-sum(math.prod(leaf.shape) for leaf in leaves) // n_chains)
