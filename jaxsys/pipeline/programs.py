"""The programs that a profile times: nodes, stages, the ends of a codec, an update."""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from jaxsys.cluster.throttle import FULL_SPEED, Throttle
from jaxsys.core.graph import Dag
from jaxsys.core.stages import StagedLoss, cut_at
from jaxsys.pipeline import codec
from jaxsys.pipeline.execute import leaf_update
from jaxsys.pipeline.job import Setup
from jaxsys.pipeline.turn import added

_WINDOW_S = 0.25  # of one timed program: long against the periods of a CPU quota
_RUN = 4  # nodes that are timed as one stage too, for what a call takes by itself
_HELD = 3  # micro-batches whose residuals are kept while a stage is timed
FEW, MANY = 16.0, 2.0  # ratios of the top-k whose ends are timed
_LEAST = 0.1  # of a node's time that is its own, whatever a call takes

# A stage's forward, which gives its outputs and residuals, and its backward from those residuals.
Programs = tuple[Callable[[], tuple[Any, Any]], Callable[[Any], Any]]


def node_programs(
    setup: Setup, micro_batches: int, n_nodes: int, granularity: str = "layer"
) -> list[Programs]:
    """Compile every node's forward and backward alone, with arrays to run them on.

    Args:
      setup: the model.
      micro_batches: parts that a step's examples are dealt out to.
      n_nodes: nodes of the graph.
      granularity: of the graph's nodes.

    Returns:
      A pair of functions for each node; nodes of one form share theirs.

    >>> node_programs.__name__  # compiles a model: see tests/pipeline/test_profile.py
    'node_programs'
    """
    return stage_programs(setup, micro_batches, range(1, n_nodes), range(n_nodes), granularity)


def stage_programs(
    setup: Setup,
    micro_batches: int,
    boundaries: Sequence[int],
    stages: Sequence[int],
    granularity: str = "layer",
) -> list[Programs]:
    """Compile some stages' forward and backward alone, with arrays to run them on.

    Args:
      setup: the model.
      micro_batches: parts that a step's examples are dealt out to.
      boundaries: nodes at which stages 1 … S−1 begin.
      stages: which to compile.
      granularity: of the graph's nodes.

    Returns:
      A pair of functions for each of the stages asked for; stages of one form share theirs.

    >>> stage_programs.__name__  # compiles a model: see tests/pipeline/test_profile.py
    'stage_programs'
    """
    specs = setup.micro_batch(micro_batches)
    staged = cut_at(setup.loss_fn, setup.shapes(), specs, boundaries, granularity=granularity)
    first = [x[: s.shape[0]] for x, s in zip(
        jax.tree.leaves(setup.data(0)), jax.tree.leaves(specs), strict=True)]  # fmt: skip
    leaves = jax.tree.leaves(setup.shapes())
    known: dict[Any, Programs] = {}
    found = []
    for stage in (staged.stages[s] for s in stages):
        values = _values(staged, stage, first, leaves)
        key = (id(stage.forward), *(x.shape for part in values for x in part))
        if key not in known:
            known[key] = _programs(stage, values)
        found.append(known[key])
    return found


def _values(staged: StagedLoss, stage: Any, first: Sequence[Any], leaves: Sequence[Any]) -> Any:
    data = dict(zip(staged.data_names, first, strict=True))

    def value(name: int) -> jax.Array:
        if name in staged.constants or name in data:
            return jnp.asarray(staged.constants[name] if name in staged.constants else data[name])
        return _ones(stage.shapes[name])

    return (
        [_ones(leaves[j]) for j in stage.leaves],
        [value(name) for name in stage.upstream],
        [value(name) for name in stage.other],
    )


def _ones(spec: Any) -> jax.Array:
    # far from 0, where arithmetic on some processors is slow, and small, so that nothing overflows
    inexact = jnp.issubdtype(spec.dtype, jnp.inexact)
    return jnp.full(spec.shape, 0.01 if inexact else 0, spec.dtype)


def _programs(stage: Any, values: Any) -> Programs:
    outputs, pullback = stage.forward(*values)
    seeds = [
        _ones(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)
        for x in outputs
    ]

    def forward() -> Any:
        return stage.forward(*values)

    total: list[list[Any]] = []

    def backward(pullback: Any) -> Any:
        grads, upstream = stage.backward(pullback, seeds)
        total[:] = [added(total[0], grads) if total else grads]  # as over micro-batches
        return total[0], upstream

    for _ in range(2):
        jax.block_until_ready(backward(pullback))
    return forward, backward


def middle(n_nodes: int) -> tuple[int, int]:
    """Choose the nodes that are timed as one stage too: from the middle, where they are alike.

    >>> middle(10), middle(3)
    ((3, 7), (0, 3))
    """
    size = min(_RUN, n_nodes)
    begin = (n_nodes - size) // 2
    return begin, begin + size


def alone_between(begin: int, end: int, n_nodes: int) -> tuple[tuple[int, ...], list[int]]:
    """Give the boundaries that make nodes a stage of their own, and its index.

    >>> alone_between(3, 7, 10), alone_between(0, 3, 3)
    (((3, 7), [1]), ((), [0]))
    """
    return tuple(b for b in (begin, end) if 0 < b < n_nodes), [int(begin > 0)]


def split_calls(
    single: Float[np.ndarray, "N 2"], together: Float[np.ndarray, "2"], begin: int, end: int
) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "N 2"]]:
    """Tell what a call takes by itself from what its nodes take.

    With ``t_i = o + s_i`` of single nodes and ``T = o + Σ s_i`` of a run of k of them,
    ``o = (Σ t_i − T) / (k − 1)``.

    Reconstruction: ours; the paper's estimator knows FLOPs only.

    Args:
      single: t, forward and backward of each node.
      together: T of the run.
      begin: first node of the run.
      end: the node after its last.

    Returns:
      o, and s of each node; o is not below 0 and s not below a tenth of t.

    >>> single = np.array([[2.0, 3.0]] * 4)
    >>> call_s, node_s = split_calls(single, np.array([7.0, 12.0]), 1, 4)
    >>> call_s.round(6).tolist(), node_s[0].round(6).tolist()
    ([0.0, 0.0], [2.0, 3.0])
    >>> split_calls(single, np.array([5.0, 9.0]), 1, 4)[0].tolist()
    [0.5, 0.0]
    """
    calls = np.zeros(2)
    if end - begin > 1:
        calls = (single[begin:end].sum(0) - together) / (end - begin - 1)
    calls = np.clip(calls, 0.0, np.median(single, axis=0))
    return calls, np.maximum(single - calls, _LEAST * single)


def split_encode(few_s: float, many_s: float) -> tuple[float, float]:
    """Tell what encoding takes whatever is kept, and what it takes for what is kept.

    Args:
      few_s: seconds for a value of which one in `FEW` is kept.
      many_s: where it is one in `MANY`.

    Returns:
      ``a, b`` of ``a + b / ratio``, neither below 0.

    >>> split_encode(2.0, 9.0)
    (1.0, 16.0)
    """
    slope = max(0.0, (many_s - few_s) / (1 / MANY - 1 / FEW))
    slope = min(slope, few_s * FEW)
    return few_s - slope / FEW, slope


def codec_programs(n_bytes: int, ratio: float) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Compile top-k's two ends for a value of so many bytes.

    >>> encode, decode = codec_programs(4096, 16.0)
    >>> decode().shape
    (1024,)
    """
    x = jnp.asarray(np.random.default_rng(0).standard_normal(max(n_bytes // 4, 64)), jnp.float32)
    parts = codec.encode(x, ratio, "topk")

    def encode() -> Any:
        return codec.encode(x, ratio, "topk")

    def decode() -> Any:
        return codec.decode(parts, x.shape, x.dtype, ratio, "topk")

    jax.block_until_ready(decode())
    return encode, decode


def update_program(
    graph: Dag, setup: Setup, optimizer: optax.GradientTransformation | None
) -> tuple[Callable[[], Any], int]:
    """Give an update of the leaves of the node that has most, and their bytes.

    >>> update_program.__name__  # needs a model: see tests/pipeline/test_profile.py
    'update_program'
    """
    node = max(graph.nodes, key=lambda node: sum(graph.leaf_bytes[j] for j in node.leaves))
    if optimizer is None or not node.leaves:
        return lambda: None, 1
    specs = jax.tree.leaves(setup.shapes())
    leaves = [_ones(specs[j]) for j in node.leaves]
    states = [optimizer.init(x) for x in leaves]
    update = leaf_update(optimizer, 1)

    def all_of_them() -> Any:
        return [update(x, state, x) for x, state in zip(leaves, states, strict=True)]

    jax.block_until_ready(all_of_them())
    return all_of_them, sum(graph.leaf_bytes[j] for j in node.leaves)


def time_program(program: Callable[[], Any], throttle: Throttle = FULL_SPEED) -> float:
    """Average a program's seconds over a window: under a CPU quota runs are all or nothing.

    Args:
      program: what to time; it must be compiled.
      throttle: of this device.

    >>> time_program(lambda: None) < 1
    True
    """
    start_s, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start_s < _WINDOW_S:
        throttle.begin()
        jax.block_until_ready(program())
        throttle.pay()
        count += 1
    return (time.perf_counter() - start_s) / count


def time_programs(programs: Programs, throttle: Throttle = FULL_SPEED) -> tuple[float, float]:
    """Average a stage's forward and backward over a window, in turns as in a pipeline.

    The residuals of a few micro-batches are kept meanwhile: an allocator that gets all memory back
    after each forward returns it to the system, and clearing new pages for the next one can take
    as long as the forward itself.

    Args:
      programs: the stage's.
      throttle: of this device.

    Returns:
      Seconds of the forward and of the backward.

    >>> time_programs((lambda: (0.0, 0.0), lambda residuals: residuals))[0] < 1
    True
    """
    forward, backward = programs
    held = collections.deque(forward()[1] for _ in range(_HELD))
    taken_s, count, start_s = np.zeros(2), 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start_s < 2 * _WINDOW_S:
        throttle.begin()
        begin_s = time.perf_counter()
        outputs, pullback = jax.block_until_ready(forward())
        throttle.pay()
        middle_s = time.perf_counter()
        throttle.begin()
        held.append(pullback)
        grads = jax.block_until_ready(backward(held.popleft()))
        throttle.pay()
        taken_s += [middle_s - begin_s, time.perf_counter() - middle_s]
        count += 1
        del outputs, pullback, grads
    forward_s, backward_s = (taken_s / count).tolist()
    return forward_s, backward_s
