"""Rates in words, and interface counters against a real table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.cluster.rates import Traffic, format_rate, interface_bytes, parse_rate, sum_interfaces
from jaxsys.core.errors import UserError


@pytest.mark.parametrize(
    ("text", "rate_bits_s"),
    [
        ("100mbit", 1e8),
        ("1gbit", 1e9),
        (" 2.5 Gbit/s ", 2.5e9),
        ("64KBIT", 64e3),
        ("8bit", 8.0),
        (".5mbit", 5e5),
    ],
)
def test_rates_are_read(text, rate_bits_s):
    assert parse_rate(text) == pytest.approx(rate_bits_s)


@pytest.mark.parametrize(
    "text",
    ["", "fast", "100", "10mbps", "-1mbit", "0mbit", "1e3mbit", "mbit", "10 m bit", "nan bit"],
)
def test_what_is_no_rate_is_one_sentence(text):
    with pytest.raises(UserError) as caught:
        parse_rate(text)
    assert "\n" not in str(caught.value)
    assert "100mbit" in str(caught.value)


def test_a_number_too_large_for_a_float_is_no_rate():
    with pytest.raises(UserError):
        parse_rate("9" * 400 + "gbit")


@given(st.floats(min_value=1.0, max_value=1e12))
def test_a_written_rate_is_read_back(rate_bits_s):
    assert parse_rate(format_rate(rate_bits_s)) == pytest.approx(rate_bits_s, rel=6e-4)


@given(st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 2**63)), max_size=5))
def test_interfaces_are_added_up_without_loopback(counters):
    head = "Inter-|   Receive  |  Transmit\n face |bytes packets\n"
    rows = [f"    lo: 5{' 0' * 7} 5{' 0' * 7}\n"]
    rows += [f"  eth{i}:{rx}{' 1' * 7} {tx}{' 1' * 7}\n" for i, (rx, tx) in enumerate(counters)]
    expected = Traffic(sum(rx for rx, _ in counters), sum(tx for _, tx in counters))
    assert sum_interfaces(head + "".join(rows)) == expected


def test_this_machines_counters_never_run_backwards():
    before = interface_bytes()
    after = interface_bytes()
    assert after.rx_bytes >= before.rx_bytes >= 0
    assert after.tx_bytes >= before.tx_bytes >= 0
