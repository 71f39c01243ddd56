"""`jaxsys nas`: scores, fits and searches end to end on small tables; mistakes are one sentence."""

import json

import numpy as np
import pytest

from jaxsys.cli import main
from jaxsys.nas import space, tables

CELLS = space.all_cells()[::40]
FITTING = ["--predictor", "gcn", "--losses", "mse", "--epochs", "15", "--seeds", "2"]


def _json(capfd, *argv):
    capfd.readouterr()
    assert main(["nas", *argv, "--json"]) == 0
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Write a table whose accuracy grows with the 3×3 convolutions."""
    path = tmp_path_factory.mktemp("table") / "own.npz"
    three = (CELLS == space.CONV3).sum(1) + 0.1 * (CELLS == space.SKIP).sum(1)
    np.savez(path, cells=CELLS, val=three, test=3 * three + 1, zen=three**2)
    return str(path)


def test_score_then_fit_on_the_scores(table, tmp_path, capfd):
    small = ["--channels", "2", "--depth", "1", "--images", "digits", "--batch", "2"]
    proxies = ["--proxies", "naswot", "params", "--block", "32"]
    out = tmp_path / "scores"
    found = _json(
        capfd, "score", "--table", table, "--sample", "60", *small, *proxies, "--out", str(out)
    )
    assert len(found["scores"]) == 60
    cells = np.stack([space.from_string(row["cell"]) for row in found["scores"]])
    written = tables.load(out / "scores.npz")
    np.testing.assert_array_equal(written.cells, cells)
    np.testing.assert_allclose(
        written.column("naswot"), [row["naswot"] for row in found["scores"]], rtol=1e-5
    )
    assert written.column("naswot.nodes").shape == (60, 26)
    options = ["--target", "val", "--test", "test", "--train", "30", *FITTING]
    columns = ["--scores", str(out / "scores.npz"), "--columns", "params", "zen"]
    fitted = _json(
        capfd, "fit", "--table", table, *columns, *options, "--out", str(tmp_path / "fit")
    )
    assert fitted["tested"] == 30
    assert len(fitted["tau_of_seeds"]) == 2
    assert fitted["tau_low"] <= fitted["tau"] <= fitted["tau_high"]
    assert (tmp_path / "fit" / "predictor" / "0").is_dir()
    assert np.load(tmp_path / "fit" / "predictions.npz")["predictions"].shape == (2, 60)


def test_trees_rank_the_rest_of_a_table(table, capfd):
    options = ["--table", table, "--target", "val", "--columns", "zen", "--predictor", "trees"]
    assert _json(capfd, "fit", *options, "--train", "60", "--seeds", "1")["tau"] > 0.7


def test_the_package_carries_a_table(tmp_path, capfd):
    options = ["--target", "valid", "--test", "test", "--columns", "synflow_nodes", "snip"]
    options += ["--table", "digits", "--predictor", "trees", "--members", "2", "--seeds", "1"]
    found = _json(capfd, "fit", *options, "--out", str(tmp_path))
    assert found["tau"] > 0.6
    assert found["tested"] == len(tables.load("digits").cells) - 156
    with np.load(tmp_path / "predictions.npz") as written:
        assert (written["spread"] > 0).any()
        assert written["predictions"].shape == written["spread"].shape


def test_score_of_another_space(tmp_path, capfd):
    small = ["--channels", "24", "--depth", "1", "--images", "digits", "--batch", "2"]
    options = ["--sample", "3", "--proxies", "naswot", "params", "--block", "8"]
    out = ["--out", str(tmp_path)]
    found = _json(capfd, "score", "--space", "vit", *small, *options, *out)
    written = tables.load(tmp_path / "scores.npz", cells=False)
    assert written.columns["arch"].tolist() == [row["cell"] for row in found["scores"]]
    assert written.column("params.nodes").shape == (3, 14)


@pytest.mark.parametrize("method", ["random", "guided"])
def test_search(table, tmp_path, capfd, method):
    options = ["--target", "val", "--test", "test", "--columns", "zen", *FITTING]
    sizes = ["--queries", "30", "--start", "20", "--step", "10", "--out", str(tmp_path)]
    found = _json(capfd, "search", "--table", table, "--method", method, *options, *sizes)
    assert [row["seed"] for row in found["found"]] == [0, 1]
    for row in found["found"]:
        place = (space.from_string(row["cell"]) == CELLS).all(1)
        assert row["test"] == pytest.approx(3 * row["target"] + 1)
        assert np.load(tmp_path / "search.npz")["values"].shape == (2, 30)
        assert place.sum() == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["score"], "no cells are named"),
        (["score", "--cells", "|conv_7x7~0|+|none~0|none~1|"], "'conv_7x7'"),
        (["score", "--cells", "15625"], "0 to 15624"),
        (["score", "--space", "nb101", "--cells", "7"], "is no NAS-Bench-101 cell"),
        (["score", "--space", "darts"], "no cells are named"),
        (["score", "--cells", "7", "--proxies", "snap"], "'snap'"),
        (["score", "--cells", "7", "--sample", "2"], "expected 1 to 1 cells"),
        (["fit", "--table", "no.csv", "--target", "x"], "cannot be read"),
        (["fit", "--table", "TABLE", "--target", "acc", "--columns", "zen"], "no column 'acc'"),
        (["fit", "--table", "TABLE", "--target", "val"], "no statistics are named"),
        (
            ["fit", "--table", "TABLE", "--target", "val", "--columns", "zen", "--train", "390"],
            "2 left to test on",
        ),
        (
            ["search", "--table", "TABLE", "--target", "val", "--predictor", "trees"],
            "guides no search",
        ),
        (
            ["search", "--table", "TABLE", "--target", "val", "--method", "evolution"],
            "does not hold",
        ),
    ],
)
def test_mistakes_are_one_sentence(table, capfd, argv, says):
    assert main(["nas", *[table if a == "TABLE" else a for a in argv]]) == 2
    err = capfd.readouterr().err
    assert says in err
    assert err.count("\n") == 1
