"""One worker of a local SGD job: profile, plan, then run strategies side by side, block by block.

Every process runs this same program. Strategies take turns, one period each, so that all of them
see the same machine; each has its own state and its own clock. Worker 0 reports.
"""

import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxsys.cluster import interface_bytes, join
from jaxsys.core import tree
from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.core.mesh import REPLICA, device_pair, on_cpu
from jaxsys.core.report import atomic_write
from jaxsys.core.stages import StagedLoss
from jaxsys.localsgd import host, profile, profiling
from jaxsys.localsgd.codec import codec_bytes
from jaxsys.localsgd.exchange import divergence
from jaxsys.localsgd.fused import fused_local_sgd
from jaxsys.localsgd.layers import layer_bytes
from jaxsys.localsgd.plan import SyncPlan
from jaxsys.localsgd.step import State, due
from jaxsys.localsgd.strategy import Strategy
from jaxsys.localsgd.task import Setup, Task, set_up
from jaxsys.localsgd.wire import Wire
from jaxsys.train import check_finite, iterate, optimizers

Emit = Callable[[dict[str, Any]], None]
_GAMMA_SAMPLE = 2048  # elements per layer from which a run estimates the divergence


@dataclasses.dataclass(frozen=True)
class Job:
    """A whole run, as every worker reads it.

    Attributes:
      task: what is trained.
      strategies: by name, in the order of their turns.
      steps: steps of every strategy.
      seed: seed of the initial parameters, the data order and the codecs.
      out: folder for the profile and the checkpoints.
      hold_bits_s: rate of an emulated link; None where the real link is all there is.
      profile: JSON of a `jaxsys.localsgd.profile.Profile` to plan from; None measures one.
      profile_rounds: rounds of the compute profile.
      save_every: steps between checkpoints; 0 saves none.
      drive: ``host`` schedules programs from the host, which overlaps on CPU; ``program`` compiles
        each step into one, which overlaps on accelerators; ``auto`` chooses by the backend.

    >>> job = Job(Task(), {"ssgd": Strategy()}, 10, 0, "out")
    >>> Job.from_json(job.to_json()) == job
    True
    """

    task: Task
    strategies: dict[str, Strategy]
    steps: int
    seed: int
    out: str
    hold_bits_s: float | None = None
    profile: str | None = None
    profile_rounds: int = 12
    save_every: int = 0
    drive: Literal["auto", "host", "program"] = "auto"

    def to_json(self) -> str:
        """Write the job for its workers."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Read what `to_json` wrote."""
        found = json.loads(text)
        task = found.pop("task")
        task["layers"] = None if task["layers"] is None else tuple(task["layers"])
        strategies = {
            name: Strategy(**(s | {"moment_periods": tuple(map(tuple, s["moment_periods"]))}))
            for name, s in found.pop("strategies").items()
        }
        return cls(task=Task(**task), strategies=strategies, **found)

    @property
    def block(self) -> int:
        """Steps that a strategy takes in one turn: the longest period."""
        return max(s.period for s in self.strategies.values())


class _Turn(NamedTuple):
    """One strategy of the run, with its functions and plan."""

    name: str
    strategy: Strategy
    plan: SyncPlan
    run: host.Overlapped


def run(job: Job, emit: Emit) -> dict[str, Any]:
    """Run a job in this process, together with its peers.

    Args:
      job: the same on every worker.
      emit: receives events as dicts; the same ones on every worker.

    Returns:
      The last figures of each strategy.

    Raises:
      UserError: workers disagree on parameters or plans, or a checkpoint is of another model.
      NonFiniteError: a loss or an update is not finite; the last checkpoint is kept.
    """
    member = join()
    pair = device_pair()
    bits_s = job.hold_bits_s
    wire = Wire(pair, None if bits_s is None else (lambda n_bytes: 8.0 * n_bytes / bits_s))
    setup = set_up(job.task, job.seed, member.process_id, member.num_processes)
    params = jax.device_put(setup.params, pair.compute)
    check_equal("parameters", tree.fingerprint(params), wire)
    emit(
        {
            "event": "setup",
            "workers": member.num_processes,
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "layers": [layer.name for layer in setup.layers],
            "layer_bytes": layer_bytes(params, setup.layers),
        }
    )
    staged = host.cut_loss(setup.loss_fn, params, setup.train.batch_at(0), setup.layers)
    optimizer = optimizers.PRESETS[job.task.optimizer](lr=job.task.lr)
    parts = (setup.loss_fn, optimizer, setup.layers)
    in_program = job.drive == "program" or (job.drive == "auto" and not on_cpu())
    one = host.overlapped_local_sgd(*parts, Strategy(period=1), staged, wire)
    measured = _profile(job, setup, staged, one, params, wire, emit)
    turns = [
        _Turn(
            name,
            strategy,
            measured.plan(strategy),
            fused_local_sgd(*parts, strategy, pair.comm_mesh)
            if in_program
            else host.overlapped_local_sgd(*parts, strategy, staged, wire),
        )
        for name, strategy in job.strategies.items()
    ]
    check_equal("plan", {turn.name: turn.plan.to_json() for turn in turns}, wire)
    emit(
        {
            "event": "plans",
            "profile": json.loads(measured.to_json()),
            "plans": {turn.name: json.loads(turn.plan.to_json()) for turn in turns},
        }
    )
    if member.process_id == 0:
        atomic_write(_profile_file(job), measured.to_json())
    idle = None if in_program or len(turns) == 1 else one
    return _train(job, setup, turns, params, wire, emit, measured, idle)


def check_equal(what: str, values: dict[str, str], wire: Wire) -> None:
    """Refuse to start while workers hold different values.

    Raises:
      UserError: names the first worker and the first entry that differ from worker 0's.

    >>> wire = Wire(device_pair()._replace(comm=jax.devices()[0], comm_mesh=jax.make_mesh(
    ...     (1,), ("replica",), devices=jax.devices()[:1],
    ...     axis_types=(jax.sharding.AxisType.Auto,))))
    >>> check_equal("plan", {"dreamddp": "..."}, wire)
    """
    names = list(values)
    hashes = np.array([zlib.crc32(values[name].encode()) for name in names], np.uint32)
    everyone = wire.gather(hashes)
    different = np.argwhere(everyone != everyone[:1])
    if len(different):
        worker, entry = different[0]
        raise UserError(
            f"worker {worker} has other {what} than worker 0, first at {names[entry]!r}; expected "
            "equal ones at the start; give all workers the same seed, text, options and version"
        )


def _profile(
    job: Job,
    setup: Setup,
    staged: StagedLoss,
    one: host.Overlapped,
    params: Any,
    wire: Wire,
    emit: Emit,
) -> profile.Profile:
    """Measure, or read the profile that was given or that the interrupted run measured."""
    resumed = job.save_every and _store(job).latest() is not None
    text = _profile_file(job).read_text() if resumed else job.profile
    if text is not None:
        found = profile.Profile.from_json(text)
        names = tuple(layer.name for layer in setup.layers)
        if found.layers != names:
            raise UserError(
                f"the profile has layers {found.layers[:3]}…; this model has {names[:3]}…; measure "
                "this model, or plan with the model of the profile"
            )
        return found
    compute = profiling.measure_compute(
        one,
        staged,
        params,
        setup.train.batch_at(0),
        wire,
        rounds=job.profile_rounds,
        on_round=lambda k: emit({"event": "profile", "compute": k}),
    )
    sizes = [n // 4 for n in layer_bytes(params, setup.layers)]
    link, points, reason = profiling.measure_link(
        wire, min(sizes), sum(sizes), on_round=lambda k: emit({"event": "profile", "link": k})
    )
    note = f"predictions use the median rate of the link, since {reason}" if reason else ""
    emit({"event": "link", "points": points, "warning": note, **link.to_dict()})
    found = profile.make_profile(setup.layers, params, compute, link, wire.workers, note)
    batch = setup.train.batch_at(0)
    sharing = profiling.measure_sharing(one, params, batch, wire, found.message_s, found.compute_s)
    return dataclasses.replace(found, sharing=sharing)


def _profile_file(job: Job) -> Path:
    return Path(job.out) / "profile.json"


def _store(job: Job) -> RunStore:
    return RunStore(Path(job.out) / "checkpoints")


def _train(
    job: Job,
    setup: Setup,
    turns: Sequence[_Turn],
    params: Any,
    wire: Wire,
    emit: Emit,
    measured: profile.Profile,
    idle: host.Overlapped | None,
) -> dict[str, Any]:
    key = jax.random.key(job.seed)
    states = {turn.name: turn.run.init(params, key) for turn in turns}
    start = _restore(job, states, emit)
    if job.save_every and start == 0:
        _save(job, states, turns, 0)  # a run killed early finds its profile, and so its plan, again
    for turn in turns:  # compile everything first: a throw-away period of each
        emit({"event": "compile", "strategy": turn.name})
        state = turn.run.init(params, key)
        for i in range(turn.strategy.period):
            state, _ = turn.run.step(
                state, setup.train.batch_at(i), due(turn.plan.phases, turn.strategy, i)
            )
        turn.run.settle(state)

    weather: list[profile.Weather] = []
    if idle is not None:
        alone, _ = profiling.measure_weather(
            idle, idle.init(params, key), [setup.train.batch_at(0)], wire
        )

    def gamma(tree: Any) -> jax.Array:
        return divergence(tree, setup.layers, REPLICA, sample=_GAMMA_SAMPLE)

    began = time.time()
    for number, first in enumerate(range(start, job.steps, job.block)):
        steps = range(first, min(first + job.block, job.steps))
        shift = number % len(turns)  # whoever goes first changes from block to block
        for turn in [*turns[shift:], *turns[:shift]]:
            block = _take_turn(turn, setup, states, steps, wire, emit)
            own = turn.run.params(states[turn.name])
            block["divergence"] = wire.run(gamma, own).tolist()
            emit({"event": "block", "strategy": turn.name, "first": first, **block})
        if idle is not None:
            batches = map(setup.train.batch_at, steps)
            alone, found = profiling.measure_weather(idle, alone, batches, wire)
            weather.append(found)
            emit({"event": "weather", "first": first, **found._asdict()})
        done = steps[-1] + 1
        due_now = job.save_every and (
            done // job.save_every > first // job.save_every or done == job.steps
        )
        if due_now:
            _save(job, states, turns, done)
            emit({"event": "saved", "step": done})
    result = {
        turn.name: _evaluate(setup, turn.run.params(states[turn.name]), wire) for turn in turns
    }
    again = _predict_again(measured, turns, weather)
    emit({"event": "end", "seconds": time.time() - began, "valid": result, "again": again})
    return result


def _predict_again(
    measured: profile.Profile, turns: Sequence[_Turn], weather: Sequence[profile.Weather]
) -> dict[str, tuple[float, float]]:
    """Predict each strategy's step and hidden share, its plan kept, from the run's own times."""
    if not weather:
        return {}
    met = measured.rescaled(profile.Weather(*np.median(np.array(weather), axis=0).tolist()))
    plans = {turn.name: met.plan(turn.strategy, turn.plan.phases) for turn in turns}
    return {name: (plan.predicted_s, plan.hidden_share) for name, plan in plans.items()}


def _take_turn(
    turn: _Turn,
    setup: Setup,
    states: dict[str, State],
    steps: range,
    wire: Wire,
    emit: Emit,
) -> dict[str, Any]:
    """Run one block of one strategy; returns figures that are the same on every worker."""
    rows, spans = [], []
    names = [layer.name for layer in setup.layers]
    wire.gather(np.zeros(1, np.float32))
    sent = interface_bytes().tx_bytes

    def step(state: State, item: tuple[int, Any]) -> tuple[State, host.HostInfo]:
        i, batch = item
        return turn.run.step(state, batch, due(turn.plan.phases, turn.strategy, i))

    for i, after, info in iterate(
        step,
        states[turn.name],
        lambda i: (i, setup.train.batch_at(i)),
        start=steps.start,
        steps=steps.stop,
        guard=lambda i, info: check_finite(i, info.loss, info.update_norm, names),
    ):
        states[turn.name] = after
        loss = float(info.loss)
        rows.append((loss, info.step_s, info.wait_s, info.comm_s))
        spans.append([tuple(span) for span in info.spans])
        emit({"event": "step", "strategy": turn.name, "step": i, "loss": loss})
    sent = interface_bytes().tx_bytes - sent
    everyone = wire.gather(np.array(rows, np.float32))  # [R, steps, 4]
    bytes_sent = wire.gather(np.array([sent], np.float32))
    counted = bool(bytes_sent.min() > 0)  # loopback is not counted: fall back to the model
    if not counted:
        bytes_sent = np.array([_modelled_bytes(turn, setup, steps, wire.workers)])
    clock = np.cumsum(everyone[:, :, 1], axis=1).max(0)  # of the slowest worker
    return {
        "loss": everyone[:, :, 0].mean(0).tolist(),
        "clock_s": clock.tolist(),
        "wait_s": everyone[:, :, 2].mean(0).tolist(),
        "compute_s": (everyone[:, :, 1] - everyone[:, :, 2]).tolist(),  # of each worker
        "comm_s": everyone[:, :, 3].mean(0).tolist(),
        "sent_bytes": float(bytes_sent.mean()),
        "sent_counted": counted,
        "spans": spans,
    }


def _modelled_bytes(turn: _Turn, setup: Setup, steps: range, workers: int) -> float:
    sizes = [n // 4 for n in layer_bytes(setup.params, setup.layers)]
    messages = [layers for i in steps for layers in due(turn.plan.phases, turn.strategy, i).send]
    return float(sum(codec_bytes(sizes[i], turn.strategy.codec, workers) for i in messages))


def _evaluate(setup: Setup, params: Any, wire: Wire) -> dict[str, float]:
    """Compute the held-out loss of the workers' mean, and their own, in nats per token."""
    loss = jax.jit(setup.loss_fn)

    def held_out(params: Any) -> float:
        return float(np.mean([loss(params, row[None]) for row in setup.valid]))

    mean = wire.run(_mean, params)
    own = wire.gather(np.array([held_out(params)], np.float32))
    return {"mean_model": held_out(mean), "own_models": float(own.mean())}


def _mean(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.pmean(x, REPLICA), tree)


def _save(job: Job, states: dict[str, State], turns: Sequence[_Turn], step: int) -> None:
    for turn in turns:
        states[turn.name] = turn.run.settle(states[turn.name])
    _store(job).save(step, states, {"job": json.loads(job.to_json())})


def _restore(job: Job, states: dict[str, State], emit: Emit) -> int:
    step = _store(job).latest() if job.save_every else None
    if step is None:
        return 0
    found, _ = _store(job).restore(step, states)
    states.update(found)
    emit({"event": "resumed", "step": step})
    return step
