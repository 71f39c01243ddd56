"""The limit on decoding: the published table, a search over shares, and its laws."""

import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

sys.path.insert(0, str(Path(__file__).parent))

from offload_shapes import MIXTRAL, machine

from jaxsys.core.errors import UserError
from jaxsys.offload.limit import limit
from jaxsys.offload.parts import parts_of
from jaxsys.offload.types import Machine, Part, Processor

rate = st.floats(1.0, 1000.0)


@pytest.mark.parametrize(
    ("rates", "bits", "resident", "link", "cpu", "split", "share", "whole"),
    [
        ((900, 25, 55, 65), 16, 54, 1.39, 3.01, 3.54, 0.62, 35.3),
        ((900, 25, 55, 65), 4.5, 194, 14.3, 27.4, 31.0, None, 96.9),
        ((550, 12, 80, 100), 16, 54, 0.67, 4.23, 4.82, 0.87, 21.6),
        ((700, 25, 130, 160), 16, 122, 2.03, 9.06, 10.45, 0.84, 27.5),
        ((280, 12, 60, 75), 16, 32, 0.60, 2.86, 3.39, 0.83, 11.0),
    ],
)
def test_the_table_of_assumed_machines(rates, bits, resident, link, cpu, split, share, whole):
    parts = parts_of(MIXTRAL, weight_bytes=2, ffn_weight_bytes=bits / 8)
    device, hit = machine(*rates), resident / 256
    for way, expected in (("link", link), ("cpu", cpu), ("split", split), ("resident", whole)):
        found = limit(parts, device, hit=hit, way=way).tokens_per_s
        assert found == pytest.approx(expected, rel=0.01 if bits == 16 else 0.03)
    if share is not None:
        assert limit(parts, device, hit=hit).cpu_share == pytest.approx(share, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(rate, rate, rate, rate, st.floats(0.0, 1.0))
def test_no_share_of_the_misses_beats_the_split(hbm, link, cpu, dram, hit):
    device = machine(hbm, link, cpu, dram)
    parts = (Part(0, "attention", 10**9, 1.0), Part(0, "mlp", 4 * 10**9, 1.0, 8))
    found = limit(parts, device, hit=hit)
    miss, hot = (1 - hit) * 4, (1 + hit * 4) / hbm
    for q in np.linspace(0, 1, 51):
        # A CPU that reads alone reaches its own rate, which was measured on that memory.
        feed = miss / dram if q < 1 else 0.0
        taken = max(q * miss / cpu, (1 - q) * miss / link, feed) + hot
        assert found.predicted_s <= taken * (1 + 1e-9) + 1e-12
    for way in ("cpu", "link"):
        assert found.predicted_s <= limit(parts, device, hit=hit, way=way).predicted_s * (1 + 1e-9)
    assert limit(parts, device, hit=hit, overlapped=True).predicted_s <= found.predicted_s
    assert found.percent(found.tokens_per_s) == pytest.approx(100)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=2), rate, rate)
def test_residency_by_columns_is_residency_by_share(columns, link, cpu):
    device = machine(100.0, link, cpu, 0.0)
    mlps = (Part(0, "mlp", 800, 1.0, 8), Part(1, "mlp", 800, 1.0, 8))
    parts = (Part(0, "attention", 800, 1.0), *mlps)
    by_columns = limit(parts, device, resident=(1, *columns))
    by_share = limit(parts, device, hit=sum(columns) / 16)
    assert by_columns.predicted_s == pytest.approx(by_share.predicted_s)


def test_a_cpu_alone_reads_everything_once():
    parts = parts_of(MIXTRAL, weight_bytes=2)
    alone = limit(parts, Machine(Processor(50e9, 1e12, 2**37)), hit=0.5)
    # 25.5 GB a token, research's figure for bfloat16.
    assert alone.predicted_s * 50e9 == pytest.approx(25.5e9, rel=0.01)
    assert (alone.link_s, alone.accelerator_s, alone.cpu_share) == (0.0, 0.0, 1.0)


def test_what_cannot_be_is_refused():
    device = machine(1, 1, 1, 1)
    with pytest.raises(UserError, match="exactly one of them"):
        limit((), device)
    with pytest.raises(UserError, match="share from 0 to 1"):
        limit((), device, hit=1.5)
