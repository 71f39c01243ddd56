"""The search on a language model: its texts, its command, and what it refuses."""

import json

import numpy as np
import pytest

from jaxsys.cli import main
from jaxsys.core.errors import UserError
from jaxsys.prune.search_model import draw_texts, recurring
from jaxsys.search.programs import Grammar, from_string


def test_the_three_stretches_never_overlap():
    ids = np.arange(1003)
    parts = draw_texts(ids, (4, 2, 6), 20, seed=3)
    assert [part.shape for part in parts] == [(4, 20), (2, 20), (6, 20)]
    seen = np.concatenate([part.reshape(-1) for part in parts])
    assert len(np.unique(seen)) == seen.size
    assert parts[0].max() < parts[1].min() < parts[1].max() < parts[2].min()
    assert all((np.diff(part, axis=1) == 1).all() for part in parts)
    other = draw_texts(ids, (4, 2, 6), 20, seed=4)
    assert any((a != b).any() for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize(
    ("windows", "length", "says"),
    [
        ((4, 2, 6), 100, "1003 tokens, which is 10 windows of 100, and 12"),
        ((0, 1, 1), 10, "at least one of each"),
        ((1, 1, 1), 1, "two tokens"),
    ],
)
def test_texts_that_do_not_do_are_told(windows, length, says):
    with pytest.raises(UserError, match=says):
        draw_texts(np.arange(1003), windows, length)


def test_what_recurs():
    grammar = Grammar(("W", "G"))
    shares = recurring(
        grammar, np.stack([from_string(grammar, t) for t in ("W*W", "abs(W)*G", "mms(W)", "W")])
    )
    assert shares["W"] == 1.0
    assert shares["G"] == shares["abs"] == shares["mms"] == 0.25
    assert shares["mul"] == 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--terminals", "W", "Q"], "terminal 'Q' is unknown"),
        (["--sparsity", "1.0"], "sparsity is 1.0"),
        (["--pattern", "2:5x"], "pattern is '2:5x'"),
        (["--promote", "0"], "promote is 0"),
        (["--devices", "0"], "--devices is 0"),
        (["--population", "2"], "fewer elites than individuals"),
        (["--length", "100000"], "give a longer text"),
        (["--pattern", "3:7"], "3:7 does not divide the"),
    ],
)
def test_mistakes_are_one_sentence(options, says, capfd):
    assert main(["prune", "search", "tiny", "--generations", "1", *options]) == 2
    told = capfd.readouterr().err
    assert says in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_the_command_searches_goes_on_and_writes(tmp_path, capfd):
    small = ["--population", "8", "--length", "32", "--calibration", "2", "--windows", "1"]
    small += ["--held-out", "1", "--top", "2", "--terminals", "W", "X", "--json"]

    def run(out, generations):
        capfd.readouterr()
        call = ["prune", "search", "tiny", *small, "--generations", str(generations)]
        assert main([*call, "--out", str(out)]) == 0
        return json.loads(capfd.readouterr().out)

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 1)
    parts = run(tmp_path / "parts", 3)
    assert parts["history"] == whole["history"]
    assert parts["rows"] == whole["rows"]
    rows = {row["metric"]: row for row in whole["rows"]}
    assert list(rows) == ["dense", "magnitude", "wanda", "found 1", "found 2"]
    assert rows["dense"]["loss"] < rows["found 1"]["loss"] <= rows["found 2"]["loss"]
    assert rows["found 1"]["loss"] == pytest.approx(whole["history"][-1]["best"], rel=1e-5)
    for name in ("search.json", "search.md", "curve.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 0
