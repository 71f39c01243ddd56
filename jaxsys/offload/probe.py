"""Time two devices and the copies between them, and describe them as a machine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.cost import LinearCost, PoorFitError, fit_linear
from jaxsys.core.errors import UserError
from jaxsys.core.measure import interleaved
from jaxsys.core.measure import machine as describe_machine
from jaxsys.offload.cost import rates_of
from jaxsys.offload.types import Machine, Processor

_TOKENS = (16, 32, 64)


@jax.jit
def _product(weight, x):
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


@jax.jit
def _one_row(weight, x):
    if weight.dtype == jnp.float32:
        return _product(weight, x[None])[0]
    return (weight.astype(jnp.float32) * x[None]).sum(-1)


def measure_machine(
    cpu_device: Any,
    accelerator_device: Any | None = None,
    *,
    largest_bytes: int = 2**28,
    width: int = 2048,
    dtype: Any = jnp.float32,
    runs: int = 10,
    strict: bool = True,
    on_event: Callable[[str], None] = lambda _: None,
) -> Machine:
    """Measure both processors, the link and how far copies and the CPU share memory.

    Lines are fitted to the fastest of interleaved runs, since neighbours only slow a run down: one
    token's product with four sizes of
    matrix gives ``launch`` and ``B``, products with many tokens give ``C``, copies of four sizes
    give the link. The memory's rate is what a product on the CPU and a copy, started together, read
    in all per second; two virtual devices of one CPU are measured like any others.

    Args:
        cpu_device: such as ``jax.devices("cpu")[0]``.
        accelerator_device: such as ``jax.devices()[0]``; None for a CPU alone.
        largest_bytes: of the largest matrix and copy; above the caches, or the rates are those of
            the caches.
        width: inputs of the matrices.
        dtype: of the weights: float32 or bfloat16, or int8 for rows of codes.
        runs: timed rounds after two that warm up.
        strict: refuse times that lie on no line; else the largest size alone gives the rate, with
            no latency.
        on_event: told what is being timed.

    Returns:
        The machine, with the fitted lines behind its rates.

    Raises:
        UserError: one device given twice, or sizes too small to compare.
        PoorFitError: ``strict`` and times that lie on no line, as on a busy machine.

    >>> machine = measure_machine(jax.devices("cpu")[0], largest_bytes=2**22, width=256, runs=3,
    ...                           strict=False)
    >>> machine.accelerator is None and machine.cpu.bytes_per_s > 0
    True
    """
    if cpu_device == accelerator_device:
        raise UserError(
            f"{cpu_device} is given as CPU and as accelerator; expected two devices; leave the "
            "accelerator out, or start with two virtual ones"
        )
    rows = [largest_bytes // (jnp.dtype(dtype).itemsize * width * d) for d in (8, 4, 2, 1)]
    if rows[0] < 8 or runs < 1:
        raise UserError(
            f"matrices of {largest_bytes} bytes with {width} inputs have {rows} rows and {runs} "
            "runs; expected at least 8 rows and a run; raise largest_bytes"
        )
    on_event(f"timing products on {cpu_device}")
    time_all = partial(_processor, rows, width, dtype, runs, strict)
    cpu, lines = time_all(cpu_device, "cpu")
    found: dict[str, Any] = {"name": describe_machine().cpu}
    if accelerator_device is None:
        return Machine(cpu, lines=tuple(lines.items()), dram_bytes_per_s=cpu.bytes_per_s, **found)
    on_event(f"timing products on {accelerator_device}")
    accelerator, more = time_all(accelerator_device, "accelerator")
    on_event(f"timing copies from {cpu_device} to {accelerator_device}")
    devices = (cpu_device, accelerator_device)
    link = _link([row * width for row in rows], dtype, runs, strict, devices)
    on_event("timing a product and a copy at once")
    dram = _together(rows[-1], width, dtype, runs, devices)
    found["name"] += f" + {accelerator_device.device_kind}"
    return Machine(
        cpu,
        accelerator,
        link_bytes_per_s=1.0 / link.beta_s_per_unit,
        link_latency_s=link.alpha_s,
        # A product alone reads at most what the memory gives.
        dram_bytes_per_s=max(dram, cpu.bytes_per_s),
        lines=(*lines.items(), *more.items(), ("link", link)),
        **found,
    )


def _weights(rows: int, width: int, dtype: Any, device: Any) -> jax.Array:
    values = np.random.default_rng(rows).integers(-9, 9, (rows, width)).astype(np.int8)
    weight = jnp.asarray(values, dtype)
    return jax.device_put(weight, device)


def _processor(rows, width, dtype, runs, strict, device, name):
    weights = [_weights(n, width, dtype, device) for n in rows]
    one = jax.device_put(jnp.ones(width, jnp.float32), device)
    # Many tokens are worth a float32 copy of codes, as the quantised forms do it.
    wide = weights[0] if jnp.issubdtype(dtype, jnp.floating) else weights[0].astype(jnp.float32)
    many = [jax.device_put(jnp.ones((n, width), wide.dtype), device) for n in _TOKENS]
    calls: dict[str, Callable] = {}
    for weight in weights:
        calls[f"1 {weight.shape[0]}"] = partial(_one_row, weight, one)
    for x in many:
        calls[f"n {x.shape[0]}"] = partial(_product, wide, x)
    times = {key: min(t.seconds) for key, t in interleaved(calls, runs=runs).items()}
    sizes = [weight.nbytes for weight in weights]
    flops = [2.0 * wide.size * n for n in _TOKENS]
    read_s = [times[f"1 {weight.shape[0]}"] for weight in weights]
    work_s = [times[f"n {n}"] for n in _TOKENS]
    reads, works = _line(sizes, read_s, strict), _line(flops, work_s, strict)
    rates = rates_of(reads, works)
    unit = Processor(rates.bytes_per_s, rates.flops_s, _memory_bytes(device), rates.launch_s)
    return unit, {f"{name} bytes": reads, f"{name} flops": works}


def _line(sizes, seconds, strict: bool) -> LinearCost:
    try:
        return fit_linear(sizes, seconds)
    except PoorFitError:
        if strict:
            raise
        last = int(np.argmax(sizes))
        return LinearCost(0.0, seconds[last] / sizes[last], 0.0, 0.0, len(sizes))


def _memory_bytes(device: Any) -> int:
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return limit or int(describe_machine().memory_gib * 2**30)


def _source(elements: int, dtype: Any, cpu_device: Any, accelerator_device: Any) -> jax.Array:
    """Put a buffer where copies to the accelerator start: pinned memory where there is such."""
    weight = _weights(1, elements, dtype, cpu_device)
    kinds = [memory.kind for memory in accelerator_device.addressable_memories()]
    if accelerator_device.platform == "cpu" or "pinned_host" not in kinds:
        return weight
    pinned = jax.sharding.SingleDeviceSharding(accelerator_device, memory_kind="pinned_host")
    return jax.device_put(np.asarray(weight), pinned)


def _target(device: Any) -> Any:
    return jax.sharding.SingleDeviceSharding(device, memory_kind="device")


def _link(sizes, dtype, runs, strict, devices) -> LinearCost:
    sources = {n: _source(n, dtype, *devices) for n in sizes}
    target = _target(devices[1])
    calls = {str(n): partial(jax.device_put, x, target) for n, x in sources.items()}
    times = interleaved(calls, runs=runs)
    n_bytes = [x.nbytes for x in sources.values()]
    return _line(n_bytes, [min(times[str(n)].seconds) for n in sizes], strict)


def _together(rows, width, dtype, runs, devices) -> float:
    """Bytes per second that a product on the CPU and a copy read when both are under way."""
    weight = _weights(rows, width, dtype, devices[0])
    source, target = _source(rows * width, dtype, *devices), _target(devices[1])
    one = jax.device_put(jnp.ones(width, jnp.float32), devices[0])

    def both():
        return jax.device_put(source, target), _one_row(weight, one)

    seconds = interleaved({"both": both}, runs=runs)["both"].seconds
    return (weight.nbytes + source.nbytes) / min(seconds)
