"""Run programs: one compiled interpreter for every expression of a grammar.

A program is first turned into instructions with addresses, so that terminals are read where they
lie and only operators take a step. Under `lax.map` over programs the switch between operators stays
a true branch (right for matrices on a CPU); under `vmap` it becomes a selection that computes every
operator for every instruction (right for short columns, and for accelerators that idle otherwise).
Mapping over *inputs* keeps the branch.

Axes: ``L`` length of a program, ``P`` population.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from jaxsys.core.errors import UserError
from jaxsys.search.operators import Operator
from jaxsys.search.programs import Grammar, Tree


class Code(NamedTuple):
    """Hold a program as instructions with addresses: the operators alone, in their order.

    Addresses count the terminals, the constants, the entries of the stack, and one entry that
    nobody reads.

    Attributes:
      operator: which operator of the grammar, [L].
      left: address of the first operand, [L].
      right: address of the last operand, [L].
      target: address of the result, [L].
      steps: how many instructions there are.
      result: address of the program's value.

    >>> Code._fields[-1]
    'result'
    """

    operator: Int32[Array, "L"]
    left: Int32[Array, "L"]
    right: Int32[Array, "L"]
    target: Int32[Array, "L"]
    steps: Int32[Array, ""]
    result: Int32[Array, ""]


def assemble(grammar: Grammar, program: Int[Array | np.ndarray, "L"]) -> Code:
    """Find where each instruction of a program reads and writes.

    Args:
      grammar: the symbols.
      program: postfix opcodes; for one that is not valid addresses are unspecified.

    >>> from jaxsys.search.programs import from_string
    >>> g = Grammar(("W", "X"), length=4)
    >>> code = assemble(g, from_string(g, "W*sqrt(X)"))
    >>> [g.operators[i].name for i in code.operator[: code.steps]]
    ['sqrt', 'mul']
    >>> code.left.tolist()[:2], code.right.tolist()[:2], code.target.tolist()[:2]
    ([1, 0], [1, 3], [3, 2])
    """
    program = jnp.asarray(program, jnp.int32)
    leaves = len(grammar.terminals) + len(grammar.constants)
    arity, taken = jnp.asarray(np.maximum(grammar.arities, 0))[program], program > 0
    grows = jnp.where(taken, 1 - arity, 0)
    place = jnp.cumsum(grows) - grows - arity  # entry of the stack that an instruction fills
    is_operator = program > leaves
    address = jnp.where(is_operator, leaves + place, program - 1)
    index = jnp.arange(program.size)
    # The left operand is what filled the same entry last, the right one what came just before.
    fills = (place[:, None] == place[None]) & (index[:, None] > index[None])
    left = address[jnp.max(jnp.where(fills, index[None], 0), axis=1)]
    right = address[jnp.maximum(index - 1, 0)]
    order = jnp.argsort(~is_operator, stable=True)
    return Code(
        (program - leaves - 1)[order],
        left[order],
        right[order],
        jnp.where(is_operator, address, leaves + grammar.height)[order],
        jnp.sum(is_operator, dtype=jnp.int32),
        address[jnp.sum(taken) - 1],
    )


def run(
    grammar: Grammar,
    program: Int[Array | np.ndarray, "L"] | Code,
    inputs: Mapping[str, Float[Array | np.ndarray, "..."]],
) -> Float[Array, "..."]:
    """Run one program.

    Args:
      grammar: the symbols.
      program: postfix opcodes, or what `assemble` makes of them; one that is not valid gives an
        unspecified array, never an error. Under `vmap` over programs its ``steps`` must be the same
        for all: the most of any.
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
    leaves, floors = _leaves(grammar, inputs)
    code = program if isinstance(program, Code) else assemble(grammar, program)
    if not grammar.operators:
        return leaves[code.result]
    branches = [(_unary if op.arity == 1 else _binary)(op) for op in grammar.operators]

    def step(i: Any, carry: Any) -> Any:
        values, repeats = carry
        at = code.left[i], code.right[i]
        # The branches read the entries and give back one value: a branch that gave back all entries
        # would copy them.
        value, floor = jax.lax.switch(code.operator[i], branches, values, repeats, *at)
        target = code.target[i]
        return values.at[target].set(value.astype(values.dtype)), repeats.at[target].set(floor)

    rest = grammar.height + 1
    values = jnp.concatenate([leaves, jnp.zeros((rest, *leaves.shape[1:]), leaves.dtype)])
    repeats = jnp.concatenate([floors, jnp.ones((rest, floors.shape[1]), floors.dtype)])
    values, _ = jax.lax.fori_loop(0, code.steps, step, (values, repeats))
    return values[code.result]


def _leaves(grammar: Grammar, inputs: Mapping[str, Any]) -> tuple[Array, Array]:
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
    return jnp.stack(leaves), jnp.asarray(repeats, jnp.float32).reshape(len(leaves), len(shape))


def _repeats(own: tuple[int, ...], full: tuple[int, ...]) -> tuple[float, ...]:
    padded = (1,) * (len(full) - len(own)) + own
    return tuple(f / o if o else 1.0 for o, f in zip(padded, full, strict=True))


def _unary(op: Operator) -> Callable[..., Any]:
    def branch(values: Any, repeats: Any, left: Any, right: Any) -> Any:
        r = repeats[left]
        return op.apply(values[left], jnp.prod(r)).astype(values.dtype), r

    return branch


def _binary(op: Operator) -> Callable[..., Any]:
    def branch(values: Any, repeats: Any, left: Any, right: Any) -> Any:
        r, s = repeats[left], repeats[right]
        value = op.apply(values[left], values[right], jnp.prod(r), jnp.prod(s))
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
    codes = jax.vmap(lambda program: assemble(grammar, program))(programs)
    most = jnp.max(codes.steps, initial=0)

    def one(code: Code) -> Array:
        return run(grammar, code._replace(steps=most), inputs)

    return jax.vmap(one)(codes)


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
