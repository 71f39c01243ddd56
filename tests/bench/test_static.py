"""Static analysis against what is known: operations of every family, bytes, memory, what fits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.bench import fits, static, traffic
from jaxsys.bench.counts import balanced_rows, count_step, step_flops
from jaxsys.bench.memory import measured_bytes
from jaxsys.bench.roofline import Peaks
from jaxsys.bench.shapes import NAMES, shape
from jaxsys.bench.step import Task, build
from jaxsys.bench.techniques import Technique
from jaxsys.core import hlo
from jaxsys.core.cost import LinearCost
from jaxsys.core.errors import UserError
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 64, 16, 2, 4, 2, 4, 24, 32)
# 128 experts take minutes to trace; as many as this differ from them in nothing else.
EXPERTS = {"qwen3-30b-a3b": 16}


def ratio(config, task, technique=Technique()):  # noqa: B008 - frozen
    built = build(config, technique, task)
    counted = count_step(built.step.trace(built.state, built.batch).jaxpr.jaxpr)
    formula = step_flops(
        config,
        task.batch,
        task.tokens,
        method=task.method,
        rank=task.rank,
        prompt_tokens=task.prompt_tokens,
        expert_rows=balanced_rows(config, task.batch * task.tokens),
    )
    assert counted[""].total < 1e-3 * sum(part.total for part in counted.values())
    products = ("qkv", "scores", "values", "output", "mlp", "head")
    for name in products if task.method == "pretrain" else ():
        assert formula[name].total == pytest.approx(counted[name].total, rel=0.01), name
    total = sum(part.total - part.again for part in counted.values())
    return sum(cost.total for cost in formula.values()) / total


FAST = ("gpt2", "gptj-6b", "pythia-6.9b", "opt-6.7b", "llama2-70b", "mistral-7b", "qwen2-7b",
        "qwen3-8b", "mixtral-8x7b")  # fmt: skip
SLOW = [name for name in NAMES if name not in (*FAST, "small")]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_formula_equals_the_count_for_every_family(name):
    config = shape(name)
    experts = EXPERTS.get(name, config.experts)
    config = replace(config, layers=1, windows=config.windows[:1], experts=experts)
    assert ratio(config, Task(batch=1, tokens=1024)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_formula_equals_the_count_of_finetuning(method):
    config = replace(shape("llama-1.3b"), layers=3)
    assert ratio(config, Task(method, batch=1, tokens=512)) == pytest.approx(1, abs=0.01)


def test_recomputing_is_counted_apart():
    built = build(shape("small"), Technique(recompute="full", layers="scan"), Task(tokens=64))
    counted = count_step(built.step.trace(built.state, built.batch).jaxpr.jaxpr)
    for name in ("qkv", "scores"):  # of others, what only makes the block's output is not needed
        assert counted[name].again == pytest.approx(counted[name].forward, rel=0.05)
    assert counted["head"].again == 0


def test_bytes_of_loops_are_counted_as_often_as_they_run():
    x, w = jnp.ones((32, 64)), jnp.ones((5, 64, 64))

    def looped(x, w):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]

    def unrolled(x, w):
        for i in range(5):
            x = jnp.sin(x @ w[i])
        return x

    found = [
        traffic.traffic(hlo.parse(jax.jit(f).lower(x, w).compile().as_text()))
        for f in (looped, unrolled)
    ]
    least = 5 * 64 * 64 * 4
    for n_bytes in found:
        assert least < n_bytes < 10 * least


def test_collectives_are_found_with_their_bytes():
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
    text = (
        jax.jit(lambda x: x.sum(0), in_shardings=split, out_shardings=whole)
        .lower(jnp.ones((8, 100)))
        .compile()
        .as_text()
    )
    assert traffic.exchanges(hlo.parse(text)) == {"all-reduce": traffic.Exchange(1, 400)}


def test_zero_splits_the_state_and_exchanges_gradients():
    task = Task(batch=8, tokens=7)
    alone = static.analyse(CONFIG, Technique(donate=True), task)
    split = static.analyse(CONFIG, Technique(donate=True, zero=3), task)
    # Parameters and two moments over eight devices; norms and batches do not shrink so much.
    assert split.memory.arguments < 0.2 * alone.memory.arguments
    assert not alone.exchanges
    moved = sum(exchange.n_bytes for exchange in split.exchanges.values())
    numbers = sum(x.size for x in jax.tree.leaves(split.built.state["trained"]))
    assert moved >= 4 * numbers
    line = LinearCost(1.0, 0.0, 1.0, 0.0, 3)
    peak = Peaks(1e12, 1e12, "given")
    slow = static.predicted_s(split, peak, 8, dict.fromkeys(traffic.EXCHANGES, line))
    assert slow > sum(e.count for e in split.exchanges.values())


def test_a_report_says_what_cannot_be():
    rows = static.measure("tiny", CONFIG, [Technique(attention="cudnn")], Task(batch=1, tokens=7))
    assert rows[0]["status"] == "not here"
    assert "GPU" in rows[0]["why"]


def test_the_largest_batch_is_found_and_none_is_said():
    peaks = []

    def peak(n):
        peaks.append(n)
        return 50 + 7 * n + n // 3

    best, need = fits.largest(peak, 999)
    assert need == 50 + 7 * best + best // 3 <= 999 < 50 + 7 * (best + 1) + (best + 1) // 3
    assert len(peaks) <= 6
    with pytest.raises(UserError, match="more than 0"):
        fits.search("tiny", CONFIG, [], Task(), 0)


@pytest.mark.slow
def test_a_70b_step_is_analysed_without_memory():
    technique = Technique(recompute="full", layers="scan", dtype="bf16", donate=True)
    found = static.analyse(shape("llama2-70b"), technique, Task(batch=1, tokens=128))
    assert found.memory.peak > 3 * 2 * 69e9  # parameters and two moments
    numbers = sum(x.size for x in jax.tree.leaves(found.built.state["trained"]))
    assert numbers == 68976648192


@pytest.mark.slow
@pytest.mark.parametrize("technique", [Technique(), Technique(recompute="full", donate=True)])
def test_predicted_peak_memory_is_near_the_measured(technique):
    task = Task(batch=8, tokens=256)
    predicted = static.analyse(shape("small"), technique, task).memory.peak
    measured = measured_bytes(shape("small"), technique, task, platform="cpu")
    assert predicted == pytest.approx(measured, rel=0.1)
