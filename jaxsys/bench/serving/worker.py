"""The engine in a thread of its own: requests go in, pieces of text come out."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jaxsys.bench.serving.metrics import Trace
from jaxsys.bench.serving.schedule import Ask
from jaxsys.evaluate.stream import TextStream

Finish = Literal["stop", "length", "error"]
_FINISH: dict[str | None, Finish] = {"end": "stop", "length": "length"}


class Piece(NamedTuple):
    """Say what a step made of a request.

    >>> Piece(7, " upon", 1, None).text
    ' upon'
    """

    ident: int
    text: str  # newly certain; may be empty
    made: int  # tokens so far, the end token left out
    finish: Finish | None


class _Order(NamedTuple):
    kind: Literal["submit", "cancel", "stop"]
    ident: int = -1
    ask: Ask | None = None
    stop: tuple[str, ...] = ()
    sent_s: float = 0.0


class _Open:
    """A request that the engine has."""

    def __init__(self, order: _Order, tokenizer: Any):
        assert order.ask is not None
        self.stream = TextStream(tokenizer, order.ask.prompt, order.stop)
        self.prompt = len(order.ask.prompt)
        self.sent_s = order.sent_s
        self.token_s: list[float] = []


class Worker:
    """Run an engine in a thread, with its texts.

    Args:
      engine: an `Engine`, warmed up; nobody else may use it from now on.
      tokenizer: with `decode`.
      deliver: called in the thread after each step, with the pieces that the step made.
      on_trace: called in the thread with the engine's own times of each request that has ended.

    >>> import types
    >>> worker = Worker(types.SimpleNamespace(idle=True), None, print)
    >>> worker.start()
    >>> worker.stop()
    >>> worker.alive
    False
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        deliver: Callable[[list[Piece]], Any],
        on_trace: Callable[[Trace], None] | None = None,
    ):
        self.engine, self.error = engine, ""
        self._tokenizer, self._deliver, self._on_trace = tokenizer, deliver, on_trace
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._open: dict[int, _Open] = {}
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Say whether the thread runs; if not, `error` may say why."""
        return self._thread.is_alive()

    def submit(self, ask: Ask, stop: tuple[str, ...] = ()) -> None:
        """Hand a request over that `Engine.check` has passed."""
        self._orders.put(_Order("submit", ask.ident, ask, stop, time.perf_counter()))

    def cancel(self, ident: int) -> None:
        """End a request; nothing more is delivered of it but what is on its way."""
        self._orders.put(_Order("cancel", ident))

    def stop(self) -> None:
        """End what is open as it is, and the thread."""
        self._orders.put(_Order("stop"))
        self._thread.join()

    def _main(self) -> None:
        try:
            while self._take_orders():
                events = self.engine.step()
                now_s = time.perf_counter()
                pieces = [p for e in events if (p := self._piece(e, now_s)) is not None]
                if pieces:
                    self._deliver(pieces)
        except Exception as error:
            self.error = f"{type(error).__name__}: {str(error)[:200]}"
        # What is still open must not wait for ever.
        left = [Piece(i, "", len(found.token_s), "error") for i, found in self._open.items()]
        self._open.clear()
        if left:
            self._deliver(left)

    def _take_orders(self) -> bool:
        """Take what was ordered, waiting if there is nothing else to do; False ends the thread."""
        while True:
            try:
                order = self._orders.get(block=self.engine.idle)
            except queue.Empty:
                return True
            if order.kind == "stop":
                return False
            if order.kind == "cancel":
                self._close(order.ident)
                self.engine.cancel(order.ident)
            else:
                assert order.ask is not None
                self._open[order.ident] = _Open(order, self._tokenizer)
                self.engine.submit(order.ask)

    def _piece(self, event: Any, now_s: float) -> Piece | None:
        found = self._open.get(event.ident)
        if found is None:
            return None
        text, finish = "", _FINISH.get(event.ended)
        if event.token is not None:
            found.token_s.append(now_s)
            text = found.stream.push([event.token])
            if found.stream.stopped and finish is None:
                self.engine.cancel(event.ident)
            if found.stream.stopped:
                finish = "stop"
        if finish:
            text += found.stream.finish()
            self._close(event.ident, now_s)
        return Piece(event.ident, text, len(found.token_s), finish)

    def _close(self, ident: int, now_s: float | None = None) -> None:
        found = self._open.pop(ident, None)
        if found is not None and now_s is not None and self._on_trace is not None:
            self._on_trace(Trace(found.sent_s, tuple(found.token_s), now_s, found.prompt,
                                 len(found.token_s)))  # fmt: skip
