"""Whole runs: serve a model until told to stop, or load a server and summarise what it did."""

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from jaxsys.bench.records import record
from jaxsys.bench.serving import client
from jaxsys.bench.serving.engine import Engine
from jaxsys.bench.serving.http import Limits, bind
from jaxsys.bench.serving.load import Prompt, arrival_times, fields_of, run_load
from jaxsys.bench.serving.metrics import Trace, check_objectives, summarise
from jaxsys.bench.serving.schedule import Layout
from jaxsys.bench.serving.server import Server
from jaxsys.core.errors import UserError


class Served(NamedTuple):
    """Hold a model that can be served.

    >>> Served._fields
    ('engine', 'tokenizer', 'name', 'end_ids')
    """

    engine: Engine
    tokenizer: Any
    name: str
    end_ids: frozenset[int]


def layout_for(
    context: int, *, slots: int = 8, pages: int | None = None, page_tokens: int = 16,
    prompt_rows: int = 4, row_tokens: int = 16, reuse: bool = True,
) -> Layout:  # fmt: skip
    """Choose the engine's sizes.

    Args:
      context: most tokens of a request, prompt and answer together.
      slots: requests that run at once.
      pages: of the cache; as many as all slots together can need by default.
      page_tokens: tokens of a page.
      prompt_rows: pieces of prompts that a step reads at most.
      row_tokens: tokens of a piece.
      reuse: pages of equal beginnings are shared.

    >>> layout_for(100, slots=2).pages
    14
    """
    table = -(-context // page_tokens) if page_tokens > 0 else 0
    pages = slots * table if pages is None else pages
    return Layout(slots, pages, page_tokens, context, prompt_rows, row_tokens, reuse)


def open_served(name: str, layout: Layout, dtype: Any = None) -> Served:
    """Load a model, and compile its steps.

    Args:
      name: as `jaxsys.evaluate.open.open_model` takes it.
      layout: sizes of the engine.
      dtype: of the parameters; that of the file by default.

    Raises:
      UserError: as `open_model`; or a context that the model does not have.

    >>> open_served("no/such/model", layout_for(16))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    from jaxsys.evaluate.open import open_model

    opened = open_model(name, dtype)
    engine = Engine(opened.model.params, opened.config, layout)
    engine.warm_up()
    return Served(engine, opened.tokenizer, str(name), opened.end_ids)


def serve(
    served: Served,
    listening: socket.socket,
    limits: Limits | None = None,
    *,
    drain_s: float = 30.0,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGTERM or SIGINT, and finish what is open then; a second one ends at once.

    Args:
      served: the model.
      listening: from `http.bind`.
      limits: bounds.
      drain_s: seconds that open requests are given at the end.
      ready: called with the URL once requests are taken.
    """

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def end() -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        server = Server(served.engine, served.tokenizer, served.name, served.end_ids, limits)
        ready(url_of(listening))
        await server.run(listening, stop, drain_s)

    asyncio.run(main())


def url_of(listening: socket.socket) -> str:
    """Give the URL of a bound socket.

    >>> with bind("127.0.0.1:0", expose=False) as taken:
    ...     url_of(taken).startswith("http://127.0.0.1:")
    True
    """
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


@contextlib.contextmanager
def served_here(
    served: Served, limits: Limits | None = None, on_trace: Callable[[Trace], None] | None = None
) -> Iterator[str]:
    """Serve a model on a free port of this process while the block runs.

    Args:
      served: the model.
      limits: bounds.
      on_trace: called with the engine's own times of each request that has ended.

    Yields:
      The URL.

    >>> import jax
    >>> from jaxsys.models import lm
    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> engine = Engine(lm.init(jax.random.key(0), config), config, layout_for(16, slots=1))
    >>> with served_here(Served(engine, None, "random", frozenset())) as url:
    ...     url.endswith("/v1")
    True
    """
    listening = bind("127.0.0.1:0", expose=False)
    url, stops = url_of(listening), []
    begun = threading.Event()

    async def main() -> None:
        stop = asyncio.Event()
        stops.append((asyncio.get_running_loop(), stop))
        server = Server(
            served.engine, served.tokenizer, served.name, served.end_ids, limits, on_trace
        )
        begun.set()
        await server.run(listening, stop)

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="server", daemon=True)
    thread.start()
    begun.wait()
    try:
        yield url
    finally:
        loop, stop = stops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@dataclass(frozen=True)
class Load:
    """Say how a server is loaded.

    Attributes:
      rate: requests a second on average; inf sends all at once.
      burstiness: 1 is a Poisson process, less comes in bursts, more is more even.
      concurrency: requests open at once at most; None for no cap.
      chat: ask the chat endpoint.
      ignore_eos: answers have all their tokens; not every server knows this.
      timeout_s: for a whole request.
      seed: of the arrivals.

    >>> Load().rate
    inf
    """

    rate: float | int = float("inf")
    burstiness: float | int = 1.0
    concurrency: int | None = None
    chat: bool = False
    ignore_eos: bool = False
    timeout_s: float | int = 600.0
    seed: int = 0


def load_server(
    target: client.Target,
    prompts: Sequence[Prompt],
    load: Load,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Trace]:
    """Send all prompts to a server.

    Args:
      target: the server.
      prompts: one request each.
      load: how they are sent.
      progress: called with the number that have ended.

    Returns:
      Their traces, failed ones too.

    Raises:
      UserError: no prompt.

    >>> load_server(client.target_of("http://127.0.0.1:8000/v1", "any"), (), Load())
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: there is no prompt; expected one at least; give some
    """
    if not prompts:
        raise UserError("there is no prompt; expected one at least; give some")
    times = arrival_times(len(prompts), load.rate, burstiness=load.burstiness, seed=load.seed)
    requests = [fields_of(p, chat=load.chat, ignore_eos=load.ignore_eos) for p in prompts]

    async def send(fields: Mapping[str, Any]) -> Trace:
        return await client.ask(target, fields, load.timeout_s)

    running = run_load(send, requests, times, concurrency=load.concurrency, progress=progress)
    return asyncio.run(running)


def measure(
    served: Served,
    prompts: Sequence[Prompt],
    load: Load,
    *,
    slo: Mapping[str, float | int] | None = None,
    limits: Limits | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Serve a model in this process, load it over HTTP, and make a row of results.

    Args:
      served: the model.
      prompts: one request each.
      load: how they are sent.
      slo: objectives, see `metrics.summarise`.
      limits: bounds of the server.
      progress: called with the number that have ended.

    Returns:
      A row for `jaxsys.bench.records`: the client's figures, the engine's own under `engine`, and
      what the engine counted under `counted`.

    Raises:
      UserError: no prompt, or objectives that are not known.

    >>> served = open_served("tiny", layout_for(32))  # doctest: +SKIP
    >>> measure(served, [Prompt("The return value", max_tokens=9)], Load())  # doctest: +SKIP
    """
    check_objectives(dict(slo or {}))
    inside: list[Trace] = []
    with served_here(served, limits, inside.append) as url:
        target = client.target_of(url, served.name, chat=load.chat)
        load_server(target, prompts[:1], Load(chat=load.chat))  # warms up all but the engine
        inside.clear()
        before = served.engine.figures()
        traces = load_server(target, prompts, load, progress)
    after = served.engine.figures()
    counted = {
        name: getattr(after, name) - getattr(before, name)
        for name in ("steps", "preempted", "read_tokens", "shared_tokens", "given_tokens")
    }
    own = summarise(inside, slo) if inside else None
    flags = {"model": served.name, "layout": asdict(served.engine.layout), **_flags(load, slo)}
    found = summarise(traces, slo)
    return record("serve", load.seed, flags, **found, engine=own, counted=counted)


def _flags(load: Load, slo: Mapping[str, float | int] | None) -> dict[str, Any]:
    flags = asdict(load) | {"slo": dict(slo or {})}
    flags["rate"] = "inf" if math.isinf(load.rate) else load.rate  # JSON has no infinity
    del flags["seed"]
    return flags


def measure_url(
    target: client.Target,
    prompts: Sequence[Prompt],
    load: Load,
    *,
    slo: Mapping[str, float | int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Load any OpenAI-compatible server, and make a row of results.

    Args:
      target: the server.
      prompts: one request each.
      load: how they are sent.
      slo: objectives, see `metrics.summarise`.
      progress: called with the number that have ended.

    Returns:
      A row for `jaxsys.bench.records`; the key is not in it.

    Raises:
      UserError: no prompt, objectives that are not known, or no request was served.

    >>> target = client.target_of("http://127.0.0.1:8000/v1", "any")
    >>> measure_url(target, (), Load(), slo={"speed_s": 1.0})
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    check_objectives(dict(slo or {}))
    first = load_server(target, prompts[:1], Load(chat=load.chat, timeout_s=load.timeout_s))[0]
    if first.error:
        raise UserError(
            f"{target.host}:{target.port} did not serve a first request ({first.error}); expected "
            "an OpenAI-compatible server with the model; check URL and model"
        )
    traces = load_server(target, prompts, load, progress)
    flags = {"model": target.model, "url": f"{target.host}:{target.port}{target.base}"}
    return record("serve", load.seed, flags | _flags(load, slo), **summarise(traces, slo))
