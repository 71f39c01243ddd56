"""The parts of a step timed one by one: each part's forward pass, its vjp, the optimizer alone.

The loss is cut where its `jax.named_scope` changes (`core.stages.cut_scopes`) and every part
becomes two compiled programs on the inputs that it has in the step. What the compiler fuses across
parts in the whole step is lost here, so the sum may lie above the step; `modules.split` loses
nothing, but cannot tell apart what was fused. The two check each other.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.bench.modules import OPTIMIZER, OTHER, PARTS
from jaxsys.core.measure import Ratio, Timing, bootstrap_ci, interleaved, ratio, timing
from jaxsys.core.stages import Stage, StagedLoss, cut_scopes, zero_cotangent

# Coarser pieces, within which the compiler may fuse.
GROUPS = {
    "embedding": "embedding",
    **dict.fromkeys(("norm", "qkv", "rope", "scores", "softmax", "values", "output"), "attention"),
    "mlp": "mlp",
    **dict.fromkeys(("head", "loss"), "head"),
}


class Ablation(NamedTuple):
    """Times of the parts alone.

    Attributes:
      step: of the whole step, in the same rounds.
      seconds: (part, phase) to the median over rounds of its seconds, and the interval's ends.
      total: sum of the parts over the step, of paired rounds.
      programs: how many different programs were timed.

    >>> Ablation(timing("step", [1.0]), {}, Ratio(1.0, (1.0, 1.0)), 0).programs
    0
    """

    step: Timing
    seconds: Mapping[tuple[str, str], tuple[float, float, float]]
    total: Ratio
    programs: int


class _Timed(NamedTuple):
    """A program to time: what it is, how often the step runs it, how it is called."""

    part: str
    phase: str
    times: int
    call: Callable[[], Any]


def ablate(
    loss_fn: Callable[..., Any],
    params: Any,
    data: tuple[Any, ...],
    *,
    step: Callable[[], Any],
    optimizer: Callable[[], Any] | None = None,
    parts: Sequence[str] | Mapping[str, str] = PARTS,
    rounds: int = 10,
    warmup: int = 2,
) -> Ablation:
    """Time every part of a loss forward and backward, the optimizer and the whole step in turns.

    Equal parts (those of all layers) are timed once and counted as often as the step runs them.

    Args:
      loss_fn: ``loss_fn(params, *data) -> scalar``, with its parts in named scopes.
      params: tree of arrays.
      data: the other arguments.
      step: runs the whole step once.
      optimizer: runs the optimizer once.
      parts: the scopes' names, or scope to the name of the piece that it belongs to (`GROUPS`).
      rounds: timed rounds.
      warmup: rounds before them.

    Returns:
      The times.

    Raises:
      UserError: what `jaxsys.core.stages.cut_scopes` refuses.

    >>> def loss(p, x):
    ...     with jax.named_scope("mlp"):
    ...         y = jnp.tanh(x @ p)
    ...     with jax.named_scope("loss"):
    ...         return jnp.sum(y)
    >>> p, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    >>> step = jax.jit(jax.grad(loss))
    >>> found = ablate(loss, p, (x,), step=lambda: step(p, x), rounds=2)
    >>> sorted(found.seconds)
    [('loss', 'backward'), ('loss', 'forward'), ('mlp', 'backward'), ('mlp', 'forward')]
    """
    names = parts if isinstance(parts, Mapping) else {part: part for part in parts}
    staged, labels = cut_scopes(loss_fn, params, data, names)
    timed = _programs(staged, labels, params, data)
    if optimizer is not None:
        timed.append(_Timed(OPTIMIZER, OPTIMIZER, 1, optimizer))
    calls = {str(i): one.call for i, one in enumerate(timed)} | {"step": step}
    times = interleaved(calls, warmup=warmup, runs=rounds)
    columns: dict[tuple[str, str], np.ndarray] = {}
    for i, one in enumerate(timed):
        seconds = one.times * np.asarray(times[str(i)].seconds)
        key = (one.part, one.phase)
        columns[key] = columns.get(key, 0.0) + seconds
    total = timing("parts", list(np.sum(list(columns.values()), axis=0)))
    found = {key: (float(np.median(x)), *bootstrap_ci(x)) for key, x in columns.items()}
    return Ablation(times["step"], found, ratio(total, times["step"]), len(timed))


def _programs(
    staged: StagedLoss, labels: Sequence[str], params: Any, data: tuple[Any, ...]
) -> list[_Timed]:
    """Run the loss once through its stages, keeping what each different program was given."""
    leaves = dict(enumerate(jax.tree.leaves(params)))
    values = dict(zip(staged.data_names, jax.tree.leaves(data), strict=True))
    last = {v: k for k, stage in enumerate(staged.stages) for v in _read(stage)}
    kept: dict[tuple[int, str], tuple[int, Callable[[], Any], Callable[[], Any] | None]] = {}
    for k, (stage, label) in enumerate(zip(staged.stages, labels, strict=True)):
        outs, pullback = stage.run(leaves, values)
        key = (id(stage.forward), label)
        if key in kept:
            kept[key] = (kept[key][0] + 1, *kept[key][1:])
        else:
            kept[key] = (1, *_calls(stage, leaves, values, pullback))
        values |= outs
        values = {v: x for v, x in values.items() if last.get(v, -1) > k}
    timed = []
    for (_, label), (times, forward, backward) in kept.items():
        timed.append(_Timed(label or OTHER, "forward", times, forward))
        if backward is not None:
            timed.append(_Timed(label or OTHER, "backward", times, backward))
    return timed


def _read(stage: Stage) -> tuple[int, ...]:
    return (*stage.upstream, *stage.other)


def _calls(
    stage: Stage, leaves: Mapping[int, Any], values: Mapping[int, Any], pullback: Any
) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    env = {**stage.constants, **values}
    given = [leaves[j] for j in stage.leaves], [env[v] for v in stage.upstream]
    other = [env[v] for v in stage.other]
    shapes = [stage.shapes[v] for v in stage.outputs]
    seeds = [
        jnp.ones(s.shape, s.dtype) if jnp.issubdtype(s.dtype, jnp.inexact) else zero_cotangent(s)
        for s in shapes
    ]
    backward = None if not any(given) else lambda: stage.backward(pullback, seeds)
    return lambda: stage.forward(*given, other), backward
