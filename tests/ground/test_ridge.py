"""Whitening of texts, and the regression that needs no pairs."""

import functools

import jax
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.ground import ridge
from jaxsys.ground.contract import Batch, Grounder
from jaxsys.ground.evaluation import score
from jaxsys.ground.metrics import strictly_best
from jaxsys.ground.ridge import RidgeConfig
from jaxsys.ground.tables import Rows, Tables
from jaxsys.ground.whiten import whiten


def game(seed=0, n=40, views=3):
    """Objects whose text is a fixed map of what is seen, beside a large part all texts share."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, 4)).astype(np.float32)
    seen = (hidden @ rng.normal(size=(4, 6)))[:, None] + 0.05 * rng.normal(size=(n, views, 6))
    noise = 5 * rng.normal(size=(n, 1)) * np.ones(5)
    said = np.concatenate([0.1 * hidden, noise], 1).astype(np.float32)
    tables = Tables(np.ones((n, views), bool), said, np.arange(n), seen.astype(np.float32))
    pairs = np.stack([rng.choice(n, 2, replace=False) for _ in range(200)]).astype(np.int32)
    answer = rng.integers(2, size=200).astype(np.int32)
    return tables, Rows(pairs, np.take_along_axis(pairs, answer[:, None], 1)[:, 0], answer)


def test_ridge_learns_small_directions_of_the_texts_and_looks_at_no_absent_view():
    tables, rows = game()
    learn = Rows(*(x[np.all(rows.objects < 30, 1)] for x in rows))
    ask = Rows(*(x[np.all(rows.objects >= 30, 1)] for x in rows))
    config = RidgeConfig(penalty=0.01, floor=1e-4)
    params = ridge.fit(config, tables, learn)
    model = Grounder(lambda key, frozen: {}, functools.partial(ridge.scores, config), None)
    right = strictly_best(score(model, params, {}, tables, ask)[0], ask.answer)
    assert len(right) >= 8
    assert right.mean() > 0.8
    plain = ridge.fit(RidgeConfig(penalty=0.01, floor=1e3), tables, learn)
    blurred = strictly_best(score(model, plain, {}, tables, ask)[0], ask.answer)
    assert blurred.mean() < right.mean()
    views = tables.views[rows.objects[:1]]
    text, mask = tables.text[rows.text[:1]], np.ones((1, 2, 3), bool)
    mask[:, :, 2] = False
    run = jax.jit(lambda batch: ridge.scores(config, params, {}, batch))
    first = run(Batch(text, mask, views.copy()))
    views[:, :, 2] = 1e6
    np.testing.assert_allclose(run(Batch(text, mask, views)), first, rtol=1e-5)


def test_whitened_vectors_have_one_variance_and_length_one():
    x = np.random.default_rng(0).normal(size=(200, 3)) * [9.0, 1.0, 0.1] + 4
    found = whiten(x, 0.0)(x)
    np.testing.assert_allclose(np.cov(found.T), np.eye(3) / 3, atol=5e-3)
    assert whiten(np.ones((1, 2)) * [[0.0], [1.0]])(np.ones((1, 2))).shape == (1, 1)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="penalty is 0"):
        RidgeConfig(penalty=0.0)
    with pytest.raises(UserError, match="expected different vectors"):
        whiten(np.ones((4, 2)))
    tables, rows = game()
    with pytest.raises(UserError, match="no views"):
        ridge.fit(RidgeConfig(), tables._replace(views=None), rows)
