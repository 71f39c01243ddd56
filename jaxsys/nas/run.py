"""From a table and a few settings to results: what the command line and the experiments share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.nas import predictor as predictors
from jaxsys.nas import rank, search, space
from jaxsys.nas.features import flat_features, predictor_inputs
from jaxsys.nas.fit import FitConfig, Fitted, boosted_trees, fit, predict
from jaxsys.nas.network import NetworkConfig
from jaxsys.nas.predictor import PredictorConfig
from jaxsys.nas.score import ScoreConfig, Scores, write_npz
from jaxsys.nas.spaces import nas_bench_201, score_archs
from jaxsys.nas.tables import Table, join, load

PREDICTORS = (*predictors.MODULES, "trees")


def parse_cells(names: Sequence[str]) -> Integer[np.ndarray, "N 6"]:
    """Read cells written as arch strings or as their numbers.

    Raises:
      UserError: for an unknown operation or a number outside the space.

    >>> parse_cells(["7"]).tolist()
    [[0, 0, 0, 0, 1, 2]]
    """
    found = [space.from_index(int(n)) if n.isdecimal() else space.from_string(n) for n in names]
    return np.stack(found) if found else np.zeros((0, 6), np.int32)


def score_cells(
    cells: Integer[np.ndarray, "N 6"],
    images: np.ndarray,
    labels: np.ndarray,
    config: ScoreConfig,
    network: NetworkConfig,
    *,
    out: Path | None = None,
    block: int = 64,
) -> Scores:
    """Score cells, and write `scores.npz`: cells, and for each proxy totals and nodes.

    Values are means over seeds. The blocks of a run that was stopped are in `out/blocks`.

    Args:
      cells: operations.
      images: `[B, Y, X, C]`.
      labels: `[B]`.
      config: proxies and seeds.
      network: what surrounds the cells.
      out: folder; nothing is written if left out.
      block: cells at a time.

    Raises:
      UserError: if there are no cells, or the images do not fit the network.

    >>> cells, x = space.from_index(np.arange(2)), np.ones((1, 8, 8, 3), np.float32)
    >>> found = score_cells(cells, x, np.zeros(1, int), ScoreConfig(("params",)),
    ...                     NetworkConfig(4, 1), block=8)
    >>> found.totals["params"].shape
    (2, 1)
    """
    opened = nas_bench_201(network)
    return score_archs(opened, cells, images, labels, config, out=out, block=block)


class FitResult(NamedTuple):
    """How well a predictor ranks what it was not trained on.

    Attributes:
      tau: `[K]` Kendall's τ-b of each seed.
      predictions: `[K, N]` for the whole table, training rows included; means of the members.
      spread: `[K, N]` their standard deviation, how uncertain the prediction is; 0 for one member.
      rows: `[K, n]` training rows.
      fitted: parameters, members of a seed side by side, or None for trees.

    >>> FitResult._fields[0]
    'tau'
    """

    tau: np.ndarray
    predictions: np.ndarray
    spread: np.ndarray
    rows: np.ndarray
    fitted: Fitted | None


def draw_rows(n_table: int, n_train: int, seeds: int, seed: int = 0) -> Integer[np.ndarray, "K n"]:
    """Draw each seed's training rows.

    Raises:
      UserError: if nothing would be left to test on.

    >>> draw_rows(10, 4, 2).shape
    (2, 4)
    """
    if not 2 <= n_train <= n_table - 2 or seeds < 1:
        raise UserError(
            f"{n_train} training rows of {n_table} and {seeds} seeds are asked for; expected at "
            "least 2 rows, 2 left to test on, and a seed; change the numbers"
        )
    draws = [np.random.default_rng(seed + k).permutation(n_table) for k in range(seeds)]
    return np.stack([d[:n_train] for d in draws])


def fit_and_test(
    name: str,
    inputs: dict[str, Any],
    targets: Float[np.ndarray, "N"] | Float[np.ndarray, "K N"],
    tests: Float[np.ndarray, "N"] | Float[np.ndarray, "K N"],
    rows: Integer[np.ndarray, "K n"],
    config: FitConfig,
    *,
    sizes: PredictorConfig | None = None,
    draws: int = 0,
    members: int = 1,
    seed: int = 0,
) -> FitResult:
    """Train a predictor for each row of training rows and test it on all others.

    With several members a seed's prediction is their mean: they share the training set and differ
    in initialisation and order.

    Args:
      name: one of `PREDICTORS`.
      inputs: from `features.predictor_inputs`.
      targets: fitted, such as validation accuracy; one for all seeds, or `[K, N]`.
      tests: ranked, such as test accuracy; likewise.
      rows: from `draw_rows`.
      config: of the training.
      sizes: of the predictor.
      draws: of Bayesian weights at prediction; 0 uses means.
      members: trained for each seed.
      seed: of initialisation.

    Raises:
      UserError: for an unknown predictor, fewer members than 1, or targets as `fit` refuses them.

    >>> x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    >>> inputs = {"nodes": x, "ops": np.zeros((40, 6), int)}
    >>> found = fit_and_test("trees", inputs, x[:, 0], x[:, 0], draw_rows(40, 20, 1), FitConfig())
    >>> bool(found.tau[0] > 0.6)
    True
    """
    if members < 1:
        raise UserError(f"{members} members are asked for; expected at least 1; raise the number")
    fitted, own = None, np.repeat(rows, members, 0)
    wanted = np.repeat(np.broadcast_to(targets, (len(rows), np.shape(targets)[-1])), members, 0)
    if name == "trees":
        found = boosted_trees(flat_features(inputs), wanted, own)
    else:
        model = predictors.make(name, inputs["nodes"].shape[1], sizes)
        fitted = fit(model, inputs, wanted, own, config, seed=seed)
        found, _ = predict(model, fitted, inputs, draws=draws, seed=seed)
    grouped = found.reshape(len(rows), members, -1)
    found, spread = grouped.mean(1), grouped.std(1)
    tau = []
    wanted = np.broadcast_to(tests, found.shape)
    for scores, own, test in zip(found, rows, wanted, strict=True):
        others = np.setdiff1d(np.arange(len(test)), own)
        tau.append(rank.kendall_tau(scores[others], test[others]))
    return FitResult(np.array(tau), found, spread, rows, fitted)


def table_inputs(
    table: Table, columns: Sequence[str], *, scale: Literal["network", "table"] = "table"
) -> dict[str, np.ndarray]:
    """Make a predictor's inputs from columns of a table: totals, or statistics of nodes.

    Raises:
      UserError: for a table without cells, or a column that is missing or incomplete.

    >>> table = Table(np.zeros((2, 6), np.int32), {"snip": np.array([1.0, 3.0])})
    >>> table_inputs(table, ["snip"])["nodes"].tolist()
    [[-1.0], [1.0]]
    """
    if table.cells is None:
        raise UserError("the table names no cells; expected cells; load it with cells")
    values = {name: table.column(name).reshape(len(table.cells), -1) for name in columns}
    if not values:
        raise UserError(
            f"no statistics are named; expected columns out of {', '.join(table.columns)}; name "
            "some"
        )
    return predictor_inputs(table.cells, values, scale=scale)


def mean_interval(
    values: Any, *, level: float = 0.95, n: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Average over seeds, with a percentile bootstrap interval.

    >>> mean_interval([1.0, 1.0])
    (1.0, (1.0, 1.0))
    """
    v = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(len(v), size=(n, len(v)))
    low, high = np.quantile(v[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(v.mean()), (float(low), float(high))


def choose_cells(
    names: Sequence[str],
    table: Path | None,
    sample: int | None,
    *,
    dataset: str | None = None,
    seed: int = 0,
) -> Integer[np.ndarray, "N 6"]:
    """Collect cells by name and from a table, and draw some of them.

    Args:
      names: arch strings or numbers.
      table: a file whose cells are taken, in its order.
      sample: how many to draw; of all cells if none are named; None keeps all that are named.
      dataset: rows to keep of the table.
      seed: of the draw.

    Raises:
      UserError: for a sample larger than the set.

    >>> choose_cells(["7", "8"], None, None).shape
    (2, 6)
    """
    parts = [parse_cells(names)]
    if table is not None:
        cells = load(table, dataset=dataset).cells
        assert cells is not None
        parts.append(cells)
    found = np.concatenate(parts)
    if sample is None:
        return found
    found = found if names or table is not None else space.all_cells()
    if not 1 <= sample <= len(found):
        raise UserError(
            f"a sample of {sample} is asked for; expected 1 to {len(found)} cells; change it"
        )
    return found[np.random.default_rng(seed).permutation(len(found))[:sample]]


def open_table(path: Path, scores: Path | None = None, *, dataset: str | None = None) -> Table:
    """Load a table of cells, and put the scores of another file beside it.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "t.csv")
    >>> _ = path.write_text("arch_str,acc\\n" + space.to_string([0] * 6) + ",90\\n")
    >>> open_table(path).column("acc").tolist()
    [90.0]
    """
    table = load(path, dataset=dataset)
    return table if scores is None else join(table, load(scores))


def save_fit(folder: Path, table: Table, found: FitResult) -> None:
    """Write `predictions.npz` (cells, predictions, spread, rows) and the parameters by Orbax.

    >>> import tempfile
    >>> table = Table(np.zeros((1, 6), np.int32), {})
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_fit(folder, table, FitResult(*[np.ones((1, 1))] * 4, None))
    >>> [f.name for f in folder.iterdir()]
    ['predictions.npz']
    """
    arrays = {"tau": found.tau, "predictions": found.predictions}
    arrays |= {"spread": found.spread, "rows": found.rows}
    cells = {} if table.cells is None else {"cells": table.cells}
    write_npz(folder / "predictions.npz", cells | arrays)
    if found.fitted is not None:
        RunStore(folder / "predictor").save(0, found.fitted._asdict())


def search_table(
    table: Table,
    method: Literal["random", "evolution", "guided"],
    target: str,
    test: str,
    columns: Sequence[str],
    predictor: str,
    config: FitConfig,
    *,
    queries: int,
    start: int,
    step: int,
    seeds: Sequence[int],
    out: Path | None = None,
) -> tuple[list[dict[str, Any]], Float[np.ndarray, "K Q"]]:
    """Search a table once for each seed.

    Args:
      table: with cells.
      method: how.
      target: column that the search sees.
      test: column that counts.
      columns: of the predictor; see `table_inputs`.
      predictor: name, for `guided`.
      config: of its training.
      queries: Q.
      start: random cells first, or the population.
      step: cells after each training.
      seeds: K.
      out: folder for `search.npz`.

    Returns:
      For each seed the cell kept and its values, and the test value kept after every query.

    >>> table = Table(space.all_cells(), {"acc": np.arange(15625.0)})
    >>> rows, curves = search_table(table, "random", "acc", "acc", (), "", FitConfig(), queries=9,
    ...                             start=1, step=1, seeds=(0, 1))
    >>> curves.shape, sorted(rows[0])
    ((2, 9), ['cell', 'seed', 'target', 'test'])
    """
    assert table.cells is not None
    evaluate, final = search.from_table(table, target), search.from_table(table, test)
    if method == "guided":
        inputs = table_inputs(table, columns)
        model = predictors.make(predictor, inputs["nodes"].shape[1])
        options = {"queries": queries, "start": start, "step": step, "seeds": seeds}
        traces = search.guided_search(evaluate, table.cells, model, inputs, config, **options)
    elif method == "evolution":
        size = min(10, start)
        traces = [
            search.evolution(evaluate, queries, population=start, sample=size, seed=s)
            for s in seeds
        ]
    else:
        traces = [search.random_search(evaluate, queries, pool=table.cells, seed=s) for s in seeds]
    curves = np.stack([search.kept_so_far(trace, final) for trace in traces])
    rows = []
    for seed, trace, curve in zip(seeds, traces, curves, strict=True):
        best = trace.cells[int(np.argmax(trace.values))]
        rows.append(
            {
                "seed": seed,
                "cell": space.to_string(best),
                "target": float(trace.values.max()),
                "test": float(curve[-1]),
            }
        )
    if out is not None:
        cells, values = (np.stack(v) for v in zip(*traces, strict=True))
        write_npz(out / "search.npz", {"cells": cells, "values": values, "test": curves})
    return rows, curves
