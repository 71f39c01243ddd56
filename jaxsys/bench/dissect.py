"""A training step of a model taken apart in both ways: profiled whole, and part by part."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import optax

from jaxsys.bench.ablation import GROUPS, Ablation, ablate
from jaxsys.bench.counts import step_flops
from jaxsys.bench.modules import OPTIMIZER, PARTS, Split, split
from jaxsys.bench.records import figure_of, record
from jaxsys.bench.step import Task, build
from jaxsys.bench.techniques import Technique, Where, why_not
from jaxsys.core.errors import UserError
from jaxsys.core.measure import Ratio, Timing
from jaxsys.models import lm
from jaxsys.train.optimizers import adamw


def measure(
    config: lm.LMConfig,
    technique: Technique,
    task: Task,
    flags: Mapping[str, Any],
    *,
    device: Any = None,
    rounds: int = 10,
    on_event: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Take one step apart.

    Each part alone is timed only where the step runs parts one after another as written: no
    recomputing, one micro-batch, unrolled layers, one type of numbers, nothing offloaded.

    Args:
      config: the model.
      technique: how the step is run; arguments are never donated here.
      task: what it trains.
      flags: what names the row.
      device: on which; the first by default.
      rounds: of each way.
      on_event: told what is being done.

    Returns:
      A row of kind ``modules``: ``step``; ``parts``, a dict from "part phase" to ``profiled`` and
      ``alone`` (timed figures), ``share`` of the step (profiled) and ``flops`` where known;
      ``profiled_total`` and ``alone_total``, what the parts add up to over the step; ``groups`` and
      ``groups_total``, the same of attention, mlp, head and so on, each alone as one program;
      ``overhead`` of the profiler, a ratio. A technique that cannot be used is a row that says so.

    Raises:
      UserError: a technique that splits over devices.

    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> row = measure(config, Technique(weights="int8"), Task(), {"model": "tiny"})
    >>> row["status"], row["why"]
    ('not here', 'codes of int8 cannot be trained: ...')
    """
    device = jax.devices()[0] if device is None else device
    if technique.zero:
        raise UserError(
            f"the step is split over devices by ZeRO-{technique.zero}; expected a step of one "
            "device; take its parts apart without"
        )
    technique = replace(technique, donate=False)
    here = Where.here([device])
    reason = why_not(technique, config, here, method=task.method, batch=task.batch)
    if reason:
        return record("modules", task.seed, flags, status="not here", why=reason)
    on_event("compiling the step")
    built = build(config, technique, task, [device])
    state, batch = built.init(), built.data(0)
    compiled = built.step.lower(state, batch).compile()
    run = partial(compiled, state, batch)
    on_event(f"the step under the profiler, {rounds} rounds")
    found = split(run, compiled.as_text(), rounds=rounds)
    alone: dict[str, Ablation] = {}
    if _as_written(technique, task):
        on_event(f"each part alone, then groups of parts, {rounds} rounds each")
        alone = _alone(config, technique, task, state, batch, run, rounds)
    fields = _fields(found, alone.get("parts"))
    if "groups" in alone:
        fields |= _grouped(found, alone["groups"])
    for name, cost in step_flops(config, task.batch, task.tokens, method=task.method).items():
        for phase, flops in (("forward", cost.forward), ("backward", cost.backward)):
            key = name if name == OPTIMIZER else f"{name} {phase}"
            if key in fields["parts"] and flops:
                fields["parts"][key]["flops"] = flops
    return record("modules", task.seed, flags, **fields)


def _as_written(technique: Technique, task: Task) -> bool:
    plain = Technique(attention=technique.attention, dtype=technique.dtype)
    return technique == plain and technique.dtype != "mixed" and task.method == "pretrain"


def _alone(
    config: lm.LMConfig,
    technique: Technique,
    task: Task,
    state: Any,
    batch: Any,
    run: Callable[[], Any],
    rounds: int,
) -> dict[str, Ablation]:
    params, tokens = state["trained"]["model"], batch["tokens"][0]
    execution = lm.Execution(technique.attention)
    optimizer = adamw(task.lr)
    memory = optimizer.init(params)

    @jax.jit
    def update(grads: Any, memory: Any, params: Any) -> Any:
        updates, memory = optimizer.update(grads, memory, params)
        return optax.apply_updates(params, updates), memory

    def loss(params: Any, tokens: Any) -> Any:
        return lm.loss(params, config, tokens, execution=execution)

    options: dict[str, Any] = {
        "step": run,
        "optimizer": lambda: update(params, memory, params),
        "rounds": rounds,
    }
    return {
        "parts": ablate(loss, params, (tokens,), **options),
        "groups": ablate(loss, params, (tokens,), parts=GROUPS, **options),
    }


def _fields(found: Split, alone: Ablation | None) -> dict[str, Any]:
    keys = dict.fromkeys((*found.seconds, *(alone.seconds if alone else ())))
    order = (*PARTS, OPTIMIZER)
    ranked = sorted(keys, key=lambda key: order.index(key[0]) if key[0] in order else len(order))
    parts = {}
    for key in ranked:
        part: dict[str, Any] = {}
        if key in found.seconds:
            part["profiled"] = _figure(found.seconds[key], found.step)
            part["share"] = found.seconds[key][0] / found.step.median_s
        if alone and key in alone.seconds:
            part["alone"] = _figure(alone.seconds[key], alone.step)
        # "optimizer optimizer" says no more than once
        parts[" ".join(dict.fromkeys(key))] = part
    totals = {"profiled_total": _ends(found.total), "overhead": _ends(found.overhead)}
    if alone:
        totals |= {"alone_total": _ends(alone.total), "programs_alone": alone.programs}
    return {
        "step": figure_of(found.step),
        "parts": parts,
        "operations": found.operations,
        **totals,
    }


def _grouped(found: Split, alone: Ablation) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for key in alone.seconds:
        held = [s[0] for k, s in found.seconds.items() if (GROUPS.get(k[0], k[0]), k[1]) == key]
        groups[" ".join(dict.fromkeys(key))] = {
            "profiled_s": sum(held),
            "alone": _figure(alone.seconds[key], alone.step),
        }
    return {"groups": groups, "groups_total": _ends(alone.total)}


def _figure(ends: tuple[float, float, float], step: Timing) -> dict[str, float | int]:
    median, low, high = ends
    return {"median_s": median, "low_s": low, "high_s": high, "runs": len(step.seconds)}


def _ends(ratio: Ratio) -> dict[str, float]:
    return {"median": ratio.median, "low": ratio.ci[0], "high": ratio.ci[1]}
