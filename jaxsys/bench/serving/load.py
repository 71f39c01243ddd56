"""Requests as clients send them: when they arrive, what they ask, and sending them in open loop.

Open loop: a request is sent at its time, whether or not earlier ones have been answered; a cap on
those that are open at once turns it into a closed loop when it binds.

Reference: gamma arrivals with a burstiness, and rates of infinity for a burst: vLLM's
`benchmark_serving`.
"""

import asyncio
import json
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxsys.bench.serving.metrics import Trace
from jaxsys.core.errors import UserError

_WORDS = (
    "the", "a", "one", "of", "and", "to", "in", "on", "at", "by", "for", "with", "from", "as",
    "it", "he", "she", "they", "we", "you", "day", "night", "house", "tree", "river", "hill",
    "road", "bird", "dog", "cat", "child", "friend", "story", "word", "hand", "eye", "door",
    "light", "water", "stone", "bread", "found", "made", "went", "came", "saw", "took", "gave",
)  # fmt: skip


def arrival_times(
    count: int, rate: float | int, *, burstiness: float | int = 1.0, seed: int = 0
) -> Float[np.ndarray, "N"]:
    """Draw when requests arrive.

    Args:
      count: of requests.
      rate: requests a second on average; inf sends all at once.
      burstiness: shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes
        in bursts, more is more even.
      seed: of the draws.

    Returns:
      Seconds from the start, not falling; the first is 0.

    Raises:
      UserError: a number that is not above 0.

    >>> arrival_times(3, math.inf).tolist()
    [0.0, 0.0, 0.0]
    >>> times = arrival_times(2000, 5.0, burstiness=0.5)
    >>> bool(350 < times[-1] < 450)
    True
    """
    if count < 1 or not rate > 0 or not 0 < burstiness < math.inf:
        raise UserError(
            f"{count} requests at a rate of {rate} with burstiness {burstiness}; expected numbers "
            "above 0; correct them"
        )
    if math.isinf(rate):
        return np.zeros(count)
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    gaps[0] = 0.0
    return np.cumsum(gaps)


@dataclass(frozen=True)
class Prompt:
    """Hold what a request asks.

    Attributes:
      text: to be continued, or the user's message of a chat.
      max_tokens: of the answer.

    >>> Prompt("Once", 4).max_tokens
    4
    """

    text: str
    max_tokens: int


def read_prompts(path: str | Path, max_tokens: int) -> list[Prompt]:
    """Read prompts from a file.

    Args:
      path: a .jsonl file whose lines have `prompt` and perhaps `max_tokens`, or a text whose
        paragraphs (parted by empty lines) are the prompts.
      max_tokens: where the file does not say.

    Raises:
      UserError: no such file, no prompt in it, or a line that is none (told by its number).

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "prompts.txt")
    >>> _ = file.write_text("Once upon\\n\\nThere was")
    >>> [prompt.text for prompt in read_prompts(file, 4)]
    ['Once upon', 'There was']
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{os.fspath(path)} cannot be read ({error}); pass a text file") from None
    if Path(path).suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        found = [_prompt_of(line, f"line {n} of {path}", max_tokens) for n, line in lines]
    else:
        found = [Prompt(part.strip(), max_tokens) for part in text.split("\n\n") if part.strip()]
    if not found:
        raise UserError(f"{path} holds no prompt; expected one at least; pass another file")
    return found


def _prompt_of(line: str, where: str, max_tokens: int) -> Prompt:
    try:
        fields = json.loads(line)
        text, length = fields["prompt"], fields.get("max_tokens", max_tokens)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text, length = None, 0
    if not isinstance(text, str) or not isinstance(length, int) or length < 1:
        raise UserError(
            f'{where} is no prompt; expected {{"prompt": TEXT, "max_tokens": NUMBER}}; correct it'
        )
    return Prompt(text, length)


def synthetic_prompts(
    count: int, tokens: int, max_tokens: int, tokenizer: Any = None, seed: int = 0
) -> list[Prompt]:
    """Make up texts of a given length that differ from their first word on.

    Args:
      count: of texts.
      tokens: of each by the tokenizer, give or take what joins at its end; words without one.
      max_tokens: of the answers.
      tokenizer: the model's; None where it is not known here.
      seed: of the draws.

    >>> len(synthetic_prompts(2, 5, 4)[0].text.split())
    5
    """
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        words = [f"{i}", *rng.choice(_WORDS, max(tokens - 1, 0))][: max(tokens, 1)]
        text = " ".join(words)
        if tokenizer is not None:
            text = tokenizer.decode(tokenizer.encode(text)[:tokens]).strip() or words[0]
        found.append(Prompt(text, max_tokens))
    return found


def fields_of(prompt: Prompt, *, chat: bool, ignore_eos: bool) -> dict[str, Any]:
    """Write a prompt as a greedy request's fields.

    Args:
      prompt: what is asked.
      chat: for the chat endpoint.
      ignore_eos: the answer has all its tokens; not every server knows this field.

    >>> fields_of(Prompt("Once", 4), chat=False, ignore_eos=False)
    {'max_tokens': 4, 'temperature': 0, 'prompt': 'Once'}
    """
    fields: dict[str, Any] = {"max_tokens": prompt.max_tokens, "temperature": 0}
    if ignore_eos:
        fields["ignore_eos"] = True
    if chat:
        return fields | {"messages": [{"role": "user", "content": prompt.text}]}
    return fields | {"prompt": prompt.text}


async def run_load(
    send: Callable[[Mapping[str, Any]], Awaitable[Trace]],
    requests: Sequence[Mapping[str, Any]],
    times: Sequence[float] | np.ndarray,
    *,
    concurrency: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Trace]:
    """Send requests at their times and wait for all.

    Args:
      send: sends one, such as `client.ask` with its target; never raises for a failure.
      requests: fields of each.
      times: seconds from the start at which each is sent.
      concurrency: open at once at most; no cap by default. A request that waits for the cap is
        not sent, and its clock does not run.
      progress: called with the number that have ended.

    Returns:
      The traces, in the order of the requests.
    """
    gate = asyncio.Semaphore(concurrency or len(requests) or 1)
    begin_s, done = time.perf_counter(), 0

    async def one(fields: Mapping[str, Any], at_s: float) -> Trace:
        nonlocal done
        await asyncio.sleep(max(0.0, begin_s + at_s - time.perf_counter()))
        async with gate:
            trace = await send(fields)
        done += 1
        progress(done)
        return trace

    pairs = zip(requests, np.asarray(times).tolist(), strict=True)
    return list(await asyncio.gather(*(one(fields, at_s) for fields, at_s in pairs)))
