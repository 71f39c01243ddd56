"""Pruning metrics as expressions over what is known of a layer.

Axes: ``O`` outputs, ``I`` inputs of a linear layer.
"""

import ast
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.prune.metrics import Metric
from jaxsys.prune.stats import Stats, weight_sums
from jaxsys.search.interpret import evaluate
from jaxsys.search.operators import SETS
from jaxsys.search.programs import Grammar, Tree, decode, from_json, from_string, to_string

# W = |weight|; G and G1 as in `Stats`, [O, I]; X as in `Stats`, [1, I]; R and C the sums of
# |weight| in each row [O, 1] and in each column [1, I]. The first three are those of Pruner-Zero.
TERMINALS = ("W", "G", "X", "G1", "R", "C")

# Metrics that people use, as expressions, and the set of operators that each is written in.
FORMULAS: Mapping[str, tuple[str, str]] = {
    "magnitude": ("W", "paper"),
    "wanda": ("W*sqrt(X)", "paper"),
    "gradient": ("W*G", "paper"),
    "gblm": ("W*sqrt(X) + W*G", "paper"),
    "gblm_l1": ("W*sqrt(X) + W*G1", "paper"),
    "pruner_zero": ("abs(W*W)*mms(G)", "paper"),
    "ria": ("(W/C + W/R)*sqrt(sqrt(X))", "protected"),
}


class Expression(NamedTuple):
    """Score the weights of a layer: the smallest scores are pruned.

    Attributes:
      text: readable by `parse`.
      tree: nested tuples (symbol, children...).
      grammar: the symbols it is written in.

    >>> expression = parse("W*sqrt(X)")
    >>> expression(jnp.array([[-2.0, 1.0]]), Stats(X=jnp.array([4.0, 9.0]))).tolist()
    [[4.0, 3.0]]
    """

    text: str
    tree: Tree
    grammar: Grammar

    @property
    def needs(self) -> frozenset[str]:
        """Name the terminals that occur.

        >>> sorted(parse("W*sqrt(X)").needs)
        ['W', 'X']
        """
        return frozenset(_symbols(self.tree)) & frozenset(self.grammar.terminals)

    def __call__(self, weight: Float[Array, "O I"], stats: Stats) -> Float[Array, "O I"]:
        """Score one layer in float32.

        Args:
          weight: W with its signs, [O, I].
          stats: of the layer; only what the expression needs must be there.

        Raises:
          UserError: if a statistic is missing.

        >>> parse("G")(jnp.ones((1, 1)), Stats())
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: the expression 'G' needs the statistic G, which was not ...
        """
        inputs = terminals(weight, stats, self.needs)
        missing = sorted(self.needs - inputs.keys())
        if missing:
            raise UserError(
                f"the expression {self.text!r} needs the statistic {missing[0]}, which was not "
                "gathered; gather it or choose another metric"
            )
        return jnp.broadcast_to(evaluate(self.grammar, self.tree, inputs), weight.shape)


def _symbols(tree: Tree) -> Iterable[str]:
    yield tree[0]
    for child in tree[1:]:
        yield from _symbols(child)


def terminals(
    weight: Float[Array, "O I"], stats: Stats, names: Iterable[str] = TERMINALS
) -> dict[str, Float[Array, "..."]]:
    """Give a layer's inputs to an expression; those that were not gathered are left out.

    Args:
      weight: W with its signs, [O, I].
      stats: of the layer.
      names: which are wanted.

    >>> sorted(terminals(jnp.ones((2, 3)), Stats(X=jnp.ones(3))))
    ['C', 'R', 'W', 'X']
    """
    wide = weight.astype(jnp.float32)
    makers = {
        "W": lambda: jnp.abs(wide),
        "G": lambda: stats.G,
        "G1": lambda: stats.G1,
        "X": lambda: None if stats.X is None else stats.X.reshape(1, -1),
        "R": lambda: weight_sums(wide, 1),
        "C": lambda: weight_sums(wide, 0),
    }
    found = {name: makers[name]() for name in names}
    return {name: x.astype(jnp.float32) for name, x in found.items() if x is not None}


def parse(text: str, operators: str = "paper") -> Expression:
    """Read a metric: a name of `FORMULAS`, an expression, or a tree in Pruner-Zero's JSON.

    In the set ``paper`` a division is by the Frobenius norm of the right operand, as in
    Pruner-Zero; in ``protected`` it is elementwise. Any number may stand as a constant.

    Args:
      text: such as ``wanda`` or ``W*sqrt(X)``.
      operators: a set of `search.operators.SETS`; the names bring their own.

    Raises:
      UserError: naming what is not understood and its position.

    Reference: arXiv 2406.02924.

    >>> parse("pruner_zero").text
    '(abs((W * W)) * mms(G))'
    >>> parse("W*Y")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: symbol 'Y' at position 3 of 'W*Y' is unknown; ...
    """
    if operators not in SETS:
        raise UserError(f"operators are {operators!r}; expected one of {', '.join(SETS)}")
    text, operators = FORMULAS.get(text.strip(), (text, operators))
    is_json = text.lstrip().startswith("{")
    grammar = Grammar(
        TERMINALS,
        operators=SETS[operators],
        constants=() if is_json else _constants(text),
        length=255,
        height=64,
    )
    program = (from_json if is_json else from_string)(grammar, text)
    return Expression(to_string(grammar, program), decode(grammar, program), grammar)


def expression_metric(text: str) -> Metric:
    """Read an expression as a metric whose scores are compared in rows.

    Args:
      text: as `parse` takes it.

    Raises:
      UserError: naming what is not understood and its position.

    >>> sorted(expression_metric("W*W*X*mms(G)").needs)
    ['G', 'X']
    """
    expression = parse(text)
    return Metric(jax.jit(expression.__call__), expression.needs & set(Stats._fields))


def _constants(text: str) -> tuple[float, ...]:
    """Find the numbers in a text; a text that does not parse has none here and fails later."""
    try:
        nodes: list[Any] = list(ast.walk(ast.parse(" ".join(text.split()), mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return ()
    numbers = [
        n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) in (int, float)
    ]
    # Two numbers that print alike are one symbol.
    return tuple({f"{value:g}": float(f"{value:g}") for value in numbers}.values())
