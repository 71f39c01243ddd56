"""The load generator: arrivals, prompts, and latencies by their definitions."""

import asyncio
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.bench.serving.load import (
    arrival_times,
    read_prompts,
    run_load,
    synthetic_prompts,
)
from jaxsys.bench.serving.metrics import Trace, cdf, summarise
from jaxsys.core.errors import UserError
from jaxsys.data import ByteTokenizer


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_of_their_gamma(burstiness):
    gaps = np.diff(arrival_times(20_000, 5.0, burstiness=burstiness, seed=1))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_rate_of_infinity_is_a_burst():
    assert not arrival_times(5, math.inf).any()
    for wrong in ((0, 1.0), (1, 0.0), (1, -1.0), (1, math.nan)):
        with pytest.raises(UserError, match="above 0"):
            arrival_times(*wrong)


def trace_of(sent, first, gaps):
    times = tuple(np.cumsum([sent + first, *gaps]).tolist())
    return Trace(sent, times, sent + 100.0, 3, len(gaps) + 1)


parts = st.tuples(st.floats(0, 5), st.floats(0.01, 5), st.lists(st.floats(0.01, 1), max_size=6))


@settings(max_examples=30, deadline=None)
@given(st.lists(parts, min_size=1, max_size=8), st.floats(0.1, 8))
def test_definitions(drawn, most_s):
    found = [trace_of(*part) for part in drawn]
    for trace in found:
        ttft = trace.token_s[0] - trace.sent_s
        assert trace.ttft_s == ttft
        assert trace.e2e_s == pytest.approx(ttft + sum(trace.itl_s))
        if trace.tokens > 1:
            assert trace.tpot_s == pytest.approx(np.mean(trace.itl_s))
    row = summarise([*found, Trace(0.0, (), 1.0, 0, 0, "failed")], {"ttft_s": most_s})
    duration = max(t.token_s[-1] for t in found) - min(0.0, *(t.sent_s for t in found))
    assert row["duration_s"] == pytest.approx(duration)
    assert row["output_tokens_per_s"] == pytest.approx(sum(t.tokens for t in found) / duration)
    good = sum(t.ttft_s <= most_s for t in found)
    assert row["goodput_per_s"] == pytest.approx(good / duration)
    assert (row["requests"], row["failed"]) == (len(found) + 1, 1)
    assert row["e2e_cdf"][-1] == [max(t.e2e_s for t in found), 1.0]
    assert row["ttft_s"]["p50"] == pytest.approx(np.median([t.ttft_s for t in found]))


def test_a_long_cdf_is_thinned_and_keeps_its_ends():
    points = cdf(np.arange(1000.0).tolist())
    assert len(points) == 200
    assert (points[0], points[-1]) == ([0.0, 0.001], [999.0, 1.0])


def test_open_loop_and_its_cap():
    open_now, most = 0, []

    async def send(fields):
        nonlocal open_now
        open_now += 1
        most.append(open_now)
        await asyncio.sleep(0.01)
        open_now -= 1
        return Trace(time.perf_counter(), (), 0.0, 0, fields["n"])

    requests = [{"n": i} for i in range(20)]
    found = asyncio.run(run_load(send, requests, np.zeros(20)))
    assert [t.tokens for t in found] == list(range(20))
    assert max(most) == 20
    most.clear()
    asyncio.run(run_load(send, requests, np.zeros(20), concurrency=3))
    assert max(most) == 3


def test_prompts_come_from_files_or_are_made_up(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "max_tokens": 3}\n\n{"prompt": "b"}\n')
    assert [(p.text, p.max_tokens) for p in read_prompts(file, 9)] == [("a", 3), ("b", 9)]
    for bad in ("{", "[]", '{"text": 1}', '{"prompt": 1}', '{"prompt": "a", "max_tokens": "x"}'):
        file.write_text('{"prompt": "a"}\n' + bad)
        with pytest.raises(UserError, match="line 2"):
            read_prompts(file, 9)
    for missing in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_prompts(missing, 9)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt", 9)
    made = synthetic_prompts(5, 12, 4, ByteTokenizer(), seed=2)
    assert all(0 < len(p.text) <= 12 for p in made)
    assert made == synthetic_prompts(5, 12, 4, ByteTokenizer(), seed=2)
    assert len({p.text for p in made}) == 5
