"""Rows, reports and comparisons: other versions refused, foreign text harmless, tests as stated."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxsys.bench import compare, records, report
from jaxsys.core.errors import UserError
from jaxsys.core.report import append_jsonl


def _timed(seconds, spread=0.02, runs=20):
    low, high = seconds * (1 - spread), seconds * (1 + spread)
    return {"median_s": seconds, "low_s": low, "high_s": high, "runs": runs}


def _row(seconds=1.0, kind="train", **flags):
    found = {"step": _timed(seconds), "tokens_per_s": 100 / seconds}
    return records.record(kind, 0, flags, **found, peak_memory_predicted_bytes=2**20)


def test_rows_come_back_as_they_were_written(tmp_path):
    row = _row(technique="naive")
    append_jsonl(tmp_path / "a.jsonl", row)
    append_jsonl(tmp_path / "b.jsonl", row)
    assert records.read(tmp_path / "a.jsonl") == [json.loads(json.dumps(row))]
    assert len(records.read_all(tmp_path)) == 2
    assert row["machine"]["cores"] >= 1
    assert row["versions"]["jax"]
    assert row["git"] is None or re.fullmatch("[0-9a-f]{40}", row["git"]["commit"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"format": 2, "kind": "train", "status": "ok", "flags": {}}', "has format 2"),
        ('{"kind": "train"}', "no row of results"),
        ("[1]", "no row of results"),
        ("{", "not JSON"),
        ("9" * 9999, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": 1, "kind": "dance", "status": "ok", "flags": {}}', "'dance'"),
        ('{"format": 1, "kind": "train", "status": "ok", "flags": []}', "list"),
    ],
)
def test_lines_that_are_no_rows_are_refused_by_number(tmp_path, line, said):
    append_jsonl(tmp_path / "x.jsonl", _row())
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match="line 2 of") as caught:
        records.read(tmp_path / "x.jsonl")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "dance"}, "kind"),
        ({"status": "lost", "why": "x"}, "status"),
        ({"status": "not here"}, "no why"),
        ({"machine": "mine"}, "cannot be a field"),
    ],
)
def test_rows_that_would_mislead_are_refused(given, said):
    kind = given.pop("kind", "train")
    with pytest.raises(UserError, match=said):
        records.record(kind, 0, {}, **given)


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


EVIL = '<script>alert("x")</script>|`<img src=http://x/y>$\\frac{$'


def _foreign():
    rows = [_row(technique=EVIL), _row(0.5, technique="donate")]
    rows.append(records.record("train", 0, {"t": 1}, status="out of memory", why=EVIL))
    rows.append(
        {**_row(kind="finetune"), "machine": None, "environment": EVIL, "step": EVIL, "mfu": []}
    )
    cdf = [[0.1, 0.5], [0.2, 1.0]]
    rows.append(records.record("serve", 0, {"burst": 9}, e2e_cdf=cdf, ttft_s={"p50": 0.1}))
    rows.append(records.record("serve", 0, {"burst": 8}, e2e_cdf=EVIL, ttft_s=EVIL))
    parts = {"mlp forward": {"profiled": _timed(0.1), "share": 0.5}, "mlp backward": EVIL}
    parts[EVIL] = {"profiled": _timed(0.2), "share": 10**400}
    total = {"median": 0.97, "low": 0.95, "high": 0.99}
    rows.append(
        records.record("modules", 0, {}, step=_timed(0.2), parts=parts, profiled_total=total)
    )
    peak = {"flops_per_s": 1e9, "bytes_per_s": 1e9, "source": EVIL}
    known = {"flops": 1e6, "bytes": 1e6, "flops_per_s": 1e8, "bytes_per_s": 1e8, "peak": peak}
    rows.append(records.record("ops", 0, {"operator": "square"}, time=_timed(0.01), **known))
    rows.append(records.record("ops", 0, {"operator": EVIL, "dtype": EVIL}, flops=None, peak=3))
    line = {"alpha_s": 1e-5, "beta_s_per_unit": 1e-9, "r2": 1.0, "residual": 0.0, "n": 3}
    rows.append(records.record("comm", 0, {"operator": "permute", "bytes": None}, line=line))
    rows.append(records.record("comm", 0, {"operator": EVIL, "bytes": 9}, time=_timed(1e-4)))
    point = {"operator": "permute", "bytes": 64}
    rows.append(records.record("comm", 0, point, time=_timed(1e-4)))
    rows.append(records.record("static", 0, {"model": "m"}, flops=1.0, more={}))
    return rows


def test_a_report_of_everything_is_one_page_without_scripts(tmp_path):
    files = report.write(_foreign(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    tags = _Tags()
    tags.feed(page)
    names = [tag for tag, _ in tags.seen]
    assert "script" not in names
    assert "link" not in names
    images = [attrs["src"] for tag, attrs in tags.seen if tag == "img"]
    assert len(images) == 6
    assert all(src.startswith("data:image/png;base64,") for src in images)
    links = [attrs[name] for _, attrs in tags.seen for name in ("src", "href") if name in attrs]
    assert all(link.startswith(("data:", "#s")) for link in links)
    assert "default-src 'none'" in page
    text = (tmp_path / "report.md").read_text()
    assert "<script" not in text
    assert {path.name for path in files} == {path.name for path in tmp_path.iterdir()}
    for name in re.findall(r"\]\((\S+)\)", text):
        assert (tmp_path / name).exists()
    assert "97.0 % of the step [95.0, 99.0]" in text


def test_figures_with_a_clear_difference_are_significant_and_others_not():
    a = [_row(1.0, batch=1), _row(1.0, batch=2), _row(1.0, batch=3)]
    b = [_row(0.8, batch=1), _row(1.01, batch=2), _row(1.0, batch=4)]
    found = compare.compare(a, b)
    by_row = {change.row: change for change in found.changes}
    assert by_row["batch 1"].significant is True
    assert by_row["batch 1"].ratio == pytest.approx(0.8)
    assert by_row["batch 1"].high < 1
    assert by_row["batch 2"].significant is False
    assert found.only_a == (("train", "batch 3"),)
    assert found.only_b == (("train", "batch 4"),)


def test_p_is_that_of_students_t_with_holms_factors():
    from scipy.stats import t

    a = [_row(1.0, batch=i) for i in range(3)]
    b = [_row(1.0 + 0.03 * i, batch=i) for i in range(3)]
    changes = compare.compare(a, b).changes
    error = np.sqrt(2) * np.log(1.02 / 0.98) / (2 * 1.959964)
    raw = [2 * t.sf(np.log(1 + 0.03 * i) / error, 4) for i in range(3)]  # 20 runs, 5 blocks
    # smallest p times 3, next times 2, largest as it is
    wanted = [max(raw[0], 2 * raw[1], 3 * raw[2]), max(2 * raw[1], 3 * raw[2]), 3 * raw[2]]
    assert [c.p for c in changes] == pytest.approx(np.minimum(wanted, 1))


@pytest.mark.slow
def test_no_difference_is_found_where_there_is_none():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(60):
        pair = []
        for _ in range(2):
            seconds = np.exp(0.1 * rng.standard_normal((3, 15)))
            figures = [records.figure_of(_timing(list(row))) for row in seconds]
            pair.append([{**_row(batch=i), "step": f} for i, f in enumerate(figures)])
        wrong += any(c.significant for c in compare.compare(*pair).changes)
    assert wrong <= 3  # of independent runs 3 or fewer are expected


def _timing(seconds):
    from jaxsys.core.measure import timing

    return timing("", seconds)


def test_one_run_has_no_test_and_a_lost_row_is_told():
    one = {**_row(batch=1), "step": _timed(1.0, runs=1)}
    lost = records.record("train", 0, {"batch": 2}, status="out of memory", why="too large")
    found = compare.compare([one, _row(batch=2)], [one, lost, lost])
    assert found.changes[0].p is None
    assert found.changes[0].significant is None
    assert found.statuses == (("train", "batch 2", "ok", "out of memory"),)
    assert found.repeated == 1
