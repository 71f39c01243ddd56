"""Train a task over a fleet, from nothing: measure, plan, start the workers, follow them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsys.cluster import join, leave
from jaxsys.cluster.sockets import connect
from jaxsys.cluster.throttle import throttle_of
from jaxsys.cluster.transport import PeerLost, Transport
from jaxsys.core.errors import UserError
from jaxsys.core.graph import dag
from jaxsys.core.report import atomic_write
from jaxsys.pipeline.choice import Choice, planner_of
from jaxsys.pipeline.devices import Fleet
from jaxsys.pipeline.estimate import NO_OVERHEADS, Overheads
from jaxsys.pipeline.faults import Outcome, supervise
from jaxsys.pipeline.fleets import internet_fleet, paper_fleet
from jaxsys.pipeline.job import Job, Task, set_up
from jaxsys.pipeline.measure import measure
from jaxsys.pipeline.place import Place, Standing
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.profile import Profile, profile
from jaxsys.pipeline.renumbered import Renumbered
from jaxsys.pipeline.work import Work, work_of
from jaxsys.train import NonFiniteError, optimizers

Tell = Callable[[dict[str, Any]], None]
_SYNTHETIC = {"paper": paper_fleet, "internet": lambda seed: internet_fleet(1000, seed)}
_PLAN_KEY = 8  # first number of the keys under which process 0 tells the plan
_MEET_S = 120.0


class Costs(NamedTuple):
    """What plans are made from.

    Attributes:
      work: costs of the model's graph.
      fleet: the devices.
      overheads: seconds of what stages do beside their nodes.
      source: where they come from, in words.
      notes: what was out of the ordinary when they were measured.

    >>> Costs._fields[-1]
    'notes'
    """

    work: Work
    fleet: Fleet
    overheads: Overheads
    source: str
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """A run as the user asks for it; see `jaxsys.cli.pipeline.TrainConfig` for each option.

    >>> Request(Task(), Choice()).steps
    100
    """

    task: Task
    choice: Choice
    out: str = "runs/pipeline-train"
    seed: int = 0
    steps: int = 100
    save_every: int = 20
    fleet: Path | None = None
    plan: Path | None = None
    standby: int = 0
    restarts: int = 3
    threshold: float | int = 1.2
    silence_s: float | int = 10.0
    error_feedback: bool = False
    clip_norm: float | int | None = None
    transport: str = "sockets"
    port: int | None = None


def known_fleet(task: Task, choice: Choice, fleet: str | Path, seed: int = 0) -> Costs:
    """Take a fleet from a file, or a synthetic one, and the model's FLOPs or measured seconds.

    Args:
      task: what is to be trained.
      choice: how to plan; its micro-batches count.
      fleet: a profile or a fleet as JSON, or ``paper`` or ``internet``.
      seed: of a synthetic fleet.

    Returns:
      The costs.

    Raises:
      UserError: no such file, or a profile of another model.

    >>> costs = known_fleet(Task(blocks=1, width=8, heads=2, length=4), Choice(), "paper")
    >>> len(costs.fleet), costs.source
    (48, 'modelled')
    """
    setup = set_up(task, seed)
    graph = dag(setup.loss_fn, setup.shapes(), *setup.micro_batch(choice.micro_batches))
    if str(fleet) in _SYNTHETIC:
        return Costs(work_of(graph), _SYNTHETIC[str(fleet)](seed), NO_OVERHEADS, "modelled")
    try:
        text = Path(fleet).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the fleet {str(fleet)!r} cannot be read ({error}); expected a profile.json or "
            "fleet.json, or one of paper and internet; correct the path"
        ) from error
    if '"node_s"' not in text:
        return Costs(
            work_of(graph), Fleet.from_json(text, symmetric=True), NO_OVERHEADS, "modelled"
        )
    found = Profile.from_json(text)
    if len(found.node_s) != len(graph.nodes):
        raise UserError(
            f"the profile {str(fleet)!r} has {len(found.node_s)} nodes and this model "
            f"{len(graph.nodes)}; a profile is of one model; measure this one"
        )
    return _costs(found, found.work(graph))


def _costs(found: Profile, work: Work) -> Costs:
    source = "from measured times"
    return Costs(work, found.fleet, found.overheads, source, found.notes)


def measured_fleet(
    task: Task,
    choice: Choice,
    place: Place,
    out: str | Path,
    seed: int = 0,
    tell: Tell = lambda _: None,
    standing: Standing | None = None,
) -> Costs:
    """Measure what stands for the fleet on this machine; see `measure`.

    Args:
      task: what is to be trained.
      choice: how to plan; its micro-batches count.
      place: what stands for the devices.
      out: folder that receives ``profile.json``.
      seed: of the data.
      tell: gets events.
      standing: the place where it stands already.

    Returns:
      The costs.

    >>> measured_fleet.__name__  # starts processes: see tests/pipeline/test_cli.py
    'measured_fleet'
    """
    setup = set_up(task, seed)
    graph = dag(setup.loss_fn, setup.shapes(), *setup.micro_batch(choice.micro_batches))
    found = measure(
        task, place, choice.micro_batches, out, standing=standing, seed=seed, on_event=tell
    )
    return _costs(found, found.work(graph))


def read_plan(path: Path, costs: Costs) -> Plan:
    """Read a plan and check that it is one of this model and fleet.

    Args:
      path: of a ``plan.json``.
      costs: of the model and the fleet.

    Raises:
      UserError: no such file, or a plan of something else.

    >>> costs = known_fleet(Task(blocks=1, width=8, heads=2, length=4), Choice(), "paper")
    >>> read_plan(Path("nowhere.json"), costs)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the plan 'nowhere.json' cannot be read ...
    """
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the plan {str(path)!r} cannot be read ({error}); expected the plan.json of `jaxsys "
            "pipeline plan`; correct the path"
        ) from error
    most = max(max(chain) for chain in plan.chains)
    if plan.n_nodes != costs.work.n_nodes or most >= len(costs.fleet):
        raise UserError(
            f"the plan {str(path)!r} is for {plan.n_nodes} nodes and devices up to number {most}; "
            f"this model has {costs.work.n_nodes} nodes and the fleet {len(costs.fleet)} devices; "
            "plan again"
        )
    return plan


def train(request: Request, place: Place, tell: Tell, log: Any = None) -> dict[str, Any]:
    """Train with worker processes on this machine.

    Args:
      request: what and how.
      place: what stands for the devices.
      tell: gets every event.
      log: takes a row a step, if given.

    Returns:
      What came out, as JSON holds it.

    Raises:
      UserError: anything that the user can mend.

    >>> train.__name__  # starts processes: see tests/pipeline/test_cli.py
    'train'
    """
    task, choice = request.task, request.choice
    spares = range(place.devices - request.standby, place.devices)
    if not 0 <= request.standby < place.devices:
        raise UserError(
            f"{request.standby} of {place.devices} devices stand by; at least one must work; "
            "raise --devices or lower --standby"
        )
    with place.stand() as standing:
        if request.fleet is None:
            costs = measured_fleet(task, choice, place, request.out, request.seed, tell, standing)
        else:
            costs = known_fleet(task, choice, request.fleet, request.seed)
        if len(costs.fleet) != place.devices:
            raise UserError(
                f"the fleet has {len(costs.fleet)} devices and --devices is {place.devices}; each "
                "needs a process; give the same number"
            )
        planner = planner_of(
            costs.work, choice, optimizer=task.optimizer,
            overheads=costs.overheads, seed=request.seed,
        )  # fmt: skip
        active = range(place.devices - request.standby)
        if request.plan is None:
            plan = planner.over(costs.fleet, active)
        else:
            plan = read_plan(request.plan, costs)
        atomic_write(Path(request.out) / "plan.json", plan.to_json())

        def follow(event: dict[str, Any]) -> None:
            if log is not None and event["event"] == "step":
                log.write({k: event[k] for k in ("step", "loss", "step_s")})
            tell(event)

        outcome = supervise(
            _job(request, plan), costs.fleet, standing, planner, spares=spares,
            restarts=request.restarts, threshold=request.threshold or None, port=request.port,
            on_event=follow,
        )  # fmt: skip
    return _result(outcome, plan, request)


def _job(request: Request, plan: Plan) -> Job:
    return Job(
        request.task,
        plan,
        request.steps,
        request.seed,
        request.out,
        request.save_every,
        request.choice.remat,
        request.error_feedback,
        request.clip_norm,
        request.transport,
        request.silence_s,
    )


def _result(outcome: Outcome, first: Plan, request: Request) -> dict[str, Any]:
    times = [outcome.step_s[step] for step in sorted(outcome.step_s)][1:]
    steps = sorted(outcome.losses)
    return {
        "steps": request.steps,
        "loss": outcome.losses[steps[-1]] if steps else None,
        "predicted_s": outcome.plan.predicted_s,
        "measured_s": float(np.median(times)) if times else None,
        "stages": outcome.plan.n_stages,
        "devices": list(outcome.plan.devices),
        "boundaries": list(outcome.plan.boundaries),
        "method": outcome.plan.method,
        "losses": [outcome.losses[step] for step in steps],
        "incidents": [
            {k: v for k, v in dataclasses.asdict(i).items() if k != "plan"}
            for i in outcome.incidents
        ],
        "changed_plan": outcome.plan != first,
        "out": request.out,
    }


def train_joined(request: Request, tell: Tell) -> dict[str, Any] | None:
    """Train as one process of a launched job, each process a device on a machine of its own.

    The processes measure themselves and their links, process 0 plans and tells the others. A lost
    process ends all of them with its name; the launcher starts them again from the checkpoint.

    Args:
      request: the same on every process.
      tell: gets process 0's events.

    Returns:
      What came out, on process 0; None on the others.

    Raises:
      UserError: anything that the user can mend.

    >>> train_joined.__name__  # needs a launcher: see tests/pipeline/test_cli.py
    'train_joined'
    """
    from jaxsys.pipeline.worker import PEER_LOST, run

    member = join(local_devices=1, distributed=False)
    transport: Any = connect(member, timeout_s=_MEET_S, silence_s=request.silence_s)
    first = member.process_id == 0
    try:
        plan = _agree(request, transport, tell if first else lambda _: None)
        losses: dict[int, float] = {}
        step_s: dict[int, float] = {}

        def follow(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                losses[event["step"]] = event["loss"]
                step_s[event["step"]] = event["step_s"]
            tell(event)

        job = _job(request, plan)
        own = Renumbered(transport, job.ranks)
        run(job, dataclasses.replace(member, process_id=own.rank), own, follow)
        transport.close()
    except PeerLost as lost:
        tell({"event": "lost", "rank": member.process_id, "peer": lost.peer, "reason": lost.reason})
        transport.close(lost)
        leave(PEER_LOST)
    except NonFiniteError as error:
        raise UserError(f"{error}; lower the learning rate") from error
    if own.rank != 0:
        return None
    return _result(Outcome(losses, step_s, (), plan), plan, request)


def _agree(request: Request, transport: Transport, tell: Tell) -> Plan:
    """Measure or read the fleet, plan on process 0, and let every process know the plan."""
    choice, size = request.choice, transport.size
    setup = set_up(request.task, request.seed)
    found = None
    if request.fleet is None and request.plan is None:
        found = profile(
            setup, choice.micro_batches, transport, throttle=throttle_of(),
            optimizer=optimizers.PRESETS[request.task.optimizer](lr=request.task.lr),
            on_event=lambda what: tell({"event": "measure", "what": what}),
        )  # fmt: skip
    if transport.rank == 0:
        if request.plan is not None:
            plan = Plan.from_json(Path(request.plan).read_text(encoding="utf-8"))
        else:
            graph = dag(setup.loss_fn, setup.shapes(), *setup.micro_batch(choice.micro_batches))
            if found is not None:
                costs = _costs(found, found.work(graph))
                atomic_write(Path(request.out) / "profile.json", found.to_json())
            else:
                assert request.fleet is not None
                costs = known_fleet(request.task, choice, request.fleet, request.seed)
            # every process must have a stage, so that no order that leaves one out will do
            all_in = dataclasses.replace(
                choice, method="exact" if choice.method == "search" else choice.method
            )
            plan = planner_of(
                costs.work, all_in, optimizer=request.task.optimizer, overheads=costs.overheads
            ).make(costs.fleet)
        if sorted(Job(request.task, plan, 1).ranks) != list(range(size)):
            raise UserError(
                f"the plan uses devices {list(plan.devices)} and {size} processes were started; "
                "every process must be one of its devices; start as many, or plan again"
            )
        text = np.frombuffer(plan.to_json().encode(), np.uint8)
        for peer in range(1, size):
            transport.send(peer, (_PLAN_KEY, 0), [np.array([len(text)], np.int64)])
            transport.send(peer, (_PLAN_KEY, 1), [text])
        atomic_write(Path(request.out) / "plan.json", plan.to_json())
        return plan
    (length,) = transport.receive(0, (_PLAN_KEY, 0), [np.zeros(1, np.int64)])
    (text,) = transport.receive(0, (_PLAN_KEY, 1), [np.zeros(int(length[0]), np.uint8)])
    return Plan.from_json(text.tobytes().decode())


def describe(event: Mapping[str, Any]) -> str:
    """Write an event as a line for people; empty for one that says nothing to them.

    Args:
      event: as workers and supervisor tell it.

    >>> describe({"event": "step", "step": 3, "loss": 4.5, "step_s": 0.25})
    'step 3: loss 4.5000, 0.250 s'
    """
    kind = event["event"]
    if kind == "step":
        return f"step {event['step']}: loss {event['loss']:.4f}, {event['step_s']:.3f} s"
    if kind == "measure":
        return str(event["what"])
    if kind == "plan":
        plan = event["plan"]
        return (
            f"{len(plan['devices'])} stages on devices {list(plan['devices'])}, "
            f"{plan['predicted_s']:.3f} s a step predicted ({plan['method']})"
        )
    if kind == "resumed" and event["rank"] == 0:
        return f"going on after step {event['step']}"
    if kind == "saved":
        return f"saved after step {event['step']}"
    if kind == "incident":
        return f"{event['kind']}: {event['device']}, {event['reason']}; planned again"
    return ""
