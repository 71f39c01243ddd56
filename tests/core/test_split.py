"""A backward pass in two programs: the whole's numbers, and no work done twice or too early."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.equations import trace
from jaxsys.core.split import split_backward


def _layers(ws, xs):
    h, mask = xs
    for w in ws:
        h = jax.nn.gelu(h @ w)
    return [h, jnp.sum(h), jnp.argmax(h, axis=1)], mask


def _pulled():
    keys = jax.random.split(jax.random.key(0), 5)
    ws = [jax.random.normal(k, (4, 4)) for k in keys[:3]]
    x = jax.random.normal(keys[3], (6, 4))
    (outs, _), pullback = jax.vjp(lambda w, h: _layers(w, (h, x)), ws, x)
    seeds = ([jnp.ones_like(outs[0]), jnp.float32(2.0), np.zeros(6, jax.dtypes.float0)], x)
    return pullback, seeds


def test_both_halves_equal_the_whole():
    pullback, seeds = _pulled()
    weights, inputs = pullback(seeds)
    split = split_backward(pullback, seeds)
    upstream, rest = split.inputs(pullback, seeds)
    np.testing.assert_allclose(upstream, inputs, rtol=1e-4, atol=1e-4)
    for a, b in zip(split.weights(rest), weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_first_half_makes_no_weight_gradient_and_the_second_repeats_nothing():
    pullback, seeds = _pulled()
    split = split_backward(pullback, seeds)
    leaves, treedef = jax.tree.flatten(seeds)
    live = [x for x in leaves if x.dtype != jax.dtypes.float0]

    def first(*given):
        mixed = iter(given)
        filled = [x if x.dtype == jax.dtypes.float0 else next(mixed) for x in leaves]
        return split.inputs(pullback, jax.tree.unflatten(treedef, filled))

    def products(function, *args):
        return sum(e.primitive.name == "dot_general" for e in trace(function, *args).equations)

    _, rest = split.inputs(pullback, seeds)
    assert products(first, *live) == 3
    assert products(lambda *values: split.weights(list(values)), *rest) == 3


def test_what_is_only_handed_on_is_not_copied():
    pullback, seeds = _pulled()
    _, rest = split_backward(pullback, seeds).inputs(pullback, seeds)
    kept = {id(x) for x in jax.tree.leaves(pullback)}
    assert any(id(x) in kept for x in rest)
