"""The digits and their division."""

import sys

import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.data import images


def test_digits():
    data = images.digits()
    assert data.images.shape == (1797, 8, 8, 1)
    assert data.images.dtype == np.float32
    assert data.images.min() == 0
    assert data.images.max() == 1
    assert data.labels.dtype == np.int32
    assert sorted(set(data.labels.tolist())) == list(range(10))
    # The classes are really there: the nearest class mean already tells most of them apart.
    flat = data.images.reshape(1797, 64)
    means = np.stack([flat[data.labels == c].mean(0) for c in range(10)])
    nearest = ((flat[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert (nearest == data.labels).mean() > 0.85


def test_division_is_complete_disjoint_and_repeatable():
    n = 50
    data = images.Images(
        np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1), np.arange(n, dtype=np.int32)
    )
    train, valid = images.train_valid(data, 0.3, seed=7)
    assert len(valid.labels) == 15
    assert sorted([*train.labels, *valid.labels]) == list(range(n))
    for part in (train, valid):
        np.testing.assert_array_equal(part.images[:, 0, 0, 0], part.labels)
    again, _ = images.train_valid(data, 0.3, seed=7)
    np.testing.assert_array_equal(train.labels, again.labels)
    other, _ = images.train_valid(data, 0.3, seed=8)
    assert not np.array_equal(train.labels, other.labels)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1e-9])
def test_a_fraction_that_empties_a_part_is_refused(fraction):
    with pytest.raises(UserError, match="valid_fraction"):
        images.train_valid(images.digits(), fraction)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'jaxsys\[vision\]'"):
        images.digits()
