"""What the backward pass of an operation keeps from its forward pass.

The rule of JAX for the operation is traced, so the answer is that of `jax.vjp`: some inputs, some
outputs, and values computed for the backward pass alone (the slope of a nonlinearity).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxsys.core.equations import Equation, evaluate, trace


class Kept(NamedTuple):
    """What one operation keeps.

    Attributes:
      values: numbers of its inputs and outputs that are kept.
      extra_bytes: size of what is kept beside those.

    >>> Kept((3,), 0).values
    (3,)
    """

    values: tuple[int, ...]
    extra_bytes: int


def value_bytes(aval: Any) -> int:
    """Count the bytes of a value.

    Args:
      aval: anything with ``shape`` and ``dtype``.

    >>> value_bytes(jax.ShapeDtypeStruct((2, 3), "bfloat16"))
    12
    """
    return math.prod(aval.shape) * aval.dtype.itemsize


def kept(
    equation: Equation,
    avals: Sequence[Any],
    differentiable: frozenset[int] | set[int],
    cache: dict[Any, Any],
) -> Kept:
    """Tell what an equation's backward pass keeps.

    Args:
      equation: of a traced program.
      avals: shapes by number of the value.
      differentiable: numbers of the values that need a gradient.
      cache: answers for equal operations, filled here.

    Returns:
      The kept values; none where no input needs a gradient.

    >>> import jax.numpy as jnp
    >>> program = trace(lambda a, b: a * b, jnp.ones(3), jnp.ones(3))
    >>> kept(program.equations[0], program.avals, {0, 1, 2}, {}).values
    (0, 1)
    >>> kept(program.equations[0], program.avals, {0, 2}, {}).values
    (1,)
    """
    reads = tuple(dict.fromkeys(equation.reads))
    wanted = tuple(i for i, v in enumerate(reads) if v in differentiable)
    if not wanted or not any(v in differentiable for v in equation.outputs):
        return Kept((), 0)
    places = {v: i for i, v in enumerate(reads)}
    key = (
        f"{equation.primitive}{equation.params}",
        tuple(places[v] if isinstance(v, int) else str(v.val) for v in equation.inputs),
        tuple((avals[v].shape, avals[v].dtype) for v in reads),
        wanted,
    )
    if key not in cache:
        cache[key] = _trace_rule(equation, [avals[v] for v in reads], reads, wanted)
    inputs, outputs, extra_bytes = cache[key]
    values = (*(reads[i] for i in inputs), *(equation.outputs[i] for i in outputs))
    return Kept(values, extra_bytes)


def _trace_rule(
    equation: Equation, avals: Sequence[Any], reads: Sequence[int], wanted: Sequence[int]
) -> tuple[list[int], list[int], int]:
    """List the places of the kept inputs and outputs, and count the bytes beside them."""

    def forward(*values: Any) -> Any:
        def run(*chosen: Any) -> list[Any]:
            env = dict(zip(reads, values, strict=True))
            env.update(zip((reads[i] for i in wanted), chosen, strict=True))
            evaluate([equation], env)
            return [env[v] for v in equation.outputs]

        outs, pullback = jax.vjp(run, *(values[i] for i in wanted))
        return outs, jax.tree.leaves(pullback)

    program = trace(forward, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
    made = program.results[: len(equation.outputs)]
    residuals = dict.fromkeys(v for v in program.results[len(made) :] if isinstance(v, int))
    inputs = [i for i in range(len(reads)) if i in residuals]
    outputs = [i for i, v in enumerate(made) if v in residuals and v not in inputs]
    known = {*range(len(reads)), *(v for v in made if isinstance(v, int))}
    extra = sum(value_bytes(program.avals[v]) for v in residuals if v not in known)
    return inputs, outputs, extra
