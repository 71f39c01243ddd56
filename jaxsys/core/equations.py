"""A JAX function as a flat list of equations over numbered values; all that depends on jaxprs.

A function is traced once and calls of `jit` are inlined. Values are numbered in the order in which
they are made, so every process that traces the same function gives them the same numbers.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from jaxsys.core.errors import UserError

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_VALUE_NEEDED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Equation(NamedTuple):
    """One operation.

    Attributes:
      primitive: JAX's primitive.
      params: its parameters.
      inputs: numbers of values, or literals (with ``val`` and ``aval``).
      outputs: numbers of values.
      scope: outermost `jax.named_scope` in which it was written, or "".

    >>> program = trace(lambda x: x + 1.0, jax.ShapeDtypeStruct((2,), "float32"))
    >>> [(e.primitive.name, e.outputs) for e in program.equations]
    [('add', (1,))]
    """

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]
    scope: str

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the values that it reads, literals left out."""
        return tuple(v for v in self.inputs if isinstance(v, int))


class Program(NamedTuple):
    """A function as a list of equations in topological order.

    Attributes:
      equations: without those that no result needs.
      avals: shape and dtype of each value, by its number.
      inputs: numbers of the arguments, which come first.
      constants: number to array, of arrays that the function closes over.
      results: numbers of values, or literals.
      effects: names of operations with side effects, in order.

    >>> trace(lambda x: (x, x * x), jax.ShapeDtypeStruct((), "float32")).results
    (0, 1)
    """

    equations: tuple[Equation, ...]
    avals: tuple[Any, ...]
    inputs: tuple[int, ...]
    constants: dict[int, Any]
    results: tuple[Any, ...]
    effects: tuple[str, ...]


class _Flattener:
    """Number the values of nested jaxprs and list their equations."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.avals: list[Any] = []
        self.constants: dict[int, Any] = {}
        self.effects: list[str] = []
        self._known: dict[int, int] = {}  # id of a constant array -> its number

    def number(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def constant(self, variable: Any, value: Any) -> int:
        if id(value) not in self._known:
            self._known[id(value)] = self.number(variable.aval)
            self.constants[self._known[id(value)]] = value
        return self._known[id(value)]

    def inline(self, closed: Any, atoms: Sequence[Any], scope: str) -> tuple[Any, ...]:
        jaxpr = closed.jaxpr
        names = {
            v: self.constant(v, c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)
        }
        names.update(zip(jaxpr.invars, atoms, strict=True))

        def atom(v: Any) -> Any:
            return v if isinstance(v, jex.Literal) else names[v]

        for eqn in jaxpr.eqns:
            inputs = tuple(atom(v) for v in eqn.invars)
            inner_scope = scope or _outermost(eqn)
            if eqn.primitive.name in _CALLS:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                outputs = self.inline(inner, inputs, inner_scope)
            else:
                if eqn.effects:
                    self.effects.append(_effect_name(eqn))
                outputs = tuple(self.number(v.aval) for v in eqn.outvars)
                self.equations.append(
                    Equation(eqn.primitive, eqn.params, inputs, outputs, inner_scope)
                )
            names.update(zip(eqn.outvars, outputs, strict=True))
        return tuple(atom(v) for v in jaxpr.outvars)


def _outermost(eqn: Any) -> str:
    return str(eqn.source_info.name_stack).partition("/")[0]


def _effect_name(eqn: Any) -> str:
    """Name the innermost operation with an effect: the one inside a loop, not the loop."""
    for inner in inner_jaxprs(eqn.params):
        for sub in inner.eqns:
            if sub.effects:
                return _effect_name(sub)
    return eqn.primitive.name


def inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """List the functions inside an operation (a loop's body, branches), as plain jaxprs.

    Args:
      params: parameters of an equation.

    Yields:
      Objects with ``eqns``, ``invars`` and ``outvars``.

    >>> program = trace(lambda x: jax.lax.map(lambda y: y + 1, x), jax.numpy.ones(3))
    >>> [len(inner.eqns) for inner in inner_jaxprs(program.equations[0].params)]
    [1]
    """
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def trace(function: Callable[..., Any], *args: Any) -> Program:
    """Trace a function of flat arguments.

    Args:
      function: any JAX function of arrays; its result may be a tree.
      *args: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Its equations; those that no result needs are left out, effects or not.

    Raises:
      UserError: the function reads the value of an array while it is traced, as it must for a shape
        or a branch that depends on data.

    >>> program = trace(lambda x: jax.jit(jax.numpy.sin)(x).sum(), jax.numpy.ones(3))
    >>> [e.primitive.name for e in program.equations]
    ['sin', 'reduce_sum']
    """
    try:
        closed = jax.make_jaxpr(function)(*args)
    except _VALUE_NEEDED as error:
        raise UserError(
            f"the function needs the value of an array{_where(error)} "
            f"({type(error).__name__}); expected shapes and branches that follow from shapes; "
            "use jnp.where, lax.cond or a fixed size"
        ) from error
    flat = _Flattener()
    inputs = tuple(flat.number(v.aval) for v in closed.jaxpr.invars)
    results = flat.inline(closed, inputs, "")
    needed = {v for v in results if isinstance(v, int)}
    equations = []
    for eqn in reversed(flat.equations):
        if needed.intersection(eqn.outputs):
            needed.update(eqn.reads)
            equations.append(eqn)
    return Program(
        tuple(reversed(equations)),
        tuple(flat.avals),
        inputs,
        flat.constants,
        results,
        tuple(dict.fromkeys(flat.effects)),
    )


def _where(error: BaseException) -> str:
    """Name the last line outside JAX that the error passed."""
    jax_folder = str(Path(jax.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(jax_folder) and f.filename != __file__]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def evaluate(equations: Sequence[Equation], env: dict[int, Any]) -> None:
    """Apply equations in order.

    Args:
      equations: in topological order.
      env: number to array of what they read; what they make is added.

    >>> program = trace(lambda x: x * 2.0, jax.numpy.ones(()))
    >>> env = {0: jax.numpy.float32(3)}
    >>> evaluate(program.equations, env)
    >>> float(env[1])
    6.0
    """
    for eqn in equations:
        values = [env[v] if isinstance(v, int) else v.val for v in eqn.inputs]
        outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        outs = outs if eqn.primitive.multiple_results else [outs]
        env.update(zip(eqn.outputs, outs, strict=True))


def describe(equations: Sequence[Equation], number: Mapping[int, int]) -> tuple[str, ...]:
    """Describe equations up to the numbers of their values, to tell which programs are the same.

    Args:
      equations: of one program.
      number: number of each value to the one that it goes by in the description.

    Returns:
      A text for each equation; equal texts are the same operation on the same places.

    >>> program = trace(lambda x: x * 2.0, jax.numpy.ones(()))
    >>> "mul" in describe(program.equations, {0: 0, 1: 1})[0]
    True
    """

    def atom(v: Any) -> str:
        return f"%{number[v]}" if isinstance(v, int) else f"{v.aval.str_short()}:{v.val}"

    def inner_constants(eqn: Equation) -> list[int]:
        return [id(c) for p in eqn.params.values() for c in getattr(p, "consts", ())]

    return tuple(
        f"{e.primitive}{e.params}{[atom(v) for v in e.inputs]}"
        f"{[number[v] for v in e.outputs]}{inner_constants(e)}"
        for e in equations
    )
