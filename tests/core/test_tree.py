"""Names of foreign checkpoints that cannot become a tree."""

import numpy as np
import pytest

from jaxsys.core import tree
from jaxsys.core.errors import UserError


@pytest.mark.parametrize(
    "names", [("a", "a.b"), ("a.b", "a"), ("a.b.c", "a.b"), ("a.b", "a.b.c.d")]
)
def test_a_leaf_cannot_be_a_branch(names):
    with pytest.raises(UserError, match="both a leaf and a branch"):
        tree.unflatten({name: np.zeros(2) for name in names})
