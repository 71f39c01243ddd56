"""The table of merge methods that work leaf by leaf, by the names that mergekit uses."""

from jaxsys.merge import linear, sphere, stock, ties
from jaxsys.merge.contract import Method

METHODS: dict[str, Method] = {
    **linear.METHODS,
    **ties.METHODS,
    **sphere.METHODS,
    **stock.METHODS,
}
