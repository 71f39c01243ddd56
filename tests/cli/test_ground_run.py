"""`jaxsys ground train` and `evaluate`: SNARE in its authors' formats, toys, every mistake told."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxsys.cli import main
from jaxsys.ground import snare_task
from jaxsys.ground.runs import Job, read_job
from jaxsys.ground.snare_task import SnareFiles, open_snare
from jaxsys.models import clip

IDS, WIDTH = [f"{i:x}a{i}" for i in range(8)], 6
SMALL = ["--hidden", "8", "--epochs", "2", "--batch", "8", "--width", str(WIDTH)]


def run(capfd, *argv, status=0):
    capfd.readouterr()
    assert main(["ground", *argv]) == status
    return capfd.readouterr()


def asked(capfd, *argv):
    out = run(capfd, *argv, "--json").out
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.fixture(scope="module")
def snare(tmp_path_factory):
    """Write the five files as the repository and its links have them."""
    folder, rng = tmp_path_factory.mktemp("snare"), np.random.default_rng(0)
    (folder / "amt" / "folds_adversarial").mkdir(parents=True)
    texts = {}
    for name, count in (("train", 24), ("val", 10), ("test", 5)):
        rows = []
        for i in range(count):
            pair = [str(x) for x in rng.choice(IDS, 2, replace=False)]
            row = {"objects": pair, "annotation": f"the {name} one {i % 7}"}
            if name != "test":
                row |= {"ans": int(rng.integers(2)), "visual": bool(i % 2)}
            texts[row["annotation"]] = rng.normal(size=WIDTH).tolist()
            rows.append(row)
        if name == "val":
            rows.append({"objects": [IDS[0]], "annotation": "the val one 0", "ans": 0,
                         "visual": True})  # fmt: skip
        (folder / "amt" / "folds_adversarial" / f"{name}.json").write_text(json.dumps(rows))
    views = {f"{one}-{v}": rng.normal(size=WIDTH).tolist() for one in IDS for v in range(14)}
    for name, entries in (("shapenet-clipViT32-frames", views), ("langfeat-512-clipViT32", texts)):
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(entries).encode()))
    return folder, views, texts


def rows_of(folder, name):
    file = folder / "amt" / "folds_adversarial" / f"{name}.json"
    return [row for row in json.loads(file.read_text()) if len(row["objects"]) == 2]


def test_zero_shot_on_snare_is_its_published_rule(snare, tmp_path, capfd):
    folder, views, texts = snare
    out = str(tmp_path / "run")
    asked(capfd, "train", "--snare", str(folder), "--grounder", "zero-shot", *SMALL, "--out", out)
    found = asked(capfd, "evaluate", out)["groups"]
    unit = lambda x: np.array(x) / np.linalg.norm(x)  # noqa: E731
    right = {True: [], False: []}
    for row in rows_of(folder, "val"):
        text = unit(texts[row["annotation"]])
        pooled = [
            np.max([unit(views[f"{o}-{v}"]) for v in range(6, 14)], 0) for o in row["objects"]
        ]
        scores = [p @ text for p in pooled]
        right[row["visual"]].append(scores[row["ans"]] > scores[1 - row["ans"]])
    assert found["all"]["asked"] == 10  # the row of one object is left out
    assert found["visual"]["mean"] == pytest.approx(np.mean(right[True]))
    assert found["blind"]["mean"] == pytest.approx(np.mean(right[False]))
    assert found["all"]["mean"] == pytest.approx(np.mean(right[True] + right[False]))


def test_snare_from_its_files_to_a_leaderboard(snare, tmp_path, capfd):
    folder, _, _ = snare
    out, board = tmp_path / "run", tmp_path / "predictions.json"
    options = ["--snare", str(folder), "--grounder", "match", *SMALL, "--out", str(out)]
    trained = asked(capfd, "train", *options)
    assert [row["epochs"] for row in trained["seeds"]] == [2]
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1]
    assert trained["seeds"][0]["validation accuracy"] == max(row["accuracy"] for row in log)
    found = asked(capfd, "evaluate", str(out), "--report", "2")
    assert found["groups"]["all"]["mean"] == pytest.approx(
        trained["seeds"][0]["validation accuracy"]
    )
    assert (out / "report-valid" / "report.html").read_text().count("no view") > 8  # no pictures
    asked(capfd, "evaluate", str(out), "--fold", "test", "--leaderboard", str(board))
    predictions = json.loads(board.read_text())
    assert sorted(predictions) == [str(i) for i in range(8)]
    for rows in predictions.values():
        assert [{k: row[k] for k in ("annotation", "objects")} for row in rows] == [
            {k: row[k] for k in ("annotation", "objects")} for row in rows_of(folder, "test")
        ]
        assert {row["num_steps"] for row in rows} == {8}
        assert {row["pred_ans"] for row in rows} <= {0, 1}
    again = asked(capfd, "train", *options)  # the run has ended: nothing is done twice
    assert again["seeds"] == trained["seeds"]
    said = run(capfd, "train", *options, "--epochs", "3", status=2).err
    assert "holds a run with training" in said
    assert "no answers to score" in run(capfd, "evaluate", str(out), "--fold", "test", status=2).err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--snare", "nowhere"], "nowhere has no train.json"),
        (["--snare", "SNARE", "--width", "7"], "6 numbers under .* expected 7"),
        (["--snare", "SNARE", "--images", "none.gz"], "none.gz is not there"),
        (["--snare", "SNARE", "--grounder", "magic"], "two feature files hold neither"),
        (["--snare", "SNARE", "--grounder", "da4lg"], "or --domain residual"),
        (["--snare", "SNARE", "--clip", "x"], "screenshots is missing"),
        (["--snare", "SNARE", "--prepared", "x"], "both SNARE and a prepared folder"),
        (["--prepared", "nowhere"], "nowhere/catalogue.jsonl cannot be read"),
        (["--seeds", "0"], "seeds is 0"),
        (["--epochs", "0"], "epochs is 0; expected at least 1; correct it$"),
    ],
)
def test_mistakes_are_one_sentence(snare, tmp_path, capfd, options, words):
    import re

    given = [str(snare[0]) if part == "SNARE" else part for part in options]
    defaults = [] if "--width" in options else ["--width", str(WIDTH)]
    if "--grounder" not in options:
        defaults += ["--grounder", "match"]
    said = run(capfd, "train", *given, *defaults, "--out", str(tmp_path), status=2)
    assert said.out == ""
    assert said.err.startswith("jaxsys: error:")
    assert said.err.count("\n") == 1
    assert re.search(words, said.err)


def test_a_row_with_an_unknown_object_is_named(snare, tmp_path, capfd):
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("train", "val"):
        rows = rows_of(snare[0], name)
        rows[1]["objects"][0] = "zzz"
        (folder / f"{name}.json").write_text(json.dumps(rows))
    options = ["--snare", str(folder), "--grounder", "match", *SMALL, "--out", str(tmp_path / "o")]
    for kind, stem in (
        ("images", "shapenet-clipViT32-frames"),
        ("texts", "langfeat-512-clipViT32"),
    ):
        options += [f"--{kind}", str(snare[0] / f"{stem}.json.gz")]
    assert "zzz" in run(capfd, "train", *options, status=2).err
    assert "holds no run" in run(capfd, "evaluate", str(tmp_path / "none"), status=2).err


def test_a_run_is_read_as_it_was_asked(tmp_path):
    from jaxsys.cli.ground_run import TrainCommand, job_of
    from jaxsys.ground.build import Choice

    for options in ({"snare": tmp_path, "clip": tmp_path}, {"prepared": tmp_path, "seeds": 3}, {}):
        job = job_of(TrainCommand(choice=Choice(hidden=(3,)), **options))
        (tmp_path / "run.json").write_text(job.to_json())
        assert read_job(tmp_path) == job
    assert isinstance(job, Job)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """Write screenshots of eight objects, one view missing, and a tiny CLIP."""
    import jax

    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(2)
    for i, one in enumerate(IDS):
        (root / "shots" / one).mkdir(parents=True)
        for view in range(14):
            if (i, view) != (2, 9):
                image = rng.integers(256, size=(10, 12, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / "shots" / one / f"{one}-{view}.png")
    tower = clip.Tower(8, 1, 2, 16)
    config = clip.ClipConfig(tower, tower, 6, 8, 4, vocab_size=515, max_positions=24, eos_id=514)
    params = jax.jit(lambda key: clip.init(key, config))(jax.random.key(0))
    clip.save(root / "clip", params, config)
    pieces = list(clip.tokens.byte_characters().values())
    names = [*pieces, *(p + "</w>" for p in pieces), "th", "<|startoftext|>", "<|endoftext|>"]
    (root / "clip" / "vocab.json").write_text(json.dumps({n: i for i, n in enumerate(names)}))
    (root / "clip" / "merges.txt").write_text("#version: 0.2\nt h\n")
    return root, params, config


@pytest.mark.slow
def test_pictures_and_texts_are_what_clip_makes_of_them(snare, pictured, tmp_path, monkeypatch):
    root, params, config = pictured
    files = SnareFiles(folder=snare[0], clip=root / "clip", screenshots=root / "shots")
    task = open_snare(files, cache=tmp_path, pixels=True, words=True)
    i = task.names.index(IDS[2])
    assert task.tables.mask[i].tolist() == [True] * 3 + [False] + [True] * 4
    assert task.tables.mask.sum() == 8 * 8 - 1
    shots = [root / "shots" / IDS[2] / f"{IDS[2]}-{v}.png" for v in (6, 7, 8, 10, 11, 12, 13)]
    pixels = jnp.asarray(clip.preprocess(shots, config))
    want = clip.encode_image(params, config, pixels).features
    np.testing.assert_allclose(task.tables.views[i][task.tables.mask[i]], want, atol=1e-5)
    again = task.encode(task.vision, jnp.asarray(task.tables.pixels[i]))
    np.testing.assert_allclose(again[:3], want[:3], atol=1e-5)
    ids = clip.load_tokenizer(root / "clip").encode(task.texts[:2], 24)
    encoded = clip.encode_text(params, config, jnp.asarray(ids))
    np.testing.assert_allclose(task.tables.text[:2], encoded.features, atol=1e-5)
    length = task.tables.words.shape[1]
    np.testing.assert_allclose(task.tables.words[:2], encoded.tokens[:, :length], atol=1e-5)
    assert task.tables.word_mask[0].sum() == np.argmax(ids[0] == 514) + 1
    monkeypatch.setattr(snare_task, "_views", None)  # the second time no picture is opened
    kept = open_snare(files, cache=tmp_path, pixels=True)
    np.testing.assert_array_equal(kept.tables.views, task.tables.views)
    np.testing.assert_array_equal(kept.tables.pixels, task.tables.pixels)


@pytest.mark.slow
def test_da4lg_adapts_clip_on_screenshots(snare, pictured, tmp_path, capfd):
    root, out = pictured[0], str(tmp_path / "run")
    where = ["--snare", str(snare[0]), "--clip", str(root / "clip")]
    where += ["--screenshots", str(root / "shots"), "--out", out]
    options = ["--grounder", "da4lg", "--rank", "2"]
    asked(capfd, "train", *where, *options, *SMALL, "--epochs", "1")
    found = asked(capfd, "evaluate", out, "--report", "1")
    assert 0 <= found["groups"]["all"]["mean"] <= 1
    assert "data:image/png" in (tmp_path / "run" / "report-valid" / "report.html").read_text()
