"""What a merge over files will read, write and hold, before it starts."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.report import format_bytes
from jaxsys.merge.plan import Leaf, MergePlan
from jaxsys.merge.views import SLICE

# Interpreter, JAX and compiled programs, as measured with tiny models.
RUNTIME_BYTES = 300 << 20


class Budget(NamedTuple):
    """Predict the cost of a merge.

    Attributes:
      read_bytes: of tensors, over all passes.
      write_bytes: of the result.
      peak_bytes: resident memory at the largest tensor, with the runtime's share.
      largest: name of the tensor that decides it.
      leaves: tensors of the result.
      passes: how often the models are read.

    >>> Budget(8, 4, 100, "w", 1, 1).write_bytes
    4
    """

    read_bytes: int
    write_bytes: int
    peak_bytes: int
    largest: str
    leaves: int
    passes: int

    def __str__(self) -> str:
        passes = "once" if self.passes == 1 else f"{self.passes} times"
        return (
            f"{self.leaves} tensors: reads {format_bytes(self.read_bytes)} (models {passes}), "
            f"writes {format_bytes(self.write_bytes)}, peak memory about "
            f"{format_bytes(self.peak_bytes)} (at {self.largest})"
        )


def predict(plan: MergePlan, passes: int = 1) -> Budget:
    """Predict bytes and memory of a merge.

    Args:
      plan: from `jaxsys.merge.plan.plan_merge`.
      passes: how often the models are read.

    >>> from jaxsys.merge.linear import METHODS
    >>> predict(MergePlan(METHODS["linear"], (), (), None, None, 0)).write_bytes
    0
    """
    read = write = peak = 0
    largest = "none"
    for leaf in plan.leaves:
        own = _input_bytes(plan, leaf)
        size = int(np.prod(leaf.shape, dtype=np.int64))
        read += own
        write += size * leaf.dtype.itemsize
        held = own + _work_bytes(plan, leaf, size)
        if held > peak:
            peak, largest = held, leaf.name
    return Budget(read * passes, write, peak + RUNTIME_BYTES, largest, len(plan.leaves), passes)


def _input_bytes(plan: MergePlan, leaf: Leaf) -> int:
    total = 0
    for number, name in [*leaf.inputs, *([leaf.base] if leaf.base else [])]:
        spec = plan.sources[number].shapes[name]
        total += int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize
    return total


def _work_bytes(plan: MergePlan, leaf: Leaf, size: int) -> int:
    """Estimate what is held beside the mapped inputs."""
    inputs = len(leaf.inputs) + 1
    blocks = plan.method.blocks
    if leaf.config is None:
        return 0
    if blocks is None or blocks.unit(leaf.config) == "whole":
        return 4 * size * (inputs + 1)
    held = 16 * min(size, SLICE) * 4 * inputs
    ranks = any(hasattr(leaf.config, key) for key in ("density", "select_topk", "gamma"))
    if (ranks and "Dare" not in type(leaf.config).__name__) or plan.method.models == (1, 1):
        held += 4 * size
    return held + (4 * size * inputs if leaf.rows else 0)


def check_budget(budget: Budget, out: Path, already_bytes: int = 0) -> None:
    """Refuse a merge that this machine's memory or the disk of its result cannot hold.

    Args:
      budget: the prediction.
      out: folder of the result.
      already_bytes: of the result that a killed run left.

    Raises:
      UserError: with what is needed and what there is.

    >>> check_budget(Budget(1, 1, 1 << 60, "w", 1, 1), Path("."))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the merge needs about 1024 PiB of memory for w and ...
    """
    free = available_memory_bytes()
    if budget.peak_bytes > free:
        raise UserError(
            f"the merge needs about {format_bytes(budget.peak_bytes)} of memory for "
            f"{budget.largest} and {format_bytes(free)} is free; close other programs, or merge on "
            "a larger machine"
        )
    place = out
    while not place.exists():
        place = place.parent
    room = shutil.disk_usage(place).free + already_bytes
    if budget.write_bytes > room:
        raise UserError(
            f"the result takes {format_bytes(budget.write_bytes)} and the disk of {out} has "
            f"{format_bytes(room)} free; free some, or name a folder on another disk"
        )


def available_memory_bytes() -> int:
    """Say how much memory this process may still take, page cache counted as free.

    >>> available_memory_bytes() > 0
    True
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    found.append(_first(Path("/proc/meminfo"), _available))
    limit = _first(Path("/sys/fs/cgroup/memory.max"), int)
    used = _first(Path("/sys/fs/cgroup/memory.current"), int)
    if limit is not None and used is not None:
        found.append(max(0, limit - used))
    return min(value for value in found if value is not None)


def _available(text: str) -> int:
    line = next(line for line in text.splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) << 10


def _first(path: Path, read: Callable[[str], Any]) -> Any:
    try:
        return read(path.read_text())
    except (OSError, ValueError, StopIteration):
        return None
