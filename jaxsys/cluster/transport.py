"""Named arrays from process to process: what a pipeline's stages hand each other.

Any process may send any other one a message at any time; a message is a few arrays under a key of
small whole numbers that both sides know, together with shapes and types, so that nothing but a
fixed header goes over the wire beside the payload. Sending returns at once.

Back ends: `in_memory` (one process, for tests and as the oracle), `jaxsys.cluster.sockets` (plain
TCP) and `jaxsys.cluster.engine` (JAX's transfer engine).
"""

import threading
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxsys.core.errors import UserError

Key = tuple[int, ...]
KEY_NUMBERS = 5  # most numbers in a key
HEADER_BYTES = 32  # of a message: length, kind and the numbers of the key


class PeerLost(RuntimeError):
    """A process that was waited for has died, left, or been silent for too long.

    Attributes:
      peer: its number.
      reason: what was seen of it.

    >>> PeerLost(3, "its connection was reset").peer
    3
    """

    def __init__(self, peer: int, reason: str) -> None:
        super().__init__(f"process {peer} is lost: {reason}")
        self.peer, self.reason = peer, reason


@runtime_checkable
class Transport(Protocol):
    """Send and receive named arrays; every process of a job has one.

    Attributes:
      rank: this process's number.
      size: how many processes there are.
      sent_bytes: receiver to bytes sent so far, headers of messages included.

    >>> Transport.__name__
    'Transport'
    """

    rank: int
    size: int

    @property
    def sent_bytes(self) -> dict[int, int]:
        """Receiver to bytes sent so far, headers of messages included."""
        ...

    def send(self, to: int, key: Key, arrays: Sequence[Any]) -> None:
        """Hand over a message; returns at once.

        Args:
          to: number of the receiving process.
          key: at most ``KEY_NUMBERS`` whole numbers, used once for this pair of processes.
          arrays: JAX or NumPy arrays; they may still be under computation.

        Raises:
          PeerLost: the receiver is known to be lost.
        """
        ...

    def expect(self, source: int, key: Key, specs: Sequence[Any]) -> None:
        """Say that a message will be received, so that its bytes may move beforehand."""
        ...

    def receive(self, source: int, key: Key, specs: Sequence[Any]) -> list[np.ndarray]:
        """Wait for a message.

        Args:
          source: number of the sending process.
          key: as given to `send`.
          specs: shape and dtype of each array.

        Returns:
          The arrays.

        Raises:
          PeerLost: the sender is lost, and the message had not arrived.
        """
        ...

    def close(self, lost: PeerLost | None = None) -> None:
        """Finish sending what was handed over, then part.

        Args:
          lost: why, where that is the loss of another process; the others are told.
        """
        ...


def message_bytes(specs: Sequence[Any]) -> int:
    """Count the bytes of a message: header and payload.

    Args:
      specs: shape and dtype of each array.

    Returns:
      Bytes.

    >>> message_bytes([np.zeros(3, np.float32)])
    44
    """
    return HEADER_BYTES + sum(
        int(np.prod(s.shape, dtype=np.int64)) * np.dtype(s.dtype).itemsize for s in specs
    )


class InMemory:
    """A transport between threads, or between turns of one thread; see `in_memory`.

    >>> InMemory(0, 1, {}, threading.Condition()).size
    1
    """

    def __init__(
        self,
        rank: int,
        size: int,
        boxes: dict[tuple[int, int, Key], list[np.ndarray]],
        changed: threading.Condition,
    ) -> None:
        self.rank, self.size = rank, size
        self.sent_bytes = dict.fromkeys((i for i in range(size) if i != rank), 0)
        self._boxes, self._changed = boxes, changed

    def send(self, to: int, key: Key, arrays: Sequence[Any]) -> None:
        """Hand over a message; it is there at once."""
        check_peer(to, self.rank, self.size)
        found = [np.asarray(x) for x in arrays]
        with self._changed:
            if (self.rank, to, key) in self._boxes:
                raise UserError(f"key {key} was sent to process {to} twice; use each key once")
            self._boxes[self.rank, to, key] = found
            self.sent_bytes[to] += message_bytes(found)
            self._changed.notify_all()

    def has(self, source: int, key: Key) -> bool:
        """Tell whether a message has arrived.

        >>> in_memory(2)[0].has(1, (0,))
        False
        """
        with self._changed:
            return (source, self.rank, key) in self._boxes

    def expect(self, source: int, key: Key, specs: Sequence[Any]) -> None:
        """Do nothing: what is sent is there at once."""

    def receive(self, source: int, key: Key, specs: Sequence[Any]) -> list[np.ndarray]:
        """Wait for a message."""
        check_peer(source, self.rank, self.size)
        name = (source, self.rank, key)
        with self._changed:
            self._changed.wait_for(lambda: name in self._boxes)
            return self._boxes.pop(name)

    def close(self, lost: PeerLost | None = None) -> None:
        """Do nothing: there is nothing under way."""


def in_memory(size: int) -> list[InMemory]:
    """Make transports that are joined within this process.

    Args:
      size: how many.

    Returns:
      One per rank.

    >>> a, b = in_memory(2)
    >>> a.send(1, (7, 0), [np.arange(2)])
    >>> b.receive(0, (7, 0), [np.arange(2)])[0].tolist(), a.sent_bytes
    ([0, 1], {1: 48})
    """
    boxes: dict[tuple[int, int, Key], list[np.ndarray]] = {}
    changed = threading.Condition()
    return [InMemory(rank, size, boxes, changed) for rank in range(size)]


def check_peer(peer: int, rank: int, size: int) -> None:
    """Refuse a peer that cannot be.

    >>> check_peer(1, 0, 2)
    """
    if not 0 <= peer < size or peer == rank:
        raise UserError(
            f"process {rank} of {size} wants to exchange with process {peer}; expected another "
            f"number from 0 to {size - 1}; mend the plan"
        )
