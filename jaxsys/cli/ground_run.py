"""`jaxsys ground train` and `jaxsys ground evaluate`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxsys.cli.options import Common, Output
from jaxsys.core.errors import UserError
from jaxsys.ground.build import Choice
from jaxsys.ground.program import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Common):
    """Train a grounder on SNARE, on a prepared furniture game, or on toys; go on where it stopped.

    SNARE comes with none of its parts. Its annotations are amt/folds_adversarial of the public
    repository snaredataset/snare, whose README links the two CLIP feature files; the screenshots
    are ShapeNetSem's models-screenshots.zip, after accepting ShapeNet's terms. Put all into one
    folder: `jaxsys ground train --snare DIR --grounder match --out RUN`, then `jaxsys ground
    evaluate RUN`. With features alone, da4lg needs `--domain residual` (frozen and none work too);
    its adapters, and magic, need `--clip` and `--screenshots`.

    Attributes:
      out: Folder of the run (runs/ground by default); the same command again goes on there.
      seed: First of the seeds.
      seeds: How many models; over fixed features they are trained side by side.
      snare: Folder with SNARE's train.json, val.json and, if there, test.json.
      images: shapenet-clipViT32-frames.json.gz, where it is not in that folder.
      texts: langfeat-512-clipViT32.json.gz, where it is not in that folder.
      width: Of the vectors in these two files.
      clip: CLIP checkpoint that encodes pictures and texts, instead of the two files.
      screenshots: What models-screenshots.zip unpacks to; with --clip, and for reports.
      lone: SNARE's few rows with one object: drop them, or seed a distractor.
      prepared: Folder of `jaxsys ground prepare`.
      encoder: Whose features of it: efficientnet-lite0, mean-colour or clip:PATH.
      text_encoder: minilm or clip:PATH.
      text: What describes an object of it: name or name+tags.
      split: Of its objects: object (at random) or library (train Scopia and default, test
        BlendSwap).
      split_seed: Draws the split.
      validation: Share of its objects that training stops by.
      candidates: Objects in a question.
      views: How many views of each object, evenly spaced; all by default.
      start: Run of match whose head lagor begins from, as published (with --lr 5e-5).
      choice: The grounder.
      training: Steps and rates.
    """

    seeds: int = 1
    snare: Path | None = None
    images: Path | None = None
    texts: Path | None = None
    width: int = 512
    clip: Path | None = None
    screenshots: Path | None = None
    lone: Literal["drop", "seed"] = "drop"
    prepared: Path | None = None
    encoder: str = "efficientnet-lite0"
    text_encoder: str = "minilm"
    text: Literal["name", "name+tags"] = "name+tags"
    split: Literal["object", "library"] = "object"
    split_seed: int = 0
    validation: float = 0.1
    candidates: int = 2
    views: int | None = None
    start: Path | None = None
    choice: Choice = field(default_factory=Choice)
    training: TrainConfig = field(default_factory=TrainConfig)

    spreads = True


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Output):
    """Score a run of `jaxsys ground train`: accuracies, harder conditions, a page of pictures.

    Attributes:
      run: Folder of the run.
      fold: train, valid or test.
      passes: Over the fold; by default 8 where views are drawn at random, as SNARE's protocol has
        it, else 1, which gives the same.
      robust: Also with 4, 2 and 1 views, a quarter of every view covered, and what else the task
        knows.
      shifted: Folders prepared from the same libraries at another elevation or light; with
        --robust.
      report: Show so many rows of the fold, drawn at random, in RUN/report-FOLD: a page and PNGs.
      rows: Show these rows of the fold instead.
      leaderboard: Write the predictions of SNARE's test fold here, in its authors' form.
      against: Other runs, evaluated on the same fold before: Welch's tests over the seeds.
    """

    run: Annotated[Path, tyro.conf.Positional]
    fold: Literal["train", "valid", "test"] = "valid"
    passes: int | None = None
    robust: bool = False
    shifted: tuple[Path, ...] = ()
    report: int = 0
    rows: tuple[int, ...] = ()
    leaderboard: Path | None = None
    against: tuple[Path, ...] = ()


def job_of(config: TrainCommand) -> Any:
    """Make the job that the options describe.

    >>> job_of(TrainCommand(seeds=2)).seeds
    (0, 1)
    """
    from jaxsys.ground.furniture_task import Furniture
    from jaxsys.ground.runs import Job
    from jaxsys.ground.snare_task import SnareFiles

    if config.seeds < 1:
        raise UserError(f"seeds is {config.seeds}; expected at least 1 model; raise it")
    snare = furniture = None
    if config.snare is not None:
        snare = SnareFiles(
            folder=config.snare,
            images=config.images,
            texts=config.texts,
            width=config.width,
            clip=config.clip,
            screenshots=config.screenshots,
            lone=config.lone,
        )
    if config.prepared is not None:
        furniture = Furniture(
            folder=config.prepared,
            encoder=config.encoder,
            text_encoder=config.text_encoder,
            text=config.text,
            split=config.split,
            split_seed=config.split_seed,
            validation=config.validation,
            candidates=config.candidates,
            views=config.views,
        )
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    return Job(config.choice, config.training, seeds, snare, furniture)


def run_train(config: TrainCommand) -> dict[str, Any]:
    """Print the best validation accuracy of every seed."""
    import numpy as np

    from jaxsys.cluster import join
    from jaxsys.core.report import atomic_write, print_table, to_json
    from jaxsys.evaluate.run import progress_bar
    from jaxsys.ground.runs import train_run
    from jaxsys.train.logs import JsonLines

    first = join(local_devices=1).process_id == 0
    job, out = job_of(config), config.out or Path("runs/ground")
    if config.snare is None and config.prepared is None and first:
        said = "no --snare and no --prepared: training on toys, whose figures say nothing"
        print(said, file=sys.stderr)
    with progress_bar("training") as progress:
        found = train_run(
            job,
            out,
            start=config.start,
            writer=JsonLines(out / "metrics.jsonl"),
            progress=progress,
            encoding=progress,
        )
    rows = []
    for i, seed in enumerate(job.seeds):
        if found is None:  # zero-shot trains nothing
            break
        best, accuracies = int(found.best_epoch[i]), found.accuracies[i]
        ran = int(np.isfinite(found.losses[i]).sum())
        rows.append(
            {"seed": seed, "epochs": ran, "best epoch": best, "loss": float(found.losses[i][best]),
             "validation accuracy": float(accuracies[best])}
        )  # fmt: skip
    result = {"grounder": job.choice.grounder, "seeds": rows, "out": str(out)}
    if first:
        atomic_write(out / "result.json", to_json(result) + "\n")
        if not config.json:
            print_table(rows, title=f"{job.choice.grounder}: {out}")
    return result


def run_evaluate(config: EvaluateCommand) -> dict[str, Any]:
    """Print accuracies, and what else was asked for."""
    from jaxsys.core.report import atomic_write, print_table, to_json
    from jaxsys.evaluate.run import progress_bar
    from jaxsys.ground.judge import evaluate_run, robust_run
    from jaxsys.ground.runs import load_run

    run = load_run(config.run, shifted=config.shifted)
    with progress_bar("batches") as progress:
        found = evaluate_run(run, config.fold, passes=config.passes, progress=progress)
    scores = found.pop("scores")
    result: dict[str, Any] = {"run": str(config.run), "seeds": run.job.seeds, **found}
    if config.leaderboard is not None:
        result["leaderboard"] = _leaderboard(config, run, scores)
    if "groups" in found:
        atomic_write(config.run / f"evaluation-{config.fold}.json", to_json(result) + "\n")
        if not config.json:
            rows = [
                {
                    "rows": name,
                    "accuracy": one["mean"],
                    "sd": one["deviation"],
                    "asked": one["asked"],
                }
                for name, one in found["groups"].items()
            ]
            print_table(rows, title=f"{config.run}, {config.fold}, {len(scores)} seeds")
    elif config.leaderboard is None:
        raise UserError(
            f"the fold {config.fold} has no answers to score; expected another fold, or a file for "
            "the predictions; give --fold valid or --leaderboard FILE"
        )
    if config.against:
        result["against"] = _against(config, result)
    if config.robust:
        result["robust"] = robust_run(run, config.fold)
        if not config.json:
            print_table(result["robust"], title="harder conditions, first seed")
    if config.report or config.rows:
        result["report"] = _report(config, run)
    return result


def _leaderboard(config: EvaluateCommand, run: Any, scores: Any) -> str:
    import numpy as np

    from jaxsys.ground.metrics import PASSES, write_leaderboard

    if config.fold not in run.questions.rows or config.leaderboard is None:
        raise UserError(
            "a leaderboard is SNARE's own; expected a run on SNARE and --fold test; leave it out"
        )
    first = scores[0]  # that of the first seed, in as many passes as the authors expect
    passes = np.resize(first, (max(PASSES, len(first)), *first.shape[1:]))
    seen = run.job.choice.views_seen or np.shape(run.questions.tables.mask)[1]
    rows = run.questions.rows[config.fold]
    write_leaderboard(config.leaderboard, rows, list(passes), views_seen=seen)
    if not config.json:
        print(f"predictions: {config.leaderboard}")
    return str(config.leaderboard)


def _against(config: EvaluateCommand, result: dict[str, Any]) -> list[dict[str, Any]]:
    from jaxsys.core.fields import read_object
    from jaxsys.core.report import print_table
    from jaxsys.ground.judge import compare_runs

    found = {str(config.run): result["groups"]}
    for other in config.against:
        file = other / f"evaluation-{config.fold}.json"
        if not file.is_file():
            raise UserError(
                f"{file} is not there; expected the other run's figures on the same fold; run "
                f"`jaxsys ground evaluate {other} --fold {config.fold}` first"
            )
        found[str(other)] = read_object(file.read_text(encoding="utf-8"), str(file))["groups"]
    rows = []
    for group in result["groups"]:
        if all(group in groups for groups in found.values()):
            each = {name: {group: x[group]["of_seeds"]} for name, x in found.items()}
            rows += [{"rows": group, **row._asdict()} for row in compare_runs(each, group)]
    if not config.json:
        print_table(rows, title="Welch's t over seeds, Bonferroni")
    return rows


def _report(config: EvaluateCommand, run: Any) -> str:
    import numpy as np

    from jaxsys.ground.judge import examples_of
    from jaxsys.ground.report import write_report

    count = len(run.questions.fold(config.fold).text)
    drawn = np.random.default_rng(0).permutation(count)[: config.report]
    places = list(config.rows) or sorted(drawn.tolist())
    examples, note = examples_of(run, config.fold, places)
    title = f"{run.job.choice.grounder}, {config.fold}"
    file = write_report(config.run / f"report-{config.fold}", examples, title, note)
    if not config.json:
        print(f"report: {file}")
    return str(file)
