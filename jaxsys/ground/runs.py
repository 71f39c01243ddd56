"""A run as a folder: what was asked of it, its checkpoints, what it scores, what it shows.

    RUN/run.json                  task, grounder, training, seeds
    RUN/checkpoints/seed-<s>/     the newest states (`seeds` where all are trained side by side)
    RUN/metrics.jsonl             loss and validation accuracy of every epoch
    RUN/best/                     the parameters that were kept, stacked over the seeds
    RUN/evaluation-<fold>.json    accuracies

Axes: ``S`` seeds.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.core.fields import read_object
from jaxsys.core.report import atomic_write, to_json
from jaxsys.ground.build import Choice, make_grounder
from jaxsys.ground.contract import Grounder
from jaxsys.ground.furniture_task import Furniture, open_furniture
from jaxsys.ground.questions import Questions
from jaxsys.ground.snare_task import SnareFiles, open_snare
from jaxsys.ground.spread import replicate, row_mesh
from jaxsys.ground.toys import toy_questions
from jaxsys.ground.train import Fitted, Progress, TrainConfig, fit, fit_seeds
from jaxsys.train.logs import Writer

_NONE: Progress = lambda done, total: None  # noqa: E731


@dataclass(frozen=True)
class Job:
    """Describe a run.

    Attributes:
        choice: the grounder.
        training: steps and rates.
        seeds: of the models.
        snare: where SNARE is; at most one of the two tasks is given.
        furniture: a game on a prepared folder; without either the toys are asked about.

    >>> Job(Choice(grounder="match")).seeds
    (0,)
    """

    choice: Choice
    training: TrainConfig = field(default_factory=TrainConfig)
    seeds: tuple[int, ...] = (0,)
    snare: SnareFiles | None = None
    furniture: Furniture | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds are {self.seeds}; expected different ones, at least one")
        if self.snare is not None and self.furniture is not None:
            raise UserError(
                "both SNARE and a prepared folder are named; expected one task; leave one out"
            )

    def to_json(self) -> str:
        """Write it as JSON, with absolute paths."""

        def plain(x: Any) -> Any:
            if isinstance(x, Path):
                return str(x.absolute())
            return {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else x

        return to_json(plain(dataclasses.asdict(self)))


def read_job(folder: Path) -> Job:
    """Read what `train_run` was asked.

    Args:
        folder: of the run.

    Raises:
        UserError: for a folder without a run.

    >>> read_job(Path("nowhere"))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere holds no run ...
    """
    file = folder / "run.json"
    try:
        found = read_object(file.read_text(encoding="utf-8"), f"run {file}")
        parts = {"choice": Choice, "training": TrainConfig}
        parts |= {"snare": SnareFiles, "furniture": Furniture}
        made = {k: v and _restore(parts[k], v) if k in parts else v for k, v in found.items()}
        return Job(**{**made, "seeds": tuple(found["seeds"])})  # type: ignore[arg-type]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{folder} holds no run ({error}); expected a folder that `jaxsys ground train` wrote; "
            "name one"
        ) from None
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} describes no run of this version ({error}); expected what `jaxsys ground "
            "train` wrote; train again"
        ) from None


def _restore(cls: Any, values: Mapping[str, Any]) -> Any:
    def one(name: str, value: Any) -> Any:
        kind = cls.__dataclass_fields__[name].type
        if isinstance(value, str) and kind in (Path, Path | None):
            return Path(value)
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: one(name, value) for name, value in values.items()})


def open_task(
    job: Job,
    *,
    cache: Path | None = None,
    shifted: Sequence[Path] = (),
    progress: Progress = _NONE,
) -> Questions:
    """Read the task of a run, with what its grounder needs.

    Args:
        job: the run.
        cache: where SNARE's features computed by CLIP are kept.
        shifted: see `furniture_task.open_furniture`.
        progress: called while pictures are encoded.

    Raises:
        UserError: for files that are missing or unfit.

    >>> len(open_task(Job(Choice(grounder="match"))).folds["valid"].text)
    56
    """
    choice = job.choice
    if shifted and job.furniture is None:
        raise UserError("shifted folders belong to a prepared task; this run has another; leave "
                        "them out")  # fmt: skip
    words = choice.grounder == "magic"
    if job.snare is not None:
        options: Any = {"pixels": choice.adapts, "words": words}
        return open_snare(job.snare, cache=cache, progress=progress, **options)
    if job.furniture is not None:
        return open_furniture(job.furniture, pixels=choice.adapts, shifted=shifted)
    return toy_questions(pixels=choice.adapts, words=words or choice.caption > 0)


class Run(NamedTuple):
    """Hold a trained run.

    Attributes:
        job: what was asked.
        questions: the task.
        grounder: functions.
        frozen: parameters.
        params: of each seed.

    >>> Run._fields[-1]
    'params'
    """

    job: Job
    questions: Questions
    grounder: Grounder
    frozen: Any
    params: list[Any]


def train_run(
    job: Job,
    out: Path,
    *,
    start: Path | None = None,
    writer: Writer | None = None,
    progress: Progress = _NONE,
    encoding: Progress = _NONE,
) -> Fitted | None:
    """Train a run into a folder, going on where it was stopped.

    Several seeds over fixed features are trained side by side in one program; those of an encoder
    that is adapted, one after another.

    Args:
        job: what to do.
        out: the folder; every process must see it.
        start: a run of MATCH whose head LaGOR begins from, as published (at a rate of 5e-5).
        writer: gets every epoch.
        progress: called with steps done and the most there can be.
        encoding: called while pictures are encoded.

    Returns:
        Parameters and curves with a leading axis S; None for zero-shot, which has none.

    Raises:
        UserError: for another run in the folder, or files that are missing or unfit.
        NonFiniteError: naming the step.

    >>> import tempfile
    >>> job = Job(Choice(grounder="zero-shot"))
    >>> train_run(job, Path(tempfile.mkdtemp())) is None
    True
    """
    _claim(job, out)
    questions = open_task(job, cache=out / "cache", progress=encoding)
    grounder, frozen = make_grounder(job.choice, questions)
    if job.choice.grounder == "zero-shot":
        return None
    begin = None if start is None else _head_of(start)
    found = _fit(job, out, questions, grounder, frozen, begin, writer, progress)
    best = RunStore(out / "best", keep=1)
    best.save(0, found.params)
    return found


def _fit(
    job: Job,
    out: Path,
    questions: Questions,
    grounder: Grounder,
    frozen: Any,
    start: Any,
    writer: Writer | None,
    progress: Progress,
) -> Fitted:
    train, valid = questions.fold("train"), questions.folds.get("valid")
    meta = {"grounder": job.choice.grounder}
    common: dict[str, Any] = {"start": start, "writer": writer, "meta": meta}
    place, seeds = out / "checkpoints", job.seeds
    alone = jax.process_count() == 1 and questions.resident and not job.choice.adapts
    if alone and len(seeds) > 1:
        return fit_seeds(
            grounder, frozen, questions.tables, train, valid, job.training, seeds=seeds,
            store=RunStore(place / "seeds"), progress=progress, **common,
        )  # fmt: skip
    found = []
    for i, seed in enumerate(seeds):
        found.append(
            fit(
                grounder, frozen, questions.tables, train, valid, job.training, seed=seed,
                store=RunStore(place / f"seed-{seed}"), resident=questions.resident,
                progress=lambda done, total, i=i: progress(i * total + done, len(seeds) * total),
                **common,
            )
        )  # fmt: skip
    stack = lambda *parts: jnp.stack(parts) if isinstance(parts[0], jax.Array) else np.stack(parts)  # noqa: E731
    return jax.tree.map(stack, *found)


def _claim(job: Job, out: Path) -> None:
    """Note what the run is, or refuse a folder that holds another."""
    file = out / "run.json"
    if file.is_file():
        had, wants = json.loads(read_job(out).to_json()), json.loads(job.to_json())
        for part in wants:
            if had[part] != wants[part]:
                raise UserError(
                    f"{out} holds a run with {part} {had[part]} and this one has {wants[part]}; "
                    "choose another directory or the same settings"
                )
    elif jax.process_index() == 0:
        atomic_write(file, job.to_json() + "\n")


def _head_of(start: Path) -> dict[str, Any]:
    run = load_run(start)
    if run.job.choice.grounder != "match":
        raise UserError(
            f"{start} holds a {run.job.choice.grounder}; expected a run of match, whose head is "
            "taken; name one"
        )
    return {"head": run.params[0]["head"]}


def load_run(folder: Path, *, shifted: Sequence[Path] = (), progress: Progress = _NONE) -> Run:
    """Open a trained run: its task, and the parameters of every seed.

    Args:
        folder: that `train_run` wrote.
        shifted: see `open_task`.
        progress: called while pictures are encoded.

    Raises:
        UserError: for a folder without a run, or one that has not ended.

    >>> load_run(Path("nowhere"))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere holds no run ...
    """
    job = read_job(folder)
    questions = open_task(job, cache=folder / "cache", shifted=shifted, progress=progress)
    grounder, frozen = make_grounder(job.choice, questions)
    if job.choice.grounder == "zero-shot":
        return Run(job, questions, grounder, frozen, [{}])
    best, count = RunStore(folder / "best"), len(job.seeds)
    if best.latest() is None:
        raise UserError(
            f"{folder} has no parameters yet; expected a run that ended; give the same command of "
            "`jaxsys ground train` again, which goes on"
        )
    mesh = row_mesh(1, jax.local_devices()[:1])
    one = jax.jit(grounder.init)(jax.random.key(0), frozen)
    like = replicate(jax.tree.map(lambda x: np.zeros((count, *x.shape), x.dtype), one), mesh)
    params, _ = best.restore(0, like)
    each = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(count)]
    return Run(job, questions, grounder, frozen, each)
