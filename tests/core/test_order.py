"""Ranks by counting against NumPy's sort."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.order import count_true, kth_smallest, ordered_keys, values_of


@pytest.fixture(scope="module")
def values():
    drawn = np.random.default_rng(0).normal(size=200).astype(np.float32)
    drawn[:4] = [np.inf, -np.inf, 0.0, -0.0]
    drawn[4:8] = drawn[8]  # ties
    return drawn


def test_keys_keep_the_order_and_come_back(values):
    keys = np.asarray(ordered_keys(jnp.asarray(values)))
    np.testing.assert_array_equal(values[np.argsort(keys, kind="stable")], np.sort(values))
    np.testing.assert_array_equal(np.asarray(values_of(jnp.asarray(keys))), values)
    assert keys[2] == keys[3]


def test_every_rank_is_that_of_the_sorted_values(values):
    keys = ordered_keys(jnp.asarray(values))
    counts = jnp.arange(1, values.size + 1)[:, None]
    found = kth_smallest(lambda at: jnp.sum(keys[None] < at, axis=1, keepdims=True), counts)
    np.testing.assert_array_equal(np.asarray(values_of(found))[:, 0], np.sort(values))


def test_ranks_outside_give_the_ends_of_the_integers(values):
    keys = ordered_keys(jnp.asarray(values))
    ends = [
        int(kth_smallest(lambda at: jnp.sum(keys < at), jnp.int32(count)))
        for count in (0, values.size + 1)
    ]
    assert ends == [-(2**31), 2**31 - 1]


@pytest.mark.parametrize("length", [1, 5, 172, 2**24 - 1, 2**24 + 1])
def test_counts_of_rows_are_exact(length):
    flags = np.random.default_rng(0).random((2, length)) < 0.5
    flags[1] = True
    found = count_true(jnp.asarray(flags))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(found)[:, 0], [flags[0].sum(), length])
