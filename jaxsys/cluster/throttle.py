"""A slow device in place of a fast one: a worker that sleeps in proportion to what it computed.

A CPU quota (`cpu_shares`) is a share of each of the kernel's periods, so that a worker which has
waited for a message runs on at a whole core's speed for a while, and one that has computed does
not: its speed depends on what came before. A throttled piece of work takes ``work / share``
seconds whenever it runs, as it would on a slower device. It is emulation in the worker itself, and
to be said where it is used.
"""

import os
import time
from collections.abc import Mapping, Sequence

from jaxsys.core.errors import UserError

VARIABLE = "JAXSYS_THROTTLE"
_LATE_S = 6e-5  # by so much the kernel's timers end a sleep late


class Throttle:
    """Bring pieces of work to a share of a core's speed.

    ``end = begin + w / share`` with w the processor time of the whole process since the beginning
    of the piece. What other processes take of the core meanwhile is part of the sleep, and so does
    not count twice, as long as the core is shared out evenly and nobody has more than an even part.

    Args:
      share: of a core's speed, above 0 and at most 1; 1 never sleeps.

    Attributes:
      share: as given.

    >>> throttle = Throttle(0.5)
    >>> begin_s, cpu_s = time.perf_counter(), time.process_time()
    >>> throttle.begin(); _ = sum(range(10**5)); throttle.pay()
    >>> time.perf_counter() - begin_s >= 2 * 0.9 * (time.process_time() - cpu_s - 1e-3)
    True
    """

    def __init__(self, share: float | int) -> None:
        if not 0 < share <= 1:
            raise UserError(
                f"a throttle's share is {share}; it must be above 0 and at most 1 (the whole speed "
                "of a core); pass another"
            )
        self.share = float(share)
        self.begin()

    def begin(self) -> None:
        """Start a piece of work now."""
        self._begin_s, self._cpu_s = time.perf_counter(), time.process_time()

    def pay(self) -> None:
        """Sleep until the piece of work has taken as long as it would at the share's speed."""
        if self.share == 1.0:
            return
        until_s = self._begin_s + (time.process_time() - self._cpu_s) / self.share
        left_s = until_s - time.perf_counter()
        if left_s > _LATE_S:
            time.sleep(left_s - _LATE_S)


FULL_SPEED = Throttle(1.0)  # never sleeps


def throttled(share: float | int, argv: Sequence[str]) -> list[str]:
    """Give an argument list that runs a command with a throttle set for it; see `throttle_of`.

    Args:
      share: of a core's speed.
      argv: program and arguments; the program must ask for its throttle.

    >>> throttled(0.5, ["python", "train.py"])
    ['env', 'JAXSYS_THROTTLE=0.5', 'python', 'train.py']
    """
    return ["env", f"{VARIABLE}={Throttle(share).share!r}", *argv]


def throttle_of(environ: Mapping[str, str] = os.environ) -> Throttle:
    """Give the throttle that a place set for this process, or one that never sleeps.

    Args:
      environ: environment variables.

    >>> throttle_of({"JAXSYS_THROTTLE": "0.5"}).share, throttle_of({}).share
    (0.5, 1.0)
    """
    return Throttle(float(environ.get(VARIABLE) or 1.0))
