"""What a run did: bytes that moved, experts that hit, seconds, and where they went."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxsys.offload.types import Machine, Terms


@dataclass
class Monitor:
    """Count while the engine runs.

    Attributes:
        blocking: wait for every task and time it; the tasks then no longer overlap.
        tokens: that went through the model, padding not counted.
        steps: decode steps.
        prompt_tokens: of ``tokens``, those of prompts.
        prefill_s: seconds of reading prompts, compiling included.
        decode_s: seconds of decode steps.
        hits: uses of experts that lived on the accelerator as a whole.
        uses: uses of experts.
        early: experts of a later layer that its router named when it was run early.
        early_right: those of them that a token then visited.
        early_copies: experts' pieces that were copied over ahead of their router.
        moved_bytes: weights that crossed the link.
        cpu_bytes: weights that the CPU's programs read.
        accelerator_bytes: weights that the accelerator's programs read.
        busy_s: seconds by term (cpu, link, accelerator) of blocking runs.

    >>> Monitor().hit_rate
    nan
    """

    blocking: bool = False
    tokens: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    hits: int = 0
    uses: int = 0
    early: int = 0
    early_right: int = 0
    early_copies: int = 0
    moved_bytes: int = 0
    cpu_bytes: int = 0
    accelerator_bytes: int = 0
    busy_s: dict[str, float] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Share of experts' uses that found them whole on the accelerator; nan without any."""
        return self.hits / self.uses if self.uses else float("nan")

    @property
    def early_rate(self) -> float:
        """Share of the experts that were foretold which a token then visited; nan without any."""
        return self.early_right / self.early if self.early else float("nan")

    def run(self, term: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function; in blocking runs, wait for its result and book the time to a term."""
        if not self.blocking:
            return function(*args)
        jax.block_until_ready(args)
        begin_s = time.perf_counter()
        found = jax.block_until_ready(function(*args))
        elapsed_s = time.perf_counter() - begin_s
        self.busy_s[term] = self.busy_s.get(term, 0.0) + elapsed_s
        return found

    def read(self, on_accelerator: bool, n_bytes: int) -> None:
        """Note that a program reads weights."""
        if on_accelerator:
            self.accelerator_bytes += n_bytes
        else:
            self.cpu_bytes += n_bytes


def terms(monitor: Monitor, machine: Machine | None = None) -> Terms:
    """Give the seconds that each resource was busy in a blocking run.

    The memory's term cannot be timed from outside: it is modelled as the bytes that CPU and link
    read from it over the machine's rate.

    Args:
        monitor: of a blocking run.
        machine: for the modelled term; 0 without it.

    Returns:
        The four terms.

    >>> terms(Monitor(busy_s={"cpu": 2.0})).cpu_s
    2.0
    """
    busy = monitor.busy_s
    dram_s = 0.0
    if machine is not None and machine.dram_bytes_per_s:
        dram_s = (monitor.cpu_bytes + monitor.moved_bytes) / machine.dram_bytes_per_s
    return Terms(busy.get("cpu", 0.0), busy.get("link", 0.0), busy.get("accelerator", 0.0), dram_s)


def tree_bytes(tree: Any) -> int:
    """Count the bytes of a tree's arrays.

    >>> tree_bytes({"w": np.zeros(3, np.float32)})
    12
    """
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def device_bytes(device: Any) -> int:
    """Count the bytes of live arrays on a device, memory that arrays share counted once.

    >>> device_bytes(jax.devices()[0]) >= 0
    True
    """
    found: dict[int, int] = {}
    for array in jax.live_arrays():
        if not array.is_deleted() and array.sharding.device_set == {device}:
            shards = [shard.data for shard in array.addressable_shards]
            for shard in shards:
                if "host" not in str(shard.sharding.memory_kind):
                    found[_pointer(shard)] = shard.nbytes
    return sum(found.values())


def _pointer(array: jax.Array) -> int:
    try:
        return array.unsafe_buffer_pointer()
    except (ValueError, RuntimeError):  # not one buffer, such as random keys
        return id(array)


def is_mapped(array: jax.Array, source: Any) -> bool:
    """Say whether an array on the CPU points into the read-only NumPy array that it was made from.

    >>> is_mapped(jax.device_put(np.zeros(3)), np.zeros(3))
    False
    """
    if not isinstance(source, np.ndarray) or source.flags["WRITEABLE"]:
        return False
    return _pointer(array) == source.ctypes.data
