"""Masks against a stable argsort: exact counts, ties by index, every scope."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.prune import masks

RNG = np.random.default_rng(0)
PLAIN = RNG.standard_normal((6, 24)).astype(np.float32)
TIED = RNG.integers(-2, 3, (6, 24)).astype(np.float32) * np.float32(0.25)
TIED[0] = 0.0
TIED[1, ::2] = -0.0


def removed_first(scores: np.ndarray, count: int) -> np.ndarray:
    """Stable ascending sort of one row; True is kept."""
    keep = np.ones(scores.size, bool)
    keep[np.argsort(scores.reshape(-1), kind="stable")[:count]] = False
    return keep.reshape(scores.shape)


@pytest.mark.parametrize("scores", [PLAIN, TIED], ids=["plain", "tied"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_every_scope_is_a_stable_sort(scores, sparsity):
    count = int(24 * sparsity)
    rows = np.stack([removed_first(row, count) for row in scores])
    np.testing.assert_array_equal(masks.row_mask(jnp.asarray(scores), sparsity), rows)
    whole = removed_first(scores, int(scores.size * sparsity))
    np.testing.assert_array_equal(masks.matrix_mask(jnp.asarray(scores), sparsity), whole)
    parts = {"b": jnp.asarray(scores[:4]), "a": jnp.asarray(scores[4:])}
    found = masks.global_mask(parts, sparsity)
    np.testing.assert_array_equal(np.concatenate([found["b"], found["a"]]), whole)


@pytest.mark.parametrize("count", [0, 1, 71, 144])
def test_a_number_of_weights_goes_exactly(count):
    whole = masks.counted_mask(jnp.asarray(TIED), count, "matrix")
    np.testing.assert_array_equal(whole, removed_first(TIED, count))
    rows = np.asarray(masks.counted_mask(jnp.asarray(TIED), count))
    gone = (~rows).sum(1)
    assert gone.sum() == count
    assert np.ptp(gone) <= 1
    for row, scores, n in zip(rows, TIED, gone, strict=True):
        np.testing.assert_array_equal(row, removed_first(scores, n))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3), (3, 3)])
@pytest.mark.parametrize("scores", [PLAIN, TIED], ids=["plain", "tied"])
def test_n_of_m_are_kept(scores, n, m):
    expected = [[removed_first(g, m - n) for g in row.reshape(-1, m)] for row in scores]
    found = masks.nm_mask(jnp.asarray(scores), n, m)
    np.testing.assert_array_equal(found, np.array(expected).reshape(scores.shape))


def test_blocks_go_whole():
    found = np.asarray(masks.block_mask(jnp.asarray(PLAIN), (2, 3), 0.5))
    sums = PLAIN.reshape(3, 2, 8, 3).sum((1, 3))
    kept = removed_first(sums, 12)
    np.testing.assert_array_equal(found, np.kron(kept, np.ones((2, 3), bool)))


def test_extreme_values_keep_their_order():
    values = np.array([[1e-38, -1e38, 3e38, -1e-42, 0.0, -3e38, 1e-42, 2.0]], np.float32)
    for count in range(8):
        found = masks.smallest_removed(jnp.asarray(values), jnp.int32(count))
        # XLA may flush subnormal numbers to zero elsewhere; their bits are ordered all the same.
        np.testing.assert_array_equal(found[0], removed_first(values[0], count))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(sparsity):
    with pytest.raises(UserError, match="lies in"):
        masks.row_mask(jnp.ones((1, 4)), sparsity)


def test_patterns_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"2:4 does not divide the 6 inputs of h\.3"):
        masks.check_nm(2, 4, 6, "h.3")
    with pytest.raises(UserError, match="keeps 5 of 4"):
        masks.nm_mask(jnp.ones((1, 4)), 5, 4)
    with pytest.raises(UserError, match="do not divide"):
        masks.block_mask(jnp.ones((2, 4)), (3, 2), 0.5)
