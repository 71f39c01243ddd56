"""SNARE's files: rows, features and screenshots, whole and broken; the text-only baseline."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxsys.core.errors import UserError
from jaxsys.ground import snare
from jaxsys.ground.pictures import screenshots
from jaxsys.ground.snare import Row
from jaxsys.ground.text_only import text_only_scores

ROW = {"annotation": "a low desk", "objects": ["a", "b"], "ans": 1, "visual": False}


def write(folder, rows, name="val.json"):
    file = folder / name
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def published():
    root = os.environ.get("JAXSYS_DATA", "")
    file = Path(root, "grounding", "snare_val.json")
    if not root or not file.is_file():
        pytest.skip("JAXSYS_DATA has no grounding/snare_val.json")
    return file


def test_the_validation_fold_has_the_counts_of_its_repository(published):
    fold = snare.load_rows(published)
    assert (len(fold.rows), fold.lone) == (2304, 6)
    whole = snare.load_rows(published, lone="seed", seed=1).rows
    assert len(whole) == 2310
    assert sum(row.visual for row in whole) == 1164
    assert len({name for row in whole for name in row.objects}) == 371
    assert len({frozenset(row.objects) for row in fold.rows}) == 322
    assert len({row.annotation for row in whole}) == 2030


def test_a_seeded_distractor_depends_on_seed_and_place_only(tmp_path):
    rows = [{**ROW, "objects": ["a"], "ans": 0}, ROW, {**ROW, "objects": ["c", "d"]}]
    file = write(tmp_path, rows)
    seeded = [snare.load_rows(file, lone="seed", seed=s).rows for s in range(8)]
    assert seeded[3] == snare.load_rows(file, lone="seed", seed=3).rows
    assert {r[0].objects for r in seeded} <= {("a", x) for x in "bcd"}
    assert len({r[0].objects for r in seeded}) > 1
    assert all(r[1:] == seeded[0][1:] for r in seeded)
    assert snare.load_rows(file).rows == seeded[0][1:]


def test_a_test_fold_has_no_answers(tmp_path):
    file = write(tmp_path, [{"annotation": "it", "objects": ["a", "b"]}])
    assert snare.load_rows(file).rows == (Row("it", ("a", "b"), None, None),)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("[", "cannot be read as JSON"),
        ([], "no list of annotations"),
        ({"a": 1}, "no list of annotations"),
        ([ROW, {**ROW, "annotation": 3}], "row 1 .*annotation"),
        ([{**ROW, "objects": ["a", "a"]}], "row 0 .* object 'a' twice"),
        ([{**ROW, "objects": ["a", "b", "c"]}], "3 objects"),
        ([{**ROW, "objects": []}], "0 objects"),
        ([{**ROW, "objects": "ab"}], "no list of 'objects'"),
        ([{**ROW, "ans": 2}], "answer 2"),
        ([{**ROW, "ans": True}], "answer True"),
        ([{**ROW, "visual": "yes"}], "visual 'yes'"),
    ],
)
def test_a_row_that_is_no_row_is_named(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        snare.load_rows(write(tmp_path, rows))


def test_an_unknown_object_is_named(tmp_path):
    file = write(tmp_path, [ROW, {**ROW, "objects": ["a", "zz"]}])
    with pytest.raises(UserError, match="1 objects without features, 'zz' first, in row 1"):
        snare.load_rows(file, known=["a", "b"])
    alone = write(tmp_path, [{**ROW, "objects": ["a"], "ans": 0}])
    with pytest.raises(UserError, match="no other to set beside it"):
        snare.load_rows(alone, lone="seed")
    with pytest.raises(UserError, match="cannot be read"):
        snare.load_rows(tmp_path / "absent.json")


def features_file(folder, entries, packed=True):
    file = folder / ("f.json.gz" if packed else "f.json")
    data = json.dumps(entries).encode()
    file.write_bytes(gzip.compress(data) if packed else data)
    return file


@pytest.mark.parametrize("packed", [True, False])
def test_features_equal_what_was_written(tmp_path, packed, monkeypatch):
    monkeypatch.setattr(snare, "_CHUNK", 37)  # entries lie across pieces
    rng = np.random.default_rng(0)
    values = {f"o{i}-{v}": rng.normal(size=5).tolist() for i in (2, 1) for v in range(14)}
    got = snare.read_view_features(features_file(tmp_path, values, packed), width=5)
    assert got.ids == ("o2", "o1")
    assert got.mask.all()
    want = [[values[f"{name}-{v}"] for v in range(6, 14)] for name in got.ids]
    np.testing.assert_array_equal(got.features, np.float32(want))
    one = snare.read_view_features(tmp_path / got_name(packed), width=5, views=(0,), ids=["o1"])
    np.testing.assert_array_equal(one.features[0, 0], np.float32(values["o1-0"]))


def got_name(packed):
    return "f.json.gz" if packed else "f.json"


def test_a_view_that_is_missing_is_masked_and_no_view_is_refused(tmp_path):
    file = features_file(tmp_path, {"a-6": [1, 2], "a-8": [3, 4], "b-0": [5, 6]})
    got = snare.read_view_features(file, width=2, ids=["a"])
    assert got.mask[0].tolist() == [True, False, True] + [False] * 5
    assert got.features[0, 1].tolist() == [0, 0]
    with pytest.raises(UserError, match=r"zero of the views .* for 1 objects, \['b'\]"):
        snare.read_view_features(file, width=2)
    with pytest.raises(UserError, match="zero views"):
        snare.read_view_features(file, width=2, views=())
    with pytest.raises(UserError, match=r"for 1 objects, \['c'\]"):
        snare.read_view_features(file, width=2, ids=["a", "c"])


def test_texts_may_hold_any_character(tmp_path, monkeypatch):
    monkeypatch.setattr(snare, "_CHUNK", 11)
    texts = ['the "big" one', "a \\ b", "[1, 2]: {x}", "café\n", ""]
    entries = {text: [float(i), 0.5] for i, text in enumerate(texts)}
    got = snare.read_text_features(features_file(tmp_path, entries), width=2)
    assert got.texts == tuple(texts)
    assert got.features[:, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"lacks 1, .*another"):
        snare.read_text_features(tmp_path / "f.json.gz", width=2, texts=["", "another"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a-6": [1, 2], "a-7": [1, 2, 3]}', "3 numbers under 'a-7'; expected 2"),
        (b'{"a-6": []}', "0 numbers"),
        (b'{"a-6": [1, NaN]}', "not finite"),
        (b'{"a-6": [1, "x"]}', "breaks off or is no JSON"),
        (b'{"a-6": [[1, 2]]}', "breaks off or is no JSON"),
        (b'{"a-6": [1, 2', "breaks off or is no JSON"),
        (b'{"six": [1, 2]}', "key 'six'"),
        (b'{"a-6": [1, true x]}', "cannot be read"),
        (b"\x1f\x8b\x08broken", "cannot be read"),
        (gzip.compress(b'{"a-6": [1, 2]}', mtime=0)[:-9], "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"{}", "zero of the views"),
    ],
)
def test_a_broken_feature_file_is_one_sentence(tmp_path, content, words):
    file = tmp_path / "f"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        snare.read_view_features(file, width=2)


def test_features_of_another_encoder_are_refused(tmp_path):
    with pytest.raises(UserError, match="3 numbers under 'a-6'; expected 512"):
        snare.read_view_features(features_file(tmp_path, {"a-6": [1, 2, 3]}))


def test_an_endless_entry_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(snare, "_MOST_ENTRY", 1000)
    monkeypatch.setattr(snare, "_CHUNK", 100)
    with pytest.raises(UserError, match="breaks off"):
        snare.read_view_features(features_file(tmp_path, {"a-6": [1.5] * 10_000}), width=None)


def test_screenshots_are_the_right_views_on_white(tmp_path):
    (tmp_path / "x").mkdir()
    for view in (0, 6, 9, 13):
        Image.new("RGBA", (3, 2), (view, 10, 20, 255)).save(tmp_path / "x" / f"x-{view}.png")
    images = screenshots(tmp_path, "x")
    assert [image[0, 0].tolist() for image in images] == [[v, 10, 20] for v in (6, 9, 13)]
    assert images[0].shape == (2, 3, 3)
    with pytest.raises(UserError, match="zero of the views"):
        screenshots(tmp_path, "x", views=(1, 2))
    with pytest.raises(UserError, match="plain name"):
        screenshots(tmp_path, "../x")
    (tmp_path / "x" / "x-7.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"x-7\.png cannot be read as an image"):
        screenshots(tmp_path, "x")


def test_rows_become_places_in_the_tables():
    images = snare.ViewFeatures(("a", "b"), np.zeros((2, 1, 3), np.float32), np.ones((2, 1), bool))
    texts = snare.TextFeatures(("x", "y"), np.zeros((2, 3), np.float32))
    got = snare.index_rows([Row("y", ("b", "a"), 1, True), Row("x", ("a", "b"))], images, texts)
    assert got.objects.tolist() == [[1, 0], [0, 1]]
    assert got.texts.tolist() == [1, 0]
    assert got.answer.tolist() == [1, -1]
    assert got.visual.tolist() == [True, False]
    with pytest.raises(UserError, match="row 0 names 'c'"):
        snare.index_rows([Row("y", ("b", "c"), 1, True)], images, texts)
    with pytest.raises(UserError, match="row 0 names 'z'"):
        snare.index_rows([Row("z", ("b", "a"), 1, True)], images, texts)


def hashed(texts):
    """Give each text a vector that depends on its words only."""
    out = np.zeros((len(texts), 64))
    for i, text in enumerate(texts):
        for word in text.split():
            out[i] += np.random.default_rng([ord(c) for c in word]).normal(size=64)
    return out + 1e-3


def by_hand(rows, encode, other_pairs_only):
    """Compute the same scores with no table and no reuse."""
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    scores = []
    for i, row in enumerate(rows):
        here = []
        for name in row.objects:
            vectors = []
            for j, other in enumerate(rows):
                same_pair = set(other.objects) == set(row.objects)
                if i == j or other.annotation == row.annotation:
                    continue
                if other.objects[other.answer] != name or (other_pairs_only and same_pair):
                    continue
                vectors.append(unit(encode([other.annotation])[0]))
            t = unit(encode([row.annotation])[0])
            here.append(t @ unit(np.mean(vectors, 0)) if vectors else -np.inf)
        scores.append(here)
    return np.array(scores)


@pytest.mark.parametrize("other_pairs_only", [False, True])
def test_text_only_scores_equal_a_plain_computation(other_pairs_only):
    rng = np.random.default_rng(1)
    words = ["red", "blue", "low", "tall", "wide", "chair", "desk", "lamp"]
    rows = []
    for _ in range(40):
        pair = tuple(str(x) for x in rng.choice(5, 2, replace=False))
        text = " ".join(rng.choice(words, 2))
        rows.append(Row(text, (pair[0], pair[1]), int(rng.integers(2)), True))
    got = text_only_scores(rows, hashed, other_pairs_only=other_pairs_only)
    np.testing.assert_allclose(got, by_hand(rows, hashed, other_pairs_only), atol=1e-12)


def test_text_only_needs_answers_and_one_vector_a_text():
    with pytest.raises(UserError, match="row 0 has no answer"):
        text_only_scores([Row("x", ("a", "b"))], hashed)
    with pytest.raises(UserError, match=r"array of \(3,\) for 1 texts"):
        text_only_scores([Row("x", ("a", "b"), 0)], lambda texts: np.zeros(3))


@pytest.mark.slow
def test_the_text_only_floor_of_the_validation_fold(published):
    import jax

    from jaxsys.ground import metrics
    from jaxsys.models import minilm

    try:
        folder = minilm.packaged()
    except UserError as reason:
        pytest.skip(str(reason))
    params, config = minilm.load(folder)
    tokenizer, run = minilm.load_tokenizer(folder), jax.jit(minilm.encode, static_argnums=1)

    def encode(texts):
        ids, mask = tokenizer.encode(texts)
        found = np.zeros((len(texts), config.width), np.float32)
        short = mask.sum(1) <= 16  # nearly all
        for rows, width in ((np.flatnonzero(short), 16), (np.flatnonzero(~short), ids.shape[1])):
            found[rows] = run(params, config, ids[rows, :width], mask[rows, :width])
        return found

    rows = snare.load_rows(published).rows
    scores = text_only_scores(rows, encode)
    counts = metrics.count(scores, [r.answer for r in rows], [r.visual for r in rows])
    accuracies = (counts.all, counts.visual_accuracy, counts.blind_accuracy)
    # Measured beforehand with transformers' own encoder.
    np.testing.assert_allclose(accuracies, (0.640, 0.662, 0.618), atol=0.002)
