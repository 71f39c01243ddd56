"""Expressions as fixed-length int32 arrays in postfix order, and their text and JSON forms.

Opcode 0 does nothing and fills the end; then come the terminals, the constants and the operators of
a `Grammar`, in its order.

Axes: ``L`` length of a program.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxsys.core.errors import UserError
from jaxsys.search.operators import PAPER, Operator

Tree = tuple[Any, ...]  # (symbol,) or (symbol, child) or (symbol, child, child)

_SYMBOLS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}


@dataclass(frozen=True)
class Grammar:
    """Say which symbols there are.

    Attributes:
      terminals: names of the inputs.
      operators: see `operators.SETS`.
      constants: numbers that may stand where a terminal may.
      length: L; 31 holds every tree of depth 4.
      height: entries of the stack; a program that needs more is not valid.

    >>> Grammar(("W", "G")).symbols[:3]
    ('', 'W', 'G')
    """

    terminals: tuple[str, ...]
    operators: tuple[Operator, ...] = PAPER
    constants: tuple[float, ...] = ()
    length: int = 31
    height: int = 6

    def __post_init__(self) -> None:
        names = [s for s in self.symbols if s]
        if not self.terminals or len(set(names)) != len(names) or min(self.length, self.height) < 1:
            raise UserError(
                f"grammar with terminals {self.terminals}, length {self.length} and height "
                f"{self.height}; expected at least one terminal, distinct names, sizes above 0; "
                "correct it"
            )

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """List the symbol of every opcode."""
        constants = tuple(f"{c:g}" for c in self.constants)
        return ("", *self.terminals, *constants, *(op.name for op in self.operators))

    @cached_property
    def arities(self) -> np.ndarray:
        """List the arity of every opcode; -1 for the one that does nothing."""
        leaves = len(self.terminals) + len(self.constants)
        return np.array([-1] + [0] * leaves + [op.arity for op in self.operators], np.int32)

    def opcode(self, symbol: str) -> int:
        """Return a symbol's opcode.

        Raises:
          UserError: if there is no such symbol.
        """
        if not symbol or symbol not in self.symbols:
            known = ", ".join(s for s in self.symbols if s)
            raise UserError(f"symbol {symbol!r} is unknown; expected one of {known}; correct it")
        return self.symbols.index(symbol)


def encode(grammar: Grammar, tree: Tree) -> Int32[np.ndarray, "L"]:
    """Write a tree as a program.

    Args:
      grammar: the symbols.
      tree: nested tuples (symbol, children...).

    Raises:
      UserError: for an unknown symbol, a wrong number of children, or a tree that is too large.

    >>> g = Grammar(("W", "G"), length=5)
    >>> [g.symbols[i] for i in encode(g, ("mul", ("abs", ("W",)), ("G",)))]
    ['W', 'abs', 'G', 'mul', '']
    """
    codes: list[int] = []

    def visit(node: Tree) -> None:
        symbol, *children = node
        code = grammar.opcode(symbol)
        if len(children) != grammar.arities[code]:
            raise UserError(
                f"{symbol!r} has {len(children)} operands; expected {grammar.arities[code]}; "
                "correct the expression"
            )
        for child in children:
            visit(child)
        codes.append(code)

    visit(tree)
    program = np.zeros(max(grammar.length, len(codes)), np.int32)
    program[: len(codes)] = codes
    heights = stack_heights(grammar, program)
    if len(codes) > grammar.length or heights.max() > grammar.height:
        raise UserError(
            f"the expression has {len(codes)} symbols and needs {heights.max()} stack entries; "
            f"at most {grammar.length} and {grammar.height} fit; shorten it or raise the grammar's "
            "length or height"
        )
    return program


def decode(grammar: Grammar, program: Any) -> Tree:
    """Read a program as a tree, the inverse of `encode`.

    Raises:
      UserError: if the array is no program.

    >>> g = Grammar(("W",), length=5)
    >>> decode(g, encode(g, ("abs", ("W",))))
    ('abs', ('W',))
    """
    stack: list[Tree] = []
    for code in np.asarray(program):
        if code == 0:
            continue
        if not 0 < code < len(grammar.symbols) or len(stack) < grammar.arities[code]:
            raise UserError(f"opcode {code} cannot stand there; expected a valid postfix program")
        first = len(stack) - int(grammar.arities[code])
        stack[first:] = [(grammar.symbols[code], *stack[first:])]
    if len(stack) != 1:
        raise UserError(f"the program leaves {len(stack)} values; expected one; correct it")
    return stack[0]


def stack_heights(grammar: Grammar, program: Any) -> Int32[np.ndarray, "... L"]:
    """Count the values on the stack after each instruction.

    >>> g = Grammar(("W",), length=5)
    >>> stack_heights(g, encode(g, ("add", ("W",), ("W",)))).tolist()
    [1, 2, 1, 1, 1]
    """
    return np.cumsum(_deltas(grammar)[np.asarray(program)], -1).astype(np.int32)


def _deltas(grammar: Grammar) -> np.ndarray:
    return np.where(grammar.arities < 0, 0, 1 - grammar.arities).astype(np.int32)


def to_string(grammar: Grammar, program: Any) -> str:
    """Write a program as text that `from_string` reads.

    >>> g = Grammar(("W", "X"))
    >>> to_string(g, encode(g, ("mul", ("W",), ("sqrt", ("X",)))))
    '(W * sqrt(X))'
    """
    signs = {"add": "+", "sub": "-", "mul": "*", "div": "/"}

    def text(node: Tree) -> str:
        symbol, *children = node
        parts = [text(child) for child in children]
        if symbol in signs:
            return f"({parts[0]} {signs[symbol]} {parts[1]})"
        return f"{symbol}({', '.join(parts)})" if parts else symbol

    return text(decode(grammar, program))


def from_string(grammar: Grammar, text: str) -> Int32[np.ndarray, "L"]:
    """Read an expression such as ``W*sqrt(X)``, with + − * / and functions by name.

    A power ``x**2`` is read as sqr, a leading minus as neg.

    Raises:
      UserError: naming what is not understood and its position, from 1.

    >>> g = Grammar(("W", "X"))
    >>> to_string(g, from_string(g, "abs(W) + X/W"))
    '(abs(W) + (X / W))'
    """
    text = " ".join(text.split())
    try:
        root = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise UserError(
            f"expression {text!r} stops making sense at position {error.offset}; expected the form "
            "W*sqrt(X); correct it"
        ) from None
    except (ValueError, MemoryError, RecursionError):  # a null byte, or nested too deeply
        raise UserError(f"{text[:40]!r} is no expression; expected the form W*sqrt(X)") from None

    def refuse(node: Any, what: str) -> UserError:
        known = ", ".join(s for s in grammar.symbols if s)
        # Python counts bytes.
        place = len(text.encode()[: node.col_offset].decode()) + 1
        return UserError(
            f"{what} at position {place} of {text!r} is unknown; expected symbols "
            f"out of {known}; correct it"
        )

    def visit(node: Any) -> Tree:
        if isinstance(node, ast.BinOp) and type(node.op) in _SYMBOLS:
            return (_SYMBOLS[type(node.op)], visit(node.left), visit(node.right))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            if not (isinstance(node.right, ast.Constant) and node.right.value == 2):
                raise refuse(node.right, "a power other than 2")
            return ("sqr", visit(node.left))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return ("neg", visit(node.operand))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            if node.func.id not in grammar.symbols:
                raise refuse(node, f"function {node.func.id!r}")
            return (node.func.id, *(visit(a) for a in node.args))
        if isinstance(node, ast.Name):
            if node.id not in grammar.symbols:
                raise refuse(node, f"symbol {node.id!r}")
            return (node.id,)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            if f"{node.value:g}" not in grammar.symbols:
                raise refuse(node, f"constant {node.value}")
            return (f"{node.value:g}",)
        raise refuse(node, "what stands")

    try:
        return encode(grammar, visit(root))
    except RecursionError:
        raise UserError(f"{text[:40]!r} is nested too deeply; shorten it") from None


def to_json(grammar: Grammar, program: Any) -> str:
    """Write a program in Pruner-Zero's tree format: nested data, left, right.

    >>> g = Grammar(("W",))
    >>> to_json(g, encode(g, ("abs", ("W",))))
    '{"data": "abs", "left": {"data": "W"}}'
    """

    def plain(node: Tree) -> dict[str, Any]:
        keys = ("data", "left", "right")
        values = [node[0], *(plain(child) for child in node[1:])]
        return dict(zip(keys, values, strict=False))

    return json.dumps(plain(decode(grammar, program)))


def from_json(grammar: Grammar, text: str) -> Int32[np.ndarray, "L"]:
    """Read Pruner-Zero's tree format; a unary node uses its left child only.

    Raises:
      UserError: for text of another form.

    >>> g = Grammar(("W",))
    >>> to_string(g, from_json(g, '{"data": "abs", "left": {"data": "W"}, "right": null}'))
    'abs(W)'
    """

    def visit(node: Any) -> Tree:
        if not isinstance(node, Mapping) or not isinstance(node.get("data"), str):
            raise UserError(f"{node!r} is no tree; expected data, left and right; correct the JSON")
        arity = int(grammar.arities[grammar.opcode(node["data"])])
        return (node["data"], *(visit(node.get(side)) for side in ("left", "right")[:arity]))

    try:
        return encode(grammar, visit(json.loads(text)))
    except RecursionError:
        raise UserError("the tree is nested too deeply; expected a smaller one") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"the tree is no JSON ({error}); expected data, left, right") from None


def random_programs(
    grammar: Grammar, n: int, *, depth: Sequence[int] = (2, 4), seed: int = 0
) -> Int32[np.ndarray, "N L"]:
    """Draw programs half by "grow", half by "full", with depths in turn.

    Above depth `depth[0]` every node is an operator; at the drawn maximum a terminal; between, grow
    takes either with probability ½. Symbols are uniform over operators and over terminals. The
    published code has no other bound; here trees that do not fit the grammar are drawn again.

    Args:
      grammar: the symbols.
      n: how many.
      depth: smallest and largest depth, where a lone terminal has depth 0.
      seed: of the draws.

    >>> random_programs(Grammar(("W", "G")), 3).shape
    (3, 31)
    """
    rng = np.random.default_rng(seed)
    arities, codes = grammar.arities, np.arange(len(grammar.arities))
    leaves, functions = codes[arities == 0], codes[arities > 0]

    def grow(level: int, most: int, full: bool) -> list[int]:
        inner = level < most and (full or level < depth[0] or rng.random() < 0.5)
        code = int(rng.choice(functions if inner else leaves))
        below = [grow(level + 1, most, full) for _ in range(arities[code] if inner else 0)]
        return [c for part in below for c in part] + [code]

    programs = np.zeros((n, grammar.length), np.int32)
    for i in range(n):
        for _ in range(1000):
            found = grow(0, depth[0] + i % (depth[1] - depth[0] + 1), full=i % 2 == 0)
            heights = np.cumsum(_deltas(grammar)[found])
            if len(found) <= grammar.length and heights.max() <= grammar.height:
                programs[i, : len(found)] = found
                break
        else:
            raise UserError(
                f"no tree of depth {depth} fits length {grammar.length} and height "
                f"{grammar.height}; raise them or lower the depth"
            )
    return programs
