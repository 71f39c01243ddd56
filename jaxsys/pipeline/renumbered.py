"""A transport whose ranks are the plan's, whatever the numbers of the processes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsys.cluster.transport import Key, PeerLost, Transport


class Renumbered:
    """A transport whose ranks are the plan's: process i of the job is device i of the fleet.

    Args:
      inner: the transport between the processes.
      ranks: the process of each rank.

    >>> from jaxsys.cluster.transport import in_memory
    >>> ends = [Renumbered(end, (1, 0)) for end in in_memory(2)]
    >>> ends[1].rank, ends[1].send(1, (0,), [np.ones(1)]), ends[0].receive(0, (0,), [np.ones(1)])
    (0, None, [array([1.])])
    """

    def __init__(self, inner: Transport, ranks: Sequence[int]):
        self._inner, self._ranks = inner, tuple(ranks)
        self.rank, self.size = self._ranks.index(inner.rank), inner.size

    @property
    def sent_bytes(self) -> dict[int, int]:
        """Receiving rank to bytes sent so far."""
        return {self._ranks.index(p): n for p, n in self._inner.sent_bytes.items()}

    def send(self, to: int, key: Key, arrays: Sequence[Any]) -> None:
        """Hand over a message; returns at once."""
        self._inner.send(self._ranks[to], key, arrays)

    def expect(self, source: int, key: Key, specs: Sequence[Any]) -> None:
        """Prepare for a message."""
        self._inner.expect(self._ranks[source], key, specs)

    def receive(self, source: int, key: Key, specs: Sequence[Any]) -> list[np.ndarray]:
        """Wait for a message."""
        return self._inner.receive(self._ranks[source], key, specs)

    def close(self, lost: PeerLost | None = None) -> None:
        """Part from the others."""
        self._inner.close(lost)
