"""Processes of their own: the losses of one process to the bit, each compiling its own stages."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from jaxsys.cluster import Membership, launch
from jaxsys.cluster.events import EVENT
from jaxsys.cluster.transport import in_memory
from jaxsys.core import tree
from jaxsys.core.errors import UserError
from jaxsys.core.stages import cut_at
from jaxsys.pipeline.job import Job, Task, set_up
from jaxsys.pipeline.local import local_run
from jaxsys.pipeline.messages import step_bytes
from jaxsys.pipeline.plan import Plan
from jaxsys.pipeline.worker import connected, run
from jaxsys.train import optimizers

ALONE = Membership(0, 1, None, "single")
MODEL = '''
"""A model of four layers, of which the first and the last are tied."""
import jax, jax.numpy as jnp, numpy as np

def model(batch, seed):
    def init(key):
        keys = jax.random.split(key, 3)
        return {n: jax.random.normal(k, (8, 8)) for n, k in zip("abc", keys)}

    def loss_fn(p, x):
        h = first = jnp.tanh(x @ p["a"])
        h = jnp.tanh(h @ p["b"])
        h = jnp.tanh(h @ p["c"]) + first
        return jnp.mean((h @ p["a"].T - x) ** 2)

    def data(step):
        return (np.random.default_rng((seed, step)).normal(size=(batch, 8)).astype(np.float32),)

    return loss_fn, init, data
'''

# Runs the worker's program, then says which stages' programs this process has compiled.
CHILD = """
import os, sys
from jaxsys.cluster.events import say
from jaxsys.pipeline import worker
made, original = [], worker.make_worker
worker.make_worker = lambda *a: made.append(original(*a)) or made[0]
worker.main(sys.argv[1])
for s, stage in enumerate(made[0]._part.staged.stages):
    counts = [stage.forward.compiled._cache_size(), stage.backward._cache_size()]
    say({"event": "compiled", "rank": made[0].rank, "stage": s, "programs": counts})
sys.stdout.flush()
os._exit(0)  # as the program does
"""


def _processes(job, n, path):
    path.write_text(job.to_json())
    events: list[dict] = []
    said = []

    def on_line(i, line):
        if line.startswith(EVENT):
            events.append(json.loads(line[len(EVENT) :]))
        else:
            said.append(line)

    report = launch([sys.executable, "-c", CHILD, str(path)], n, on_line=on_line)
    assert report.exit_code == 0, said
    return events


def _one_process(job):
    """The oracle: all workers here, in memory."""
    setup, plan = set_up(job.task, job.seed), job.plan
    data = setup.micro_batch(len(plan.chains) * plan.micro_batches)
    staged = cut_at(setup.loss_fn, setup.shapes(), data, plan.boundaries, remat=job.remat)
    optimizer = optimizers.PRESETS[job.task.optimizer](lr=job.task.lr)
    run = local_run(staged, plan, optimizer, setup.shapes(), error_feedback=job.error_feedback)
    states, losses = run.init(jax.jit(setup.init)(jax.random.key(job.seed))), []
    for step in range(job.steps):
        states, infos = run.step(states, setup.data(step))
        losses.append(infos[0].loss)
    return losses, step_bytes(staged, plan, jax.tree.leaves(setup.shapes()))


def _compare(job, n, tmp_path):
    events = _processes(job, n, tmp_path / "job.json")
    losses, counted = _one_process(job)
    assert [e["loss"] for e in events if e["event"] == "step"] == losses
    for event in events:
        if event["event"] == "stages":
            sent = {(event["rank"], int(to)): b for to, b in event["sent_bytes"].items()}
            assert sent == {pair: b for pair, b in counted.items() if pair[0] == event["rank"]}
    for event in events:
        if event["event"] == "compiled":
            own = event["stage"] % job.plan.n_workers == event["rank"] % job.plan.n_workers
            assert event["programs"] == ([1, 1] if own else [0, 0]), event
    assert [e["step"] for e in events if e["event"] == "saved"] == [job.steps - 1]
    return events


def test_two_processes_give_the_losses_of_one_to_the_bit(tmp_path):
    (tmp_path / "mine.py").write_text(MODEL)
    task = Task(f"{tmp_path / 'mine.py'}:model", batch=4, lr=0.01)
    plan = Plan(
        3, (1,), (0, 1), micro_batches=2, codec="topk",
        ratios_forward=(3.0,), ratios_backward=(4.0,),
    )  # fmt: skip
    job = Job(task, plan, steps=3, out=str(tmp_path / "out"), error_feedback=True)
    _compare(job, 2, tmp_path)
    # and go on from the checkpoint, in a single process and without compression
    alone = dataclasses.replace(job, plan=Plan(3, (), (0,), micro_batches=2), steps=4)
    events: list[dict] = []
    run(alone, ALONE, in_memory(1)[0], events.append)
    resumed = [e for e in events if e["event"] in ("resumed", "step")]
    assert [(e["event"], e["step"]) for e in resumed] == [("resumed", 2), ("step", 3)]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["sockets", "engine"])
def test_three_processes_train_a_language_model(transport, tmp_path):
    task = Task(blocks=2, width=16, heads=2, length=8, batch=4)
    setup = set_up(task)
    assert "wte.weight" in tree.paths(setup.shapes())  # the tied embedding
    plan = Plan(
        _nodes(setup), (1, 3), (0, 1, 2), order="zero-bubble", micro_batches=4, codec="int8",
        ratios_forward=(2.0, 1.0), ratios_backward=(2.0, 1.0),
    )  # fmt: skip
    job = Job(task, plan, steps=3, out=str(tmp_path / "out"), transport=transport)
    events = _processes(job, 3, tmp_path / "job.json")
    losses, _ = _one_process(job)
    assert [e["loss"] for e in events if e["event"] == "step"] == losses
    assert np.isfinite(losses).all()


def _nodes(setup):
    from jaxsys.core.graph import dag

    return len(dag(setup.loss_fn, setup.shapes(), *setup.micro_batch(4)).nodes)


def test_an_unknown_transport_is_one_sentence(tmp_path):
    job = Job(Task(), Plan(3, (1,), (0, 1)), steps=1, transport="pigeons")
    with pytest.raises(UserError, match="expected sockets or engine"):
        connected(job, ALONE)
