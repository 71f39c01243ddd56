"""`jaxsys localsgd`: partial local SGD over slow links."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxsys.cli.options import Common
from jaxsys.core.errors import UserError
from jaxsys.localsgd.task import Task

Link = Literal["auto", "netlab", "emulated", "none"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Common):
    """What `compare` and `train` share.

    Attributes:
      out: Folder for tables, figures, logs and checkpoints.
      seed: Seed of parameters, data order and codecs.
      workers: Worker processes on this machine (a launched or cluster job has its own number).
      period: Steps in which every layer is averaged once (H).
      steps: Steps of each strategy.
      link: netlab (shaped network namespaces), emulated (the wire is held for the modelled time),
        none (loopback); auto takes the first of netlab and emulated that works.
      bandwidth: Rate of each worker's link, such as 100mbit, or one rate per worker.
      port: Port of the coordinator; a free one by default.
      profile: A profile.json to plan from, instead of measuring.
      drive: Who overlaps communication with compute: host (programs scheduled from the host, for
        CPU), program (one program a step, for accelerators), auto by the backend.
      task: What is trained.
    """

    spreads: ClassVar[bool] = True

    workers: int = 4
    period: int = 5
    steps: int = 20
    link: Link = "auto"
    bandwidth: tuple[str, ...] = ("60mbit",)
    port: int | None = None
    profile: Path | None = None
    drive: Literal["auto", "host", "program"] = "auto"
    task: Task = field(default_factory=Task)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RunConfig):
    """Train one model with several strategies side by side over slow links.

    Attributes:
      strategies: Names: ssgd, wfbp, local, equal, dreamddp, dreamddp-nofill, dreamddp-eager, best,
        diloco, streaming.
      smoke: A quick run of a tiny model, to see that everything works.
    """

    strategies: tuple[str, ...] = ("ssgd", "wfbp", "local", "dreamddp")
    smoke: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Train one model with one strategy, with checkpoints; a killed run goes on where it was.

    Attributes:
      strategy: One of the names of `compare`.
      save_every: Steps between checkpoints.
      restarts: How often all workers are started again after one has died.
      codec: Form of what is sent: f32, f16, int8, int4.
      error_feedback: Add what the codec lost to the next message.
      moment_periods: Pairs GLOB PERIOD: optimiser moments that are averaged too, e.g. *mu* 50.
      loggers: tensorboard, wandb; metrics.jsonl is always written.
    """

    strategy: str = "dreamddp"
    save_every: int = 20
    restarts: int = 0
    codec: Literal["f32", "f16", "int8", "int4"] = "f32"
    error_feedback: bool = False
    moment_periods: tuple[tuple[str, int], ...] = ()
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Common):
    """Plan from a measured profile, for other bandwidths, worker counts and periods; no hardware.

    Attributes:
      profile: profile.json of a run (`compare` and `train` write one).
      strategies: Names of strategies.
      bandwidths: Link rates, such as 10mbit 100mbit 1gbit.
      workers: Worker counts, to thousands.
      periods: Values of H.
      latency_ms: Milliseconds of one message between two workers.
      allreduce: Model of the all-reduce: ring, halving_doubling, recursive_doubling, tree, server.
    """

    profile: Path
    strategies: tuple[str, ...] = ("ssgd", "wfbp", "local", "dreamddp", "dreamddp-eager")
    bandwidths: tuple[str, ...] = ("10mbit", "30mbit", "100mbit", "300mbit", "1gbit")
    workers: tuple[int, ...] = (4, 32, 1024)
    periods: tuple[int, ...] = (5,)
    latency_ms: float = 0.0
    allreduce: str = "ring"


def _request(config: RunConfig, out: str, **more: Any) -> Any:
    from jaxsys.localsgd.compare import Comparison
    from jaxsys.localsgd.supervise import Links

    return Comparison(
        **{
            "workers": config.workers,
            "period": config.period,
            "steps": config.steps,
            "links": Links(config.link, config.bandwidth),
            "task": config.task,
            "seed": config.seed,
            "out": str(config.out or out),
            "profile": None if config.profile is None else str(config.profile),
            "port": config.port,
            "drive": config.drive,
        }
        | more
    )


def _report(config: RunConfig, request: Any) -> dict[str, Any]:
    from jaxsys.core.report import print_table
    from jaxsys.localsgd.compare import compare

    record, _ = compare(request)
    if not config.json and record.blocks:
        print_table(record.table(intervals=False), title=record.label())
        print(f"table, figure and logs: {request.out}")
        if record.time_lost_s():
            print(f"time lost to restarts: {record.time_lost_s():.1f} s")
    return {
        "label": record.label(),
        "rows": record.rows(),
        "time_lost_s": record.time_lost_s(),
        "out": str(request.out),
    }


def run_compare(config: CompareConfig) -> dict[str, Any]:
    """Run the strategies side by side."""
    more: dict[str, Any] = {"strategies": config.strategies}
    if config.smoke:
        task = Task(model="tiny", batch=2, min_layer_bytes=20_000)
        more |= {"steps": 2 * config.period, "task": task}
    return _report(config, _request(config, "runs/compare", **more))


def run_train(config: TrainConfig) -> dict[str, Any]:
    """Train with one strategy."""
    overrides: list[tuple[str, Any]] = []
    if config.codec != "f32":
        overrides.append(("codec", config.codec))
    if config.error_feedback:
        overrides.append(("error_feedback", True))
    if config.moment_periods:
        overrides.append(("moment_periods", config.moment_periods))
    request = _request(
        config,
        f"runs/train-{config.strategy}",
        strategies=(config.strategy,),
        save_every=config.save_every,
        restarts=config.restarts,
        overrides=tuple(overrides),
        loggers=config.loggers,
    )
    return _report(config, request)


def run_plan(config: PlanConfig) -> dict[str, Any]:
    """Sweep plans and print the schedule."""
    from jaxsys.cluster import parse_rate
    from jaxsys.core.report import atomic_write, print_table, to_json
    from jaxsys.localsgd.figures import sweep_figure
    from jaxsys.localsgd.profile import Profile
    from jaxsys.localsgd.sweep import schedule_table, sweep, sweep_table

    try:
        profile = Profile.from_json(config.profile.read_text())
    except OSError as error:
        raise UserError(
            f"the profile {str(config.profile)!r} cannot be read ({error.strerror}); expected the "
            "profile.json that compare or train wrote; correct the path"
        ) from error
    rows = sweep(
        profile,
        strategies=config.strategies,
        bandwidths_bits_s=[parse_rate(rate) for rate in config.bandwidths],
        workers=config.workers,
        periods=config.periods,
        latency_s=config.latency_ms / 1e3,
        algorithm=config.allreduce,
    )
    out = config.out or Path("runs/plan")
    plain = [{k: v for k, v in row.items() if k != "plan"} for row in rows]
    first = [
        r
        for r in rows
        if r["workers"] == config.workers[0] and r["period"] in (1, config.periods[0])
    ]
    title = (
        f"{config.workers[0]} workers, {config.allreduce} all-reduce, period {config.periods[0]}"
    )
    atomic_write(out / "plan.json", to_json(plain))
    sweep_figure(first, out / "plan.png", title)
    if not config.json:
        print_table(schedule_table(rows), title="schedules (layers, nearest the loss first)")
        print_table(sweep_table(rows), title="modelled seconds per step")
        print(f"numbers and figure: {out}")
    return {"rows": plain, "out": str(out)}


COMMANDS = {
    "compare": (CompareConfig, run_compare),
    "train": (TrainConfig, run_train),
    "plan": (PlanConfig, run_plan),
}
