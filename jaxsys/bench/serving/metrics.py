"""Latencies of served requests: the definitions, and their summary.

TTFT: from sending a request to its first token. E2E: to its last. TPOT = (E2E - TTFT) / (tokens -
1), of requests with two tokens at least. ITL: every gap between two tokens that follow each other,
of all requests together. Goodput: requests a second that meet all objectives.

Reference: vLLM's `benchmark_serving`, whose definitions these are; goodput: DistServe (arXiv
2401.09670, section 3).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsys.core.errors import UserError

MEASURES = ("ttft_s", "tpot_s", "e2e_s")
CDF_POINTS = 200


@dataclass(frozen=True)
class Trace:
    """Hold the times of one request, by one clock.

    Attributes:
      sent_s: when it was sent.
      token_s: when each of its pieces came; one a token, unless a server sends several at once.
      ended_s: when its answer was whole, or failed.
      prompt_tokens: of the prompt; 0 where it is not known.
      tokens: of the answer.
      error: why it failed; empty if it did not.

    >>> trace = Trace(1.0, (1.5, 1.6, 1.8), 1.8, 4, 3)
    >>> round(trace.ttft_s, 3), round(trace.e2e_s, 3), round(trace.tpot_s, 3)
    (0.5, 0.8, 0.15)
    """

    sent_s: float
    token_s: tuple[float, ...]
    ended_s: float
    prompt_tokens: int
    tokens: int
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Give the time to the first token; to the end where there is none."""
        return (self.token_s[0] if self.token_s else self.ended_s) - self.sent_s

    @property
    def e2e_s(self) -> float:
        """Give the time to the last token; to the end where there is none."""
        return (self.token_s[-1] if self.token_s else self.ended_s) - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Give the mean time of a token after the first; nan with fewer than two."""
        return (self.e2e_s - self.ttft_s) / (self.tokens - 1) if self.tokens > 1 else float("nan")

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Give the gaps between pieces that follow each other."""
        return tuple(np.diff(self.token_s).tolist())


def check_objectives(slo: Mapping[str, float | int]) -> None:
    """Refuse objectives that are not known.

    Args:
      slo: of `MEASURES`, each with its most seconds.

    Raises:
      UserError: another name, or a time that is not above 0.

    >>> check_objectives({"ttft_s": 0.0})
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the objective ttft_s is 0.0; expected one of ttft_s, ...
    """
    for name, most_s in slo.items():
        if name not in MEASURES or not most_s > 0:
            raise UserError(
                f"the objective {name} is {most_s}; expected one of {', '.join(MEASURES)} with "
                "seconds above 0; correct it"
            )


def summarise(
    traces: Sequence[Trace], slo: Mapping[str, float | int] | None = None
) -> dict[str, Any]:
    """Summarise requests that were served in one run.

    Args:
      traces: all of them, failed ones too; those are counted and leave the rest alone.
      slo: objectives: of `MEASURES`, each with its most seconds.

    Returns:
      `ttft_s`, `tpot_s`, `itl_s`, `e2e_s` (each p50, p90, p99 and mean, None where there is
      nothing to measure), `output_tokens_per_s`, `requests_per_s`, `goodput_per_s` (None without
      objectives), `slo`, `requests`, `failed`, `prompt_tokens`, `output_tokens`, `duration_s` (from
      the first sent to the last token) and `e2e_cdf`, points of (seconds, share of the requests).

    Raises:
      UserError: no requests, or objectives that are not known.

    >>> found = summarise([Trace(0.0, (1.0, 2.0), 2.0, 4, 2), Trace(0.0, (3.0, 4.0), 4.0, 4, 2)],
    ...                   {"ttft_s": 2.0})
    >>> found["requests_per_s"], found["goodput_per_s"], found["ttft_s"]["mean"]
    (0.5, 0.25, 2.0)
    """
    slo = dict(slo or {})
    check_objectives(slo)
    if not traces:
        raise UserError("no request was sent; expected one at least; send more")
    served = [trace for trace in traces if not trace.error]
    begin_s = min(trace.sent_s for trace in traces)
    duration_s = max((trace.sent_s + trace.e2e_s for trace in served), default=begin_s) - begin_s
    output = sum(trace.tokens for trace in served)
    good = sum(all(getattr(t, name) <= most or np.isnan(getattr(t, name))
                   for name, most in slo.items()) for t in served)  # fmt: skip

    def rate(count: int) -> float | None:
        return count / duration_s if duration_s > 0 else None

    return {
        "ttft_s": _quantiles([t.ttft_s for t in served]),
        "tpot_s": _quantiles([t.tpot_s for t in served if t.tokens > 1]),
        "itl_s": _quantiles([gap for t in served for gap in t.itl_s]),
        "e2e_s": _quantiles([t.e2e_s for t in served]),
        "output_tokens_per_s": rate(output),
        "requests_per_s": rate(len(served)),
        "goodput_per_s": rate(good) if slo else None,
        "slo": slo,
        "requests": len(traces),
        "failed": len(traces) - len(served),
        "prompt_tokens": sum(t.prompt_tokens for t in served),
        "output_tokens": output,
        "duration_s": duration_s,
        "e2e_cdf": cdf([t.e2e_s for t in served]),
    }


def cdf(values: Sequence[float]) -> list[list[float]]:
    """Give the share of values up to each, at most `CDF_POINTS` points.

    >>> cdf([2.0, 1.0])
    [[1.0, 0.5], [2.0, 1.0]]
    """
    ordered, n = sorted(values), len(values)
    kept = sorted({round(i) for i in np.linspace(0, n - 1, min(n, CDF_POINTS))}) if n else []
    return [[float(ordered[i]), (i + 1) / n] for i in kept]


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p90": None, "p99": None, "mean": None}
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99]).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "mean": float(np.mean(values))}
