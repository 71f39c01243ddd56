"""Processes that work together: launching them, joining a job, and slow networks to try them on.

Nothing here imports JAX before `join` is called, so that a launcher stays small.
"""

from jaxsys.cluster.join import Membership, join, launched_as, leave, read_environment
from jaxsys.cluster.launch import Attempt, LaunchReport, launch, most_workers
from jaxsys.cluster.netlab import Availability, LinkRate, Netlab, available, netlab
from jaxsys.cluster.rates import Traffic, format_rate, interface_bytes, parse_rate
from jaxsys.cluster.shares import Shares, available_shares, cpu_shares

__all__ = [
    "Attempt",
    "Availability",
    "LaunchReport",
    "LinkRate",
    "Membership",
    "Netlab",
    "Shares",
    "Traffic",
    "available",
    "available_shares",
    "cpu_shares",
    "format_rate",
    "interface_bytes",
    "join",
    "launch",
    "launched_as",
    "leave",
    "most_workers",
    "netlab",
    "parse_rate",
    "read_environment",
]
