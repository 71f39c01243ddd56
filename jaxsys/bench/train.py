"""Measure training and fine-tuning steps over a grid of techniques.

Every cell is compiled and its memory worked out before anything runs, so that one that cannot fit
is a row and not a crash. Cells whose states fit in memory together are timed in turns.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxsys.bench.counts import trained_numbers
from jaxsys.bench.memory import measured_bytes
from jaxsys.bench.records import figure_of, record
from jaxsys.bench.static import Static, analyse, devices_for, flags_of, peak_of, predicted_s
from jaxsys.bench.step import Task
from jaxsys.bench.techniques import Technique, Where, why_not
from jaxsys.core.cost import LinearCost
from jaxsys.core.errors import UserError
from jaxsys.core.measure import Timing, interleaved
from jaxsys.core.report import format_bytes
from jaxsys.models.lm import LMConfig

_TOGETHER = 12  # cells timed in turns at most, so that a run that is cut off loses no more


class Cell(NamedTuple):
    """One row to be: a technique on a task, compiled.

    Attributes:
      technique: how.
      task: what.
      flags: the row's identity.
      devices: on which.
      found: its static analysis.

    >>> Cell._fields
    ('technique', 'task', 'flags', 'devices', 'found')
    """

    technique: Technique
    task: Task
    flags: dict[str, Any]
    devices: list[Any]
    found: Static


def measure(
    model: str,
    config: LMConfig,
    techniques: Sequence[Technique],
    task: Task,
    *,
    devices: Sequence[Any] | None = None,
    budget_bytes: int | None = None,
    runs: int = 10,
    memory: bool = True,
    lines: Mapping[str, LinearCost] | None = None,
    done: Sequence[Mapping[str, Any]] = (),
    on_event: Callable[[str], None] = lambda _: None,
    on_row: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure a step under several techniques, with random weights and random text.

    Args:
      model: its name, for the rows.
      config: the model.
      techniques: how the step is run.
      task: what it trains.
      devices: all by default where ZeRO splits, else the first.
      budget_bytes: memory of one device that may be used; what is free by default.
      runs: timed rounds, after two that warm up.
      memory: also measure peak memory, each cell in a process of its own.
      lines: fitted lines of collectives, for the predicted time.
      done: rows of an earlier run; their cells are not run again.
      on_event: told what is being done.
      on_row: given each row as soon as it is known.

    Returns:
      Rows of kind ``train`` (method pretrain) or ``finetune``, one for each technique: ``step``,
      ``tokens_per_s``, ``mfu`` (products that the model needs, over what the devices could do),
      ``hfu`` (products that are computed, with recomputation), ``peak_memory_predicted_bytes``,
      ``peak_memory_measured_bytes``, ``predicted_s``, ``compile_s``.

    Raises:
      UserError: fewer than one run.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> techniques = [Technique(), Technique(zero=1)]
    >>> found = measure("tiny", config, techniques, Task(batch=1, tokens=8), runs=2,
    ...                 devices=jax.devices()[:1], memory=False)
    >>> [row["status"] for row in found], found[1]["why"]
    (['ok', 'not here'], 'ZeRO-1 splits state over devices, and there is one')
    """
    if runs < 1:
        raise UserError(f"runs is {runs}; expected 1 at least; raise it")
    known = {_key(row["flags"]): dict(row) for row in done}
    rows: dict[str, dict[str, Any]] = {}
    waiting: list[Cell] = []

    def keep(flags: Mapping[str, Any], row: dict[str, Any], *, new: bool = True) -> None:
        rows[_key(flags)] = row
        if new:
            on_row(row)

    order = []
    for technique in techniques:
        chosen = devices_for(technique, devices)
        flags = flags_of(model, technique, task, len(chosen))
        order.append(_key(flags))
        if order[-1] in known:
            keep(flags, known[order[-1]], new=False)
            continue
        on_event(f"compiling {technique.name}")
        cell = _compiled(config, technique, task, flags, chosen, budget_bytes)
        if isinstance(cell, Cell):
            waiting.append(cell)
        else:
            keep(flags, cell)
    for group in _groups(waiting, budget_bytes):
        on_event(f"timing {len(group)} cells in turns")
        times = _times(group, runs)
        for cell in group:
            timing = times.get(_key(cell.flags))
            if memory and timing is not None:
                on_event(f"memory of {cell.technique.name}")
            keep(cell.flags, _row(config, cell, timing, lines, memory=memory))
    return [rows[key] for key in order]


def _key(flags: Mapping[str, Any]) -> str:
    return json.dumps(flags, sort_keys=True)


def _kind(task: Task) -> str:
    return "train" if task.method == "pretrain" else "finetune"


def _compiled(config, technique, task, flags, devices, budget) -> Cell | dict[str, Any]:
    where = Where.here(devices)
    reason = why_not(technique, config, where, method=task.method, batch=task.batch)
    if reason:
        return record(_kind(task), task.seed, flags, status="not here", why=reason)
    try:
        found = analyse(config, technique, task, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = "the compiler found no way to fit it into the device's memory"
        return record(_kind(task), task.seed, flags, status="out of memory", why=why)
    limit = free_bytes(devices[0], len(devices)) if budget is None else budget
    need = found.memory.peak + (found.memory.host if where.platform == "cpu" else 0)
    if need > limit:
        why = (
            f"a device would need {format_bytes(need)} by static analysis, and may use "
            f"{format_bytes(limit)}"
        )
        more = {"peak_memory_predicted_bytes": need, "compile_s": found.compile_s}
        return record(_kind(task), task.seed, flags, status="out of memory", why=why, **more)
    return Cell(technique, task, flags, devices, found)


def free_bytes(device: Any, n_devices: int = 1) -> int:
    """Give the memory of one device that is free: nine tenths of what the system says.

    Args:
      device: such as ``jax.devices()[0]``.
      n_devices: virtual ones on a CPU share its memory.

    Returns:
      Bytes.

    >>> free_bytes(jax.devices()[0]) > 0
    True
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats:
        return int(0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    path = Path("/proc/meminfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    kib = [int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable")]
    return int(0.9 * 1024 * (kib[0] if kib else 4 * 2**20)) // n_devices


def _groups(cells: Sequence[Cell], budget: int | None) -> list[list[Cell]]:
    """Put cells together, in order, while their states and the largest program fit."""
    groups: list[list[Cell]] = []
    for cell in cells:
        limit = free_bytes(cell.devices[0], len(cell.devices)) if budget is None else budget
        group = [*groups[-1], cell] if groups else [cell]
        held = sum(c.found.memory.arguments + c.found.memory.host for c in group)
        extra = max(c.found.memory.peak - c.found.memory.arguments for c in group)
        if groups and held + extra <= limit and len(group) <= _TOGETHER:
            groups[-1] = group
        else:
            groups.append([cell])
    return groups


class _Running:
    """A cell's state between its steps; calling it runs one more."""

    def __init__(self, cell: Cell) -> None:
        self.compiled = cell.found.compiled
        self.state, self.batch = cell.found.built.init(), cell.found.built.data(0)

    def __call__(self) -> Any:
        state, self.state = self.state, None
        self.state, info = self.compiled(state, self.batch)
        return self.state, info


def _times(group: Sequence[Cell], runs: int) -> dict[str, Timing]:
    try:
        running = {_key(cell.flags): _Running(cell) for cell in group}
        return interleaved(running, warmup=2, runs=runs, seed=group[0].task.seed)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if len(group) == 1:
            return {}
    running = {}
    return {key: time for cell in group for key, time in _times([cell], runs).items()}


def _row(config, cell: Cell, timing: Timing | None, lines, *, memory: bool) -> dict[str, Any]:
    task, found, n = cell.task, cell.found, len(cell.devices)
    platform = cell.devices[0].platform
    # Host memory is the CPU's own.
    need = found.memory.peak + (found.memory.host if platform == "cpu" else 0)
    fields: dict[str, Any] = {"peak_memory_predicted_bytes": need, "compile_s": found.compile_s}
    if timing is None:
        why = f"the device ran out of memory, where {format_bytes(need)} had been predicted"
        return record(_kind(task), task.seed, cell.flags, status="out of memory", why=why, **fields)
    measured = None
    if memory:
        measured = measured_bytes(config, cell.technique, task, platform=platform, n_devices=n)
    peak = peak_of(cell.technique, cell.devices[0])
    could = timing.median_s * n * peak.flops_per_s
    trained = trained_numbers(config, task.method, task.rank, task.prompt_tokens)
    return record(
        _kind(task),
        task.seed,
        cell.flags,
        step=figure_of(timing),
        tokens_per_s=task.batch * task.tokens / timing.median_s,
        mfu=found.products / could,
        hfu=found.hardware / could,
        peak_memory_measured_bytes=measured,
        predicted_s=predicted_s(found, peak, n, lines),
        flops_model=found.products,
        flops_hardware=found.hardware,
        trained_numbers=trained,
        peaks=peak.to_dict(),
        **fields,
    )
