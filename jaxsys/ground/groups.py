"""Batches that encode each object once, however many rows it is in: training an encoder cheaply.

A batch of a game's rows drawn at random shows most of its objects once, and an adapted encoder runs
over every one of them. Here a few objects of one category are drawn first, with a few of their
views, and then rows among them: the encoder's work is bounded by the objects, not by the rows.

Axes: ``U`` objects of a batch, ``W`` of their views, ``B`` rows, ``K`` candidates.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxsys.core.errors import UserError
from jaxsys.ground.contract import Batch
from jaxsys.ground.tables import Rows, Tables, gather


class Group(NamedTuple):
    """Hold the objects of a batch and rows among them.

    Attributes:
        objects: [U], places in the tables.
        views: [U, W], which of their views are shown.
        places: [B, K], the candidates' places among `objects`.
        rows: B rows, whose objects are places in the tables.

    >>> rows = Rows(np.array([[5, 7]]), np.array([0]), np.array([1]))
    >>> Group(np.array([5, 7]), np.zeros((2, 1), int), np.array([[0, 1]]), rows).rows.answer
    array([1])
    """

    objects: Int32[np.ndarray, " U"]
    views: Int32[np.ndarray, "U W"]
    places: Int32[np.ndarray, "B K"]
    rows: Rows


def groups(
    rows: Rows, category: Any, n_views: int, *, objects: int, views: int, batch: int, seed: int
) -> Iterator[Group]:
    """Draw groups without end.

    A category is drawn in proportion to its rows, then `objects` of its objects, then `batch` of
    the rows among them, with replacement; so that over many groups all rows of a category come up
    equally often. A category with fewer objects is filled up with others that no row names.

    Args:
        rows: all that may be asked, each within one category.
        category: [N], of each object of the tables.
        n_views: V of the tables.
        objects: U.
        views: W, drawn without replacement for each object anew.
        batch: B.
        seed: of all draws.

    Raises:
        UserError: for numbers that the rows cannot give.

    >>> rows = Rows(np.array([[0, 1], [0, 1], [1, 2]]), np.arange(3), np.array([0, 1, 0]))
    >>> group = next(groups(rows, np.zeros(3), 8, objects=2, views=3, batch=4, seed=0))
    >>> group.views.shape, group.places.shape
    ((2, 3), (4, 2))
    """
    candidates, category = np.asarray(rows.objects), np.asarray(category)
    there = np.unique(candidates)
    n = candidates.shape[1]
    if not n <= objects <= len(there) or not 1 <= views <= n_views or batch < 1:
        raise UserError(
            f"groups of {objects} objects with {views} views and {batch} rows are asked for; "
            f"expected {n} to {len(there)} objects, 1 to {n_views} views and at least 1 row; "
            "change them"
        )
    of_row = category[candidates[:, 0]]
    names, counts = np.unique(of_row, return_counts=True)
    return _draw(rows, category, there, names, counts, (objects, views, n_views, batch), seed)


def _draw(
    rows: Rows,
    category: np.ndarray,
    there: np.ndarray,
    names: np.ndarray,
    counts: np.ndarray,
    sizes: tuple[int, int, int, int],
    seed: int,
) -> Iterator[Group]:
    n_objects, n_views, all_views, batch = sizes
    rng = np.random.default_rng(seed)
    candidates = np.asarray(rows.objects)
    own = {name: np.flatnonzero(category[candidates[:, 0]] == name) for name in names}
    while True:
        name = rng.choice(names, p=counts / counts.sum())
        inside, outside = there[category[there] == name], there[category[there] != name]
        chosen = rng.permutation(inside)[:n_objects]
        fill = rng.permutation(outside)[: n_objects - len(chosen)]
        chosen = np.concatenate([chosen, fill]).astype(np.int32)
        place = np.full(len(category), -1, np.int32)
        place[chosen] = np.arange(n_objects)
        among = own[name][(place[candidates[own[name]]] >= 0).all(1)]
        if not len(among):
            continue  # objects of one name only; another draw finds others
        at = rng.choice(among, batch)
        shown = rng.permuted(np.tile(np.arange(all_views, dtype=np.int32), (n_objects, 1)), axis=1)
        picked = Rows(*(np.asarray(part)[at] for part in rows))
        yield Group(chosen, np.sort(shown[:, :n_views], 1), place[picked.objects], picked)


def gather_group(tables: Tables, group: Group) -> Batch:
    """Make a batch of a group: `pixels` holds each object once, `places` says which is whose.

    Args:
        tables: of NumPy arrays or memory maps.
        group: from `groups`.

    >>> tables = Tables(np.ones((3, 8), bool), np.eye(2), np.arange(2), np.ones((3, 8, 4)))
    >>> tables = tables._replace(pixels=np.ones((3, 8, 5, 5)))
    >>> rows = Rows(np.array([[0, 2]]), np.array([1]), np.array([0]))
    >>> group = Group(np.array([0, 2]), np.zeros((2, 1), int), np.array([[0, 1]]), rows)
    >>> batch = gather_group(tables, group)
    >>> batch.views.shape, batch.pixels.shape, batch.places.tolist()
    ((1, 2, 1, 4), (2, 1, 5, 5), [[0, 1]])
    """
    seen = tables._replace(mask=np.asarray(tables.mask)[:, :1], views=None, pixels=None)
    batch = gather(seen, group.rows)
    at = group.objects[:, None], group.views
    parts: dict[str, Any] = {"mask": np.asarray(tables.mask)[at][group.places]}
    if tables.views is not None:
        parts["views"] = np.asarray(tables.views[at])[group.places]
    if tables.pixels is not None:
        parts |= {"pixels": np.asarray(tables.pixels[at]), "places": group.places}
    return batch._replace(**parts)
