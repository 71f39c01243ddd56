"""What the nodes of an expression compute: Pruner-Zero's operators, and a protected set.

An operator is given its operands and, for each, how many times broadcasting has repeated every one
of its values: a mean is the same over repeated values, a norm or an unbiased deviation is not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp


class Operator(NamedTuple):
    """A function of one or two arrays of one shape.

    Attributes:
      name: as in text and in JSON.
      arity: 1 or 2.
      apply: (operands..., repeats...) -> array of the same shape.
      by_number: whether the right operand enters as one number, so that the result repeats as the
        left one does.

    >>> Operator("neg", 1, lambda x, r: -x).arity
    1
    """

    name: str
    arity: int
    apply: Callable[..., Any]
    by_number: bool = False


def _mms(x: Any, r: Any) -> Any:
    low, high = jnp.min(x), jnp.max(x)
    span = high - low
    return (x - low) / jnp.where(span > 0, span, 1.0)


def _zsn(x: Any, r: Any) -> Any:
    n = x.size / r
    centred = x - jnp.mean(x)
    variance = jnp.sum(jnp.square(centred)) / r / jnp.maximum(n - 1, 1)
    # The mean of equal numbers is rounded: without this their z-scores would be noise.
    varies = (jnp.max(x) > jnp.min(x)) & (variance > 0)
    return jnp.where(varies, centred / jnp.where(varies, jnp.sqrt(variance), 1.0), 0.0)


def _div(x: Any, y: Any, rx: Any, ry: Any) -> Any:
    norm = jnp.sqrt(jnp.sum(jnp.square(y)) / ry)
    return x / jnp.where(norm > 0, norm, 1.0)


def _unary(name: str, f: Callable[[Any], Any]) -> Operator:
    return Operator(name, 1, lambda x, r: f(x))


def _binary(name: str, f: Callable[[Any, Any], Any]) -> Operator:
    return Operator(name, 2, lambda x, y, rx, ry: f(x, y))


# The eleven unary and four binary operators of Pruner-Zero (arXiv 2406.02924, released code). `div`
# divides by the Frobenius norm of its right operand. `mms`, `zsn` and `div` leave a constant (or
# zero) operand undivided, where the released code gives NaN.
PAPER: tuple[Operator, ...] = (
    _unary("sqr", jnp.square),
    _unary("pow", jnp.square),
    _unary("neg", jnp.negative),
    _unary("abs", jnp.abs),
    _unary("log", lambda x: jnp.log(jnp.abs(x) + 0.001)),
    _unary("sqrt", lambda x: jnp.sqrt(jnp.abs(x))),
    _unary("tanh", jnp.tanh),
    _unary("skp", lambda x: x),
    Operator("mms", 1, _mms),
    Operator("zsn", 1, _zsn),
    _unary("exp", lambda x: jnp.exp(jnp.minimum(x, 100.0))),
    _binary("add", jnp.add),
    _binary("sub", jnp.subtract),
    _binary("mul", jnp.multiply),
    Operator("div", 2, _div, by_number=True),
)

# Elementwise throughout, and finite for finite operands of moderate size.
PROTECTED: tuple[Operator, ...] = (
    _unary("sqr", jnp.square),
    _unary("neg", jnp.negative),
    _unary("abs", jnp.abs),
    _unary("log", lambda x: jnp.log(jnp.abs(x) + 0.001)),
    _unary("sqrt", lambda x: jnp.sqrt(jnp.abs(x))),
    _unary("tanh", jnp.tanh),
    _unary("exp", lambda x: jnp.exp(jnp.clip(x, -30.0, 30.0))),
    _binary("add", jnp.add),
    _binary("sub", jnp.subtract),
    _binary("mul", jnp.multiply),
    _binary("div", lambda x, y: jnp.where(jnp.abs(y) > 1e-3, x / jnp.where(y == 0, 1, y), 1.0)),
    _binary("max", jnp.maximum),
    _binary("min", jnp.minimum),
)

SETS = {"paper": PAPER, "protected": PROTECTED}
