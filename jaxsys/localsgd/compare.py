"""The main job: strategies side by side over slow links, a table and a figure at the end."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jaxsys.cluster import Membership, join, most_workers
from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import append_jsonl, atomic_write, markdown_table, to_json
from jaxsys.localsgd import figures
from jaxsys.localsgd.job import Job, run
from jaxsys.localsgd.live import LiveView
from jaxsys.localsgd.profile import Profile
from jaxsys.localsgd.record import Record
from jaxsys.localsgd.strategy import choose
from jaxsys.localsgd.supervise import Links, run_workers
from jaxsys.localsgd.task import Task, set_up
from jaxsys.train import NonFiniteError, logs


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` runs.

    Attributes:
      workers: worker processes on this machine.
      strategies: names from `jaxsys.localsgd.strategy.presets`, or one for a plain training run.
      period: H, the steps in which every layer is averaged once.
      steps: steps of each strategy.
      links: what joins the workers.
      task: what is trained.
      seed: seed of parameters, data order and codecs.
      out: folder of results.
      save_every: steps between checkpoints; 0 saves none.
      restarts: how often all workers may be started again after one has died.
      profile: file of a measured profile to plan from, instead of measuring.
      port: port of the coordinator; a free one by default.
      overrides: fields of `Strategy` that replace those of the presets, such as the codec.
      loggers: ``tensorboard`` and ``wandb`` besides ``metrics.jsonl``.
      drive: who overlaps communication with compute, see `Job`.
    """

    workers: int = 4
    strategies: tuple[str, ...] = ("ssgd", "wfbp", "local", "dreamddp")
    period: int = 5
    steps: int = 20
    links: Links = dataclasses.field(default_factory=Links)
    task: Task = dataclasses.field(default_factory=Task)
    seed: int = 0
    out: str = "runs/compare"
    save_every: int = 0
    restarts: int = 0
    profile: str | None = None
    port: int | None = None
    overrides: tuple[tuple[str, Any], ...] = ()
    loggers: tuple[str, ...] = ()
    drive: Literal["auto", "host", "program"] = "auto"

    def job(self) -> Job:
        """Check everything that can be checked before a process is started, and make the job.

        Raises:
          UserError: whatever is wrong with the request.
        """
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; expected at least 1; raise it")
        count, bound = most_workers()
        if join().num_processes == 1 and not 1 <= self.workers <= count:
            raise UserError(
                f"{self.workers} workers; this machine can start 1 to {count} ({bound}); choose a "
                "number in that range, or spread the job over several machines with jaxsys launch"
            )
        if len(self.links.bandwidth) not in (1, self.workers):
            raise UserError(
                f"{len(self.links.bandwidth)} link rates for {self.workers} workers; expected one "
                "for all or one each; correct --bandwidth"
            )
        set_up(self.task, self.seed, 0, self.workers)
        strategies = {
            name: dataclasses.replace(strategy, **dict(self.overrides))
            for name, strategy in choose(self.strategies, self.period).items()
        }
        profile = None
        if self.profile is not None:
            try:
                profile = Path(self.profile).read_text()
            except OSError as error:
                raise UserError(
                    f"the profile {self.profile!r} cannot be read ({error.strerror}); expected the "
                    "profile.json of a run; correct the path"
                ) from error
            Profile.from_json(profile)
        return Job(
            task=self.task,
            strategies=strategies,
            steps=self.steps,
            seed=self.seed,
            out=self.out,
            profile=profile,
            save_every=self.save_every,
            drive=self.drive,
        )


def compare(request: Comparison) -> tuple[Record, Job]:
    """Run a comparison with a live view, and write its table and figure.

    Called in a process that belongs to a job already (``jaxsys launch``, Slurm, ...), it becomes
    one worker of that job; elsewhere it starts its own workers on this machine.

    Args:
      request: what to run.

    Returns:
      The record of the run and the job that was run. The folder ``request.out`` then holds
      ``table.md``, ``result.json``, ``compare.png``, ``profile.json``, ``metrics.jsonl`` and
      ``events.jsonl``.

    Raises:
      UserError: whatever is wrong with the request, before anything is started where possible.
    """
    member = join()
    if member.num_processes > 1:
        links = Links("none")  # the cluster has its own
        request = dataclasses.replace(request, workers=member.num_processes, links=links)
    job = request.job()
    out = Path(request.out)
    if member.process_id != 0:
        _run_member(job, lambda _: None)
        return Record(), job
    record = _earlier(request, out)
    writer = _writer(request, job, out)
    restarts = 0
    with LiveView(record, list(job.strategies), job.steps) as view:

        def on_event(event: dict[str, Any]) -> None:
            view.update(event)
            for row in metrics(event):
                writer.write(row)

        if member.num_processes > 1:
            _run_joined(job, member, out, on_event)
        else:
            report = run_workers(
                job,
                request.workers,
                request.links,
                on_event=on_event,
                restarts=request.restarts,
                port=request.port,
            )
            restarts = report.restarts
    writer.close()
    write_results(record, job, out, restarts=restarts)
    return record, job


def _earlier(request: Comparison, out: Path) -> Record:
    """Go on with the record of an interrupted run, or start a new one."""
    events = out / "events.jsonl"
    if request.save_every and RunStore(out / "checkpoints").latest() is not None:
        return Record.read(events) if events.exists() else Record()
    for old in (events, out / "metrics.jsonl", out / "workers.log"):
        old.unlink(missing_ok=True)
    return Record()


def _run_joined(
    job: Job, member: Membership, out: Path, on_event: Callable[[dict[str, Any]], None]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def emit(event: dict[str, Any]) -> None:
        event = json.loads(to_json(event | {"at_s": time.monotonic() - began}))
        append_jsonl(out / "events.jsonl", event)
        on_event(event)

    emit({"event": "start", "link": "joined", "bandwidth": [], "workers": member.num_processes})
    _run_member(job, emit)


def _run_member(job: Job, emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the job in this process; what stops it is told as `run_workers` tells it."""
    try:
        run(job, emit)
    except NonFiniteError as error:
        raise UserError(str(error)) from error


def _writer(request: Comparison, job: Job, out: Path) -> logs.Writer:
    writers: list[logs.Writer] = [logs.JsonLines(out / "metrics.jsonl")]
    if "tensorboard" in request.loggers:
        writers.append(logs.TensorBoard(out / "tensorboard"))
    if "wandb" in request.loggers:
        writers.append(logs.WeightsAndBiases("jaxsys", json.loads(job.to_json()), out))
    return logs.Tee(*writers)


def metrics(event: dict[str, Any]) -> list[dict[str, Any]]:
    """Write a block's event as one row per step, for the log writers.

    >>> block = {"event": "block", "strategy": "ssgd", "first": 4, "loss": [2.5], "clock_s": [0.1],
    ...          "wait_s": [0.05], "comm_s": [0.06], "sent_bytes": 8.0, "divergence": [0.0]}
    >>> metrics(block)[0]["step"], metrics(block)[0]["ssgd/loss"]
    (4, 2.5)
    """
    if event["event"] != "block":
        return []
    name, count = event["strategy"], len(event["loss"])
    ends = [0.0, *event["clock_s"]]
    rows = []
    for k in range(count):
        row = {
            f"{name}/loss": event["loss"][k],
            f"{name}/step_s": ends[k + 1] - ends[k],
            f"{name}/wait_s": event["wait_s"][k],
            f"{name}/comm_s": event["comm_s"][k],
            f"{name}/sent_bytes": event["sent_bytes"] / count,
        }
        if k == count - 1:
            gammas = enumerate(event["divergence"])
            row |= {f"{name}/divergence/{i}": gamma for i, gamma in gammas}
        rows.append({"step": event["first"] + k} | row)
    return rows


def write_results(record: Record, job: Job, out: Path, restarts: int = 0) -> None:
    """Write a run's table, numbers and figure into its folder."""
    heading = f"{record.label()}; {job.steps} steps, seed {job.seed}; {machine()}\n\n"
    atomic_write(out / "table.md", heading + markdown_table(record.table()))
    result = {
        "label": record.label(),
        "rows": record.rows(),
        "restarts": restarts,
        "time_lost_s": record.time_lost_s(),
        "machine": dataclasses.asdict(machine()),
    }
    atomic_write(out / "result.json", to_json(result))
    figures.compare_figure(record, job.strategies, out / "compare.png")
