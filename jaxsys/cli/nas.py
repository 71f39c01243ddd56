"""`jaxsys nas`: rank architectures without training them, learn from tables, search."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxsys.cli.options import Common
from jaxsys.core.errors import UserError

Images = Literal["noise", "digits", "cifar"]


@dataclass(frozen=True, kw_only=True)
class ScoreCommand(Common):
    """Score architectures of a search space with zero-cost proxies.

    Attributes:
      out: Folder for scores.npz, totals and node-wise; a run that was stopped goes on there.
      seed: Seed of the images, and of the cells that are drawn.
      space: nb201 (NAS-Bench-201), nb101 (NAS-Bench-101), darts or vit (AutoFormer's).
      cells: Architectures as the space writes them; of nb201 also numbers from 0 to 15624.
      table: Take the cells of this table (.csv, .json, .npz, or digits: the package's own).
      dataset: Keep the rows of this data set, where the table has several.
      sample: Draw so many of the cells (of the whole space if none are named).
      proxies: Names such as synflow, snip, grad_norm, naswot, zico.
      images: What the network sees.
      batch: Images.
      inits: Initialisations that are averaged.
      channels: Of the first stage or tokens (nb201 16, nb101 128, darts 16, vit 192).
      depth: Cells in a stage (nb201 5, nb101 3), in all (darts 8), or layers (vit 12).
      block: Cells scored at a time; less needs less memory.
    """

    space: Literal["nb201", "nb101", "darts", "vit"] = "nb201"
    cells: tuple[str, ...] = ()
    table: Path | None = None
    dataset: str | None = None
    sample: int | None = None
    proxies: tuple[str, ...] = ("synflow", "snip", "grad_norm")
    images: Images = "noise"
    batch: int = 16
    inits: int = 1
    channels: int | None = None
    depth: int | None = None
    block: int = 64


@dataclass(frozen=True, kw_only=True)
class TableCommand(Common):
    """What `fit` and `search` share.

    Attributes:
      out: Folder for what is written.
      seed: First of the seeds.
      table: Cells and what is known of them (.csv, .json, .npz, or digits: the package's own).
      dataset: Keep the rows of this data set, where the table has several.
      scores: A second table, such as scores.npz of `nas score`, joined by cell.
      columns: Statistics that the predictor sees, totals or node-wise.
      target: Column that is learned, such as validation accuracy.
      test: Column that counts in the end; the target by default.
      predictor: mabn, parzc (mabn with a graph encoder), mlp, gcn or trees (gradient-boosted).
      losses: Added up: mse, pair, diff_kendall, list_mle.
      epochs: Passes over the training set.
      lr: Peak of Adam's rate.
      seeds: How many runs.
    """

    table: Path
    target: str
    test: str | None = None
    dataset: str | None = None
    scores: Path | None = None
    columns: tuple[str, ...] = ()
    predictor: Literal["mabn", "parzc", "mlp", "gcn", "trees"] = "parzc"
    losses: tuple[str, ...] = ("mse", "pair")
    epochs: int = 150
    lr: float = 1e-3
    seeds: int = 5


@dataclass(frozen=True, kw_only=True)
class FitCommand(TableCommand):
    """Train a predictor on a few architectures of a table and rank all the others.

    Attributes:
      train: Architectures in a training set.
      draws: Draws of the Bayesian weights at prediction; 0 uses their means.
      members: Predictors trained for each seed, whose mean ranks and whose spread is written.
    """

    train: int = 156
    draws: int = 0
    members: int = 1


@dataclass(frozen=True, kw_only=True)
class SearchCommand(TableCommand):
    """Search a table for its best cell, asking for as few as possible.

    Attributes:
      method: random, evolution (regularised) or guided (by the predictor).
      queries: Cells asked for.
      start: Random cells asked first (guided), or the population (evolution).
      step: Cells asked after each training (guided).
    """

    method: Literal["random", "evolution", "guided"] = "guided"
    queries: int = 200
    start: int = 40
    step: int = 40


def run_score(config: ScoreCommand) -> dict[str, Any]:
    """Print a table of scores."""
    from jaxsys.core.report import print_table
    from jaxsys.nas.batches import image_batch
    from jaxsys.nas.run import choose_cells
    from jaxsys.nas.score import ScoreConfig
    from jaxsys.nas.spaces import choose_archs, open_space, score_archs

    wanted = ScoreConfig(config.proxies, tuple(range(config.inits)))
    images, labels = image_batch(config.images, config.batch, seed=config.seed)
    sizes: dict[str, Any] = {"channels": config.channels, "depth": config.depth}
    opened = open_space(config.space, **sizes, image_channels=images.shape[-1])
    named = (config.cells, config.table, config.sample)
    drawn: dict[str, Any] = {"dataset": config.dataset, "seed": config.seed}
    if config.space == "nb201":
        cells = choose_cells(*named, **drawn)
    else:
        cells = choose_archs(opened, *named, space=config.space, **drawn)
    found = score_archs(opened, cells, images, labels, wanted, out=config.out, block=config.block)
    totals = {name: values.mean(1) for name, values in found.totals.items()}
    rows = [
        {"cell": opened.text(cell)} | {name: float(v[i]) for name, v in totals.items()}
        for i, cell in enumerate(cells)
    ]
    if not config.json:
        print_table(rows)
    return {"scores": rows, "images": config.images, "inits": config.inits}


def run_fit(config: FitCommand) -> dict[str, Any]:
    """Print τ on the architectures left out."""
    from jaxsys.core.report import print_table
    from jaxsys.nas.run import (
        draw_rows,
        fit_and_test,
        mean_interval,
        open_table,
        save_fit,
        table_inputs,
    )

    table = open_table(config.table, config.scores, dataset=config.dataset)
    inputs = table_inputs(table, config.columns)
    target, test = table.column(config.target), table.column(config.test or config.target)
    rows = draw_rows(len(target), config.train, config.seeds, config.seed)
    found = fit_and_test(
        config.predictor,
        inputs,
        target,
        test,
        rows,
        _fit_config(config),
        draws=config.draws,
        members=config.members,
        seed=config.seed,
    )
    mean, (low, high) = mean_interval(found.tau)
    result = {
        "predictor": config.predictor,
        "train": config.train,
        "tested": len(target) - config.train,
        "seeds": config.seeds,
        "tau": mean,
        "tau_low": low,
        "tau_high": high,
    }
    if config.out:
        save_fit(config.out, table, found)
    if not config.json:
        print_table([result])
    return result | {"tau_of_seeds": found.tau}


def run_search(config: SearchCommand) -> dict[str, Any]:
    """Print what each seed would keep."""
    from jaxsys.core.report import print_table
    from jaxsys.nas.run import open_table, search_table

    table = open_table(config.table, config.scores, dataset=config.dataset)
    if config.method == "guided" and config.predictor == "trees":
        raise UserError("predictor 'trees' guides no search; expected mabn, parzc, mlp or gcn")
    rows, curves = search_table(
        table,
        config.method,
        config.target,
        config.test or config.target,
        config.columns,
        config.predictor,
        _fit_config(config),
        queries=config.queries,
        start=config.start,
        step=config.step,
        seeds=range(config.seed, config.seed + config.seeds),
        out=config.out,
    )
    if not config.json:
        print_table(rows)
    return {
        "method": config.method,
        "queries": config.queries,
        "found": rows,
        "test_mean": float(curves[:, -1].mean()),
    }


def _fit_config(config: TableCommand) -> Any:
    from jaxsys.nas.fit import FitConfig

    return FitConfig(losses=config.losses, epochs=config.epochs, lr=config.lr)


COMMANDS = {
    "score": (ScoreCommand, run_score),
    "fit": (FitCommand, run_fit),
    "search": (SearchCommand, run_search),
}
