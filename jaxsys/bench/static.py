"""What is known of a training step before it runs: operations, bytes, memory, exchange, least time.

The step is traced and compiled from shapes alone; nothing is allocated, so that models are studied
which would not fit. What the compiler says holds for the backend that it compiles for: XLA on a CPU
widens bfloat16 for most operations, so that such programs need more memory there than on a GPU.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import jax

from jaxsys.bench.counts import Cost, balanced_rows, count_step, step_flops
from jaxsys.bench.records import record
from jaxsys.bench.roofline import Peaks, floor_s, peaks
from jaxsys.bench.step import Built, Task, build
from jaxsys.bench.techniques import Technique, Where, why_not
from jaxsys.bench.traffic import Exchange, exchanges, traffic
from jaxsys.core import hlo
from jaxsys.core.cost import LinearCost
from jaxsys.core.flops import Scoped
from jaxsys.models.lm import LMConfig


class Memory(NamedTuple):
    """Bytes that a compiled step needs on one device.

    Attributes:
      arguments: state and batch.
      outputs: state and loss after the step.
      shared: of the outputs that are written over the arguments (donation).
      temporaries: all else.
      host: state in host memory.

    >>> Memory(4, 4, 4, 2, 0).peak
    6
    """

    arguments: int
    outputs: int
    shared: int
    temporaries: int
    host: int

    @property
    def peak(self) -> int:
        """The most that is needed at once in the device's own memory."""
        return self.arguments + self.outputs - self.shared + self.temporaries


class Static(NamedTuple):
    """What is known of a step.

    Attributes:
      built: the step and the shapes of what it takes.
      compiled: the program.
      compile_s: seconds that tracing and compiling took; less if a persistent cache had it.
      formula: operations by part by formula.
      products: of these the products of matrices, which model FLOP utilisation counts.
      counted: operations by part in the traced program.
      hardware: products that are computed, with recomputation and experts' rounding.
      memory: of one device.
      traffic: bytes that one device's program reads and writes, loops times their trips.
      exchanges: kind of collective to count and bytes.

    >>> Static._fields[:2]
    ('built', 'compiled')
    """

    built: Built
    compiled: Any
    compile_s: float
    formula: dict[str, Cost]
    products: float
    counted: dict[str, Scoped]
    hardware: float
    memory: Memory
    traffic: float
    exchanges: dict[str, Exchange]


def analyse(
    config: LMConfig, technique: Technique, task: Task, devices: Sequence[Any] | None = None
) -> Static:
    """Trace and compile a step from shapes alone, and read what it will need.

    Args:
      config: the model.
      technique: how.
      task: what.
      devices: as for `step.build`.

    Returns:
      The figures; nothing has run.

    Raises:
      UserError: if the technique cannot be used here.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> found = analyse(config, Technique(donate=True), Task(batch=1, tokens=8))
    >>> found.memory.peak > found.memory.arguments > 0, found.exchanges
    (True, {})
    """
    built = build(config, technique, task, devices)
    start = time.perf_counter()
    traced = built.step.trace(built.state, built.batch)
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - start
    if technique.attention == "cudnn":  # one opaque operation; the plain one computes the same
        plain = build(config, replace(technique, attention="plain"), task, devices)
        traced = plain.step.trace(plain.state, plain.batch)
    counted = count_step(traced.jaxpr.jaxpr)
    rows = task.batch // technique.accumulate * task.tokens
    own = balanced_rows(config, rows)
    computed = None if own is None else float(own * technique.accumulate)
    options: dict[str, Any] = {
        "method": task.method, "rank": task.rank, "prompt_tokens": task.prompt_tokens
    }  # fmt: skip
    both = [
        step_flops(config, task.batch, task.tokens, products_only=True, expert_rows=e, **options)
        for e in (None, computed)
    ]
    products, done = (sum(cost.total for cost in found.values()) for found in both)
    module = hlo.parse(compiled.as_text())
    return Static(
        built=built,
        compiled=compiled,
        compile_s=compile_s,
        formula=step_flops(config, task.batch, task.tokens, expert_rows=computed, **options),
        products=products,
        counted=counted,
        hardware=done + sum(part.again for part in counted.values()),
        memory=_memory(compiled),
        traffic=traffic(module),
        exchanges=exchanges(module),
    )


def _memory(compiled: Any) -> Memory:
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.host_argument_size_in_bytes + found.host_temp_size_in_bytes,
    )


def peak_of(technique: Technique, device: Any) -> Peaks:
    """Give the device's peaks for the numbers that a technique computes with.

    >>> peak_of(Technique(), jax.devices()[0]).flops_per_s > 0
    True
    """
    return peaks(device, "float32" if technique.dtype == "f32" else "bfloat16")


def predicted_s(
    found: Static, peak: Peaks, n_devices: int, lines: Mapping[str, LinearCost] | None = None
) -> float:
    """Predict the least seconds of a step: the roofline, and what each collective takes.

    Args:
      found: of the step.
      peak: of one device.
      n_devices: that share the operations.
      lines: kind of collective to its fitted line over bytes; without, exchange is left out.

    Returns:
      Seconds; nothing is assumed to overlap with exchange.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> found = analyse(config, Technique(), Task(batch=1, tokens=8))
    >>> predicted_s(found, Peaks(1e6, 1e12, "a guess"), 1) > 0.5
    True
    """
    flops = sum(part.total for part in found.counted.values()) / n_devices
    seconds = floor_s(flops, found.traffic, peak)
    for kind, exchange in found.exchanges.items():
        if lines and kind in lines:
            seconds += exchange.count * lines[kind](exchange.n_bytes / exchange.count)
    return float(seconds)


def flags_of(model: str, technique: Technique, task: Task, n_devices: int) -> dict[str, Any]:
    """Name a cell of a grid: a row's identity.

    >>> flags_of("small", Technique(zero=1), Task(batch=2), 8)["technique"]
    'zero 1'
    """
    own = asdict(task)
    own.pop("seed")
    if task.method != "lora":
        del own["rank"], own["alpha"]
    if task.method != "prompt":
        own.pop("prompt_tokens")
    return {"model": model, **own, "technique": technique.name, "devices": n_devices}


def measure(
    model: str,
    config: LMConfig,
    techniques: Sequence[Technique],
    task: Task,
    *,
    devices: Sequence[Any] | None = None,
    lines: Mapping[str, LinearCost] | None = None,
    on_event: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Make the static report of some techniques.

    Args:
      model: its name, for the rows.
      config: the model.
      techniques: to compile, each with and without donation.
      task: what is trained.
      devices: all by default where ZeRO splits, else the first.
      lines: fitted lines of collectives.
      on_event: told what is being compiled.

    Returns:
      A row of kind ``static`` for each technique.

    >>> config = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> row = measure("tiny", config, [Technique()], Task(batch=1, tokens=8))[0]
    >>> row["peak_bytes_donated"] < row["peak_bytes_kept"], row["collective_bytes"]
    (True, 0)
    """
    rows = []
    for technique in techniques:
        chosen = devices_for(technique, devices)
        flags = flags_of(model, technique, task, len(chosen))
        on_event(technique.name)
        where = Where.here(chosen)
        reason = why_not(technique, config, where, method=task.method, batch=task.batch)
        if reason:
            rows.append(record("static", task.seed, flags, status="not here", why=reason))
            continue
        both = {
            donate: analyse(config, replace(technique, donate=donate), task, chosen)
            for donate in (technique.donate, not technique.donate)
        }
        rows.append(_row(flags, technique, task, both, chosen, lines))
    return rows


def devices_for(technique: Technique, devices: Sequence[Any] | None) -> list[Any]:
    """Choose devices: those given, else all where ZeRO splits, else the first.

    >>> len(devices_for(Technique(), None))
    1
    """
    found = list(jax.devices() if devices is None else devices)
    return found if technique.zero or devices is not None else found[:1]


def _row(flags, technique, task, both: dict[bool, Static], devices, lines) -> dict[str, Any]:
    found, peak = both[technique.donate], peak_of(technique, devices[0])
    formula = sum(cost.total for cost in found.formula.values())
    counted = sum(part.total for part in found.counted.values())
    return record(
        "static",
        task.seed,
        flags,
        flops_formula=formula,
        flops_counted=counted,
        flops_ratio=counted / formula,
        flops_recomputed=sum(part.again for part in found.counted.values()),
        flops_model=found.products,
        parts=_parts(found),
        traffic_bytes=found.traffic,
        peak_bytes_donated=both[True].memory.peak,
        peak_bytes_kept=both[False].memory.peak,
        host_bytes=found.memory.host,
        memory=found.memory._asdict(),
        collective_bytes=sum(e.n_bytes for e in found.exchanges.values()),
        collectives={kind: e._asdict() for kind, e in found.exchanges.items()},
        predicted_s=predicted_s(found, peak, len(devices), lines),
        peaks=peak.to_dict(),
        compile_s=found.compile_s,
    )


def _parts(found: Static) -> dict[str, Any]:
    nothing = Cost(0.0, 0.0)
    return {
        name or "elsewhere": {
            "formula": found.formula.get(name, nothing).total,
            "counted": part.total,
            "recomputed": part.again,
        }
        for name, part in found.counted.items()
    }
