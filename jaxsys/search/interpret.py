"""Run programs: one compiled interpreter for every expression of a grammar.

Under `lax.map` over programs the switch stays a true branch (right for matrices on a CPU); under
`vmap` it becomes a selection that computes every operator for every instruction (right for short
columns, and for accelerators that idle otherwise).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.search.programs import Grammar


def run(
    grammar: Grammar,
    program: Int[Array | np.ndarray, "L"],
    inputs: Mapping[str, Float[Array | np.ndarray, "..."]],
) -> Float[Array, "..."]:
    """Run one program.

    Args:
      grammar: the symbols.
      program: postfix opcodes; one that is not valid gives an unspecified array, never an error.
      inputs: terminal -> array; the shapes must broadcast to one.

    Returns:
      An array of the broadcast shape.

    Raises:
      UserError: if a terminal has no input.

    >>> from jaxsys.search.programs import from_string
    >>> g = Grammar(("W", "X"))
    >>> x = {"W": jnp.array([[1.0, 2.0]]), "X": jnp.array([[4.0, 9.0]])}
    >>> run(g, jnp.asarray(from_string(g, "W*sqrt(X)")), x).tolist()
    [[2.0, 6.0]]
    """
    missing = [name for name in grammar.terminals if name not in inputs]
    if missing:
        raise UserError(f"terminal {missing[0]!r} has no input; got {', '.join(inputs)}; add it")
    arrays = [jnp.asarray(inputs[name]) for name in grammar.terminals]
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    dtype = jnp.result_type(*arrays)
    leaves = [jnp.broadcast_to(a, shape) for a in arrays]
    # Along each axis, how often broadcasting has repeated every value of a terminal.
    repeats = [_repeats(a.shape, shape) for a in arrays]
    leaves += [jnp.full(shape, c, dtype) for c in grammar.constants]
    repeats += [tuple(float(s) for s in shape)] * len(grammar.constants)
    floors = jnp.asarray(repeats, jnp.float32).reshape(len(leaves), len(shape))
    operand = (jnp.zeros((grammar.height, *shape), dtype), jnp.ones((grammar.height, len(shape))))

    def push(stack: Any, at: Any, value: Any, floor: Any) -> Any:
        values, repeated = stack
        return values.at[at].set(value.astype(dtype)), repeated.at[at].set(floor)

    def leaf(i: int) -> Any:
        return lambda stack, top: (push(stack, top, leaves[i], floors[i]), top + 1)

    def unary(f: Any) -> Any:
        def step(stack: Any, top: Any) -> Any:
            x, r = stack[0][top - 1], stack[1][top - 1]
            return push(stack, top - 1, f(x, jnp.prod(r)), r), top

        return step

    def binary(f: Any) -> Any:
        def step(stack: Any, top: Any) -> Any:
            (x, y), (r, s) = ((stack[i][top - 2], stack[i][top - 1]) for i in range(2))
            value = f(x, y, jnp.prod(r), jnp.prod(s))
            return push(stack, top - 2, value, jnp.minimum(r, s)), top - 1

        return step

    branches = [lambda stack, top: (stack, top)]
    branches += [leaf(i) for i in range(len(leaves))]
    branches += [(unary if op.arity == 1 else binary)(op.apply) for op in grammar.operators]

    def step(carry: Any, code: Any) -> Any:
        return jax.lax.switch(code, branches, *carry), None

    (stack, _), _ = jax.lax.scan(step, (operand, jnp.zeros((), jnp.int32)), program)
    return stack[0][0]


def _repeats(own: tuple[int, ...], full: tuple[int, ...]) -> tuple[float, ...]:
    padded = (1,) * (len(full) - len(own)) + own
    return tuple(f / o if o else 1.0 for o, f in zip(padded, full, strict=True))


def run_many(
    grammar: Grammar,
    programs: Int[Array | np.ndarray, "P L"],
    inputs: Mapping[str, Any],
    *,
    batching: Literal["map", "vmap"] | None = None,
) -> Float[Array, "P ..."]:
    """Run a population.

    Args:
      grammar: the symbols.
      programs: one row for each individual.
      inputs: terminal -> array.
      batching: `vmap` for inputs of at most a few thousand numbers if left out, else `map`.

    >>> from jaxsys.search.programs import from_string
    >>> g = Grammar(("a",))
    >>> programs = jnp.stack([from_string(g, t) for t in ("a", "-a")])
    >>> run_many(g, programs, {"a": jnp.array([1.0])}).tolist()
    [[1.0], [-1.0]]
    """
    numbers = max(math.prod(jnp.shape(v)) for v in inputs.values())
    batching = batching or ("vmap" if numbers <= 4096 else "map")
    one = lambda program: run(grammar, program, inputs)  # noqa: E731
    return jax.vmap(one)(programs) if batching == "vmap" else jax.lax.map(one, programs)
