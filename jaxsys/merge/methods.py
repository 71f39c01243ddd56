"""The table of merge methods that work leaf by leaf, by the names that mergekit uses."""

from jaxsys.merge import linear
from jaxsys.merge.contract import Method

METHODS: dict[str, Method] = {**linear.METHODS}
