"""A ring of transfer buffers: weights on their way to the accelerator, and for one use there."""

from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

Key = Any


class _Slot:
    """One buffer: what is in it, and the result that says when it is free again."""

    def __init__(self, key: Key, arrays: Any):
        self.key, self.arrays, self.result = key, arrays, None


class Ring:
    """Copy weights to the accelerator with a few buffers, so that memory stays bounded.

    A copy does not wait. A buffer is taken again when the program that read it has run: with two,
    one is filled while the other is read.

    Args:
        device: the accelerator.
        depth: buffers, at least 1.
        pinned: copy through page-locked host memory, from which the link reads at its full rate.

    >>> import numpy as np
    >>> ring = Ring(jax.devices()[0], 1)
    >>> float(ring.fetch("w", np.ones(3))[0]), ring.holds("w"), ring.has_room()
    (1.0, True, False)
    """

    def __init__(self, device: Any, depth: int, *, pinned: bool = False):
        self.depth = max(depth, 1)
        self.peak_bytes = 0
        self.spent: set[Key] = set()
        self._slots: list[_Slot] = []
        # By its memory, not the device: out of page-locked memory it would count as there already.
        self._there = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
        self._pinned = SingleDeviceSharding(device, memory_kind="pinned_host") if pinned else None

    def holds(self, key: Key) -> bool:
        """Say whether a copy is there or under way."""
        return any(slot.key == key for slot in self._slots)

    def has_room(self) -> bool:
        """Say whether a copy can start without waiting for a program."""
        done = (slot.result is not None and slot.result.is_ready() for slot in self._slots)
        return len(self._slots) < self.depth or any(done)

    def fetch(self, key: Key, tree: Any) -> Any:
        """Give weights on the accelerator; the copy is started if it is not under way."""
        for slot in self._slots:
            if slot.key == key:
                slot.result = None
                return slot.arrays
        self._make_room()
        if self._pinned is not None:
            tree = jax.device_put(tree, self._pinned)
        arrays = jax.device_put(tree, self._there)
        self._slots.append(_Slot(key, arrays))
        held = sum(x.nbytes for slot in self._slots for x in jax.tree.leaves(slot.arrays))
        self.peak_bytes = max(self.peak_bytes, held)
        return arrays

    def used(self, key: Key, result: Any) -> None:
        """Note the result of the program that reads a copy; the buffer is free when it is there."""
        self.spent.add(key)
        for slot in self._slots:
            if slot.key == key:
                slot.result = result

    def begin(self) -> None:
        """Forget what was used: a new pass through the layers begins."""
        self.spent.clear()

    def _make_room(self) -> None:
        while len(self._slots) >= self.depth:
            used = [slot for slot in self._slots if slot.result is not None]
            # Without a used one, the last copy was made too early: it is made again later.
            oldest = used[0] if used else self._slots[-1]
            if oldest.result is not None:
                jax.block_until_ready(oldest.result)
            self._slots.remove(oldest)
