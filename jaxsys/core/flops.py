"""Floating-point operations of a function's equations, loop bodies times their trip counts.

A product of matrices is 2 per multiplication and addition, a convolution likewise, where its window
meets the image and not its padding; a reduction is one per element read; moving data is free; every
other operation is one per element written.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.equations import Equation, inner_jaxprs

# fmt: off
_FREE = frozenset((
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice",
    "dynamic_slice", "dynamic_update_slice", "concatenate", "pad", "gather", "rev", "iota",
    "copy", "copy_p", "convert_element_type", "bitcast_convert_type", "stop_gradient",
    "device_put", "sharding_constraint", "optimization_barrier", "split", "reduce_precision",
    "random_wrap", "random_unwrap", "empty", "create_token", "broadcast", "pvary", "pcast",
    "layout_constraint", "reshard", "stack", "unstack",
))
# fmt: on
_READS = ("reduce_", "cum", "argmax", "argmin", "scatter")


class Count(NamedTuple):
    """Operations of an equation or a program.

    Attributes:
      flops: floating-point operations.
      unknown: whether a loop of unknown length is in it, its body counted once.

    >>> Count(2.0, False) + Count(1.0, True)
    Count(flops=3.0, unknown=True)
    """

    flops: float
    unknown: bool

    def __add__(self, other: tuple) -> "Count":
        return Count(self.flops + other[0], self.unknown or other[1])


def count(equation: Equation, avals: Any) -> Count:
    """Count one equation of a traced program.

    Args:
      equation: of the program.
      avals: shapes by number of the value, the program's ``avals``.

    Returns:
      Its operations: of a scan the body times its length, of a while loop the body once (and
      ``unknown``), of a cond the dearest branch.

    >>> import jax, jax.numpy as jnp
    >>> from jaxsys.core.equations import trace
    >>> program = trace(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5)))
    >>> count(program.equations[0], program.avals).flops
    60.0
    """
    shapes = [_shape(avals[v] if isinstance(v, int) else v.aval) for v in equation.inputs]
    outs = [_shape(avals[v]) for v in equation.outputs]
    return _count(equation.primitive.name, equation.params, shapes, outs)


class Scoped(NamedTuple):
    """Operations of one scope of a program with gradients.

    Attributes:
      forward: of the forward pass.
      again: of the forward pass, computed again for the backward pass.
      backward: of the backward pass.

    >>> Scoped(1.0, 0.0, 2.0).backward
    2.0
    """

    forward: float = 0.0
    again: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.again + self.backward


def by_scope(
    jaxpr: Any, names: Sequence[str], *, branch: Callable[[list[float]], float] = max
) -> dict[str, Scoped]:
    """Count the operations of a traced program by `jax.named_scope`.

    Args:
      jaxpr: such as ``jax.make_jaxpr(f)(...).jaxpr``.
      names: scopes; an operation belongs to the innermost of them that it is in.
      branch: which of its branches' totals a cond counts; the dearest by default.

    Returns:
      Name to count, and "" to that of what is in none of the scopes. Of a while loop of unknown
      length the body is counted once.

    >>> import jax, jax.numpy as jnp
    >>> def loss(w, x):
    ...     with jax.named_scope("head"):
    ...         return jnp.sum(x @ w)
    >>> traced = jax.make_jaxpr(jax.grad(loss))(jnp.ones((3, 5)), jnp.ones((2, 3)))
    >>> found = by_scope(traced.jaxpr, ("head",))["head"]
    >>> found.forward, found.backward
    (70.0, 60.0)
    """
    found: dict[str, list[float]] = {}
    _spread(jaxpr, "", frozenset(names), branch, 1.0, found)
    return {name: Scoped(*found.get(name, ())) for name in ("", *names)}


def _spread(jaxpr: Any, outer: str, names: Any, branch: Any, times: float, found: Any) -> None:
    for eqn in jaxpr.eqns:
        stack = f"{outer}/{eqn.source_info.name_stack}"
        inner = list(inner_jaxprs(eqn.params))
        name = eqn.primitive.name
        if not inner or name.startswith(("reduce", "scatter")) or name == "custom_jvp_call":
            ins = [_shape(v.aval) for v in eqn.invars]
            outs = [_shape(v.aval) for v in eqn.outvars]
            _add(stack, _count(name, eqn.params, ins, outs).flops * times, names, found)
        elif name == "cond":
            parts: list[dict[str, list[float]]] = [{} for _ in inner]
            for part, body in zip(parts, inner, strict=True):
                _spread(body, stack, names, branch, times, part)
            totals = [sum(sum(v) for v in part.values()) for part in parts]
            chosen = parts[totals.index(branch(totals))]
            for key, values in chosen.items():
                kept = found.setdefault(key, [0.0, 0.0, 0.0])
                found[key] = [a + b for a, b in zip(kept, values, strict=True)]
        else:
            more = {"scan": "length"}.get(name)
            factor = eqn.params[more] if more else 1
            factor = eqn.params["mesh"].size if name == "shard_map" else factor
            bodies = inner if name == "while" else inner[:1]
            for body in bodies:
                _spread(body, stack, names, branch, times * factor, found)


def _add(stack: str, flops: float, names: Any, found: Any) -> None:
    if not flops:
        return
    words = re.findall(r"\w+", stack)
    scope = next((word for word in reversed(words) if word in names), "")
    # A backward pass is named "transpose"; in it, what was not kept stands under this name.
    kind = 1 if "rematted_computation" in words else 2 * ("transpose" in words)
    found.setdefault(scope, [0.0, 0.0, 0.0])[kind] += flops


def _shape(aval: Any) -> tuple[int, ...]:
    return tuple(getattr(aval, "shape", ()))


def _count(name: str, params: dict[str, Any], ins: list[Any], outs: list[Any]) -> Count:
    written = sum(math.prod(s) for s in outs)
    read = math.prod(ins[0]) if ins else 0
    inner = [_jaxpr_count(j) for j in inner_jaxprs(params)]
    if name == "cond":
        return max(inner, key=lambda c: c.flops)._replace(unknown=any(c.unknown for c in inner))
    if name == "scan":
        return Count(params["length"] * inner[0].flops, inner[0].unknown)
    if name == "while":
        return Count(sum(c.flops for c in inner), True)
    if name.startswith("scatter"):
        return Count(float(math.prod(ins[-1])), False)
    if inner and not name.startswith("reduce"):  # a call; a reduction counts what it reads
        times = params["mesh"].size if name == "shard_map" else 1
        return Count(times * inner[0].flops, inner[0].unknown)
    return Count(float(_plain(name, params, ins, outs, read, written)), False)


def _jaxpr_count(jaxpr: Any) -> Count:
    total = Count(0.0, False)
    for eqn in jaxpr.eqns:
        ins = [_shape(v.aval) for v in eqn.invars]
        total += _count(eqn.primitive.name, eqn.params, ins, [_shape(v.aval) for v in eqn.outvars])
    return total


def _plain(name: str, params: Any, ins: Any, outs: Any, read: int, written: int) -> float:
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        return 2.0 * written * math.prod(ins[0][axis] for axis in contract)
    if name == "conv_general_dilated":
        return _convolution(params, ins, outs)
    if name.startswith("ragged_dot"):
        return 2.0 * math.prod(ins[0]) * ins[1][-1]  # every row meets one matrix
    if name in _FREE:
        return 0.0
    if name.startswith(("reduce_window", "select_and")):
        return float(max(written, read)) * math.prod(params.get("window_dimensions", (1,)))
    if name.startswith(_READS):
        return float(read)
    if name == "sort":
        length = max(2, ins[0][params["dimension"]])
        return float(read) * math.log2(length)
    if name == "top_k":
        return float(read)
    if name == "fft":
        return 5.0 * written * math.log2(max(2, math.prod(params["fft_lengths"])))
    if name in ("cholesky", "lu", "qr", "householder_product", "eigh", "svd", "triangular_solve"):
        *_, rows, columns = ins[0]
        factor = {"cholesky": 1 / 3, "lu": 2 / 3, "eigh": 9.0, "svd": 12.0}.get(name, 2.0)
        side = ins[1][-1] if name == "triangular_solve" else min(rows, columns)
        return factor * read * side
    return float(written)


def _convolution(params: Any, ins: Any, outs: Any) -> float:
    image, kernel, out = params["dimension_numbers"]  # (batch or out, channels or in, space...)
    flops = 2.0 * outs[0][out[0]] * outs[0][out[1]] * ins[1][kernel[1]]
    space = zip(image[2:], kernel[2:], out[2:], strict=True)
    for d, (i, k, o) in enumerate(space):
        steps = np.arange(outs[0][o])[:, None] * params["window_strides"][d]
        taps = np.arange(ins[1][k]) * params["rhs_dilation"][d]
        place = steps + taps - params["padding"][d][0]
        spread = params["lhs_dilation"][d]
        inside = (place >= 0) & (place < ins[0][i] * spread) & (place % spread == 0)
        flops *= int(inside.sum())
    return flops
