"""Reports: tables, strict JSON, files that are whole or absent, figures that repeat."""

import io
import json
import math
import os
from contextlib import redirect_stderr, redirect_stdout

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.core import report
from jaxsys.core.errors import UserError


def test_markdown_escapes_and_keeps_the_columns_asked_for():
    rows = [{"a": "x|y", "b": 1, "c": None}, {"a": "two\nlines", "b": 22}]
    table = report.markdown_table(rows, columns=["b", "a"])
    lines = table.splitlines()
    assert lines[0].split("|")[1].strip() == "b"
    assert "x\\|y" in lines[2]
    assert "two lines" in lines[3]
    assert len({len(line) for line in lines}) == 1
    assert report.markdown_table([]) == ""


def test_print_table_goes_where_it_is_told():
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        report.print_table([{"strategy": "[ssgd]", "loss": 2.5}], title="Runs")
        report.print_table([{"strategy": "local"}], stderr=True)
    assert "[ssgd]" in out.getvalue()
    assert "Runs" in out.getvalue()
    assert "local" in err.getvalue()
    assert "local" not in out.getvalue()


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(plain)
def test_json_of_plain_values_round_trips_on_one_line(value):
    line = report.to_json(value)
    assert "\n" not in line
    assert json.loads(line) == value


def test_json_takes_arrays_and_refuses_what_it_cannot_write(tmp_path):
    row = {"x": jnp.arange(2), "y": np.float64(math.inf), "p": tmp_path, "s": {2, 1}}
    assert json.loads(report.to_json(row)) == {
        "x": [0, 1],
        "y": None,
        "p": str(tmp_path),
        "s": [1, 2],
    }
    with pytest.raises(UserError, match="object"):
        report.to_json(object())


def test_atomic_write_keeps_the_old_file_when_the_new_one_fails(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    report.atomic_write(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        report.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_get_ordinary_permissions(tmp_path):
    report.atomic_write(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_jsonl_append_adds_and_write_replaces(tmp_path):
    path = tmp_path / "runs" / "log.jsonl"
    for step in range(3):
        report.append_jsonl(path, {"step": step})
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [0, 1, 2]
    report.write_jsonl(path, [{"step": 9}])
    assert path.read_text() == '{"step": 9}\n'


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_figure_gives_the_same_bytes(tmp_path, suffix):
    for name in ("one", "two"):
        fig, axes = report.figure(2, 1)
        axes[0, 0].plot([0, 1], [1, 0], label="loss")
        axes[0, 0].legend()
        report.save_figure(fig, tmp_path / f"{name}.{suffix}")
    one, two = (tmp_path / f"{name}.{suffix}" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_size > 1000


def test_figure_uses_the_house_colours_and_refuses_unknown_endings(tmp_path):
    fig, axes = report.figure()
    assert axes[0, 0].plot([0, 1])[0].get_color() == report.COLOURS[0]
    with pytest.raises(UserError, match="png"):
        report.save_figure(fig, tmp_path / "loss.exe")


@given(st.floats(1e-9, 1e6))
def test_formatted_seconds_are_within_rounding(seconds):
    factors = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
    words = report.format_seconds(seconds).split()
    total = sum(float(n) * factors[u] for n, u in zip(words[::2], words[1::2], strict=True))
    tolerance = 60 if "h" in words else 0.51 if "min" in words else 0.006 * seconds
    assert abs(total - seconds) <= tolerance


@given(st.integers(0, 2**59))
def test_formatted_bytes_are_within_rounding(count):
    number, unit = report.format_bytes(count).split()
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert abs(float(number) * factor - count) <= 0.006 * count
    assert float(number) < 1024


def test_odd_durations():
    assert report.format_seconds(float("nan")) == "nan"
    assert report.format_seconds(-0.5) == "-500 ms"
    assert report.format_seconds(0.0009998) == "1 ms"
    assert report.format_seconds(59.9) == "1 min 0 s"
