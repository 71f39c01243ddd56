"""The programs that a profile times alone: nodes, stages, the ends of a codec."""

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.cluster.throttle import FULL_SPEED, Throttle
from jaxsys.core.stages import StagedLoss, cut_at
from jaxsys.pipeline import codec
from jaxsys.pipeline.job import Setup
from jaxsys.pipeline.turn import added

_WINDOW_S = 0.15  # of one timed program: long against the periods of a CPU quota
_HELD = 3  # micro-batches whose residuals are kept while a stage is timed
FEW, MANY = 16.0, 2.0  # ratios of the top-k whose ends are timed

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

    The residuals of a few micro-batches are kept meanwhile, as in a pipeline. As many turns again
    go before, untimed: the first use of a page takes longer than the work on it, and a step later
    finds all pages in use (`cluster.heap`).

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
    for _ in range(2 * _HELD):
        held.append(forward()[1])
        jax.block_until_ready(backward(held.popleft()))
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
