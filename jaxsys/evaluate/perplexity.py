"""Perplexity of texts, in disjoint or overlapping windows, per token and per byte."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.measure import bootstrap_ci
from jaxsys.evaluate.protocol import Model
from jaxsys.evaluate.score import Request, prefix_id, score


class Perplexity(NamedTuple):
    """Hold the likelihood of texts, and how it was taken.

    Attributes:
      nats: negative log-likelihood of all tokens together.
      tokens: how many tokens were scored, each once.
      bytes: UTF-8 bytes of the text that they stand for; 0 if not known.
      windows: how many windows.
      nats_per_token_ci: 95 % bootstrap interval over windows.
      protocol: in words.

    >>> found = Perplexity(200.0, 100, 400, 1, (2.0, 2.0), "")
    >>> round(found.per_token, 3), round(found.per_byte, 3), round(found.bits_per_byte, 3)
    (7.389, 1.649, 0.721)
    """

    nats: float
    tokens: int
    bytes: int
    windows: int
    nats_per_token_ci: tuple[float, float]
    protocol: str

    @property
    def nats_per_token(self) -> float:
        """Give the mean negative log-likelihood of a token.

        >>> Perplexity(200.0, 100, 400, 1, (2.0, 2.0), "").nats_per_token
        2.0
        """
        return self.nats / self.tokens

    @property
    def per_token(self) -> float:
        """Give exp(nats / tokens).

        >>> Perplexity(0.0, 100, 400, 1, (0.0, 0.0), "").per_token
        1.0
        """
        return math.exp(self.nats_per_token)

    @property
    def per_byte(self) -> float:
        """Give exp(nats / bytes), which can be compared between tokenizers.

        >>> Perplexity(0.0, 100, 400, 1, (0.0, 0.0), "").per_byte
        1.0
        """
        return math.exp(self.nats / self.bytes) if self.bytes else float("nan")

    @property
    def bits_per_byte(self) -> float:
        """Give log2 of the perplexity per byte.

        >>> Perplexity(0.0, 100, 400, 1, (0.0, 0.0), "").bits_per_byte
        0.0
        """
        return self.nats / self.bytes / math.log(2) if self.bytes else float("nan")

    def row(self, name: str) -> dict[str, Any]:
        """Lay the figures out as one row of a table.

        Args:
          name: of the text.

        >>> Perplexity(200.0, 100, 400, 1, (2.0, 2.0), "").row("text")["tokens"]
        100
        """
        low, high = self.nats_per_token_ci
        return {
            "text": name,
            "nats/token": self.nats_per_token,
            "low": low,
            "high": high,
            "perplexity/token": self.per_token,
            "perplexity/byte": self.per_byte,
            "bits/byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "windows": self.windows,
        }


def windows(ids: Sequence[int], length: int, stride: int, prefix: int) -> list[Request]:
    """Cut a text into windows that together score each of its tokens once.

    A window feeds `length` tokens. The first begins with `prefix` and scores all that it predicts;
    every later one moves on by `stride` tokens and scores only those, so that they see at least
    `length - stride` tokens before them. Disjoint windows are `stride = length`; their first token
    sees one token, the one before. The last window ends with the text, and is moved back to be of
    full length.

    Args:
      ids: of the text, without a begin token.
      length: input tokens of a window.
      stride: tokens from window to window, at most `length`.
      prefix: token before the text.

    Raises:
      UserError: if not 1 <= stride <= length.

    >>> windows([1, 2, 3, 4, 5], length=2, stride=2, prefix=0)[1]
    Request(context=(2,), continuation=(3, 4))
    >>> windows([1, 2, 3, 4, 5], length=2, stride=1, prefix=0)[1]
    Request(context=(1, 2), continuation=(3,))
    """
    if not 1 <= stride <= length:
        raise UserError(f"stride is {stride}; it must lie between 1 and the window's {length}")
    whole = (prefix, *map(int, ids))
    found = []
    done = 1  # of `whole`; the prefix is not scored
    while done < len(whole):
        end = min(len(whole), done + (length if done == 1 else stride))
        first = max(0, end - 1 - length)
        found.append(Request(whole[first:done], whole[done:end]))
        done = end
    return found


def perplexity(
    model: Model,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    length: int | None = None,
    stride: int | None = None,
    most_windows: int | None = None,
    tokens_per_batch: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score whole texts, every token of them once.

    Args:
      model: see `Model`.
      tokenizer: with `encode`, `decode`, and a begin or end token, which stands before each text.
      texts: scored each by itself.
      length: input tokens of a window; the model's context by default.
      stride: tokens from window to window; `length` by default, which is disjoint windows.
      most_windows: of each text, score only so many from its beginning.
      tokens_per_batch: rows times length of one program.
      progress: called with (windows done, windows in all).

    Raises:
      UserError: nothing to score, or a window longer than the context.

    >>> import jax.numpy as jnp, types
    >>> from jaxsys.evaluate.protocol import from_forward
    >>> model = from_forward(lambda p, t: jnp.zeros((*t.shape, 4)), {}, 4, 8)
    >>> digits = types.SimpleNamespace(
    ...     encode=lambda s: [int(c) for c in s], decode=lambda i: "".join(map(str, i)),
    ...     bos_id=0, eos_id=None)
    >>> round(perplexity(model, digits, ["123123123123"]).per_token, 4)
    4.0
    """
    length = model.context if length is None else length
    stride = length if stride is None else stride
    if length > model.context:
        raise UserError(
            f"the window is {length} tokens and the context {model.context}; shorten it"
        )
    prefix = prefix_id(tokenizer)
    requests, sizes = [], 0
    for text in texts:
        ids = [int(i) for i in tokenizer.encode(text)]
        ids = ids[1:] if ids[:1] == [prefix] else ids
        found = windows(ids, length, stride, prefix)
        size = len(text.encode())
        if most_windows is not None and len(found) > most_windows:
            found = found[:most_windows]
            count = sum(len(request.continuation) for request in found)
            # Half a letter at the end counts as much as it has bytes, within three.
            size = len(tokenizer.decode(ids[:count]).rstrip("\ufffd").encode())
        requests += found
        sizes += size
    if not requests:
        raise UserError("there is no token to score; give a text that is not empty")
    scores = score(
        model,
        requests,
        max_length=length,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    kind = "disjoint windows" if stride == length else f"windows moved by {stride}"
    part = "" if most_windows is None else f", the first {most_windows} of each text"
    protocol = (
        f"{len(texts)} text(s), each after token {prefix}, {kind} of {length} input tokens{part}; "
        "every token is scored once; intervals are a bootstrap over windows"
    )
    nats = -scores.log_likelihood
    return Perplexity(
        float(nats.sum()),
        int(scores.tokens.sum()),
        sizes,
        len(requests),
        ratio_ci(nats, scores.tokens),
        protocol,
    )


def ratio_ci(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Give the 95 % bootstrap interval of a ratio of sums, drawing its terms in pairs.

    Args:
      sums: `[N]` numerators.
      counts: `[N]` denominators.

    >>> ratio_ci(np.array([2.0, 4.0]), np.array([1, 2]))
    (2.0, 2.0)
    """

    def ratio(drawn: np.ndarray) -> float:
        places = drawn.astype(np.int64)
        return float(sums[places].sum() / counts[places].sum())

    return bootstrap_ci(np.arange(len(sums), dtype=np.float64), statistic=ratio)
