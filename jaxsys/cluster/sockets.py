"""Named arrays over plain TCP: every pair of processes has one connection and two threads.

A thread per link sends, so that handing over costs nothing, and one receives into a mailbox, so
that a message is usually there when it is asked for. A dead process is noticed by its connections'
end (at once), a stopped machine by silence: idle links carry heartbeats.
"""

import contextlib
import queue
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsys.cluster._ports import listen_on_all
from jaxsys.cluster._rendezvous import meet
from jaxsys.cluster.join import Membership
from jaxsys.cluster.transport import (
    HEADER_BYTES,
    KEY_NUMBERS,
    Key,
    PeerLost,
    check_peer,
    message_bytes,
)
from jaxsys.core.errors import UserError

_HEADER = struct.Struct(f"<IQ{KEY_NUMBERS}i")
assert _HEADER.size == HEADER_BYTES
_DATA, _ALIVE, _BYE, _ABORT = 0x4A58_0001, 0x4A58_0002, 0x4A58_0003, 0x4A58_0004
_UNUSED = -(2**31)  # fills up a key's numbers
_PIECE_BYTES = 2**18  # so much is written at once; a blocked piece is silence of the peer
_MOST_BYTES = 2**34  # of one message: more is a stranger's or a damaged header
_HELLO = struct.Struct("<16si")


class Sockets:
    """The TCP transport of one process; see `connect`.

    Attributes:
      rank: this process's number.
      size: how many processes there are.
      host: address at which process 0 sees this one.
      sent_bytes: receiver to bytes sent so far, headers of messages included, heartbeats not.

    >>> Sockets.__mro__[1].__name__
    'object'
    """

    def __init__(
        self,
        rank: int,
        links: dict[int, socket.socket],
        host: str,
        silence_s: float | int,
        hold_s: Callable[[int, int], float] | None,
    ) -> None:
        self.rank, self.size, self.host = rank, len(links) + 1, host
        self.sent_bytes = dict.fromkeys(sorted(links), 0)
        self._silence_s, self._hold_s = silence_s, hold_s
        self._changed = threading.Condition()
        self._box: dict[tuple[int, Key], memoryview] = {}
        self._lost: dict[int, str] = {}
        self._left: set[int] = set()
        self._links, self._locks = links, {peer: threading.Lock() for peer in links}
        self._queues: dict[int, queue.SimpleQueue[Any]] = {}
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        for peer, link in links.items():
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.settimeout(silence_s)
            self._queues[peer] = queue.SimpleQueue()
            for work in (self._send_all, self._receive_all):
                self._threads.append(threading.Thread(target=work, args=(peer,), daemon=True))
        if links:
            self._threads.append(threading.Thread(target=self._keep_alive, daemon=True))
        for thread in self._threads:
            thread.start()

    def send(self, to: int, key: Key, arrays: Sequence[Any]) -> None:
        """Hand over a message; returns at once."""
        check_peer(to, self.rank, self.size)
        self.check()
        self.sent_bytes[to] += message_bytes(arrays)
        self._queues[to].put((_DATA, _filled(key), list(arrays)))

    def expect(self, source: int, key: Key, specs: Sequence[Any]) -> None:
        """Do nothing: what is sent arrives by itself."""

    def receive(self, source: int, key: Key, specs: Sequence[Any]) -> list[np.ndarray]:
        """Wait for a message; any lost process ends the wait, since the sender waits for it too."""
        check_peer(source, self.rank, self.size)
        name = (source, _filled(key))
        with self._changed:
            self._changed.wait_for(
                lambda: name in self._box or bool(self._lost) or source in self._left
            )
            if name not in self._box:
                self._raise_lost(source)
            payload = self._box.pop(name)
        return _split(payload, specs, source, key)

    def check(self) -> None:
        """Raise `PeerLost` if a process is known to be lost.

        >>> connect(Membership(0, 1, None, "single")).check()
        """
        with self._changed:
            if self._lost:
                self._raise_lost(next(iter(self._lost)))

    def pause(self, seconds: float) -> None:
        """Wait until something is heard of the others, at most for some seconds.

        >>> connect(Membership(0, 1, None, "single")).pause(0.0)
        """
        with self._changed:
            self._changed.wait(seconds)

    def close(self, lost: PeerLost | None = None, wait_s: float | int = 60) -> None:
        """Finish sending, tell the others that this process leaves, and part.

        Args:
          lost: why it leaves, where that is the loss of another one: the others are told its
            number, so that all name the same process.
          wait_s: how long to wait for the others to leave, in seconds. A connection that is ended
            while the other side still sends loses what is under way.
        """
        if self._closing.is_set():
            return
        kind, key = (_BYE, ()) if lost is None else (_ABORT, (lost.peer,))
        for waiting in self._queues.values():
            waiting.put((kind, _filled(key), []))
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._left | set(self._lost)) >= len(self._links),
                wait_s if lost is None else min(wait_s, 1.0),
            )
        self._closing.set()
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        # An interpreter that ends under a thread which frees an array aborts the process.
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1.0)

    def _raise_lost(self, source: int) -> None:
        for peer, reason in self._lost.items():
            raise PeerLost(peer, reason)
        raise PeerLost(source, "it has left without sending what was expected of it")

    def _lose(self, peer: int, reason: str) -> None:
        with self._changed:
            if peer not in self._left:
                self._lost.setdefault(peer, reason)
            self._changed.notify_all()

    def _send_all(self, peer: int) -> None:
        link, waiting = self._links[peer], self._queues[peer]
        kind = _DATA
        try:
            while kind == _DATA:
                kind, key, arrays = waiting.get()
                parts = [_flat(x) for x in arrays]  # waits for what is under computation
                n_bytes = sum(part.nbytes for part in parts)
                if self._hold_s is not None and kind == _DATA:
                    time.sleep(self._hold_s(peer, n_bytes + HEADER_BYTES))
                with self._locks[peer]:
                    _write(link, _HEADER.pack(kind, n_bytes, *key))
                    for part in parts:
                        _write(link, part)
        except TimeoutError:
            self._lose(peer, f"it has taken nothing for {self._silence_s:g} s")
        except OSError as error:
            self._lose(peer, f"its connection ended ({error.strerror or error})")
        except Exception as error:  # an array that was under computation has failed
            self._lose(self.rank, f"a message could not be made: {error}")

    def _keep_alive(self) -> None:
        """Send heartbeats on the links that carry nothing else."""
        beat = _HEADER.pack(_ALIVE, 0, *_filled(()))
        while not self._closing.wait(self._silence_s / 4):
            for peer, link in self._links.items():
                if not self._locks[peer].acquire(blocking=False):
                    continue  # a message is being written
                with contextlib.suppress(OSError, ValueError):
                    # A link that takes nothing at once still has bytes to deliver.
                    if select.select([], [link], [], 0)[1]:
                        link.send(beat)
                self._locks[peer].release()

    def _receive_all(self, peer: int) -> None:
        link = self._links[peer]
        header = bytearray(HEADER_BYTES)
        try:
            while _read(link, memoryview(header)):
                kind, n_bytes, *key = _HEADER.unpack(header)
                if kind not in (_DATA, _ALIVE, _BYE, _ABORT) or n_bytes > _MOST_BYTES:
                    raise OSError("it sent what is no message")
                payload = memoryview(bytearray(n_bytes))
                if n_bytes and not _read(link, payload):
                    break
                with self._changed:
                    if kind == _DATA:
                        self._box[peer, tuple(key)] = payload
                    elif kind == _BYE:
                        self._left.add(peer)
                    elif kind == _ABORT:
                        self._lost.setdefault(key[0], f"process {peer} has noticed it")
                    self._changed.notify_all()
                if kind in (_BYE, _ABORT):
                    return
            self._lose(peer, "its connection ended")
        except TimeoutError:
            self._lose(peer, f"it has been silent for {self._silence_s:g} s")
        except OSError as error:
            self._lose(peer, f"its connection ended ({error.strerror or error})")


def connect(
    member: Membership,
    *,
    timeout_s: float | int = 60,
    silence_s: float | int = 10,
    hold_s: Callable[[int, int], float] | None = None,
) -> Sockets:
    """Join all processes of a job by TCP, each pair once.

    Args:
      member: this process's place, as from `jaxsys.cluster.join`; its coordinator's port must be
        free, so join with ``distributed=False`` or give another one.
      timeout_s: how long to wait for the others.
      silence_s: silence after which a process counts as lost, in seconds.
      hold_s: emulated links: ``(receiver, bytes) ->`` seconds for which a message is held before
        it leaves, link by link; None: the real links are all there is.

    Returns:
      The transport.

    Raises:
      UserError: as `jaxsys.cluster.join`; or a process does not answer at its address.

    >>> connect(Membership(0, 1, None, "single")).size
    1
    """
    if member.num_processes == 1:
        return Sockets(0, {}, "127.0.0.1", silence_s, hold_s)
    assert member.coordinator is not None
    token = secrets.token_hex(8)
    deadline_s = time.monotonic() + timeout_s
    with listen_on_all(0) as server:
        card = f"{server.getsockname()[1]} {token}"
        table = meet(
            member.coordinator, member.process_id, member.num_processes, float(timeout_s), card
        )
        token = table[0][1].split()[1]  # process 0's is the job's
        links: dict[int, socket.socket] = {}
        for peer, (host, text) in enumerate(table[: member.process_id]):
            links[peer] = _call(host, int(text.split()[0]), peer, deadline_s)
            links[peer].sendall(_HELLO.pack(token.encode(), member.process_id))
        while len(links) < member.num_processes - 1:
            _answer(server, token, links, deadline_s, member)
    host = table[member.process_id][0]
    return Sockets(member.process_id, links, host, silence_s, hold_s)


def _call(host: str, port: int, peer: int, deadline_s: float) -> socket.socket:
    try:
        left_s = max(deadline_s - time.monotonic(), 0.1)
        return socket.create_connection((host, port), timeout=left_s)
    except OSError as error:
        raise UserError(
            f"process {peer} does not answer at {host}:{port} ({error.strerror or error}); every "
            "process must be able to reach every other one; open the ports between them"
        ) from error


def _answer(
    server: socket.socket,
    token: str,
    links: dict[int, socket.socket],
    deadline_s: float,
    member: Membership,
) -> None:
    """Take one call of a process with a higher number; strangers are sent away."""
    server.settimeout(max(deadline_s - time.monotonic(), 0.1))
    try:
        link, _ = server.accept()
    except TimeoutError as error:
        missing = [i for i in range(member.process_id + 1, member.num_processes) if i not in links]
        raise UserError(
            f"process {missing[0]} did not connect to process {member.process_id}; every process "
            "must be able to reach every other one; open the ports between them"
        ) from error
    hello = bytearray(_HELLO.size)
    with contextlib.suppress(OSError):
        link.settimeout(2.0)
        if _read(link, memoryview(hello)):
            said, peer = _HELLO.unpack(hello)
            right = secrets.compare_digest(said, token.encode())
            if right and member.process_id < peer < member.num_processes and peer not in links:
                links[peer] = link
                return
    link.close()


def _filled(key: Key) -> Key:
    if len(key) > KEY_NUMBERS:
        raise UserError(f"the key {key} has {len(key)} numbers; at most {KEY_NUMBERS} fit")
    return (*key, *[_UNUSED] * (KEY_NUMBERS - len(key)))


def _flat(x: Any) -> memoryview:
    array = np.ascontiguousarray(np.asarray(x)).reshape(-1)
    return memoryview(array.view(np.uint8))


def _write(link: socket.socket, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[link.send(left[:_PIECE_BYTES]) :]


def _read(link: socket.socket, into: memoryview) -> bool:
    """Fill a buffer; False where the peer has ended the connection."""
    while into:
        n_bytes = link.recv_into(into)
        if n_bytes == 0:
            return False
        into = into[n_bytes:]
    return True


def _split(payload: memoryview, specs: Sequence[Any], source: int, key: Key) -> list[np.ndarray]:
    expected = message_bytes(specs) - HEADER_BYTES
    if len(payload) != expected:
        raise UserError(
            f"process {source} sent {len(payload)} bytes as message {key}; expected {expected}; "
            "give all processes the same plan, model and version"
        )
    found, begin = [], 0
    for spec in specs:
        end = begin + message_bytes([spec]) - HEADER_BYTES
        array = np.frombuffer(payload[begin:end], np.uint8).view(np.dtype(spec.dtype))
        found.append(array.reshape(spec.shape))
        begin = end
    return found
