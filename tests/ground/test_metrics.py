"""SNARE's figures: strict wins, pooled counts, seeds, Welch's test, the leaderboard's file."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.ground import metrics
from jaxsys.ground.metrics import Counts
from jaxsys.ground.snare import Row


def test_a_hand_made_file_of_four_rows():
    scores = [[2.0, 1.0], [1.0, 3.0], [1.0, 1.0], [0.5, 0.1]]
    counts = metrics.count(scores, [0, 1, 0, 1], [True, True, False, False])
    assert counts == Counts(visual=2, visual_right=2, blind=2, blind_right=0)
    assert (counts.all, counts.visual_accuracy, counts.blind_accuracy) == (0.5, 1.0, 0.0)


@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2), st.integers(-2, 2)), min_size=1),
    st.data(),
)
def test_a_row_is_right_only_above_every_other(scores, data):
    answers = [data.draw(st.integers(0, 2)) for _ in scores]
    got = metrics.strictly_best(np.array(scores, float), answers)
    want = [
        all(r[a] > x for k, x in enumerate(r) if k != a)
        for r, a in zip(scores, answers, strict=True)
    ]
    assert got.tolist() == want


def test_not_a_number_is_wrong():
    got = metrics.strictly_best([[math.nan, 0.0], [0.0, math.nan], [1.0, -math.inf]], [0, 0, 0])
    assert got.tolist() == [False, False, True]


def test_passes_are_pooled_by_counts_not_by_means():
    passes = [Counts(3, 3, 1, 0), Counts(1, 0, 7, 7)]
    total = metrics.pooled(passes)
    assert total == Counts(4, 3, 8, 7)
    assert total.all == 10 / 12
    assert total.all != np.mean([p.all for p in passes])
    assert math.isnan(Counts(1, 1, 0, 0).blind_accuracy)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.strictly_best([[1.0, 2.0]], [2]), "reach from 2 to 2"),
        (lambda: metrics.strictly_best([[1.0, 2.0]], [-1]), "reach from -1"),
        (lambda: metrics.strictly_best([[1.0, 2.0]], [0, 1]), "one row of scores"),
        (lambda: metrics.strictly_best([[1.0]], [0]), "at least 2"),
        (lambda: metrics.count([[1.0, 2.0]], [0], [True, True]), "visual has shape"),
        (lambda: metrics.pooled([]), "zero passes"),
        (lambda: metrics.spread([]), "zero seeds"),
        (lambda: metrics.compare({"a": [1.0], "b": [1.0, 2.0]}), "'a' has 1 seeds"),
        (lambda: metrics.compare({"a": [1.0, 2.0]}, [("a", "c")]), "'c' has 0 seeds"),
    ],
)
def test_mistakes_are_one_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_spread_over_seeds():
    got = metrics.spread([0.7, 0.8, 0.9])
    assert got.mean == pytest.approx(0.8)
    assert got.deviation == pytest.approx(0.1)
    assert math.isnan(metrics.spread([0.5]).deviation)


def welch_by_hand(a, b):
    from scipy.special import betainc

    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    t = (np.mean(a) - np.mean(b)) / np.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return t, betainc(freedom / 2, 0.5, freedom / (freedom + t * t))


def test_welch_and_bonferroni():
    rng = np.random.default_rng(0)
    seeds = {name: rng.normal(0.8 + 0.01 * i, 0.01, 10) for i, name in enumerate("abc")}
    rows = metrics.compare({k: v.tolist() for k, v in seeds.items()})
    assert [(r.first, r.second) for r in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in rows:
        t, p = welch_by_hand(seeds[row.first], seeds[row.second])
        assert row.t == pytest.approx(t)
        assert row.p == pytest.approx(min(1, 3 * p), rel=1e-6)
    [alone] = metrics.compare({k: v.tolist() for k, v in seeds.items()}, [("a", "c")])
    assert alone.p == pytest.approx(rows[1].p / 3)


def test_seeds_that_do_not_vary():
    [same] = metrics.compare({"a": [0.5, 0.5], "b": [0.5, 0.5]})
    [other] = metrics.compare({"a": [0.5, 0.5], "b": [0.6, 0.6]})
    assert (same.t, same.p) == (0.0, 1.0)
    assert (other.t, other.p) == (-math.inf, 0.0)


def test_the_leaderboard_file(tmp_path):
    rows = [Row("it", ("a", "b")), Row("that", ("c", "d"))]
    passes = [[[0.0, 1.0], [2.0, 2.0]], np.array([[1.0, 0.0], [0.0, 3.0]])]
    metrics.write_leaderboard(tmp_path / "t.json", rows, passes, views_seen=2)
    got = json.loads((tmp_path / "t.json").read_text())
    assert set(got) == {"0", "1"}
    assert got["0"][0] == {"annotation": "it", "objects": ["a", "b"], "pred_ans": 1, "num_steps": 2}
    assert [[row["pred_ans"] for row in got[n]] for n in "01"] == [[1, 0], [0, 1]]
    with pytest.raises(UserError, match=r"pass 0 has scores of shape \(1, 2\)"):
        metrics.write_leaderboard(tmp_path / "u.json", rows, [[[0.0, 1.0]]], views_seen=8)
    assert not (tmp_path / "u.json").exists()
