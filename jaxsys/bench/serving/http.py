"""HTTP/1.1 on asyncio streams, as much as a server of JSON needs, with limits on everything."""

import asyncio
import contextlib
import ipaddress
import json
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxsys.bench.serving.protocol import Refusal
from jaxsys.core.errors import UserError

_REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 411: "Length Required", 413: "Content Too Large",
    415: "Unsupported Media Type", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error",
    503: "Service Unavailable", 505: "HTTP Version Not Supported",
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Bound what clients may ask of a server.

    Attributes:
      header_bytes: of a request's head.
      body_bytes: of a request's body.
      connections: open at once.
      requests: that run or wait at once; more are told to come back (429).
      head_s: seconds within which a request's head, and then its body, must be there; also how
        long a connection may stay idle.
      slow_s: seconds that a client may leave a full buffer unread before it is dropped.
      write_bytes: of an answer that may wait for its client in this process.

    >>> Limits().body_bytes
    1048576
    """

    header_bytes: int = 16 << 10
    body_bytes: int = 1 << 20
    connections: int = 4096
    requests: int = 2048
    head_s: float | int = 30.0
    slow_s: float | int = 20.0
    write_bytes: int = 64 << 10


class Request(NamedTuple):
    """Hold one request.

    >>> Request("GET", "/health", {}, b"", True).path
    '/health'
    """

    method: str
    path: str
    headers: dict[str, str]  # names in small letters
    body: bytes
    keep: bool  # the connection stays open after the answer


def bind(address: str, expose: bool) -> socket.socket:
    """Take the port that a server will listen on.

    Args:
      address: HOST:PORT; port 0 takes any free one.
      expose: addresses that other machines reach are allowed.

    Returns:
      A bound socket.

    Raises:
      UserError: no address, one that other machines reach and `expose` is not set, or a port that
        is in use.

    >>> with bind("127.0.0.1:0", expose=False) as taken:
    ...     taken.getsockname()[1] > 0
    True
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UserError(
            f"the address is {address!r}; expected HOST:PORT with a port up to 65535; pass one "
            "such as 127.0.0.1:8000"
        )
    try:
        family, _, _, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"the host {host!r} is not known; pass one such as 127.0.0.1") from None
    if not expose and not ipaddress.ip_address(str(where[0]).partition("%")[0]).is_loopback:
        raise UserError(
            f"{host} can be reached from other machines, and the server asks nobody who they are; "
            "pass --expose if that is meant, or listen on 127.0.0.1"
        )
    try:
        return socket.create_server(where[:2], family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"port {port} of {host} cannot be taken ({error.strerror}); expected a free one; stop "
            "the program that holds it or choose another port"
        ) from None


async def read_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits
) -> Request | None:
    """Read a request.

    Args:
      reader: made with a limit of `limits.header_bytes`.
      writer: for a client that asks whether its body is welcome.
      limits: bounds.

    Returns:
      None where the client has closed, or stayed silent for too long.

    Raises:
      Refusal: what is not HTTP, or over a limit.
    """
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), limits.head_s)
    except asyncio.LimitOverrunError:
        raise Refusal(431, f"the head has over {limits.header_bytes} bytes") from None
    except (asyncio.IncompleteReadError, TimeoutError, ConnectionError):
        return None
    method, path, version, headers = _head(head)
    length = _length(headers, limits)
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        body = await asyncio.wait_for(reader.readexactly(length), limits.head_s)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {limits.head_s:g} s") from None
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    wish = headers.get("connection", "").lower()
    keep = wish == "keep-alive" if version == "HTTP/1.0" else wish != "close"
    return Request(method, path.partition("?")[0], headers, body, keep)


def _head(head: bytes) -> tuple[str, str, str, dict[str, str]]:
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/"):
        raise Refusal(400, "the first line is no request of HTTP")
    if parts[2] not in ("HTTP/1.0", "HTTP/1.1"):
        raise Refusal(505, "only HTTP/1.1 and 1.0 are served")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip() or "\n" in line or "\r" in line:
            raise Refusal(400, "a header line is not NAME: VALUE")
        name = name.lower()
        if name in headers and name in ("content-length", "transfer-encoding", "host"):
            raise Refusal(400, f"the header {name} is there twice")
        headers[name] = value.strip()
    return parts[0], parts[1], parts[2], headers


def _length(headers: dict[str, str], limits: Limits) -> int:
    if "transfer-encoding" in headers:
        raise Refusal(411, "a body must come with its Content-Length")
    text = headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise Refusal(400, "Content-Length is no whole number")
    if int(text) > limits.body_bytes:
        raise Refusal(413, f"the body has {text} bytes; {limits.body_bytes} at most are taken")
    return int(text)


def head_of(status: int, kind: str, length: int | None, keep: bool, more: str = "") -> bytes:
    """Write an answer's head.

    Args:
      status: of HTTP.
      kind: of its contents.
      length: of its body; None for one that comes in chunks.
      keep: the connection stays open.
      more: further header lines.

    >>> head_of(200, "text/plain", 2, True).splitlines()[0]
    b'HTTP/1.1 200 OK'
    """
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    stay = "keep-alive" if keep else "close"
    return (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\n{size}\r\n"
        f"Connection: {stay}\r\n{more}\r\n"
    ).encode("latin-1")


def json_answer(status: int, value: Any, keep: bool, more: str = "") -> bytes:
    """Write a whole answer.

    >>> json_answer(200, {}, True).endswith(b"{}")
    True
    """
    body = json.dumps(value, ensure_ascii=False).encode()
    return head_of(status, "application/json", len(body), keep, more) + body


def chunked(data: bytes) -> bytes:
    """Write a piece of a body that comes in chunks; an empty one ends it.

    >>> chunked(b"ab"), chunked(b"")
    (b'2\\r\\nab\\r\\n', b'0\\r\\n\\r\\n')
    """
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def send(writer: asyncio.StreamWriter, data: bytes, limits: Limits) -> None:
    """Write to a client, waiting while it has too much unread.

    Raises:
      ConnectionError: it has gone, or leaves its answer unread for too long.
    """
    if writer.is_closing():
        raise ConnectionResetError("the client has gone")
    writer.write(data)
    if writer.transport.get_write_buffer_size() > limits.write_bytes:
        try:
            await asyncio.wait_for(writer.drain(), limits.slow_s)
        except TimeoutError:
            writer.transport.abort()
            raise ConnectionAbortedError("the client does not read") from None


async def discard(reader: asyncio.StreamReader) -> None:
    """Read what a refused client still sends, for a second: closing earlier loses the refusal."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(1.0):
            while await reader.read(1 << 16):
                pass


async def close(writer: asyncio.StreamWriter, limits: Limits) -> None:
    """Close a connection, letting the client read what is on its way for a while."""
    with contextlib.suppress(Exception):
        writer.close()
        await asyncio.wait_for(writer.wait_closed(), limits.slow_s)
    writer.transport.abort()
