"""Time an exchange over each of several shaped links, and say where a rate is off.

The programs at both ends are `_probe.py`; a link is measured against an end that is not shaped.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxsys.cluster.rates import format_rate
from jaxsys.core.errors import UserError

_PROBE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("_probe.py"))]
_FRAME_BYTES = 9000


class LinkRate(NamedTuple):
    """What a link was measured to carry.

    Attributes:
      up_bits_s: payload bits per second that its end sends.
      down_bits_s: payload bits per second that it receives.

    >>> LinkRate(up_bits_s=9.9e7, down_bits_s=9.8e7).up_bits_s
    99000000.0
    """

    up_bits_s: float
    down_bits_s: float


class ShapedLink(NamedTuple):
    """A link to be timed.

    Attributes:
      name: how messages call it.
      enter: gives the argument list that runs a program at its end.
      rate_bits_s: what it should carry.
      burst_bytes: what it lets pass at once after a pause.

    >>> ShapedLink("worker 0", list, 1e8, 36000).name
    'worker 0'
    """

    name: str
    enter: Callable[[Sequence[str]], list[str]]
    rate_bits_s: float
    burst_bytes: int


def time_links(
    server: Callable[[Sequence[str]], list[str]],
    address: str,
    links: Sequence[ShapedLink],
    seconds: float,
) -> list[LinkRate]:
    """Time the links one after the other, so that each number belongs to one of them.

    Args:
      server: gives the argument list that runs a program at the end that is not shaped.
      address: of that end.
      links: the links that lead to it.
      seconds: about how long each direction is timed.

    Returns:
      A rate for each link.

    Raises:
      UserError: an exchange failed or did not end.

    >>> link = ShapedLink("loopback", list, 1e9, 9000)
    >>> time_links(list, "127.0.0.1", [link], 0.01)[0].up_bits_s > 0
    True
    """
    measured = []
    with subprocess.Popen(
        server([*_PROBE, "serve", str(len(links))]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip() or "0"  # nothing: the first time fails
            for link in links:
                timed_bytes = max(round(link.rate_bits_s * seconds / 8), 2 * _FRAME_BYTES)
                warm_bytes = 2 * link.burst_bytes + timed_bytes // 4
                done = subprocess.run(
                    link.enter([*_PROBE, "time", address, port, str(warm_bytes), str(timed_bytes)]),
                    capture_output=True,
                    text=True,
                    timeout=30.0 + 20.0 * seconds,
                )
                if done.returncode != 0:
                    raise UserError(
                        f"the timed exchange of {link.name} failed "
                        f"({(done.stderr.strip().splitlines() or ['no message'])[-1]}); "
                        "expected it to reach the bridge; try again or use an emulated link"
                    )
                times = json.loads(done.stdout)
                bits = 8.0 * timed_bytes
                measured.append(LinkRate(bits / times["up_s"], bits / times["down_s"]))
        finally:
            process.kill()
    return measured


def warn_where_off(
    links: Sequence[ShapedLink], measured: Sequence[LinkRate], tolerance: float
) -> None:
    """Warn about rates that are off by more than the tolerance.

    >>> warn_where_off([ShapedLink("worker 0", list, 1e8, 9000)], [LinkRate(1e8, 9.9e7)], 0.1)
    """
    off = [
        f"{link.name} {format_rate(rate)} instead of {format_rate(link.rate_bits_s)}"
        for link, rates in zip(links, measured, strict=True)
        for rate in rates
        if abs(rate / link.rate_bits_s - 1.0) > tolerance
    ]
    if off:
        warnings.warn(
            f"links are off by more than {tolerance:.0%} ({'; '.join(off[:4])}); "
            "the machine is busy or too slow for the rate; choose a lower one or wait",
            RuntimeWarning,
            stacklevel=3,
        )
