"""Runs over eight devices: one loss curve whatever the mesh and the plan, resumed to the bit."""

import dataclasses

import numpy as np
import pytest

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.models import lm
from jaxsys.moe.contract import LayerPlan, MoEPlan
from jaxsys.moe.task import Task
from jaxsys.moe.train import Job, make_mesh, train
from jaxsys.moe.upcycle import to_mixtral

TASK = Task(
    width=8, heads=2, depth=2, hidden=8, experts=4, length=16, batch=1, lr=0.01, factor=4.0,
    gate="bias",
)  # fmt: skip
PLAN = MoEPlan((LayerPlan(1, 2, 500), LayerPlan(2, 1, 900)))
JOB = Job(TASK, steps=4, tensor=2, data=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(JOB)


def test_gradients_in_gaps_and_a_resumed_run_give_the_same_losses(whole, tmp_path):
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


def test_what_is_trained_opens_as_a_mixtral(whole, tmp_path):
    bias = whole.params["moe"]["0"]["gate"]["bias"]
    assert np.count_nonzero(bias) > 0
    params = {**whole.params, "moe": {}}
    for i, layer in whole.params["moe"].items():
        params["moe"][i] = {**layer, "gate": {"weight": layer["gate"]["weight"]}}
    files, config = to_mixtral(params, whole.setup.config, 2)
    lm.save(tmp_path, files, config)
    assert lm.load_config(tmp_path).experts == 4


def test_mistakes_are_found_before_anything_starts():
    for job, says in (
        (dataclasses.replace(JOB, data=3), "8 devices cannot be laid out as 3 data groups"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, experts=6), data=1),
         "6 experts cannot be dealt out over 4 ranks"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, hidden=7)),
         "7 hidden units cannot be dealt out over 2 ranks"),
        (dataclasses.replace(JOB, plan=MoEPlan((LayerPlan(),) * 3)), "the plan has 3 layers"),
        (dataclasses.replace(JOB, steps=0), "steps is 0"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, gate="best")), "'best' is not"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, optimizer="x")), "'x' is not"),
        (dataclasses.replace(JOB, task=dataclasses.replace(TASK, length=10**7)), "windows? of|has"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            train(job)
    assert dict(make_mesh(6).shape) == {"data": 4, "expert": 2, "tensor": 1}
