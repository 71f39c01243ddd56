"""Score any grounder over rows in batches of one size, and say how good it is, where, and when not.

Axes: ``P`` passes, ``R`` rows, ``K`` candidates, ``V`` views.

Reference: arXiv 2107.12514, section 5 (SNARE's protocol).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from jaxsys.core.errors import UserError
from jaxsys.ground import metrics
from jaxsys.ground.contract import Batch, Grounder
from jaxsys.ground.robust import drop_views
from jaxsys.ground.spread import own_rows, replicate, row_mesh, split, spread
from jaxsys.ground.tables import Rows, Tables, check, gather, take_rows

Change = Callable[[Batch, Any], Batch]


class Share(NamedTuple):
    """Hold how many questions were answered rightly, passes pooled.

    Attributes:
        right: answers.
        asked: questions, times passes.

    >>> Share(3, 4).accuracy
    0.75
    """

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """Give the share of right answers; NaN where nothing was asked."""
        return self.right / self.asked if self.asked else float("nan")


class Condition(NamedTuple):
    """Hold one way of making the task harder.

    Attributes:
        name: for tables.
        tables: what is seen then, such as features of views under another light; None takes those
            of the plain task.
        change: (batch, key) -> batch, inside the compiled program, such as `keep_views`.
        rows: what is asked then, such as objects of another library; None asks the same.

    >>> Condition("2 views", change=keep_views(2)).tables is None
    True
    """

    name: str
    tables: Tables | None = None
    change: Change | None = None
    rows: Rows | None = None


def hits(scores: Float[Array, "B K"], answer: Integer[Array, "B"]) -> Bool[Array, "B"]:
    """Say which rows are right, inside a compiled program, as `metrics.strictly_best` does.

    Args:
        scores: of the candidates; one that is not a number makes its row wrong.
        answer: the place of the one that is meant.

    >>> hits(jnp.array([[2.0, 1.0], [1.0, 1.0]]), jnp.array([0, 0])).tolist()
    [True, False]
    """
    meant = jnp.take_along_axis(scores, answer[:, None], 1)
    own = jnp.arange(scores.shape[1])[None] == answer[:, None]
    return jnp.all((meant > scores) | own, 1)


def keep_views(count: int) -> Change:
    """Make a change that leaves each candidate a few of its views, drawn evenly.

    Args:
        count: how many.

    Raises:
        UserError: for fewer than one.

    >>> batch = Batch(jnp.ones((1, 4)), jnp.ones((1, 2, 8), bool))
    >>> int(keep_views(2)(batch, jax.random.key(0)).mask.sum())
    4
    """
    if count < 1:
        raise UserError(f"{count} views are to be kept; expected at least 1; keep more")
    return lambda batch, key: batch._replace(mask=drop_views(key, jnp.asarray(batch.mask), count))


@lru_cache(maxsize=16)
def _program(grounder: Grounder, change: Change | None, mesh: Any, resident: bool) -> Any:
    def run(trainable: Any, frozen: Any, tables: Any, rows: Any, first: Any, at: Any) -> Any:
        batch = spread(gather(tables, rows), mesh) if resident else rows
        key = jax.random.key(at[0])
        key = jax.random.fold_in(jax.random.fold_in(key, at[1]), at[2])
        change_key, key = jax.random.split(key)
        if change is not None:
            batch = change(batch, change_key)
        if first is not None:
            # An object that lacks the view begins with the first that it has.
            lacks = ~jnp.asarray(batch.mask)[..., first]
            start = jnp.where(lacks, jnp.argmax(jnp.asarray(batch.mask), -1), first)
            batch = batch._replace(first_view=start)
        return grounder.scores(trainable, frozen, batch, key=key)

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(run, out_shardings=sharding)


def score(
    grounder: Grounder,
    trainable: Any,
    frozen: Any,
    tables: Tables,
    rows: Rows,
    *,
    passes: int = 1,
    first_views: bool = False,
    change: Change | None = None,
    batch: int = 256,
    seed: int = 0,
    resident: bool = True,
    devices: Sequence[Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Float[np.ndarray, "P R K"]:
    """Score every row, once in each pass.

    Args:
        grounder: whose scores are asked.
        trainable: its trained parameters.
        frozen: those it was trained beside.
        tables: of objects and texts.
        rows: R questions; their answers are not looked at.
        passes: P; each draws other random views and dropped views. One is enough for a grounder
            that draws none.
        first_views: pass p shows view p mod V first, as SNARE's protocol asks of LaGOR.
        change: what is done to each batch beforehand.
        batch: rows scored at a time; the last batch is filled up and cut, so one program serves.
        seed: of the draws.
        resident: put the tables on the device; without, batches are gathered on the host.
        devices: that share each batch; the first one if left out and there is one process.
        progress: called with batches done and their number.

    Raises:
        UserError: for fewer than one pass, or rows and tables that do not fit.

    >>> from jaxsys.ground.match import zero_shot
    >>> tables = Tables(np.ones((3, 1), bool), np.eye(3), np.arange(3), np.eye(3)[:, None])
    >>> rows = Rows(np.array([[0, 1], [2, 0]]), np.array([1, 2]), np.array([1, 0]))
    >>> score(zero_shot(scale=1.0), {}, {}, tables, rows).tolist()
    [[[0.0, 1.0], [1.0, 0.0]]]
    """
    if passes < 1 or batch < 1:
        raise UserError(f"passes is {passes} and batch {batch}; expected at least 1; raise them")
    check(tables, rows, answers=False)
    n, v = len(rows.text), np.shape(tables.mask)[1]
    if devices is None and jax.process_count() == 1:
        devices = jax.local_devices()[:1]
    count = len(jax.devices() if devices is None else devices)
    batch = -(-min(batch, n) // count) * count
    mesh = row_mesh(batch, devices)
    run = _program(grounder, change, mesh, resident)
    trainable, frozen = replicate((trainable, frozen), mesh)
    held = replicate(tables, mesh) if resident else None
    own = own_rows(batch, mesh)
    found, starts = [], range(0, n, batch)
    for number in range(passes):
        parts = []
        for i, start in enumerate(starts):
            asked = take_rows(rows, np.arange(start, start + batch) % n)
            if resident:
                asked = replicate(Rows(*map(np.asarray, asked)), mesh)
            else:
                asked = split(gather(tables, take_rows(asked, own)), mesh)
            first = np.int32(number % v) if first_views else None
            at = np.array([seed, number, i], np.int32)
            parts.append(run(trainable, frozen, held, asked, first, at))
            progress(number * len(starts) + i + 1, passes * len(starts))
        found.append(np.concatenate([np.asarray(part) for part in parts])[:n])
    return np.stack(found)


def snare_figures(scores: Any, answer: Any, visual: Any) -> dict[str, float]:
    """Give SNARE's three figures: counts of all passes pooled, ties wrong.

    Args:
        scores: [P, R, 2], as from `score`.
        answer: [R].
        visual: [R] bool.

    Returns:
        ``all``, ``visual`` and ``blind``, shares of right answers.

    Reference: arXiv 2107.12514, section 5.

    >>> snare_figures([[[2.0, 1.0], [0.0, 1.0]]], [0, 0], [True, False])
    {'all': 0.5, 'visual': 1.0, 'blind': 0.0}
    """
    counts = metrics.pooled([metrics.count(one, answer, visual) for one in np.asarray(scores)])
    return {
        "all": counts.all,
        "visual": counts.visual_accuracy,
        "blind": counts.blind_accuracy,
    }


def group_figures(scores: Any, answer: Any, groups: Mapping[str, Any]) -> dict[str, Share]:
    """Count right answers of all rows and of some groups of them.

    Args:
        scores: [P, R, K], as from `score`.
        answer: [R].
        groups: name to [R] bool, such as pairs with the same noun, or names unseen in training.

    Raises:
        UserError: for a group of another length.

    >>> group_figures([[[2.0, 1.0], [0.0, 1.0]]], [0, 0], {"same noun": [False, True]})
    {'all': Share(right=1, asked=2), 'same noun': Share(right=0, asked=1)}
    """
    right = np.stack([metrics.strictly_best(one, answer) for one in np.asarray(scores)])
    found = {"all": Share(int(right.sum()), right.size)}
    for name, members in groups.items():
        inside = np.asarray(members, bool)
        if inside.shape != right.shape[1:]:
            raise UserError(
                f"group {name!r} has shape {inside.shape} and there are {right.shape[1]} rows; "
                "expected one mark each; make them together"
            )
        found[name] = Share(int(right[:, inside].sum()), int(inside.sum()) * len(right))
    return found


def difference(
    first: Any, second: Any, clusters: Any, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Compare two conditions on the same rows, drawing whole clusters of rows for the interval.

    Rows that mean the same object are not independent, so objects are drawn, not rows.

    Args:
        first: [P, R], whether right.
        second: [P, R].
        clusters: [R], such as the objects that are meant.
        level: coverage aimed at.
        draws: of the bootstrap.
        seed: of it.

    Returns:
        Accuracy of the second minus that of the first, and its interval.

    >>> difference([[True, True]], [[True, False]], [0, 1])[0]
    -0.5
    """
    gap = np.asarray(second, float).mean(0) - np.asarray(first, float).mean(0)
    _, of_row = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(of_row, gap), np.bincount(of_row)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(gap.mean()), (float(low), float(high))


def robustness(
    grounder: Grounder,
    trainable: Any,
    frozen: Any,
    tables: Tables,
    rows: Rows,
    conditions: Sequence[Condition],
    **options: Any,
) -> list[dict[str, Any]]:
    """Ask the same questions under harder conditions.

    Args:
        grounder: as for `score`.
        trainable: as for `score`.
        frozen: as for `score`.
        tables: of the plain task.
        rows: R questions with answers.
        conditions: what is made harder.
        options: of `score`.

    Returns:
        A row for the plain task and each condition: ``condition``, ``accuracy``, ``asked`` rows,
        and, where the same rows were asked, ``difference`` to the plain task with its interval
        ``low``, ``high`` over objects.

    >>> from jaxsys.ground.match import zero_shot
    >>> tables = Tables(np.ones((2, 1), bool), np.eye(2), np.arange(2), np.eye(2)[:, None])
    >>> rows, swapped = Rows(np.array([[0, 1]]), np.array([1]), np.array([1])), np.eye(2)[::-1]
    >>> dark = Condition("dark", tables._replace(views=swapped[:, None]))
    >>> [row["accuracy"] for row in robustness(zero_shot(), {}, {}, tables, rows, [dark])]
    [1.0, 0.0]
    """

    def right(condition: Condition) -> np.ndarray:
        seen = condition.tables or tables
        asked = condition.rows or rows
        check(seen, asked)
        found = score(grounder, trainable, frozen, seen, asked, change=condition.change, **options)
        return np.stack([metrics.strictly_best(one, np.asarray(asked.answer)) for one in found])

    plain = right(Condition("plain"))
    answer = np.asarray(rows.answer)
    meant = np.take_along_axis(np.asarray(rows.objects), answer[:, None], 1)[:, 0]
    found: list[dict[str, Any]] = [
        {"condition": "plain", "accuracy": float(plain.mean()), "asked": plain.shape[1]}
    ]
    for condition in conditions:
        one = right(condition)
        row = {"condition": condition.name, "accuracy": float(one.mean()), "asked": one.shape[1]}
        if condition.rows is None:
            gap, (low, high) = difference(plain, one, meant)
            row |= {"difference": gap, "low": low, "high": high}
        found.append(row)
    return found
