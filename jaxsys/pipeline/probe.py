"""Time the links of a fleet through the very transport that a run uses, and fit lines."""

import statistics
import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jaxsys.cluster.transport import Transport
from jaxsys.core.cost import PoorFitError, fit_linear

_FIRST_BYTES, _MOST_BYTES, _LINK_S = 2**14, 2**24, 0.1
_KEY = 7  # first number of all keys of the probes


def measure_links(
    transport: Transport, on_event: Callable[[str], None] = lambda _: None
) -> tuple[Float[np.ndarray, "P P"], Float[np.ndarray, "P P"], list[str]]:
    """Time exchanges over every link in each direction and fit ``t = α + M / rate``.

    Of two messages sent together the time between their receipts is that of the second's bytes
    alone: what a link lets pass at once after a pause has been spent on the first. Half an empty
    exchange is α.

    Args:
      transport: this process's.
      on_event: told which link is next.

    Returns:
      α, seconds [P, P]; rates, bytes per second [P, P]; and notes on links without a line. All on
      process 0; the others get zeros and ones.

    >>> from jaxsys.cluster.transport import in_memory
    >>> latency_s, bytes_per_s, notes = measure_links(in_memory(1)[0])  # one alone has no link
    >>> latency_s.tolist(), bytes_per_s.tolist(), notes
    ([[0.0]], [[1.0]], [])
    """
    size, rank = transport.size, transport.rank
    latency_s, rates = np.zeros((size, size)), np.ones((size, size))
    notes: list[str] = []
    for p in range(size):
        for q in range(size):
            if p == q:
                continue
            found = np.zeros(2)
            if rank == p:
                on_event(f"timing the link from {p} to {q}")
                found = np.array(_probe(transport, q))
            elif rank == q:
                _answer(transport, p)
            # everybody learns it: nobody starts the next probe before this one has ended
            found = gather(transport, found, 100 + p * size + q)[p]
            latency_s[p, q], rates[p, q] = abs(found)
            if found[1] < 0:
                notes.append(f"link {p} to {q}: its times lie on no line; the median rate is used")
    return latency_s, rates, notes


def _probe(transport: Transport, q: int) -> tuple[float, float]:
    """Time the link to q: α and its rate, the rate negative where it is a median."""
    turn = 0

    def exchange(n_bytes: int, count: int) -> list[float]:
        nonlocal turn
        turn += 1
        head = np.array([n_bytes, count], np.int64)
        transport.send(q, (_KEY, 3, turn), [head])
        payload = np.zeros(n_bytes, np.uint8)
        for k in range(count):
            transport.send(q, (_KEY, 4, turn, k), [payload])
        marks = []
        for k in range(count):
            transport.receive(q, (_KEY, 5, turn, k), [np.zeros(1, np.uint8)])
            marks.append(time.perf_counter())
        return marks

    empty = []
    for _ in range(6):
        start_s = time.perf_counter()
        empty.append(exchange(1, 1)[0] - start_s)
    alpha_s = statistics.median(empty[1:]) / 2
    sizes, seconds = [], []
    n_bytes = _FIRST_BYTES
    while True:
        marks = [exchange(n_bytes, 3) for _ in range(3)]
        times = [max(m[2] - m[1], 1e-7) for m in marks]
        sizes += [n_bytes] * 3
        seconds += times
        if statistics.median(times) > _LINK_S or n_bytes >= _MOST_BYTES:
            break
        n_bytes *= 2
    exchange(0, 0)
    try:
        line = fit_linear(sizes, seconds)
        return alpha_s, 1.0 / line.beta_s_per_unit
    except PoorFitError:
        large = [n / s for n, s in zip(sizes, seconds, strict=True)][-6:]
        return alpha_s, -statistics.median(large)


def _answer(transport: Transport, p: int) -> None:
    turn = 0
    while True:
        turn += 1
        (head,) = transport.receive(p, (_KEY, 3, turn), [np.zeros(2, np.int64)])
        n_bytes, count = (int(x) for x in head)
        if count == 0:
            return
        for k in range(count):
            transport.receive(p, (_KEY, 4, turn, k), [np.zeros(n_bytes, np.uint8)])
            transport.send(p, (_KEY, 5, turn, k), [np.zeros(1, np.uint8)])


def gather(transport: Transport, mine: np.ndarray, turn: int) -> np.ndarray:
    """Give every process every process's array; nobody goes on before all have come.

    Args:
      transport: this process's.
      mine: its array, of one shape everywhere.
      turn: a number used once.

    Returns:
      The arrays, by rank.

    >>> from jaxsys.cluster.transport import in_memory
    >>> gather(in_memory(1)[0], np.arange(2), 0).tolist()
    [[0, 1]]
    """
    rank, size = transport.rank, transport.size
    for q in range(size):
        if q != rank:
            transport.send(q, (_KEY, 1, turn), [mine])
    everyone = [
        mine if p == rank else transport.receive(p, (_KEY, 1, turn), [mine])[0] for p in range(size)
    ]
    return np.stack(everyone)
