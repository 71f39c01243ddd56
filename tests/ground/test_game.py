"""The reference game: splits, questions, batches, and batches that share objects."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.ground.catalogue import Catalogue, Object, read_catalogue, write_catalogue
from jaxsys.ground.contract import check_batch
from jaxsys.ground.da4lg import Da4lgConfig, da4lg
from jaxsys.ground.features import caption_tokens, mean_colour, vocabulary_of
from jaxsys.ground.game import (
    Prepared,
    TextVectors,
    head_noun,
    make_game,
    split_by_library,
    split_by_object,
)
from jaxsys.ground.groups import gather_group, groups
from jaxsys.ground.tables import from_games, gather, take_rows

NAMES = ("Round table", "Glass table", "table", "Lamp", "Desk lamp", "Bed 140x190", "lamp ")


def _catalogue(names, categories=("a", "b"), libraries=("x", "y")) -> Catalogue:
    return Catalogue(
        tuple(
            Object(
                f"k{i}",
                name,
                ("Toy",),
                categories[i % len(categories)],
                libraries[i % len(libraries)],
                "Ann",
                "CC0",
                (1.0, 2.0, 3.0),
            )
            for i, name in enumerate(names)
        )
    )


def _prepared(catalogue: Catalogue, views: int = 4) -> Prepared:
    n, rng = len(catalogue.objects), np.random.default_rng(0)
    features = rng.standard_normal((n, views, 3)).astype(np.float32)
    return Prepared(catalogue, Path(), features, np.ones((n, views), bool), features)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=6, max_size=14), st.integers(0, 3))
def test_a_game_asks_every_pair_both_ways(names, seed):
    catalogue = _catalogue(names)
    split = split_by_object(catalogue, seed)
    parts = np.concatenate(split)
    assert sorted(parts.tolist()) == list(range(len(names)))
    plain = [" ".join(name.lower().split()) for name in names]
    expected = {
        (meant, other)
        for meant, other in itertools.permutations(range(len(names)), 2)
        if meant % 2 == other % 2 and plain[meant] != plain[other]
    }
    if not expected:
        with pytest.raises(UserError, match="under different names"):
            make_game(catalogue, range(len(names)))
        return
    game = make_game(catalogue, range(len(names)), text="name", seen=split.train)
    meant = game.candidates[np.arange(len(game.answer)), game.answer]
    other = game.candidates[np.arange(len(game.answer)), 1 - game.answer]
    assert set(zip(meant.tolist(), other.tolist(), strict=True)) == expected
    assert len(game.answer) == len(expected)
    assert game.answer.mean() == 0.5
    known = {plain[i] for i in split.train}
    for row, (m, o) in enumerate(zip(meant, other, strict=True)):
        assert " ".join(game.texts[game.text_of[row]].lower().split()) == plain[m]
        assert game.unseen_name[row] == (plain[m] not in known)
        assert game.same_noun[row] == (head_noun(names[m]) == head_noun(names[o]))


def test_more_candidates_have_different_names_and_answers_go_round():
    catalogue = _catalogue([f"thing {chr(97 + i % 5)}" for i in range(20)], ("a",))
    game = make_game(catalogue, range(20), n_candidates=4, draws=2)
    assert game.candidates.shape == (40, 4)
    assert np.bincount(game.answer).tolist() == [10] * 4
    for row in game.candidates.tolist():
        assert len({catalogue.objects[i].name for i in row}) == 4
    few = make_game(catalogue, range(20), most_per_category=10)
    assert len(few.answer) == 10
    assert few.answer.mean() == 0.5


def test_bad_games_and_splits_are_told_of(tmp_path):
    catalogue = _catalogue(NAMES)
    for run, message in (
        (lambda: make_game(catalogue, [0, 0]), "each place once"),
        (lambda: make_game(catalogue, [0, 99]), "each place once"),
        (lambda: make_game(catalogue, range(7), n_candidates=1), "at least 2"),
        (lambda: split_by_object(catalogue, 0, test=0.99), "two of each"),
        (lambda: split_by_library(catalogue, ["x"], ["x"]), "different ones"),
        (lambda: split_by_library(catalogue, ["x"], ["z"]), r"out of \['x', 'y'\]"),
    ):
        with pytest.raises(UserError, match=message):
            run()
    split = split_by_library(catalogue, ["x"], ["y"], validation=0.25)
    assert {catalogue.objects[i].library for i in split.test} == {"y"}
    assert len(split.validation) == 1
    twice = Catalogue(catalogue.objects[:1] * 2)
    with pytest.raises(UserError, match="there twice"):
        write_catalogue(tmp_path / "c.jsonl", twice)
    (tmp_path / "c.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(UserError, match=r"line 1 of .* is no object"):
        read_catalogue(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("name", "noun"),
    [
        ("TV 16:9", "tv"),
        ("Sofa 3 seats", "sofa"),
        ("Class seat", "seat"),
        ("Table with tablecloth", "table"),
        ("Glass", "glass"),
        ("90", "90"),
        ("Bill 10€", "bill"),
        ("Toilet-brush (old)", "brush"),
    ],
)
def test_head_nouns(name, noun):
    assert head_noun(name) == noun


def test_objects_encoded_once_give_the_same_scores():
    catalogue = _catalogue([f"thing {i}" for i in range(12)])
    prepared, game = _prepared(catalogue), make_game(catalogue, range(12))
    texts = TextVectors(np.random.default_rng(1).standard_normal((12, 3)).astype(np.float32))
    tables, [rows] = from_games(prepared, [game], [texts])
    category = np.arange(12) % 2
    drawn = groups(rows, category, 4, objects=5, views=4, batch=6, seed=0)
    encoder = mean_colour()
    config = Da4lgConfig(3, 3, rank=1, patterns=encoder.patterns, hidden=(4,), contrast=0.0)
    model, frozen = da4lg(config, encoder.encode), {"vision": encoder.params}
    params = model.init(jax.random.key(0), frozen)
    params["domain"] = jax.tree.map(lambda x: x + 0.3, params["domain"])
    group = next(drawn)
    assert len(set(group.objects.tolist())) == 5
    assert (group.objects[group.places] == group.rows.objects).all()
    shared = gather_group(tables, group)
    check_batch(shared)
    single = gather(tables, group.rows)
    scores = [model.scores(params, frozen, batch) for batch in (shared, single)]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)
    one = da4lg(Da4lgConfig(3, 3, rank=1, patterns=encoder.patterns, hidden=(4,), contrast=0.0,
                            pooling="two"), encoder.encode)  # fmt: skip
    key = jax.random.key(3)
    scores = [one.scores(params, frozen, batch, key=key) for batch in (shared, single)]
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)


def test_groups_ask_every_row_of_a_category_and_show_few_views():
    catalogue = _catalogue([f"thing {i}" for i in range(9)])
    game = make_game(catalogue, range(9))
    tables, [rows] = from_games(_prepared(catalogue), [game], [TextVectors(np.zeros((9, 2)))])
    category = np.arange(9) % 2
    drawn = groups(rows, category, 4, objects=5, views=2, batch=64, seed=1)
    asked: set[tuple[int, int, int]] = set()
    for group in itertools.islice(drawn, 60):
        assert (np.diff(group.views) > 0).all()
        assert len(set(category[group.rows.objects].ravel().tolist())) == 1
        asked |= set(zip(*group.rows.objects.T.tolist(), group.rows.answer.tolist(), strict=True))
    assert len(asked) == len(game.answer)
    first, second = (
        next(groups(rows, category, 4, objects=5, views=2, batch=8, seed=7)) for _ in "ab"
    )
    assert all(np.array_equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    with pytest.raises(UserError, match="expected 2 to 9 objects, 1 to 4 views"):
        groups(rows, category, 4, objects=10, views=2, batch=8, seed=0)
    assert gather_group(tables, first).views.shape == (8, 2, 2, 3)
    assert take_rows(rows, [0]).objects.shape == (1, 2)


def test_caption_tokens_know_the_words_that_were_trained_on():
    known = vocabulary_of(["A red chair", "a LAMP, red"], size=5)
    assert known.words == ("a", "red", "chair")
    tokens, mask = caption_tokens(["red sofa", "a b c d e"], known, 4)
    assert tokens.tolist() == [[3, 1, 0, 0], [2, 1, 1, 1]]
    assert mask.sum(1).tolist() == [2, 4]
