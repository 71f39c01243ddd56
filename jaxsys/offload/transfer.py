"""A ring of transfer buffers: weights on their way to the accelerator, and for one use there."""

from collections.abc import Collection
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

Key = Any


class _Slot:
    """One buffer: what is in it, and the result that says when it is free again."""

    def __init__(self, key: Key, arrays: Any, n_bytes: int):
        self.key, self.arrays, self.n_bytes, self.result = key, arrays, n_bytes, None


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

    def start(self, key: Key, tree: Any) -> Any:
        """Start a copy if it is not there or under way; what may be waited for comes back."""
        if self.holds(key):
            return None
        self._make_room()
        n_bytes = sum(x.nbytes for x in jax.tree.leaves(tree))
        self._slots.append(_Slot(key, self._copy(tree), n_bytes))
        self.peak_bytes = max(self.peak_bytes, sum(slot.n_bytes for slot in self._slots))
        return self._slots[-1].arrays

    def fetch(self, key: Key, tree: Any) -> Any:
        """Give weights on the accelerator; the copy is started if it is not under way."""
        self.start(key, tree)
        slot = next(slot for slot in self._slots if slot.key == key)
        slot.result = None
        return slot.arrays

    def drop(self, keys: Collection[Key]) -> None:
        """Free the buffers of copies that were made ahead and are not wanted."""
        self._slots = [slot for slot in self._slots if slot.key not in keys]

    def _copy(self, tree: Any) -> Any:
        if self._pinned is not None:
            tree = jax.device_put(tree, self._pinned)
        return jax.device_put(tree, self._there)

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
