"""Reports, judgements and conditions: pages that need nothing else and say what was asked."""

import re
from html.parser import HTMLParser

import jax
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.ground import judge, metrics
from jaxsys.ground.build import Choice
from jaxsys.ground.da4lg import Da4lgConfig, da4lg
from jaxsys.ground.evaluation import (
    Condition,
    difference,
    group_figures,
    keep_views,
    robustness,
    score,
    snare_figures,
)
from jaxsys.ground.match import zero_shot
from jaxsys.ground.report import Example, page, view_scores, write_report
from jaxsys.ground.runs import Job, Run
from jaxsys.ground.tables import Rows, Tables, gather
from jaxsys.ground.toys import toy_questions

N, V, D = 6, 3, 4
PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    mask = np.ones((N, V), bool)
    mask[1, 2] = False
    views = rng.normal(size=(N, V, D)).astype(np.float32)
    text = rng.normal(size=(N, D)).astype(np.float32)
    objects = np.array([[i, j] for i in range(N) for j in range(N) if i < j])
    answer = np.arange(len(objects)) % 2
    rows = Rows(objects, np.take_along_axis(objects, answer[:, None], 1)[:, 0], answer)
    return Tables(mask, text, np.arange(N), views), rows


def test_scores_do_not_depend_on_batches_devices_or_the_driver(data):
    tables, rows = data
    want = score(zero_shot(), {}, {}, tables, rows)
    assert want.shape == (1, 15, 2)
    for options in (
        {"batch": 4},
        {"batch": 8, "devices": jax.devices()},
        {"batch": 4, "devices": jax.devices()[:2], "resident": False},
    ):
        np.testing.assert_allclose(
            score(zero_shot(), {}, {}, tables, rows, **options), want, atol=1e-5
        )


def test_passes_pool_counts_as_snare_does(data):
    tables, rows = data
    scores = score(zero_shot("one"), {}, {}, tables, rows, passes=4, batch=8)
    assert len({one.tobytes() for one in scores}) == 4  # each pass draws its own views
    visual = np.arange(15) < 6
    wins = np.array([metrics.strictly_best(one, rows.answer) for one in scores])
    found = snare_figures(scores, rows.answer, visual)
    assert found == {
        "all": wins.sum() / 60,
        "visual": wins[:, visual].sum() / 24,
        "blind": wins[:, ~visual].sum() / 36,
    }
    groups = group_figures(scores, rows.answer, {"visual": visual})
    assert groups["visual"].accuracy == found["visual"]
    again = score(zero_shot("one"), {}, {}, tables, rows, passes=4, batch=8)
    np.testing.assert_array_equal(again, scores)
    with pytest.raises(UserError, match="group 'x' has shape"):
        group_figures(scores, rows.answer, {"x": visual[:3]})


def test_conditions_are_compared_on_the_same_rows(data):
    tables, rows = data
    turned = tables._replace(views=-tables.views)
    few = Rows(*(x[:4] for x in rows))
    conditions = [
        Condition("1 view", change=keep_views(1)), Condition("turned", turned),
        Condition("few", rows=few),
    ]  # fmt: skip
    plain, one, other, fewer = robustness(
        zero_shot("mean"), {}, {}, tables, rows, conditions, passes=2
    )
    assert other["accuracy"] == pytest.approx(1 - plain["accuracy"])  # all signs change
    assert other["difference"] == pytest.approx(other["accuracy"] - plain["accuracy"])
    assert one["low"] <= one["difference"] <= one["high"]
    assert "difference" not in fewer
    assert fewer["asked"] == 4
    gap, (low, high) = difference(np.ones((1, 40)), np.zeros((1, 40)), np.arange(40) // 4)
    assert (gap, low, high) == (-1, -1, -1)


def test_an_interval_over_objects_is_wider_than_one_over_rows():
    rng = np.random.default_rng(0)
    objects = np.repeat(np.arange(10), 30)
    right = np.repeat(rng.random(10) < 0.5, 30)[None]  # rows of an object stand and fall together
    wide = np.ptp(difference(np.zeros((1, 300)), right, objects)[1])
    narrow = np.ptp(difference(np.zeros((1, 300)), right, np.arange(300))[1])
    assert wide > 3 * narrow


def test_a_view_alone_is_scored_as_if_it_were_the_only_one(data):
    tables, rows = data
    batch = gather(tables, rows)
    got = view_scores(zero_shot(scale=1.0), {}, {}, batch)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    want = np.einsum("bkvd,bd->bkv", unit(batch.views), unit(batch.text))
    np.testing.assert_allclose(got, np.where(batch.mask, want, np.nan), atol=1e-5)


class Outline(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.sources = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_is_whole_escaped_and_needs_nothing_else(tmp_path):
    hostile = '<script>alert("1")</script> & $x$'
    example = Example(hostile, [hostile, "b"], [[PICTURE, None], [PICTURE, PICTURE]],
                      [0.5, 1.5], [[1.0, np.nan], [0.5, 1.5]], 0)  # fmt: skip
    file = write_report(tmp_path, [example, example._replace(answer=None)], hostile, hostile)
    outline = Outline()
    outline.feed(file.read_text(encoding="utf-8"))
    assert outline.open == []
    assert "script" not in outline.tags
    assert "".join(outline.text).count(hostile) == 7  # title, heading, note; text, name, twice
    assert len(outline.sources) == 6
    assert all(re.match(r"data:image/png;base64,", source) for source in outline.sources)
    assert "0 of 1 right" in file.read_text()
    assert (tmp_path / "question-1.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(UserError, match="2 names, 1 scores"):
        page([example._replace(scores=[1.0])], "x")
    with pytest.raises(UserError, match=r"weights have shape \(1, 2\)"):
        page([example._replace(weights=[[1.0, 2.0]])], "x")
    with pytest.raises(UserError, match="zero examples"):
        write_report(tmp_path, [], "x")


def test_examples_show_what_da4lg_weighs():
    task = toy_questions(n_views=2, size=8, width=8)
    choice = Choice(domain="residual", hidden=(4,), contrast=0.0)
    model = da4lg(Da4lgConfig(8, 8, "residual", hidden=(4,), contrast=0.0))
    params = jax.jit(model.init)(jax.random.key(0), {})
    run = Run(Job(choice), task, model, {}, [params])
    (example,), note = judge.examples_of(run, "test", [3])
    assert "weights" in note
    np.testing.assert_allclose(np.sum(example.weights, 1), 2, rtol=1e-5)  # they average 1
    rows = task.fold("test")
    assert example.text == task.texts[rows.text[3]] == example.names[example.answer]
    assert example.pictures[0][1].shape == (8, 8, 3)
    with pytest.raises(UserError, match="row 56 is not in the fold test"):
        judge.examples_of(run, "test", [56])
    with pytest.raises(UserError, match="fold 'x' is not there"):
        task.fold("x")
