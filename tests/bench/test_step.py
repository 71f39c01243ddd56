"""Every technique's step against the naive one: the same loss and the same parameters after it."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from jaxsys.bench.counts import trained_numbers
from jaxsys.bench.step import Task, build
from jaxsys.bench.techniques import Technique, Where, combinations, why_not
from jaxsys.core.errors import UserError
from jaxsys.models import lm, quantise

CONFIG = lm.LMConfig("llama", 64, 16, 2, 4, 2, 4, 24, 32, init_std=0.3)
# Large enough a rate that a wrong gradient shows in the parameters.
TASK = Task(batch=8, tokens=7, lr=0.05, rank=2, prompt_tokens=3)
HERE = Where("cpu", 8, ("device", "pinned_host"))


@cache
def after(technique, method="pretrain", config=CONFIG, given=None):
    """Losses of two steps and what was trained after them; ``given`` quantises the start only."""
    built = build(config, technique, replace(TASK, method=method))
    params = None
    if given:
        params = quantise.quantise(lm.init(jax.random.key(0), config), bits=given)
        params = quantise.dequantise(params)
    state, losses = built.init(params), []
    for i in range(2):
        state, info = built.step(state, built.data(i))
        losses.append(float(info["loss"]))
    trained = state["trained"]
    if technique.layers == "scan":
        trained = {**trained, "model": lm.unstack(trained["model"], config)}
    flat, _ = jax.tree_util.tree_flatten_with_path(trained)
    return losses, {jax.tree_util.keystr(k): np.asarray(x, np.float32) for k, x in flat}


def check(technique, method="pretrain", config=CONFIG):
    bits = {"full": None, "int8": 8, "4bit": 4}[technique.weights]
    losses, found = after(technique, method, config)
    expected, wanted = after(Technique(), method, config, bits)
    exact = technique.dtype == "f32"
    np.testing.assert_allclose(losses, expected, rtol=1e-5 if exact else 0.03)
    assert set(found) == set(wanted)
    for name, value in found.items():
        if exact:
            np.testing.assert_allclose(value, wanted[name], rtol=0, atol=2e-4, err_msg=name)
        else:  # AdamW's first steps are signs: where a gradient is nearly 0, rounding turns them
            assert np.mean(np.abs(value - wanted[name])) < 0.5 * TASK.lr, name


SINGLES = [t for t in combinations(most=1) if why_not(t, CONFIG, HERE, batch=8) is None]
SINGLES = [t for t in (*SINGLES, Technique(accumulate=4)) if t != Technique()]
TOGETHER = [
    Technique(recompute="full", layers="scan", accumulate=4, offload="parameters"),
    Technique(zero=3, recompute="full", layers="scan"),
]
FINETUNING = [
    ("prompt", Technique(offload="optimizer", accumulate=2, weights="int8")),
]
SLOW = [
    ("lora", Technique(weights="4bit", layers="scan", recompute="full")),
    ("pretrain", Technique(recompute="weight_dots", attention="xla", donate=True)),
    ("lora", Technique(weights="int8", zero=3)),
    ("lora", Technique(dtype="mixed")),
    ("full", Technique(recompute="full", layers="scan", accumulate=2)),
    ("pretrain", Technique(zero=2, offload="optimizer", recompute="full")),
    ("pretrain", Technique(zero=3, offload="parameters")),
    ("pretrain", Technique(zero=1, recompute="host_dots")),
]


@pytest.mark.parametrize("technique", TOGETHER, ids=lambda t: t.name)
def test_several_techniques_at_once_change_nothing(technique):
    check(technique)


@pytest.mark.parametrize(("method", "technique"), FINETUNING, ids=str)
def test_finetuning_is_the_same_by_every_technique(method, technique):
    check(technique, method)


@pytest.mark.slow
@pytest.mark.parametrize("technique", SINGLES, ids=lambda t: t.name)
def test_every_single_technique_changes_nothing(technique):
    check(technique)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "technique"), SLOW, ids=str)
def test_more_techniques_at_once_change_nothing(method, technique):
    check(technique, method)


def test_a_step_trains_what_the_method_says():
    sizes = {}
    for method in ("pretrain", "lora", "prompt"):
        built = build(CONFIG, Technique(), replace(TASK, method=method))
        leaves = jax.tree.leaves(built.state["trained"])
        sizes[method] = sum(x.size for x in leaves)
        assert sizes[method] == trained_numbers(CONFIG, method, TASK.rank, TASK.prompt_tokens)
    assert sizes["prompt"] == 3 * CONFIG.width < sizes["lora"] < sizes["pretrain"]


@pytest.mark.parametrize(
    ("technique", "method", "where", "reason"),
    [
        (Technique(weights="int8"), "pretrain", HERE, "codes of int8 cannot be trained"),
        (Technique(weights="4bit"), "full", HERE, "use lora or prompt"),
        (Technique(zero=2), "pretrain", HERE._replace(count=1), "there is one"),
        (Technique(accumulate=3), "pretrain", HERE, "3 micro-batches"),
        (Technique(offload="optimizer"), "pretrain", Where("cpu", 1, ("device",)), "pinned_host"),
        (Technique(attention="cudnn"), "pretrain", HERE, "needs an NVIDIA GPU"),
        (Technique(attention="cudnn"), "pretrain", HERE._replace(platform="gpu"), "16-bit"),
        (
            Technique(attention="cudnn", dtype="bf16"),
            "pretrain",
            HERE._replace(platform="gpu"),
            "heads of 8, 16",
        ),
    ],
)
def test_what_cannot_be_is_said(technique, method, where, reason):
    assert reason in why_not(technique, CONFIG, where, method=method, batch=8)


def test_blocks_that_differ_are_not_scanned():
    config = replace(CONFIG, model_type="mistral", windows=(0, 4))
    assert "blocks differ" in why_not(Technique(layers="scan"), config, HERE, batch=8)
    with pytest.raises(UserError, match="blocks differ"):
        lm.stack(lm.init(jax.random.key(0), config), config)


def test_an_impossible_technique_is_refused_before_work():
    with pytest.raises(UserError, match="ZeRO-1 splits"):
        build(CONFIG, Technique(zero=1), TASK, jax.devices()[:1])
    with pytest.raises(UserError, match="is not known"):
        combinations({"recompute": ("some",)})
