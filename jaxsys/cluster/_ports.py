"""Listening sockets on TCP ports: taking one, finding a free one, saying that one is occupied."""

import errno
import socket

from jaxsys.core.errors import UserError


def split_address(address: str) -> tuple[str, int]:
    """Split ``HOST:PORT`` (or ``[IPV6]:PORT``) and check the port.

    Args:
      address: text such as ``node1:4000`` or ``[::1]:4000``.

    Returns:
      The host without brackets, and the port number.

    Raises:
      UserError: the text has no host, or no port from 1 to 65535.

    >>> split_address("node1:4000"), split_address("[::1]:80")
    (('node1', 4000), ('::1', 80))
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"the coordinator is {address!r}; expected HOST:PORT with a port from 1 to 65535; "
            "pass one such as 10.0.0.1:4000"
        )
    return host, int(port)


def listen_on_all(port: int) -> socket.socket:
    """Listen on a port of every local address, as JAX's coordinator does; 0 takes any free one.

    Args:
      port: the TCP port.

    Returns:
      The listening socket; the caller closes it.

    Raises:
      UserError: another program listens on the port, or it may not be used.

    >>> with listen_on_all(0) as server:
    ...     server.getsockname()[1] > 0
    True
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        reason = "is occupied" if error.errno == errno.EADDRINUSE else f"fails: {error.strerror}"
        raise UserError(
            f"port {port} of this machine {reason}; the coordinator needs a free one; "
            "stop the program that holds it or choose another port"
        ) from error


def free_port() -> int:
    """Find a TCP port that nothing on this machine listens on.

    Another program may take it between this call and its use; the window is short.

    Returns:
      The port number.

    >>> 0 < free_port() < 65536
    True
    """
    with listen_on_all(0) as server:
        return server.getsockname()[1]


def is_local(host: str) -> bool:
    """Tell whether a host name or address belongs to this machine (in this network namespace).

    Args:
      host: a name or a numeric address.

    Returns:
      True where a socket can be bound to it; False also where the name is unknown.

    >>> is_local("127.0.0.1"), is_local("192.0.2.1")
    (True, False)
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
