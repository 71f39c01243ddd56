"""Link rates in words and numbers, and how many bytes this process's interfaces have carried."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from jaxsys.core.errors import UserError

_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmg]?bit)(?:/s)?\s*", re.IGNORECASE | re.ASCII)


class Traffic(NamedTuple):
    """Bytes carried by the interfaces of a network namespace since they came up.

    Attributes:
      rx_bytes: received.
      tx_bytes: sent.

    >>> Traffic(rx_bytes=10, tx_bytes=4).rx_bytes
    10
    """

    rx_bytes: int
    tx_bytes: int


def parse_rate(text: str) -> float:
    """Read a link rate such as ``100mbit``; prefixes are powers of 1000.

    ``mbps`` is refused, because it means megabits to some tools and megabytes to `tc`.

    Args:
      text: a positive number and one of bit, kbit, mbit, gbit (any case), ``/s`` allowed.

    Returns:
      The rate in bits per second.

    Raises:
      UserError: the text is no such rate.

    >>> parse_rate("100mbit"), parse_rate("1.5 Gbit/s")
    (100000000.0, 1500000000.0)
    """
    match = _RATE.fullmatch(text)
    rate_bits_s = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    if not 0.0 < rate_bits_s < math.inf:
        raise UserError(
            f"the link rate is {text!r}; expected a positive number with kbit, mbit or gbit; "
            "write it as in 100mbit"
        )
    return rate_bits_s


def format_rate(rate_bits_s: float) -> str:
    """Write a link rate in the largest unit that leaves a number of at least 1.

    Args:
      rate_bits_s: a positive rate in bits per second.

    Returns:
      Text that `parse_rate` reads back, to four significant digits.

    >>> format_rate(1e8), format_rate(2.5e9), format_rate(1234567.0)
    ('100mbit', '2.5gbit', '1.235mbit')
    """
    rounded = float(f"{rate_bits_s:.4g}")
    unit = next((u for u in ("gbit", "mbit", "kbit") if rounded >= _UNITS[u]), "bit")
    return f"{float(f'{rounded / _UNITS[unit]:.4g}'):.12g}{unit}"


def interface_bytes() -> Traffic:
    """Count the bytes that have crossed this network namespace's interfaces, loopback left out.

    Returns:
      The sums over all other interfaces, headers included.

    >>> before, after = interface_bytes(), interface_bytes()
    >>> after.rx_bytes >= before.rx_bytes
    True
    """
    return sum_interfaces(Path("/proc/self/net/dev").read_text())


def sum_interfaces(table: str) -> Traffic:
    """Add up the kernel's table of interface counters, loopback left out.

    Args:
      table: the text of ``/proc/net/dev``: two lines of headings, then one line an interface with
        the received bytes in the first column and the sent bytes in the ninth.

    Returns:
      The sums.

    >>> sum_interfaces("h\\nh\\n lo: 9 0 0 0 0 0 0 0 9\\n eth0: 5 1 0 0 0 0 0 0 7 1\\n")
    Traffic(rx_bytes=5, tx_bytes=7)
    """
    rx_bytes = tx_bytes = 0
    for line in table.splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() == "lo" or not numbers:
            continue
        fields = numbers.split()
        rx_bytes += int(fields[0])
        tx_bytes += int(fields[8])
    return Traffic(rx_bytes, tx_bytes)
