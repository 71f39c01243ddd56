"""The main job: strategies side by side over slow links, a table and a figure at the end."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.core.measure import machine
from jaxsys.core.report import atomic_write, markdown_table, to_json
from jaxsys.localsgd import figures
from jaxsys.localsgd.job import Job
from jaxsys.localsgd.live import LiveView
from jaxsys.localsgd.profile import Profile
from jaxsys.localsgd.record import Record
from jaxsys.localsgd.strategy import choose
from jaxsys.localsgd.supervise import Links, run_workers
from jaxsys.localsgd.task import Task, set_up


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
    """

    workers: int = 4
    strategies: tuple[str, ...] = ("ssgd", "wfbp", "local", "dreamddp")
    period: int = 5
    steps: int = 40
    links: Links = Links()
    task: Task = Task()
    seed: int = 0
    out: str = "runs/compare"
    save_every: int = 0
    restarts: int = 0
    profile: str | None = None
    port: int | None = None
    overrides: tuple[tuple[str, Any], ...] = ()

    def job(self) -> Job:
        """Check everything that can be checked before a process is started, and make the job.

        Raises:
          UserError: whatever is wrong with the request.
        """
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; expected at least 1; raise it")
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
        )


def compare(request: Comparison) -> tuple[Record, Job]:
    """Run a comparison with a live view, and write its table and figure.

    Args:
      request: what to run.

    Returns:
      The record of the run and the job that was run. The folder ``request.out`` then holds
      ``table.md``, ``result.json``, ``compare.png``, ``profile.json`` and ``events.jsonl``.

    Raises:
      UserError: whatever is wrong with the request, before anything is started where possible.
    """
    job = request.job()
    out = Path(request.out)
    events = out / "events.jsonl"
    store = out / "checkpoints"
    record = Record()
    if events.exists():
        if request.save_every and store.exists():
            record = Record.read(events)
        else:
            events.unlink()
    with LiveView(record, list(job.strategies), job.steps) as view:
        report = run_workers(
            job,
            request.workers,
            request.links,
            on_event=view.update,
            restarts=request.restarts,
            port=request.port,
        )
    write_results(record, job, out, restarts=report.restarts)
    return record, job


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
