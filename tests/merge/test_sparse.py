"""Sparse parts against dense arithmetic in NumPy, and their bytes against a count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.merge import sparse

SHAPE = (7, 13)


def draw(seed: int, n: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *SHAPE)).astype(np.float32)


def keep_largest(row: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-np.abs(row.ravel()), kind="stable")[:k]
    kept = np.zeros(row.size, row.dtype)
    kept[order] = row.ravel()[order]
    return kept.reshape(row.shape)


@pytest.mark.parametrize("layout", ["mask", "index"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_decoding_gives_the_largest_entries(layout, density):
    stack = draw(0)
    part = sparse.encode(stack, density, layout=layout, bits=32)
    k = round(density * stack[0].size)
    expected = np.stack([keep_largest(row, k) for row in stack])
    np.testing.assert_array_equal(jax.jit(sparse.decode, static_argnums=1)(part, SHAPE), expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(0, 45))
def test_largest_marks_exactly_k_and_never_a_smaller_one(values, k):
    x = np.array(values, np.float32)
    keep = sparse.largest(x, k)
    assert keep.sum() == min(k, x.size)
    if keep.any() and not keep.all():
        assert np.abs(x[keep]).min() >= np.abs(x[~keep]).max()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(0, 2**31))
def test_masks_survive_packing(n, seed):
    mask = np.random.default_rng(seed).random((2, n)) < 0.4
    packed = sparse.pack_mask(mask)
    assert packed.shape == (2, -(-n // 8))
    np.testing.assert_array_equal(np.asarray(sparse.unpack_mask(packed, n)), mask)


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 2])
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_bytes_are_as_predicted(bits, density):
    stack = np.random.default_rng(1).normal(size=(2, 1000)).astype(np.float32)
    part = sparse.encode(stack, density, bits=bits)
    assert sparse.stored_bytes(part) == sparse.predicted_bytes(1000, 2, density, bits)
    assert sum(np.asarray(x).nbytes for x in jax.tree.leaves(part)) == sparse.stored_bytes(part)


@pytest.mark.parametrize(("bits", "error"), [(16, 2**-8), (8, 1 / 250), (4, 1 / 13)])
def test_few_bits_err_by_at_most_half_a_step(bits, error):
    stack = draw(2)
    found = np.asarray(sparse.decode(sparse.encode(stack, 1.0, bits=bits), SHAPE))
    assert np.abs(found - stack).max() <= error * np.abs(stack).max()


def test_two_bits_take_the_best_of_the_scales():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=256), rng.uniform(2, 3, 100)]).astype(np.float32)
    coded = sparse.encode_values(values[None], 2)
    found = np.asarray(sparse.decode_values(coded, 356))[0]
    for part in (slice(0, 256), slice(256, 356)):
        x, y = values[part], found[part]
        levels = np.unique(np.round(np.abs(y), 5))
        assert len(levels) <= 2
        errors = []
        for factor in np.linspace(0.5, 1.5, 11):
            step = factor * np.abs(x).mean()
            nearest = np.array([-1.5, -0.5, 0.5, 1.5]) * step
            errors.append(np.square(x[:, None] - nearest[None]).min(1).sum())
        assert np.square(x - y).sum() == pytest.approx(min(errors), rel=1e-4)
    # A Gaussian keeps 88 % of its energy in four levels.
    assert np.square(values[:256] - found[:256]).mean() < 0.15
    nothing = sparse.encode_values(np.zeros((1, 5), np.float32), 2)
    assert not np.asarray(sparse.decode_values(nothing, 5)).any()


def test_dare_keeps_the_number_and_scales_up():
    stack = np.ones((2, 200), np.float32)
    keys = [jax.random.key(i) for i in range(2)]
    found = np.asarray(sparse.decode(sparse.encode(stack, 0.25, bits=32, keys=keys), (200,)))
    assert ((found != 0).sum(1) == 50).all()
    np.testing.assert_allclose(found.sum(1), 200)
    assert (found[0] != found[1]).any()


def test_unified_and_dense_parts_decode_to_their_formulas():
    vector, scale = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([2.0, 0.5], np.float32)
    mask = np.random.default_rng(3).random((2, 6)) < 0.5
    part = sparse.Unified(jnp.asarray(vector), sparse.pack_mask(mask), jnp.asarray(scale))
    expected = scale[:, None, None] * mask.reshape(2, 2, 3) * vector[None]
    np.testing.assert_allclose(sparse.decode(part, (2, 3)), expected)
    chosen = sparse.choose(part, jnp.array([1]))
    np.testing.assert_allclose(sparse.decode(chosen, (2, 3)), expected[1:])
    assert [sparse.experts_of(p) for p in (part, chosen)] == [2, 1]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(UserError, match="density is"):
        sparse.encode(draw(0), density)
