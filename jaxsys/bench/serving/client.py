"""A client of OpenAI-compatible servers that takes times: one connection a request, streamed.

Reference: the definitions of vLLM's `benchmark_serving`: the clock starts before the connection is
made, and a piece counts when it has arrived.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from jaxsys.bench.serving.metrics import Trace
from jaxsys.core.errors import UserError

_MOST_LINE = 1 << 20


@dataclass(frozen=True)
class Target:
    """Say which server is asked.

    Attributes:
      host: its name or address.
      port: of TCP.
      base: path before /completions, such as /v1.
      model: asked for.
      chat: ask the chat endpoint.
      secure: over TLS.
      key: for the Authorization header; empty for none.

    >>> Target("127.0.0.1", 8000, "/v1", "tiny").path
    '/v1/completions'
    """

    host: str
    port: int
    base: str
    model: str
    chat: bool = False
    secure: bool = False
    key: str = ""

    @property
    def path(self) -> str:
        """Give the endpoint's path."""
        return self.base + ("/chat/completions" if self.chat else "/completions")


def target_of(url: str, model: str, *, chat: bool = False, key: str = "") -> Target:
    """Take a server's URL apart.

    Args:
      url: such as http://127.0.0.1:8000/v1; /v1 is added where there is no path.
      model: asked for.
      chat: ask the chat endpoint.
      key: for the Authorization header.

    Raises:
      UserError: no URL of HTTP.

    >>> target_of("http://localhost:8000", "tiny").path
    '/v1/completions'
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"the URL is {url!r}; expected one such as http://127.0.0.1:8000/v1")
    secure = parts.scheme == "https"
    base = parts.path.rstrip("/") or "/v1"
    return Target(parts.hostname, port or (443 if secure else 80), base, model, chat, secure, key)


async def ask(target: Target, fields: Mapping[str, Any], timeout_s: float | int = 600.0) -> Trace:
    """Send a request, and take the time of every piece of its answer.

    Args:
      target: the server.
      fields: of the request, such as prompt or messages, and max_tokens.
      timeout_s: for the whole.

    Returns:
      The times; what went wrong is their `error`.
    """
    sent_s = time.perf_counter()
    token_s: list[float] = []
    usage: dict[str, Any] = {}
    error = ""
    try:
        async with asyncio.timeout(timeout_s):
            error = await _exchange(target, fields, token_s, usage)
    except TimeoutError:
        error = f"no whole answer within {timeout_s:g} s"
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as failed:
        error = f"{type(failed).__name__}: {str(failed)[:160]}"
    ended_s = time.perf_counter()
    made = usage.get("completion_tokens")
    return Trace(
        sent_s,
        tuple(token_s),
        ended_s,
        usage.get("prompt_tokens") or 0,
        len(token_s) if made is None else made,
        error,
    )


async def _exchange(
    target: Target, fields: Mapping[str, Any], token_s: list[float], usage: dict[str, Any]
) -> str:
    """Run one request; the error, if any."""
    reader, writer = await asyncio.open_connection(
        target.host, target.port, ssl=target.secure or None, limit=_MOST_LINE
    )
    try:
        writer.write(_request(target, fields))
        await writer.drain()
        status, headers = await _head(reader)
        lines = _lines(reader, headers)
        if status != 200:
            return f"status {status}: {' '.join([line async for line in lines])[:200]}"
        async for line in lines:
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return ""
            now_s = time.perf_counter()
            chunk = json.loads(data)
            if "error" in chunk:
                return str(chunk["error"])[:200]
            usage.update(chunk.get("usage") or {})
            if _is_token(chunk):
                token_s.append(now_s)
        return "the answer ended before [DONE]"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _is_token(chunk: Mapping[str, Any]) -> bool:
    """Tell a piece of text from the opening of a chat, from the end, and from counts."""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            if choice.get("text") or (choice.get("text") == "" and not choice.get("finish_reason")):
                return True
        elif delta.get("content") or (delta.get("content") == "" and "role" not in delta
                                      and not choice.get("finish_reason")):  # fmt: skip
            return True
    return False


def _request(target: Target, fields: Mapping[str, Any]) -> bytes:
    body = {"model": target.model, "stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps({**body, **fields}).encode()
    key = f"Authorization: Bearer {target.key}\r\n" if target.key else ""
    return (
        f"POST {target.path} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\n"
        f"Content-Type: application/json\r\nAccept: text/event-stream\r\n"
        f"Content-Length: {len(data)}\r\n{key}Connection: close\r\n\r\n"
    ).encode() + data


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    status = first.split(" ")[1:2]
    if not status or not status[0].isdigit():
        raise ValueError(f"{first[:80]!r} is no answer of HTTP")
    pairs = (line.partition(":") for line in lines if line)
    return int(status[0]), {name.lower(): value.strip() for name, _, value in pairs}


async def _lines(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[str]:
    """Give the lines of a body, however it comes."""
    rest = b""
    async for data in _parts(reader, headers):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _MOST_LINE:
            raise ValueError("the answer has too long a line")
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip("\r")
    if rest:
        yield rest.decode("utf-8", "replace")


async def _parts(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        return
    left = int(headers["content-length"]) if "content-length" in headers else None
    while left is None or left > 0:
        data = await reader.read(1 << 16 if left is None else min(left, 1 << 16))
        if not data:
            return
        if left is not None:
            left -= len(data)
        yield data
