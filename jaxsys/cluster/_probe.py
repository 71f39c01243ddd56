"""The two ends of a netlab's timed exchange; run by path, standard library only.

``serve N`` prints its port and answers N connections, one after the other. ``time HOST PORT WARM
BYTES`` sends WARM + BYTES to the other end and then receives as many, and prints the seconds that
the BYTES took in each direction as JSON. The time is taken where the bytes arrive, and starts
after the first WARM of them, when the shaper's saved-up burst is spent and TCP has found its rate.
"""

import json
import socket
import struct
import sys
import time

_CHUNK_BYTES = 1 << 16
_HEADER = struct.Struct("<QQ")
_SECONDS = struct.Struct("<d")


def receive(peer: socket.socket, warm_bytes: int, timed_bytes: int) -> float:
    """Receive warm_bytes + timed_bytes.

    Args:
      peer: a connected stream socket.
      warm_bytes: how many to let pass before the clock starts.
      timed_bytes: how many to time at least; all that arrives is counted.

    Returns:
      The seconds per byte after the warm-up, times timed_bytes.

    >>> left, right = socket.socketpair()
    >>> with left, right:
    ...     left.sendall(bytes(1000))
    ...     seconds = receive(right, 100, 900)
    >>> seconds >= 0
    True
    """
    total_bytes = got_bytes = 0
    start_bytes, start_s = 0, 0.0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while total_bytes < warm_bytes + timed_bytes:
        left_bytes = warm_bytes + timed_bytes - total_bytes
        got_bytes = peer.recv_into(buffer, min(_CHUNK_BYTES, left_bytes))
        if got_bytes == 0:
            raise ConnectionError("the other end closed the connection")
        total_bytes += got_bytes
        if not start_bytes and total_bytes >= warm_bytes:
            start_bytes, start_s = total_bytes, time.perf_counter()
    seconds = time.perf_counter() - start_s
    return seconds * timed_bytes / max(total_bytes - start_bytes, 1)


def send(peer: socket.socket, count_bytes: int) -> None:
    """Send count_bytes zeros.

    Args:
      peer: a connected stream socket.
      count_bytes: how many.

    >>> left, right = socket.socketpair()
    >>> with left, right:
    ...     send(left, 10)
    ...     len(right.recv(100))
    10
    """
    chunk = bytes(_CHUNK_BYTES)
    while count_bytes > 0:
        part = memoryview(chunk)[: min(count_bytes, _CHUNK_BYTES)]
        peer.sendall(part)
        count_bytes -= len(part)


def _serve(count: int) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        print(server.getsockname()[1], flush=True)
        for _ in range(count):
            peer, _ = server.accept()
            with peer:
                header = peer.recv(_HEADER.size, socket.MSG_WAITALL)
                warm_bytes, timed_bytes = _HEADER.unpack(header)
                peer.sendall(_SECONDS.pack(receive(peer, warm_bytes, timed_bytes)))
                send(peer, warm_bytes + timed_bytes)
                peer.recv(1)  # stay until the other end has all


def _time(host: str, port: int, warm_bytes: int, timed_bytes: int) -> None:
    with socket.create_connection((host, port), timeout=60.0) as peer:
        peer.sendall(_HEADER.pack(warm_bytes, timed_bytes))
        send(peer, warm_bytes + timed_bytes)
        up_s = _SECONDS.unpack(peer.recv(_SECONDS.size, socket.MSG_WAITALL))[0]
        down_s = receive(peer, warm_bytes, timed_bytes)
    print(json.dumps({"up_s": up_s, "down_s": down_s}))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(int(sys.argv[2]))
    else:
        _time(sys.argv[2], *map(int, sys.argv[3:]))
