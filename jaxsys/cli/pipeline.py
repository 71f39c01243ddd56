"""`jaxsys pipeline`: plan and train over unequal devices and slow links (arXiv 2410.12707)."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxsys.cli.options import Common
from jaxsys.pipeline.choice import Choice
from jaxsys.pipeline.job import Task

Method = Literal["equal-number", "equal-compute", "op-fence", "exact", "search"]
Codec = Literal["dense", "uniform", "adatopk", "int8", "int4"]
Order = Literal["gpipe", "1f1b", "eager-1f1b", "interleaved", "zero-bubble", "auto"]


@dataclass(frozen=True, kw_only=True)
class FleetConfig(Common):
    """What `plan` and `train` share.

    Attributes:
      out: Folder for plans, profiles, figures, logs and checkpoints.
      seed: Seed of parameters, data order and the search for a plan.
      task: What is trained.
      method: How nodes are dealt out; search also orders the devices and may leave some out.
      codec: How values travel: dense, uniform (top-k everywhere), adatopk (by how slow a boundary
        is), int8, int4.
      ratio: By how much top-k shrinks the slowest boundary's bytes.
      order: In which order micro-batches go through the stages; auto takes the fastest.
      chunks: Stages of each device, for interleaved.
      micro_batches: Micro-batches in a step.
      remat: Keep a stage's inputs only, and run it forward again before its backward.
      fleet: A profile.json or fleet.json, instead of measuring devices on this machine.
      devices: Devices to stand for on this machine, a process each.
      bandwidth: Rate of each device's link, such as 1gbit, or one for all; loopback if left out.
      clusters: Which devices are near each other, such as 0,2 1,3.
      between: Rate of the links between clusters, such as 20mbit.
      cores: Share of a core of each device, such as 0.6 0.3.
      shares_by: What holds a device to its share, the kernel's quota or a throttle in the worker,
        which is nearer to a slower device.
    """

    task: Task = field(default_factory=Task)
    method: Method = "search"
    codec: Codec = "dense"
    ratio: float = 100.0
    order: Order = "1f1b"
    chunks: int = 1
    micro_batches: int = 4
    remat: bool = False
    fleet: Path | None = None
    devices: int = 2
    bandwidth: tuple[str, ...] = ()
    clusters: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    cores: tuple[float, ...] = ()
    shares_by: Literal["quota", "throttle"] = "quota"


@dataclass(frozen=True, kw_only=True)
class PlanConfig(FleetConfig):
    """Plan a model over a fleet, beside other methods and codecs; draw it as a Gantt chart.

    Attributes:
      fleet: A profile.json or fleet.json, or paper or internet (synthetic ones), instead of
        measuring devices on this machine.
    """


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FleetConfig):
    """Train over the devices; a lost one is replaced, a killed run goes on where it was.

    Under `jaxsys launch`, or a cluster's own launcher, each process is a device.

    Attributes:
      plan: A plan.json of `jaxsys pipeline plan`, instead of planning.
      steps: Steps of the whole run.
      save_every: Steps between checkpoints; 0 saves the last step only.
      standby: Devices, the last ones, that only replace lost ones.
      restarts: How often a device may be lost.
      threshold: Least predicted gain for which the plan is remade when a device is slow; 0 never.
      silence_s: Seconds of silence after which a device counts as lost.
      error_feedback: Add to a gradient what compression took from earlier ones.
      clip_norm: Bound on the norm of the whole gradient, over all stages; none if left out.
      transport: sockets (TCP) or engine (JAX's transfer engine).
      port: Port of the coordinator; a free one by default.
      loggers: tensorboard, wandb; metrics.jsonl is always written.
    """

    spreads: ClassVar[bool] = True

    plan: Path | None = None
    steps: int = 100
    save_every: int = 20
    standby: int = 0
    restarts: int = 3
    threshold: float = 1.2
    silence_s: float = 10.0
    error_feedback: bool = False
    clip_norm: float | None = None
    transport: Literal["sockets", "engine"] = "sockets"
    port: int | None = None
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()


def _choice(config: FleetConfig) -> Choice:
    names = [f.name for f in dataclasses.fields(Choice)]
    return Choice(**{name: getattr(config, name) for name in names})


def _place(config: FleetConfig, devices: int) -> Any:
    from jaxsys.pipeline.place import Place, read_clusters

    clusters = read_clusters(config.clusters)
    return Place(
        devices, config.bandwidth, clusters, config.between, config.cores, config.shares_by
    )


def _tell(config: FleetConfig) -> Any:
    """Give what shows an event as a line, in JSON mode on standard error."""
    from jaxsys.pipeline.train import describe

    def show(event: dict[str, Any]) -> None:
        line = describe(event)
        if line:
            print(line, flush=True)

    return show


def run_plan(config: PlanConfig) -> dict[str, Any]:
    """Plan by every method, and draw the chosen plan beside the first."""
    import json

    from jaxsys.core.report import atomic_write, print_table
    from jaxsys.pipeline.choice import compare, plan_figure, plan_rows, planner_of
    from jaxsys.pipeline.train import known_fleet, measured_fleet

    out = config.out or Path("runs/pipeline-plan")
    choice = _choice(config)
    costs = (
        measured_fleet(config.task, choice, _place(config, config.devices), out, config.seed,
                       _tell(config))
        if config.fleet is None
        else known_fleet(config.task, choice, config.fleet, config.seed)
    )  # fmt: skip
    given: dict[str, Any] = {"overheads": costs.overheads}
    plan = planner_of(
        costs.work, choice, optimizer=config.task.optimizer, seed=config.seed, **given
    ).make(costs.fleet)
    codecs = dict.fromkeys(["dense", config.codec])
    rows = compare(costs.work, costs.fleet, choice, codecs=list(codecs), seed=config.seed, **given)
    stages = plan_rows(plan, costs.fleet, costs.work)
    atomic_write(out / "plan.json", plan.to_json())
    atomic_write(out / "fleet.json", costs.fleet.to_json())
    shown = {"equal-number, dense": rows[0].get("plan"), f"{config.method}, {config.codec}": plan}
    drawn = {title: each for title, each in shown.items() if each is not None}
    small = {k: p for k, p in drawn.items() if p.n_stages <= 12}
    if small:
        plan_figure(small, costs.fleet, costs.work, out / "plan.png", **given)
    plain = [{k: v for k, v in row.items() if k != "plan"} for row in rows]
    if not config.json:
        print_table(plain, title=f"predicted seconds of a step, {costs.source}")
        print_table(
            stages, title=f"{config.method}, {config.codec}: {plan.predicted_s:.3f} s a step"
        )
        print(f"plan, fleet and figure: {out}")
    return {
        "source": costs.source,
        "rows": plain,
        "plan": json.loads(plan.to_json()),
        "stages": stages,
        "notes": list(costs.notes),
        "out": str(out),
    }


def run_train(config: TrainConfig) -> dict[str, Any]:
    """Measure, plan and train, or join the processes of a launched job that do."""
    from jaxsys.cluster import launched_as
    from jaxsys.core.report import print_table
    from jaxsys.pipeline.train import Request, train, train_joined
    from jaxsys.train.logs import JsonLines, Tee, TensorBoard, WeightsAndBiases, Writer

    out = config.out or Path("runs/pipeline-train")
    names = {f.name for f in dataclasses.fields(Request)}
    shared = {name: getattr(config, name) for name in names if hasattr(config, name)}
    request = Request(**shared | {"choice": _choice(config), "out": str(out)})
    if launched_as()[1] > 1:
        result = train_joined(request, _tell(config))
    else:
        place = _place(config, config.devices)
        writers: list[Writer] = [JsonLines(out / "metrics.jsonl")]
        if "tensorboard" in config.loggers:
            writers.append(TensorBoard(out / "tensorboard"))
        if "wandb" in config.loggers:
            writers.append(WeightsAndBiases("jaxsys-pipeline", dataclasses.asdict(config), out))
        log = Tee(*writers)
        try:
            result = train(request, place, _tell(config), log)
        finally:
            log.close()
    if result is None:
        return {}
    if not config.json:
        print_table([{k: v for k, v in result.items() if k not in ("losses", "incidents")}])
        for incident in result["incidents"]:
            print(f"{incident['kind']}: {incident['device']}, {incident['reason']}")
    return result


COMMANDS = {
    "plan": (PlanConfig, run_plan),
    "train": (TrainConfig, run_train),
}
