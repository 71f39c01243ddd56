"""Run programs: one compiled interpreter for every expression of a grammar.

Under `lax.map` over programs the switch stays a true branch (right for matrices on a CPU); under
`vmap` it becomes a selection that computes every operator for every instruction (right for short
columns, and for accelerators that idle otherwise). Mapping over *inputs* keeps the branch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsys.core.errors import UserError
from jaxsys.search.operators import Operator
from jaxsys.search.programs import Grammar, Tree


def run(
    grammar: Grammar,
    program: Int[Array | np.ndarray, "L"],
    inputs: Mapping[str, Float[Array | np.ndarray, "..."]],
    *,
    steps: Int[Array, ""] | None = None,
) -> Float[Array, "..."]:
    """Run one program.

    Args:
      grammar: the symbols.
      program: postfix opcodes; one that is not valid gives an unspecified array, never an error.
      inputs: terminal -> array; the shapes must broadcast to one.
      steps: instructions to run; up to the end of the program if left out. Under `vmap` over
        programs it must be the same for all.

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
    leaves, floors = _leaves(grammar, inputs)
    shape, dtype = leaves[0].shape, leaves[0].dtype
    program, arities = jnp.asarray(program), jnp.asarray(np.maximum(grammar.arities, 0))
    branches = [_nothing, *(_leaf(i) for i in range(len(leaves)))]
    branches += [(_unary if op.arity == 1 else _binary)(op) for op in grammar.operators]

    def step(i: Any, carry: Any) -> Any:
        values, repeats, top = carry
        code = program[i]
        # The branches read the stack and give back one value: a branch that gave back the stack
        # would copy it.
        value, floor = jax.lax.switch(code, branches, values, repeats, top, leaves, floors)
        at = top - arities[code]
        values = values.at[at].set(value.astype(dtype))
        return values, repeats.at[at].set(floor), jnp.where(code > 0, at + 1, top)

    empty = (
        jnp.zeros((grammar.height, *shape), dtype),
        jnp.ones((grammar.height, len(shape)), jnp.float32),
        jnp.zeros((), jnp.int32),
    )
    steps = jnp.sum(program > 0) if steps is None else steps
    values, _, _ = jax.lax.fori_loop(0, steps, step, empty)
    return values[0]


def _leaves(grammar: Grammar, inputs: Mapping[str, Any]) -> tuple[list[Array], Array]:
    """Broadcast the terminals and constants, and count along each axis how often that repeated."""
    missing = [name for name in grammar.terminals if name not in inputs]
    if missing:
        raise UserError(f"terminal {missing[0]!r} has no input; got {', '.join(inputs)}; add it")
    arrays = [jnp.asarray(inputs[name]) for name in grammar.terminals]
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    dtype = jnp.result_type(*arrays)
    leaves = [jnp.broadcast_to(a, shape).astype(dtype) for a in arrays]
    leaves += [jnp.full(shape, c, dtype) for c in grammar.constants]
    repeats = [_repeats(a.shape, shape) for a in arrays]
    repeats += [tuple(float(s) for s in shape)] * len(grammar.constants)
    return leaves, jnp.asarray(repeats, jnp.float32).reshape(len(leaves), len(shape))


def _repeats(own: tuple[int, ...], full: tuple[int, ...]) -> tuple[float, ...]:
    padded = (1,) * (len(full) - len(own)) + own
    return tuple(f / o if o else 1.0 for o, f in zip(padded, full, strict=True))


def _nothing(values: Any, repeats: Any, top: Any, leaves: Any, floors: Any) -> Any:
    # Written above the top of the stack, or nowhere if the stack is full.
    return jnp.zeros_like(values[0]), jnp.ones_like(repeats[0])


def _leaf(i: int) -> Callable[..., Any]:
    return lambda values, repeats, top, leaves, floors: (leaves[i], floors[i])


def _unary(op: Operator) -> Callable[..., Any]:
    def branch(values: Any, repeats: Any, top: Any, leaves: Any, floors: Any) -> Any:
        r = repeats[top - 1]
        return op.apply(values[top - 1], jnp.prod(r)).astype(values.dtype), r

    return branch


def _binary(op: Operator) -> Callable[..., Any]:
    def branch(values: Any, repeats: Any, top: Any, leaves: Any, floors: Any) -> Any:
        r, s = repeats[top - 2], repeats[top - 1]
        value = op.apply(values[top - 2], values[top - 1], jnp.prod(r), jnp.prod(s))
        return value.astype(values.dtype), r if op.by_number else jnp.minimum(r, s)

    return branch


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
    programs = jnp.asarray(programs)
    numbers = max(math.prod(jnp.shape(v)) for v in inputs.values())
    if (batching or ("vmap" if numbers <= 4096 else "map")) == "map":
        return jax.lax.map(lambda program: run(grammar, program, inputs), programs)
    most = jnp.max(jnp.sum(programs > 0, -1), initial=0)
    return jax.vmap(lambda program: run(grammar, program, inputs, steps=most))(programs)


def evaluate(grammar: Grammar, tree: Tree, inputs: Mapping[str, Any]) -> Array:
    """Evaluate one tree directly, operator by operator, without the interpreter's stack.

    Nothing is broadcast before an operator needs it. Right for one expression that is used often;
    under `jit` every expression compiles anew.

    Args:
      grammar: the symbols.
      tree: as `programs.decode` gives it.
      inputs: terminal -> array.

    >>> g = Grammar(("W", "X"))
    >>> evaluate(g, ("mul", ("W",), ("sqrt", ("X",))), {"W": 2.0, "X": 9.0}).tolist()
    6.0
    """
    symbol, *children = tree
    operands = [evaluate(grammar, child, inputs) for child in children]
    if operands:
        apply = next(op.apply for op in grammar.operators if op.name == symbol)
        rank = max(x.ndim for x in operands)
        same = [x.reshape((1,) * (rank - x.ndim) + x.shape) for x in operands]
        return apply(*same, *([1.0] * len(operands)))
    if symbol in grammar.terminals:
        if symbol not in inputs:
            raise UserError(f"terminal {symbol!r} has no input; got {', '.join(inputs)}; add it")
        return jnp.asarray(inputs[symbol])
    return jnp.asarray(grammar.constants[grammar.opcode(symbol) - len(grammar.terminals) - 1])
