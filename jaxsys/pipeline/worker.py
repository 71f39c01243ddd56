"""The program of one process of a pipeline: ``python -m jaxsys.pipeline.worker JOB.json``.

It reads the job, finds its part by its number, connects to the others, goes on from the newest
checkpoint and trains. Events go to standard output (`jaxsys.cluster.events`) for
`jaxsys.pipeline.faults` to read: ``start``, ``resumed`` and ``stages`` (seconds at work by stage)
of every process, ``step`` and ``saved`` of process 0, ``lost`` of whoever misses another one.
"""

import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsys.cluster import Membership, join, leave
from jaxsys.cluster.events import say, say_mistake
from jaxsys.cluster.heap import keep_freed_memory
from jaxsys.cluster.sockets import Sockets, connect
from jaxsys.cluster.throttle import throttle_of
from jaxsys.cluster.transport import PeerLost, Transport
from jaxsys.core import tree
from jaxsys.core.errors import UserError
from jaxsys.core.stages import cut_at
from jaxsys.pipeline.execute import Worker
from jaxsys.pipeline.job import Job, Setup, set_up
from jaxsys.pipeline.state import PipelineStore
from jaxsys.pipeline.turn import State, StepInfo
from jaxsys.train import NonFiniteError, check_finite, optimizers

MISTAKE, NOT_FINITE, PEER_LOST = 2, 3, 4  # exit statuses
_SAVED = 6  # first number of the key of a message that says that a part is saved
_MEET_S = 120  # processes with a small share of a core take long to start

Tell = Callable[[dict[str, Any]], None]


def run(job: Job, member: Membership, transport: Transport, tell: Tell) -> State:
    """Train this process's part of a job.

    Args:
      job: the same on all processes.
      member: this process's place.
      transport: to the others.
      tell: receives events.

    Returns:
      The state after the last step.

    Raises:
      PeerLost: another process is lost.
      NonFiniteError: the loss is not finite; the last checkpoint is kept.
      UserError: plan, model and checkpoint do not fit each other.

    >>> from jaxsys.cluster.transport import in_memory
    >>> from jaxsys.pipeline.job import Task
    >>> from jaxsys.pipeline.plan import Plan
    >>> task = Task(blocks=1, width=8, heads=2, length=4, batch=2)
    >>> job = Job(task, Plan(3, (1,), (0, 1)), steps=1)
    >>> run(job, Membership(0, 1, None, "single"), in_memory(1)[0], lambda event: None)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the loss has 2 stages and the transport 1 processes; the plan ...
    """
    tell({"event": "start", "rank": member.process_id, "pid": os.getpid()})
    setup = set_up(job.task, job.seed)
    worker = make_worker(job, setup, transport)
    store = PipelineStore(Path(job.out) / "checkpoints")
    state = worker.init(own_leaves(setup.init, set(worker.paths.values()), job.seed))
    found = store.restore(worker, state)
    if found is not None:
        state, _ = found
        tell({"event": "resumed", "rank": worker.rank, "step": state.step - 1})
    while state.step < job.steps:
        number = state.step
        state, info = worker.step(state, setup.data(number))
        check_finite(number, info.loss)
        tell(_stages(worker, info))
        if worker.rank == 0:
            tell(
                {
                    "event": "step",
                    "step": number,
                    "loss": info.loss,
                    "step_s": info.step_s,
                    "sent_bytes": info.sent_bytes,
                }
            )
        if state.step == job.steps or (job.save_every and state.step % job.save_every == 0):
            store.save(worker, state)
            _all_saved(transport, number)
            if worker.rank == 0:
                tell({"event": "saved", "step": number})
    return state


def make_worker(job: Job, setup: Setup, transport: Transport) -> Worker:
    """Cut the loss as the job's plan says and take this process's part of it.

    Args:
      job: the job.
      setup: its task, made concrete.
      transport: to the other processes.

    Returns:
      The worker; nothing is compiled yet.

    Raises:
      UserError: the boundaries do not fit the model, or the processes are not as many as planned.

    >>> from jaxsys.cluster.transport import in_memory
    >>> from jaxsys.pipeline.job import Task
    >>> from jaxsys.pipeline.plan import Plan
    >>> job = Job(Task(blocks=1, width=8, heads=2, length=4), Plan(3, (1,), (0, 1)), steps=1)
    >>> len(make_worker(job, set_up(job.task), in_memory(2)[0]).stages)
    1
    """
    plan, shapes = job.plan, setup.shapes()
    data = setup.micro_batch(len(plan.chains) * plan.micro_batches)
    staged = cut_at(setup.loss_fn, shapes, data, plan.boundaries, remat=job.remat)
    optimizer = optimizers.PRESETS[job.task.optimizer](lr=job.task.lr)
    return Worker(staged, plan, transport, optimizer, shapes, error_feedback=job.error_feedback,
                  clip_norm=job.clip_norm, throttle=throttle_of())  # fmt: skip


def own_leaves(init: Callable[[Any], Any], paths: Collection[str], seed: int) -> dict[str, Any]:
    """Make some of a model's parameters, and no others.

    Args:
      init: ``init(key) -> params``.
      paths: of the leaves wanted.
      seed: of the parameters.

    Returns:
      Path to leaf.

    >>> init = lambda key: {"a": jax.numpy.ones(2), "b": jax.random.normal(key, (3,))}
    >>> own_leaves(init, ["a"], 0)["a"].tolist()
    [1.0, 1.0]
    """

    def some(key: Any) -> dict[str, Any]:
        return {k: x for k, x in tree.flatten(init(key)).items() if k in paths}

    return jax.jit(some)(jax.random.key(seed))


def _stages(worker: Worker, info: StepInfo) -> dict[str, Any]:
    """Sum up the seconds that each stage computed; the update is not part of the prediction."""
    busy_s = {str(s): 0.0 for s in worker.stages}
    for span in info.spans:
        if span.name != "update":
            busy_s[span.stream.removeprefix("stage ")] += span.end_s - span.start_s
    return {
        "event": "stages",
        "rank": worker.rank,
        "busy_s": busy_s,
        "wait_s": info.wait_s,
        "sent_bytes": info.sent_bytes,
    }


def _all_saved(transport: Transport, number: int) -> None:
    """Let process 0 wait until all parts of a checkpoint are there."""
    word = np.zeros(1, np.uint8)
    if transport.rank:
        transport.send(0, (_SAVED, number), [word])
        return
    for peer in range(1, transport.size):
        transport.receive(peer, (_SAVED, number), [word])


def connected(job: Job, member: Membership) -> Transport:
    """Connect to the other processes by the job's transport.

    Args:
      job: names it.
      member: this process's place.

    Returns:
      The transport.

    Raises:
      UserError: it has another name, or the processes do not find each other.

    >>> from jaxsys.pipeline.job import Task
    >>> from jaxsys.pipeline.plan import Plan
    >>> job = Job(Task(), Plan(1, (), (0,)), steps=1)
    >>> connected(job, Membership(0, 1, None, "single")).size
    1
    """
    if job.transport not in ("sockets", "engine"):
        raise UserError(
            f"the transport is {job.transport!r}; expected sockets or engine; choose one of them"
        )
    control: Sockets = connect(member, timeout_s=_MEET_S, silence_s=job.silence_s)
    if job.transport == "sockets":
        return control
    from jaxsys.cluster.engine import Engine

    return Engine(control)


def main(job_file: str) -> None:
    """Run the job in this process; a mistake is one marked sentence and status 2."""
    member: Membership | None = None
    transport: Transport | None = None
    try:
        job = Job.from_json(Path(job_file).read_text())
        keep_freed_memory()
        member = join(local_devices=1, distributed=False)
        transport = connected(job, member)
        run(job, member, transport, say)
        transport.close()
    except PeerLost as lost:
        rank = None if member is None else member.process_id
        say({"event": "lost", "rank": rank, "peer": lost.peer, "reason": lost.reason})
        if transport is not None:
            transport.close(lost)
        leave(PEER_LOST)
    except UserError as error:
        say_mistake(error)
        leave(MISTAKE)
    except NonFiniteError as error:
        say_mistake(error)
        leave(NOT_FINITE)


if __name__ == "__main__":
    main(sys.argv[1])
    # All is written; an interpreter that ends under a library's thread can abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
