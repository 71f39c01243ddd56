"""Quantised weights: error bounds as laws, products against the dense matrix, trees by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxsys.core.errors import UserError
from jaxsys.models import lm
from jaxsys.models.quantise import (
    Quantised4bit,
    QuantisedInt8,
    dequantise,
    quantise,
    quantise_4bit,
    quantise_int8,
    weights,
)

MATRICES = arrays(
    np.float32,
    (3, 11),
    elements=st.floats(-1e4, 1e4, width=32),
)


@settings(max_examples=25, deadline=None)
@given(MATRICES)
def test_int8_errs_by_half_a_step_of_its_row_at_most(matrix):
    error = np.abs(np.asarray(quantise_int8(jnp.asarray(matrix)).dense()) - matrix)
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    assert (error <= largest / 127 * 0.5001 + 1e-30).all()


@settings(max_examples=25, deadline=None)
@given(MATRICES, st.sampled_from([2, 8]))
def test_4bit_errs_by_half_a_step_of_its_group_at_most(matrix, group):
    error = np.abs(np.asarray(quantise_4bit(jnp.asarray(matrix), group=group).dense()) - matrix)
    groups = -(-matrix.shape[1] // group)
    for i in range(groups):  # the strided groups that the docstring defines
        part = np.s_[:, i::groups]
        largest = np.abs(matrix[part]).max(axis=1, keepdims=True, initial=0)
        assert (error[part] <= largest / 7 * 0.5001 + 1e-30).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_codes_that_fit_come_back_exactly(scale):
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (6, 16)).astype(np.float32)
    codes[:, :4] = 7.0  # with group 4 each strided group then holds the largest code
    matrix = jnp.asarray(codes * np.float32(scale))
    np.testing.assert_allclose(quantise_4bit(matrix, group=4).dense(), matrix, rtol=3e-7)
    again = quantise_int8(quantise_int8(matrix).dense())
    np.testing.assert_allclose(again.dense(), quantise_int8(matrix).dense(), rtol=3e-7)


def _quantised(bits, shape, in_out):
    matrix = jax.random.normal(jax.random.key(1), shape)
    if bits == 8:
        return matrix, quantise_int8(matrix, in_out=in_out)
    return matrix, quantise_4bit(matrix, group=8, in_out=in_out)


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("n_rows", [1, 2, 9])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_are_those_of_the_dense_matrix(bits, n_rows, in_out):
    matrix, weight = _quantised(bits, (13, 20), in_out)
    dense = np.asarray(weight.dense(), np.float64)
    assert dense.shape == weight.shape == matrix.shape
    x = jax.random.normal(jax.random.key(2), (n_rows, 13 if in_out else 20))
    expected = np.asarray(x, np.float64) @ (dense if in_out else dense.T)
    np.testing.assert_allclose(jax.jit(weight.matmul)(x), expected, atol=2e-5)
    y = lm.linear({"weight": weight, "bias": jnp.ones(expected.shape[1])}, x[None])
    np.testing.assert_allclose(y[0], expected + 1, atol=2e-5)
    assert weight.matmul(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_and_gradients_are_those_of_the_dense_matrix(bits):
    _, weight = _quantised(bits, (13, 20), False)
    indices = jnp.array([[3, 0], [12, 3]])
    np.testing.assert_array_equal(weight.rows(indices), weight.dense()[indices])
    for n_rows in (1, 4):
        x = jax.random.normal(jax.random.key(2), (n_rows, 20))
        found = jax.grad(lambda x: jnp.sin(weight.matmul(x)).sum())(x)
        expected = jax.grad(lambda x: jnp.sin(x @ weight.dense().T).sum())(x)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_bytes_are_what_the_bits_say():
    matrix = jnp.ones((64, 256))
    sizes = [
        sum(a.nbytes for a in jax.tree.leaves(w))
        for w in (
            quantise_int8(matrix),
            quantise_4bit(matrix, group=32),
            quantise_4bit(matrix, group=64),
        )
    ]
    assert sizes == [64 * 256 + 64 * 4, 64 * 256 * 5 // 8, 64 * 256 * 9 // 16]


CONFIG = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64, rope=lm.Rope(width=8), tied=True)


@pytest.mark.parametrize(("bits", "kind"), [(8, QuantisedInt8), (4, Quantised4bit)])
def test_a_model_computes_what_its_dequantised_copy_does(bits, kind):
    params = lm.init(jax.random.key(0), CONFIG)
    small = quantise(params, ("*.layers.*", "*embed_tokens*"), bits=bits)
    found = weights(small)
    assert found.keys() == weights(params).keys()
    assert isinstance(found["model.layers.1.mlp.up_proj.weight"], kind)
    assert isinstance(found["model.embed_tokens.weight"], kind)
    assert isinstance(found["model.layers.1.input_layernorm.weight"], jax.Array)
    tokens = jnp.arange(6)[None]
    expected = lm.apply(dequantise(small), CONFIG, tokens).logits
    np.testing.assert_allclose(lm.apply(small, CONFIG, tokens).logits, expected, atol=1e-5)


def test_routers_and_what_is_quantised_already_stay():
    params = {
        "h": {"0": {"gate": {"weight": jnp.ones((2, 4))}, "up": {"weight": jnp.ones((2, 4))}}}
    }
    once = quantise(params, bits=4)
    assert once["h"]["0"]["gate"]["weight"] is params["h"]["0"]["gate"]["weight"]
    twice = quantise(once, bits=8)
    assert twice["h"]["0"]["up"]["weight"] is once["h"]["0"]["up"]["weight"]


def test_mistakes_are_named():
    params = {"h": {"0": {"weight": jnp.ones((2, 4))}}}
    with pytest.raises(UserError, match="'x\\.\\*' matches no matrix"):
        quantise(params, ("x.*",))
    with pytest.raises(UserError, match="group is 7"):
        quantise(params, bits=4, group=7)


@pytest.mark.parametrize("bits", [8, 4])
def test_any_leaf_may_stand_in_the_tree(bits):
    """Masks, shapes and shardings are made by mapping over the tree."""
    weight = _quantised(bits, (13, 20), False)[1]
    assert jax.tree.leaves(jax.tree.map(lambda x: x.ndim > 1, weight))
    assert jax.eval_shape(lambda w: w, weight).shape == (13, 20)
