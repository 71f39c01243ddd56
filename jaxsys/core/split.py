"""A backward pass cut in two: what earlier stages wait for, and what only the update needs.

Zero-bubble pipelines send the cotangents of a stage's inputs on as soon as they are known and make
the gradients of its parameters when there is nothing else to do. Both come from one pullback; here
its equations are dealt out: those that the input cotangents need, and the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxsys.core.equations import Equation, evaluate, trace


class SplitBackward(NamedTuple):
    """The two programs of a backward pass.

    Attributes:
      inputs: ``(pullback, cotangents) -> (input cotangents, rest)``; one compiled program.
      weights: ``rest -> leaf gradients``, compiled. ``rest`` holds what the second program still
        needs: residuals, cotangents and values that the first one made.

    >>> SplitBackward._fields
    ('inputs', 'weights')
    """

    inputs: Callable[[Any, Any], tuple[Any, Any]]
    weights: Callable[[Any], Any]


def split_backward(pullback: Any, cotangents: Any) -> SplitBackward:
    """Cut ``pullback(cotangents) -> (leaf gradients, input cotangents)`` in two programs.

    Equations from which an input cotangent follows go to the first, so it does no more than it
    must; the second repeats nothing. An equation that yields both kinds (a loop over layers, a
    rematerialised block) is done in the first. What the second needs of the pullback is handed over
    by reference.

    Args:
      pullback: as `jax.vjp` gives it, of a function of two arguments: leaves and inputs.
      cotangents: of the function's outputs; shapes and types count, and these are fixed.

    Returns:
      The two programs; they serve every pullback of the same function.

    >>> import jax.numpy as jnp
    >>> _, pullback = jax.vjp(lambda w, x: w * x, jnp.float32(2.0), jnp.float32(3.0))
    >>> split = split_backward(pullback, jnp.float32(1.0))
    >>> cotangent, rest = split.inputs(pullback, jnp.float32(1.0))
    >>> float(cotangent), float(split.weights(rest))
    (2.0, 3.0)
    """
    flat, treedef = jax.tree.flatten((pullback, cotangents))
    # Cotangents of integers have no numbers and no place among a program's inputs.
    live = [i for i, x in enumerate(flat) if x.dtype != jax.dtypes.float0]
    empty = {i: x for i, x in enumerate(flat) if x.dtype == jax.dtypes.float0}
    shape: list[Any] = []

    def run(*args: Any) -> list[Any]:
        values = empty | dict(zip(live, args, strict=True))
        back, seeds = jax.tree.unflatten(treedef, [values[i] for i in range(len(flat))])
        shape[:] = back(seeds)
        return jax.tree.leaves(tuple(shape))

    program = trace(run, *(flat[i] for i in live))
    n_weights = len(jax.tree.leaves(shape[0]))
    weights_tree, inputs_tree = (jax.tree.structure(part) for part in shape)
    shape.clear()  # it holds tracers
    to_weights, to_inputs = program.results[:n_weights], program.results[n_weights:]
    first = _needed(program.equations, to_inputs)
    done = set(map(id, first))
    second = [e for e in program.equations if id(e) not in done]
    own = {v for e in second for v in e.outputs} | set(program.constants)
    wanted = [v for e in second for v in e.reads] + [v for v in to_weights if isinstance(v, int)]
    rest = [v for v in dict.fromkeys(wanted) if v not in own]
    # A compiled program would copy what it was given, so that part goes round it.
    round_it = [v for v in rest if v in program.inputs]
    through = [v for v in rest if v not in program.inputs]

    @jax.jit
    def compiled_inputs(args: list[Any]) -> tuple[list[Any], list[Any]]:
        env = program.constants | dict(zip(program.inputs, args, strict=True))
        evaluate(first, env)
        return _read(to_inputs, env), [env[v] for v in through]

    def inputs(back: Any, seeds: Any) -> tuple[Any, Any]:
        given = jax.tree.leaves((back, seeds))
        args = [given[i] for i in live]
        upstream, made = compiled_inputs(args)
        return jax.tree.unflatten(inputs_tree, upstream), [*(args[v] for v in round_it), *made]

    @jax.jit
    def weights(values: Any) -> Any:
        env = program.constants | dict(zip((*round_it, *through), values, strict=True))
        evaluate(second, env)
        return jax.tree.unflatten(weights_tree, _read(to_weights, env))

    return SplitBackward(inputs, weights)


def _needed(equations: Sequence[Equation], results: Sequence[Any]) -> list[Equation]:
    """Find the equations from which some values follow, in order."""
    needed = {v for v in results if isinstance(v, int)}
    found = []
    for eqn in reversed(equations):
        if needed.intersection(eqn.outputs):
            found.append(eqn)
            needed.update(eqn.reads)
    return found[::-1]


def _read(results: Sequence[Any], env: dict[int, Any]) -> list[Any]:
    return [env[v] if isinstance(v, int) else v.val for v in results]
