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
    """Time exchanges over every link, in both directions at once, and fit ``t = α + M / rate``.

    Both ends send, as those of a pipeline do, since what acknowledges one direction waits behind
    the messages of the other. Of two messages sent together the time between their receipts is that
    of the second's bytes alone: what a link lets pass at once after a pause has been spent on the
    first. Half an empty exchange is α.

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
        for q in range(p + 1, size):
            found = np.zeros(2)
            if rank == p:
                on_event(f"timing the link between {p} and {q}")
                found = np.array(_ask(transport, q))
            elif rank == q:
                found = np.array(_answer(transport, p))
            # everybody learns it: nobody starts the next probe before this one has ended
            everyone = gather(transport, found, 100 + p * size + q)
            latency_s[p, q] = latency_s[q, p] = everyone[p, 0]
            for source, target in ((p, q), (q, p)):
                rate = everyone[target, 1]
                rates[source, target] = abs(rate)
                if rate < 0:
                    notes.append(
                        f"link {source} to {target}: its times lie on no line; the median rate is "
                        "used"
                    )
    return latency_s, rates, notes


def _ask(transport: Transport, q: int) -> tuple[float, float]:
    """Lead the exchanges with q: α, and the rate from q to here (negative where it is a median)."""
    turn = 0

    def exchange(n_bytes: int, count: int) -> list[float]:
        nonlocal turn
        turn += 1
        transport.send(q, (_KEY, 3, turn), [np.array([n_bytes, count], np.int64)])
        return _both_ways(transport, q, turn, n_bytes, count)

    empty = []
    for _ in range(6):
        start_s = time.perf_counter()
        empty.append(exchange(1, 1)[0] - start_s)
    times: list[tuple[int, float]] = []
    n_bytes = _FIRST_BYTES
    while True:
        times += [(n_bytes, _last_s(exchange(n_bytes, 3))) for _ in range(3)]
        if statistics.median(s for _, s in times[-3:]) > _LINK_S or n_bytes >= _MOST_BYTES:
            break
        n_bytes *= 2
    exchange(0, 0)
    return statistics.median(empty[1:]) / 2, _rate(times)


def _answer(transport: Transport, p: int) -> tuple[float, float]:
    """Do the exchanges that p asks for: 0, and the rate from p to here."""
    turn, times = 0, []
    while True:
        turn += 1
        (head,) = transport.receive(p, (_KEY, 3, turn), [np.zeros(2, np.int64)])
        n_bytes, count = (int(x) for x in head)
        if count == 0:
            return 0.0, _rate(times)
        marks = _both_ways(transport, p, turn, n_bytes, count)
        if count > 1:
            times.append((n_bytes, _last_s(marks)))


def _both_ways(
    transport: Transport, other: int, turn: int, n_bytes: int, count: int
) -> list[float]:
    """Send messages and receive as many; gives the times of receipt."""
    payload, marks = np.zeros(n_bytes, np.uint8), []
    for k in range(count):
        transport.send(other, (_KEY, 4, turn, k), [payload])
    for k in range(count):
        transport.receive(other, (_KEY, 4, turn, k), [payload])
        marks.append(time.perf_counter())
    return marks


def _last_s(marks: list[float]) -> float:
    return max(marks[-1] - marks[-2], 1e-7)


def _rate(times: list[tuple[int, float]]) -> float:
    """Fit bytes per second; where there is no line, give the median of the largest, negative."""
    sizes, seconds = zip(*times, strict=True)
    try:
        return 1.0 / fit_linear(sizes, seconds).beta_s_per_unit
    except PoorFitError:
        return -statistics.median(n / s for n, s in times[-6:])


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
