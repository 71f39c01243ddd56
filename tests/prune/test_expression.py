"""Metrics as text: against the methods' own formulas and NumPy, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.prune.expression import FORMULAS, expression_metric, parse
from jaxsys.prune.metrics import METRICS
from jaxsys.prune.stats import Stats

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(5, 8)).astype(np.float32)
STATS = Stats(
    X=jnp.asarray(RNG.uniform(0.5, 2.0, 8), jnp.float32),
    G=jnp.asarray(RNG.uniform(0.0, 3.0, (5, 8)), jnp.float32),
    G1=jnp.asarray(RNG.uniform(0.0, 3.0, (5, 8)), jnp.float32),
)


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_the_methods_own(name):
    expected = METRICS[name].apply(jnp.asarray(WEIGHT), STATS)
    np.testing.assert_allclose(parse(name)(jnp.asarray(WEIGHT), STATS), expected, rtol=1e-5)
    assert parse(name).needs & set(Stats._fields) == METRICS[name].needs


def test_the_published_tree():
    """It reads |W·W| ⊙ mms(G)."""
    w, g = ({"data": name, "left": None, "right": None} for name in "WG")
    product = {"data": "mul", "left": w, "right": w}
    left = {"data": "abs", "left": product, "right": None}
    right = {"data": "mms", "left": g, "right": None}
    expression = parse(json.dumps({"data": "mul", "left": left, "right": right}))
    assert expression.text == "(abs((W * W)) * mms(G))" == parse("pruner_zero").text
    grad = np.asarray(STATS.G)
    expected = WEIGHT**2 * (grad - grad.min()) / (grad.max() - grad.min())
    np.testing.assert_allclose(expression(jnp.asarray(WEIGHT), STATS), expected, rtol=1e-5)


def test_constants_and_broadcasting():
    size, x, g = np.abs(WEIGHT), np.asarray(STATS.X)[None], np.asarray(STATS.G)
    cases = {
        "W*sqrt(X) + 0.25*W*G": size * np.sqrt(x) + 0.25 * size * g,
        "X": np.broadcast_to(x, (5, 8)),
        "W/X": size / np.linalg.norm(x),
        "W*zsn(X)": size * (x - x.mean()) / x.std(ddof=1),
        "2*W - 1e-3": 2 * size - 1e-3,
        "R*C": size.sum(1, keepdims=True) * size.sum(0, keepdims=True),
    }
    for text, expected in cases.items():
        found = parse(text)(jnp.asarray(WEIGHT), STATS)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=text)
    elementwise = parse("W/X", "protected")(jnp.asarray(WEIGHT), STATS)
    np.testing.assert_allclose(elementwise, size / x, rtol=1e-5)


def test_as_a_metric():
    metric = expression_metric("G1*W")
    assert metric.needs == {"G1"}
    assert metric.scope == "row"
    found = metric.apply(jnp.asarray(WEIGHT), STATS)
    np.testing.assert_allclose(found, np.abs(WEIGHT) * np.asarray(STATS.G1), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: parse("W*Y"), "'Y' at position 3"),
        (lambda: parse("wandas"), "'wandas' at position 1"),
        (lambda: parse("W*cos(X)"), "function 'cos' at position 3"),
        (lambda: parse("W*(X"), "position"),
        (lambda: parse('{"data": "mul"}'), "no tree"),
        (lambda: parse("W", "all"), "operators are 'all'"),
        (lambda: parse("W*G")(jnp.asarray(WEIGHT), Stats(X=STATS.X)), "needs the statistic G"),
    ],
)
def test_mistakes_are_told(call, says):
    with pytest.raises(UserError, match=says):
        call()
