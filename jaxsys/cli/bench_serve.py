"""Verbs of `jaxsys bench`: serving."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsys.cli.model_options import Dtype, ModelName, dtype_of
from jaxsys.cli.options import Common
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Common):
    """Serve a model over HTTP (--listen), or load a server with requests and take times.

    Without --listen, the model is served on a free port of this process and loaded; with --url, a
    server that runs already is loaded, of any make that speaks OpenAI's completions.

    Attributes:
      out: Folder for serve.jsonl.
      seed: Seed of arrivals and made-up prompts.
      model: A name (smollm2, stories260k, tiny) or a path: a Hugging Face folder, .gguf, .bin. With
        --url, the name that the server knows.
      listen: HOST:PORT to serve on until SIGTERM; port 0 takes a free one.
      expose: Allow an address that other machines reach; the server asks nobody who they are.
      url: Load this server instead, such as http://127.0.0.1:8000/v1; the environment variable
        OPENAI_API_KEY is sent along if set.
      slots: Requests that run at once.
      context: Most tokens of a request, prompt and answer together; by default what the model
        can take, 1024 at most.
      pages: Pages of the cache; by default as many as all slots can need.
      page_tokens: Tokens of a page.
      prompt_rows: Pieces of prompts that a step reads at most.
      row_tokens: Tokens of a piece.
      reuse: Share pages among requests that begin alike.
      dtype: Of the parameters.
      max_requests: Requests that may run or wait at once; more are told to come back.
      requests: Requests to send.
      rate: Requests a second on average; inf sends all at once.
      burstiness: Of the arrivals: 1 is a Poisson process, less comes in bursts.
      concurrency: Requests open at once at most.
      prompts: A text file (paragraphs) or .jsonl (prompt, max_tokens) instead of made-up prompts.
      prompt_tokens: Tokens of a made-up prompt.
      max_tokens: Tokens of an answer at most.
      chat: Ask the chat endpoint.
      ignore_eos: Answers have all their tokens; not every server knows this field.
      slo_ttft: Seconds to the first token that a good request takes at most.
      slo_tpot: Seconds a token after it.
      slo_e2e: Seconds to the last token.
      timeout: Seconds for a whole request.
    """

    model: ModelName
    listen: str | None = None
    expose: bool = False
    url: str | None = None
    slots: int = 8
    context: int | None = None
    pages: int | None = None
    page_tokens: int = 16
    prompt_rows: int = 4
    row_tokens: int = 16
    reuse: bool = True
    dtype: Dtype = "file"
    max_requests: int = 2048
    requests: int = 64
    rate: float = float("inf")
    burstiness: float = 1.0
    concurrency: int | None = None
    prompts: Path | None = None
    prompt_tokens: int = 64
    max_tokens: int = 64
    chat: bool = False
    ignore_eos: bool = False
    slo_ttft: float | None = None
    slo_tpot: float | None = None
    slo_e2e: float | None = None
    timeout: float = 600.0


def run_serve(config: ServeConfig) -> dict[str, Any] | None:
    """Serve until told to stop, or print what a load found."""
    if config.listen is not None and config.url is not None:
        raise UserError("both --listen and --url are given; serve or load; pass one of them")
    if config.listen is not None:
        _listen(config)
        return None
    row = _load(config)
    if config.out:
        from jaxsys.core.report import append_jsonl

        append_jsonl(config.out / "serve.jsonl", row)
    if not config.json:
        _tell(row)
    return row


def _layout(config: ServeConfig) -> Any:
    from jaxsys.bench.serving.run import layout_for
    from jaxsys.models import lm

    context = config.context
    if context is None:
        context = min(1024, lm.load_config(lm.find_model(config.model)).max_positions)
    return layout_for(
        context,
        slots=config.slots,
        pages=config.pages,
        page_tokens=config.page_tokens,
        prompt_rows=config.prompt_rows,
        row_tokens=config.row_tokens,
        reuse=config.reuse,
    )


def _limits(config: ServeConfig) -> Any:
    from jaxsys.bench.serving.http import Limits

    if config.max_requests < 1:
        raise UserError(f"--max-requests is {config.max_requests}; pass 1 or more")
    return Limits(requests=config.max_requests, connections=config.max_requests + 512)


def _listen(config: ServeConfig) -> None:
    from jaxsys.bench.serving.http import bind
    from jaxsys.bench.serving.run import open_served, serve

    layout, limits = _layout(config), _limits(config)
    with bind(config.listen or "", config.expose) as listening:  # before the model is read
        served = open_served(config.model, layout, dtype_of(config.dtype))
        serve(
            served,
            listening,
            limits,
            ready=lambda url: print(f"{served.name} at {url}", file=sys.stderr, flush=True),
        )


def _load(config: ServeConfig) -> dict[str, Any]:
    import os

    from jaxsys.bench.serving import client
    from jaxsys.bench.serving.load import arrival_times
    from jaxsys.bench.serving.metrics import check_objectives
    from jaxsys.bench.serving.run import Load, measure, measure_url, open_served

    slo = {"ttft_s": config.slo_ttft, "tpot_s": config.slo_tpot, "e2e_s": config.slo_e2e}
    slo = {name: most_s for name, most_s in slo.items() if most_s is not None}
    check_objectives(slo)
    arrival_times(config.requests, config.rate, burstiness=config.burstiness)
    if config.concurrency is not None and config.concurrency < 1:
        raise UserError(f"--concurrency is {config.concurrency}; pass 1 or more, or leave it out")
    if config.prompt_tokens < 1 or config.max_tokens < 1:
        raise UserError(
            f"prompts have {config.prompt_tokens} tokens and answers {config.max_tokens}; expected "
            "1 or more of each; raise them"
        )
    load = Load(
        rate=config.rate,
        burstiness=config.burstiness,
        concurrency=config.concurrency,
        chat=config.chat,
        ignore_eos=config.ignore_eos,
        timeout_s=config.timeout,
        seed=config.seed,
    )
    if config.url is not None:
        key = os.environ.get("OPENAI_API_KEY", "")
        target = client.target_of(config.url, config.model, chat=config.chat, key=key)
        prompts = _prompts(config, None)
        with _progress(len(prompts)) as progress:
            return measure_url(target, prompts, load, slo=slo, progress=progress)
    prompts = _prompts(config, None) if config.prompts else None
    served = open_served(config.model, _layout(config), dtype_of(config.dtype))
    prompts = _prompts(config, served.tokenizer) if prompts is None else prompts
    with _progress(len(prompts)) as progress:
        return measure(served, prompts, load, slo=slo, limits=_limits(config), progress=progress)


def _prompts(config: ServeConfig, tokenizer: Any) -> list[Any]:
    from jaxsys.bench.serving.load import read_prompts, synthetic_prompts

    if config.prompts is None:
        return synthetic_prompts(
            config.requests, config.prompt_tokens, config.max_tokens, tokenizer, config.seed
        )
    found = read_prompts(config.prompts, config.max_tokens)
    return [found[i % len(found)] for i in range(config.requests)]


def _progress(total: int) -> Any:
    """A bar on standard error that is told how many requests have ended."""
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    @contextlib.contextmanager
    def bar() -> Any:
        columns = "requests", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task("requests", total=total)
            yield lambda done: shown.update(task, completed=done)

    return bar()


def _tell(row: dict[str, Any]) -> None:
    from jaxsys.core.report import print_table

    sides = {"client": row, "engine": row.get("engine")}
    table = [
        {"": name, "by": side, **{f"{q} s": found[name][q] for q in ("p50", "p90", "p99", "mean")}}
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s")
        for side, found in sides.items()
        if found
    ]
    print_table(table)

    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    print(
        f"{row['requests']} requests, {row['failed']} failed; {rate(row['output_tokens_per_s'])} "
        f"tokens/s, {rate(row['requests_per_s'])} requests/s, of them good: "
        f"{rate(row['goodput_per_s'])}"
    )


COMMANDS: dict[str, tuple[Any, Any]] = {"serve": (ServeConfig, run_serve)}
