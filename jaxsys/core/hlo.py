"""The compiled text of a program (HLO) as instructions: what calls what, what each writes.

The text is what ``jit(f).lower(...).compile().as_text()`` gives. Every instruction that came from a
line of JAX carries that line's path of `jax.named_scope`s, its ``op_name``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxsys.core.errors import UserError

_HEAD = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z]*\w*\[([\d,<=]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_NAME = re.compile(r"%([\w.\-]+)")
_MOVING = frozenset(
    ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "broadcast", "iota",
     "reshape", "after-all", "partition-id", "replica-id")
)  # fmt: skip


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: unique in its module.
      opcode: such as ``fusion`` or ``all-reduce``.
      shapes: dimensions of each array that it writes.
      n_bytes: of those arrays together.
      operands: names of the instructions that it reads.
      called: names of the computations that it runs.
      op_name: path of scopes that it came from, or "".
      text: the whole line.

    >>> Instruction("add.1", "add", ((2, 3),), 24, (), (), "", "").elements
    6
    """

    name: str
    opcode: str
    shapes: tuple[tuple[int, ...], ...]
    n_bytes: int
    operands: tuple[str, ...]
    called: tuple[str, ...]
    op_name: str
    text: str

    @property
    def elements(self) -> int:
        """Numbers that it writes."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      name: of the program, ``jit_`` and the function's name.
      entry: name of the computation where it starts.
      computations: name to instructions, in the order of the schedule.

    >>> Module("jit_f", "main", {"main": ()}).instructions
    {}
    """

    name: str
    entry: str
    computations: Mapping[str, tuple[Instruction, ...]]

    @cached_property
    def instructions(self) -> dict[str, Instruction]:
        """All instructions by name."""
        return {i.name: i for found in self.computations.values() for i in found}


def parse(text: str) -> Module:
    """Read a program's compiled text.

    Args:
      text: from ``compiled.as_text()``.

    Returns:
      Its computations.

    Raises:
      UserError: text without a module or without an entry.

    >>> import jax
    >>> module = parse(jax.jit(lambda x: jax.numpy.sin(x) + 1).lower(1.0).compile().as_text())
    >>> module.computations[module.entry][-1].n_bytes
    4
    """
    name = re.match(r"HloModule ([^\s,]+)", text)
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.rstrip().endswith("{") and (opened := _COMPUTATION.match(line.rstrip())):
            current = computations.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif current is not None and (head := _HEAD.match(line)):
            current.append(_instruction(head[1], line, line[head.end() :]))
    if name is None or not entry:
        raise UserError(
            "the text is no compiled program; expected HLO with an entry; pass what "
            "compiled.as_text() gives"
        )
    return Module(name[1], entry, {key: tuple(found) for key, found in computations.items()})


def _instruction(name: str, line: str, rest: str) -> Instruction:
    shape, rest = _split(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    operands, attributes = _split("(" + rest)
    shapes, n_bytes = [], 0
    for kind, bits, sizes in _ARRAY.findall(shape):
        shapes.append(tuple(int(n) for n in re.findall(r"\d+", sizes)))
        width = int(bits or (0 if kind in ("token", "opaque") else 8))  # pred has no digits
        n_bytes += -(-width * math.prod(shapes[-1]) // 8)
    called = [*_CALLED.findall(attributes)]
    for branches in _BRANCHES.findall(attributes):
        called += _NAME.findall(branches)
    op_name = _OP_NAME.search(attributes)
    return Instruction(
        name,
        opcode.strip(),
        tuple(shapes),
        n_bytes,
        tuple(_NAME.findall(operands)),
        tuple(dict.fromkeys(called)),
        op_name[1] if op_name else "",
        line.strip(),
    )


def _split(text: str) -> tuple[str, str]:
    """Cut text that starts with a parenthesis after the one that closes it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def work(module: Module, instruction: Instruction) -> float:
    """Weigh an instruction by what it computes, to share a fused kernel's time among its parts.

    A product of matrices weighs two per multiplication and addition; a reduction, a scatter or a
    sort what it reads; parameters, constants, broadcasts and views nothing; all else one per number
    written.

    Args:
      module: that it is in.
      instruction: of one of its computations.

    Returns:
      The weight, 0 or more; instructions that call computations weigh what these do in all.

    >>> import jax
    >>> x = jax.numpy.ones((4, 8))
    >>> module = parse(jax.jit(lambda x: x @ x.T).lower(x).compile().as_text())
    >>> sum(work(module, i) for i in module.computations[module.entry]) >= 2 * 4 * 8 * 4
    True
    """
    return _work(module.computations, module.instructions, instruction)


def _work(computations, known: Mapping[str, Instruction], instruction: Instruction) -> float:
    if instruction.opcode in _MOVING:
        return 0.0
    read = [known[name] for name in instruction.operands if name in known]
    if instruction.opcode == "dot" and read:
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
        sizes = [
            read[0].shapes[0][int(axis)] for axis in re.findall(r"\d+", axes[1] if axes else "")
        ]
        return 2.0 * instruction.elements * math.prod(sizes)
    if instruction.opcode == "convolution" and len(read) > 1:
        per_output = read[1].elements / max(1, instruction.shapes[0][-1])
        return 2.0 * instruction.elements * per_output
    if instruction.opcode in ("reduce", "reduce-window", "scatter", "sort", "select-and-scatter"):
        return float(max([instruction.elements, *(i.elements for i in read)]))
    if instruction.called:
        inner = [i for name in instruction.called for i in computations.get(name, ())]
        return sum(_work(computations, known, i) for i in inner)
    return float(instruction.elements)
