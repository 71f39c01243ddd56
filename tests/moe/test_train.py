"""Runs over eight devices: one loss curve whatever the mesh and the plan, resumed to the bit."""

import dataclasses

import numpy as np
import pytest

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.moe.contract import LayerPlan, MoEPlan
from jaxsys.moe.task import Task
from jaxsys.moe.train import Job, make_mesh, train

TASK = Task(
    width=8, heads=2, depth=2, hidden=8, experts=4, length=16, batch=1, lr=0.01, factor=4.0,
    gate="bias",
)  # fmt: skip
PLAN = MoEPlan((LayerPlan(1, 2, 500), LayerPlan(2, 1, 900)))
JOB = Job(TASK, steps=4, tensor=2, data=2)


@pytest.mark.slow
def test_gradients_in_gaps_and_a_resumed_run_give_the_same_losses(tmp_path):
    whole = train(JOB)
    assert np.count_nonzero(whole.params["moe"]["0"]["gate"]["bias"]) > 0
    store = RunStore(tmp_path / "checkpoints")
    job = dataclasses.replace(JOB, plan=PLAN, save_every=2)
    first = train(dataclasses.replace(job, steps=2), store=store)
    rest = train(job, store=store)
    losses = [*first.losses, *rest.losses]
    np.testing.assert_allclose(losses, whole.losses, rtol=1e-5)
    assert whole.losses[-1] < whole.losses[0]
    assert rest.valid_loss == pytest.approx(whole.valid_loss, rel=1e-5)
    with pytest.raises(UserError, match="holds a run with seed 0 and this one has 1"):
        train(dataclasses.replace(job, seed=1), store=store)


def test_mistakes_are_found_before_anything_starts():
    for job, says in (
        (dataclasses.replace(JOB, data=3), "8 devices cannot be laid out as 3 data groups"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, experts=6), data=1),
         "6 experts cannot be dealt out over 4 ranks"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, hidden=7)),
         "7 hidden units cannot be dealt out over 2 ranks"),
        (dataclasses.replace(JOB, plan=MoEPlan((LayerPlan(),) * 3)), "the plan has 3 layers"),
        (dataclasses.replace(JOB, steps=0), "steps is 0"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, model="no/file")), "no/file is"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, optimizer="x")), "'x' is not"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, length=10**7)), "a window has"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            train(job)
    assert dict(make_mesh(6).shape) == {"data": 4, "expert": 2, "tensor": 1}
