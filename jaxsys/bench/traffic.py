"""What a compiled program moves, read from its text: bytes of memory, and collectives.

Both are counted as often as loops run them, which the compiler's own cost analysis does not do.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxsys.core import hlo

EXCHANGES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "permute")
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
     "partition-id", "replica-id", "iota", "opt-barrier")
)  # fmt: skip


class Exchange(NamedTuple):
    """One kind of collective in a step.

    Attributes:
      count: how often it runs.
      n_bytes: in all, of what each device gives (an all-gather gets that many from each).

    >>> Exchange(2, 100).count
    2
    """

    count: int
    n_bytes: int


def exchanges(module: hlo.Module) -> dict[str, Exchange]:
    """Add up the collectives of a compiled program, those in loops times the trips.

    Args:
      module: from `core.hlo.parse`.

    Returns:
      Kind to count and bytes, kinds that do not occur left out.

    >>> import jax
    >>> exchanges(hlo.parse(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text()))
    {}
    """
    found: dict[str, Exchange] = {}
    for instruction, times in _run(module, module.entry, 1):
        kind = instruction.opcode.removesuffix("-start").removeprefix("collective-")
        if kind in EXCHANGES:
            given = sum(_bytes(module, name) for name in instruction.operands)
            before = found.get(kind, Exchange(0, 0))
            found[kind] = Exchange(before.count + times, before.n_bytes + times * given)
    return found


def traffic(module: hlo.Module) -> float:
    """Add up the bytes that a program's instructions read and write, loops times their trips.

    A fused kernel reads its operands and writes its result, or of each the slices that it uses.
    What stays in a cache between two instructions is counted all the same.

    Args:
      module: from `core.hlo.parse`.

    Returns:
      Bytes.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> text = jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(100)).compile().as_text()
    >>> traffic(hlo.parse(text))
    800.0
    """
    return float(sum(t * _moved(module, i) for i, t in _run(module, module.entry, 1)))


def _run(module: hlo.Module, name: str, times: int) -> Iterator[tuple[hlo.Instruction, int]]:
    """Yield every instruction that runs by itself, and how often."""
    for instruction in module.computations[name]:
        called = [c for c in instruction.called if c in module.computations]
        if instruction.opcode == "while":
            trips = re.search(r'known_trip_count[^0-9}]*"(\d+)"', instruction.text)
            for inner in called:
                yield from _run(module, inner, times * int(trips[1] if trips else 1))
        elif instruction.opcode == "conditional":
            # Of an expert's sizes the first after none, as in `counts.count_step`.
            yield from _run(module, called[min(1, len(called) - 1)], times)
        elif instruction.opcode == "call":
            for inner in called:
                yield from _run(module, inner, times)
        elif instruction.opcode not in _FREE:
            yield instruction, times


def _bytes(module: hlo.Module, name: str) -> int:
    found = module.instructions.get(name)
    return found.n_bytes if found else 0


def _moved(module: hlo.Module, instruction: hlo.Instruction) -> int:
    if instruction.opcode.endswith("-done"):
        return 0
    if instruction.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * instruction.n_bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _bytes(module, instruction.operands[1])
    read = [_bytes(module, name) for name in instruction.operands]
    written = instruction.n_bytes
    if instruction.opcode == "fusion" and instruction.called:
        inside = module.computations.get(instruction.called[0], ())
        read, written = _fused(module, inside, read, written)
    return sum(read) + written


def _fused(
    module: hlo.Module, inside: Sequence[hlo.Instruction], read: list[int], written: int
) -> tuple[list[int], int]:
    """Reduce what a fusion reads and writes to the slices that it uses."""
    updates = [i for i in inside if i.opcode == "dynamic-update-slice"]
    whole = {i.operands[0] for i in updates}
    for own in inside:
        if own.opcode != "parameter":
            continue
        place = int(own.text.partition("parameter(")[2].partition(")")[0])
        users = [i for i in inside if own.name in i.operands]
        if place < len(read) and own.name in whole and len(users) == 1:
            read[place] = 0
        elif place < len(read) and users and all(i.opcode == "dynamic-slice" for i in users):
            read[place] = sum(i.n_bytes for i in users)
    if updates and inside[-1] in updates:
        written = sum(_bytes(module, i.operands[1]) for i in updates)
    return read, written
