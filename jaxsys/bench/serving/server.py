"""An OpenAI-compatible server: completions and chat, whole or streamed, on asyncio and one engine.

One coroutine a connection, one thread for the engine. A client that goes, or does not read, has its
request cancelled; nobody waits for it.
"""

import asyncio
import contextlib
import itertools
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from jaxsys.bench.serving import http
from jaxsys.bench.serving.engine import Engine
from jaxsys.bench.serving.exposition import Counts, exposition
from jaxsys.bench.serving.http import Limits, Request
from jaxsys.bench.serving.metrics import Trace
from jaxsys.bench.serving.protocol import Answer, Refusal, Wanted, event, parse
from jaxsys.bench.serving.schedule import Ask
from jaxsys.bench.serving.worker import Piece, Worker
from jaxsys.core.errors import UserError

_LONG_TEXT = 16 << 10  # characters; tokenizing more would hold up the other clients


class Server:
    """Serve one model.

    Args:
      engine: warmed up, of the model.
      tokenizer: the model's.
      model: its name for clients.
      end_ids: tokens that end an answer.
      limits: bounds.
      on_trace: called with the engine's own times of each request that has ended.

    >>> Server(None, None, "tiny").draining
    False
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        model: str,
        end_ids: frozenset[int] = frozenset(),
        limits: Limits | None = None,
        on_trace: Callable[[Trace], None] | None = None,
    ):
        self.limits, self.model = limits or Limits(), model
        self.draining = False
        self.counts = Counts()
        self._engine: Engine = engine
        self._tokenizer, self._end_ids = tokenizer, end_ids
        self._on_trace = on_trace
        self._open: dict[int, asyncio.Queue[Piece | None]] = {}
        self._idents = itertools.count()
        self._connections: set[asyncio.Task[None]] = set()
        self._created = int(time.time())

    async def run(
        self, listening: socket.socket, stop: asyncio.Event, drain_s: float = 30.0
    ) -> None:
        """Serve until told to stop, then finish what is open.

        Args:
          listening: from `http.bind`.
          stop: set it to end the server.
          drain_s: seconds that open requests are given then.
        """
        loop = asyncio.get_running_loop()
        self._worker = Worker(
            self._engine,
            self._tokenizer,
            lambda pieces: loop.call_soon_threadsafe(self._hand_out, pieces),
            self._count_trace,
        )
        self._worker.start()
        server = await asyncio.start_server(
            self._connected, sock=listening, limit=self.limits.header_bytes
        )
        await stop.wait()
        self.draining = True
        server.close()
        end_s = loop.time() + drain_s
        while self._open and self._worker.alive and loop.time() < end_s:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._worker.stop)
        await asyncio.sleep(0)  # the last pieces are handed out
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _hand_out(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.ident in self._open:
                self._open[piece.ident].put_nowait(piece)

    def _count_trace(self, trace: Trace) -> None:
        self.counts.add(trace)
        if self._on_trace is not None:
            self._on_trace(trace)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writer.transport.set_write_buffer_limits(high=self.limits.write_bytes)
        try:
            if len(self._connections) > self.limits.connections:
                refusal = Refusal(503, "too many connections are open; come back later")
                await self._refuse(writer, refusal, keep=False)
            else:
                while await self._one(reader, writer):
                    pass
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await http.close(writer, self.limits)
            self._connections.discard(task)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False if the connection ends with it."""
        try:
            request = await http.read_request(reader, writer, self.limits)
        except Refusal as refusal:  # where the next request begins is not known
            await self._refuse(writer, refusal, keep=False)
            await http.discard(reader)
            return False
        if request is None:
            return False
        try:
            return await self._answer(request, reader, writer) and request.keep
        except Refusal as refusal:
            await self._refuse(writer, refusal, keep=request.keep)
            return request.keep
        except ConnectionError:
            raise
        except Exception as error:  # a fault of ours ends this connection, not the server
            message = f"the server failed at this request ({type(error).__name__})"
            await self._refuse(writer, Refusal(500, message), keep=False)
            return False

    async def _refuse(self, writer: Any, refusal: Refusal, keep: bool) -> None:
        self.counts.refused(refusal.status)
        more = "Retry-After: 1\r\n" if refusal.status in (429, 503) else ""
        more += "Allow: GET, POST\r\n" if refusal.status == 405 else ""
        data = http.json_answer(refusal.status, refusal.body(), keep, more)
        await http.send(writer, data, self.limits)

    async def _answer(self, request: Request, reader: Any, writer: Any) -> bool:
        path = request.path.rstrip("/") or "/"
        gets = {"/health": self._health, "/metrics": self._metrics, "/v1/models": self._models,
                f"/v1/models/{self.model}": self._own_model}  # fmt: skip
        posts = {"/v1/completions": False, "/v1/chat/completions": True}
        if path in posts:
            if request.method != "POST":
                raise Refusal(405, f"{path} takes POST")
            return await self._complete(request, posts[path], reader, writer)
        if path not in gets:
            raise Refusal(404, f"nothing is served at {path[:80]!r}", "not_found")
        if request.method != "GET":
            raise Refusal(405, f"{path} takes GET")
        await http.send(writer, gets[path](request.keep), self.limits)
        return True

    def _health(self, keep: bool) -> bytes:
        if self.draining or not self._worker.alive:
            why = self._worker.error or "the server is ending"
            raise Refusal(503, f"no request can be served: {why}")
        return http.json_answer(200, {"status": "ok"}, keep)

    def _metrics(self, keep: bool) -> bytes:
        body = exposition(self.counts, self._engine.figures(), len(self._connections)).encode()
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return http.head_of(200, kind, len(body), keep) + body

    def _card(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self._created, "owned_by": "jaxsys"}

    def _models(self, keep: bool) -> bytes:
        return http.json_answer(200, {"object": "list", "data": [self._card()]}, keep)

    def _own_model(self, keep: bool) -> bytes:
        return http.json_answer(200, self._card(), keep)

    async def _complete(self, request: Request, chat: bool, reader: Any, writer: Any) -> bool:
        if self.draining or not self._worker.alive:
            raise Refusal(503, "the server is ending; ask another")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refusal(415, "the body must have Content-Type application/json")
        wanted = parse(request.body, chat=chat, model=self.model)
        if len(self._open) >= self.limits.requests:
            raise Refusal(429, f"{len(self._open)} requests run or wait; come back later", "queue")
        ask = await self._ask(wanted)
        kind = "chatcmpl" if chat else "cmpl"
        answer = Answer(f"{kind}-{secrets.token_hex(12)}", self.model, int(time.time()), chat)
        mail: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._open[ask.ident] = mail
        watch = asyncio.create_task(_gone(reader, mail))
        finished = False
        try:
            self._worker.submit(ask, wanted.stop)
            pieces = _pieces(mail)
            if wanted.stream:
                await self._stream(pieces, answer, wanted, ask, writer, request.keep)
            else:
                await self._whole(pieces, answer, ask, writer, request.keep)
            finished = True
        finally:
            if not finished:
                self._worker.cancel(ask.ident)
                self.counts.cancelled += 1
            del self._open[ask.ident]
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        return not watch.done() or watch.cancelled()

    async def _ask(self, wanted: Wanted) -> Ask:
        """Turn a request into tokens, and check them against what the engine holds."""
        prompt: Any = wanted.prompt
        if not wanted.chat and not isinstance(prompt, str):
            ids = prompt
        else:
            size = (
                len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)
            )
            try:
                ids = (
                    await asyncio.to_thread(self._encode, prompt)
                    if size > _LONG_TEXT
                    else self._encode(prompt)
                )
            except UserError as error:
                raise Refusal(
                    400, str(error), None, "messages" if wanted.chat else "prompt"
                ) from None
        longest = self._engine.layout.longest
        room = longest - len(ids)
        if room < (wanted.max_tokens or 1):
            message = (
                f"this server holds {longest} tokens of a request; the prompt has {len(ids)} and "
                f"{wanted.max_tokens or 1} are asked for"
            )
            raise Refusal(400, message, "context_length_exceeded",
                          "messages" if wanted.chat else "prompt")  # fmt: skip
        ask = Ask(
            ident=next(self._idents),
            prompt=tuple(ids),
            max_tokens=wanted.max_tokens or room,
            end_ids=frozenset() if wanted.ignore_eos else self._end_ids,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=secrets.randbits(32) if wanted.seed is None else wanted.seed,
        )
        try:
            self._engine.check(ask)
        except UserError as error:
            raise Refusal(400, str(error), None, "prompt") from None
        return ask

    def _encode(self, prompt: Any) -> list[int]:
        from jaxsys.evaluate.open import encode_prompt

        if isinstance(prompt, str):
            return encode_prompt(self._tokenizer, prompt)
        return encode_prompt(self._tokenizer, self._tokenizer.apply_chat_template(prompt))

    async def _whole(self, pieces: Any, answer: Answer, ask: Ask, writer: Any, keep: bool) -> None:
        text, last = [], None
        async for last in pieces:
            text.append(last.text)
            if last.finish == "error":
                raise Refusal(500, "the engine has failed; the server is ending")
        assert last is not None
        assert last.finish is not None
        found = answer.whole("".join(text), last.finish, len(ask.prompt), last.made)
        await http.send(writer, http.json_answer(200, found, keep), self.limits)

    async def _stream(
        self, pieces: Any, answer: Answer, wanted: Wanted, ask: Ask, writer: Any, keep: bool
    ) -> None:
        opening = http.head_of(200, "text/event-stream", None, keep, "Cache-Control: no-cache\r\n")
        if wanted.chat:
            opening += http.chunked(event(answer.chunk("", first=True)))
        await http.send(writer, opening, self.limits)
        async for piece in pieces:
            if piece.finish == "error":
                failed = Refusal(500, "the engine has failed; the server is ending")
                data = event(failed.body())
            else:
                data = event(answer.chunk(piece.text, piece.finish))
            if piece.finish and wanted.include_usage:
                data += event(answer.usage(len(ask.prompt), piece.made))
            if piece.finish:
                await http.send(
                    writer, http.chunked(data + event("[DONE]")) + http.chunked(b""), self.limits
                )
            else:
                await http.send(writer, http.chunked(data), self.limits)


async def _pieces(mail: asyncio.Queue[Piece | None]) -> AsyncIterator[Piece]:
    """Give a request's pieces to its last.

    Raises:
      ConnectionResetError: the client has gone.
    """
    while True:
        piece = await mail.get()
        if piece is None:
            raise ConnectionResetError("the client has gone")
        yield piece
        if piece.finish:
            return


async def _gone(reader: asyncio.StreamReader, mail: asyncio.Queue[Piece | None]) -> None:
    """Wait until the client closes; one that sends more before its answer is whole goes too."""
    with contextlib.suppress(ConnectionError):
        await reader.read(1)
    mail.put_nowait(None)
