"""Where a training step's time goes: over the parts of the model, forward, backward, optimizer.

Times come from the profiler (`core.profiler`), whose events name instructions of the compiled text
(`core.hlo`); an instruction's ``op_name`` holds the `jax.named_scope`s it was written in and
whether differentiation made it. No kernel's name is known here, so this works for any model that
names its parts and on any backend.

An instruction that the compiler fused from several parts is shared among them by the work of what
was fused into it (`core.hlo.work`). Where operations overlap, every instant is divided equally
among those under way.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core import hlo, profiler
from jaxsys.core.measure import Ratio, Timing, bootstrap_ci, interleaved, ratio, timing

PARTS = (
    "embedding", "norm", "qkv", "rope", "scores", "softmax", "values", "output", "mlp", "head",
    "loss",
)  # fmt: skip
OPTIMIZER = "optimizer"
OTHER = "other"
PHASES = ("forward", "recompute", "backward", OPTIMIZER, OTHER)
_WORD = re.compile(r"[\w.]+")
_FUNCTION = re.compile(r"p?jit\([^()]*\)")  # a jitted function's name is no scope


def part_of(op_name: str, parts: Sequence[str] = (*PARTS, OPTIMIZER)) -> str:
    """Give the innermost named part in a path of scopes.

    Args:
      op_name: such as ``jit(step)/transpose(jvp(head))/dot_general``.
      parts: the names that count.

    Returns:
      The part, or "other".

    >>> part_of("jit(step)/transpose(jvp(head))/dot_general"), part_of("jit(step)/add")
    ('head', 'other')
    >>> part_of("jit(loss)/jvp(jit(norm))/add")
    'other'
    """
    for element in reversed(op_name.split("/")[:-1]):
        for word in reversed(_WORD.findall(_FUNCTION.sub("", element))):
            if word in parts:
                return word
    return OTHER


def phase_of(op_name: str) -> str:
    """Tell which pass made an instruction, from its path of scopes.

    Args:
      op_name: a path in which differentiation left ``jvp(…)`` and ``transpose(jvp(…))``.

    Returns:
      One of `PHASES`; ``recompute`` is what `jax.checkpoint` runs again for the backward pass.

    >>> phase_of("jit(step)/jvp(head)/dot_general"), phase_of("jit(step)/transpose(jvp(mlp))/mul")
    ('forward', 'backward')
    >>> phase_of("jit(step)/optimizer/mul")
    'optimizer'
    """
    if part_of(op_name, (OPTIMIZER,)) == OPTIMIZER:
        return OPTIMIZER
    if "rematted_computation" in op_name:
        return "recompute"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else OTHER


def attribute(
    module: hlo.Module, parts: Sequence[str] = (*PARTS, OPTIMIZER)
) -> dict[str, dict[tuple[str, str], float]]:
    """Share every instruction among parts and phases.

    Args:
      module: the compiled program.
      parts: names of scopes that count.

    Returns:
      For each instruction ``{(part, phase): share}``, shares adding up to 1. One that calls a fused
      computation is shared by the work of the instructions in it. What the compiler put in, and
      that has no path, goes with the first instruction that reads it, or else with what it reads.

    >>> import jax
    >>> def f(x):
    ...     with jax.named_scope("head"):
    ...         return x @ x
    >>> x = jax.numpy.ones((64, 64))
    >>> module = hlo.parse(jax.jit(f).lower(x).compile().as_text())
    >>> (("head", "other"), 1.0) in [p for s in attribute(module).values() for p in s.items()]
    True
    """
    known, paths = module.instructions, _paths(module)
    found = {}
    for name, instruction in known.items():
        weights: dict[tuple[str, str], float] = {}
        for path, weight in _leaves(module, instruction, paths):
            key = (part_of(path, parts), phase_of(path))
            weights[key] = weights.get(key, 0.0) + weight
        if not sum(weights.values()):
            weights = {(part_of(paths[name], parts), phase_of(paths[name])): 1.0}
        total = sum(weights.values())
        found[name] = {key: weight / total for key, weight in weights.items() if weight}
    return found


def _paths(module: hlo.Module) -> dict[str, str]:
    """Give every instruction a path of scopes: its own, a reader's, or that of what it reads."""
    paths: dict[str, str] = {}
    for computation in module.computations.values():
        reader: dict[str, str] = {}
        for i in reversed(computation):
            paths[i.name] = i.op_name or reader.get(i.name, "")
            if paths[i.name] and i.opcode != "tuple":
                reader.update(dict.fromkeys(i.operands, paths[i.name]))
        for i in computation:
            if not paths[i.name]:
                paths[i.name] = next((p for o in i.operands if "/" in (p := paths.get(o, ""))), "")
    return paths


def _leaves(
    module: hlo.Module, instruction: hlo.Instruction, paths: Mapping[str, str]
) -> list[tuple[str, float]]:
    """Paths and weights of what an instruction computes, through fusions."""
    own = paths[instruction.name]
    if instruction.opcode not in ("fusion", "call") or not instruction.called:
        return [(own, hlo.work(module, instruction))]
    inner = [
        pair
        for name in instruction.called
        for i in module.computations.get(name, ())
        for pair in _leaves(module, i, paths)
    ]
    return [(path or own, weight) for path, weight in inner]


class Split(NamedTuple):
    """A step's time over parts and phases.

    Attributes:
      step: of the step alone, not profiled.
      seconds: (part, phase) to the median over rounds of its seconds, and the interval's ends.
      total: time under way in all parts over the step's, of paired rounds.
      overhead: the profiled call's time over the step's.
      operations: how many instructions had events.

    >>> Split(timing("step", [1.0]), {}, Ratio(1.0, (1.0, 1.0)), Ratio(1.0, (1.0, 1.0)), 0).seconds
    {}
    """

    step: Timing
    seconds: Mapping[tuple[str, str], tuple[float, float, float]]
    total: Ratio
    overhead: Ratio
    operations: int


def split(
    run: Callable[[], Any],
    text: str,
    *,
    parts: Sequence[str] = (*PARTS, OPTIMIZER),
    rounds: int = 10,
    warmup: int = 2,
) -> Split:
    """Profile a compiled step and share its time among the parts of the model.

    Rounds alternate between the step alone and the step under the profiler. Several devices: the
    first one's time.

    Args:
      run: runs the step once; it may be called often (no donated arguments).
      text: the step's compiled text, ``compiled.as_text()``.
      parts: names of scopes that count; anything else is "other".
      rounds: of each kind.
      warmup: rounds before them.

    Returns:
      The split; the parts' seconds add up to ``total`` times the step.

    >>> import jax
    >>> def step(x):
    ...     with jax.named_scope("mlp"):
    ...         return jax.numpy.tanh(x @ x)
    >>> x = jax.numpy.ones((256, 256))
    >>> compiled = jax.jit(step).lower(x).compile()
    >>> found = split(lambda: compiled(x), compiled.as_text(), rounds=2)
    >>> sorted(found.seconds), found.operations > 0
    ([('mlp', 'other')], True)
    """
    module = hlo.parse(text)
    shares = attribute(module, parts)
    captured: list[tuple[list[profiler.Event], float]] = []
    times = interleaved(
        {"step": run, "profiled": lambda: captured.append(profiler.capture(run))},
        warmup=warmup,
        runs=rounds,
    )
    rows, operations = [], set()
    for events, _ in captured[warmup:]:
        here = _of_program(events, module, shares)
        operations |= {event.op for event in here}
        row: dict[tuple[str, str], float] = {}
        for op, seconds in profiler.shared(here).items():
            for key, share in shares[op].items():
                row[key] = row.get(key, 0.0) + share * seconds
        rows.append(row)
    step = times["step"]
    under_way = timing("under way", [sum(row.values()) for row in rows])
    profiled = timing("profiled", [seconds for _, seconds in captured[warmup:]])
    keys = sorted({key for row in rows for key in row}, key=lambda key: _order(key, parts))
    columns = {key: [row.get(key, 0.0) for row in rows] for key in keys}
    return Split(
        step,
        {key: (float(np.median(x)), *bootstrap_ci(x)) for key, x in columns.items()},
        ratio(under_way, step),
        ratio(profiled, step),
        len(operations),
    )


def _of_program(
    events: Sequence[profiler.Event], module: hlo.Module, shares: Mapping[str, Any]
) -> list[profiler.Event]:
    """Events of one device that compute: a loop or a call whose insides have events is left out."""
    own = [e for e in events if e.op in shares and e.module in ("", module.name)]
    first = min((e.device for e in own), default="")
    seen = {e.op for e in own}
    known = module.instructions

    def contains(op: str) -> bool:
        inner = [i for name in known[op].called for i in module.computations.get(name, ())]
        return any(i.name in seen for i in inner)

    outer = {op for op in seen if known[op].opcode != "fusion" and contains(op)}
    return [e for e in own if e.device == first and e.op not in outer]


def _order(key: tuple[str, str], parts: Sequence[str]) -> tuple[int, int]:
    part, phase = key
    return (parts.index(part) if part in parts else len(parts), PHASES.index(phase))
