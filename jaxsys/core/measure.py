"""Time things fairly on a shared machine, and say which machine it was.

Neighbours make absolute times on a shared machine drift by factors. What stays comparable is taken
in one interleaved run (A B A B, in shuffled order, so that a slow minute hits both alike) and
reported as a ratio of pairs with a bootstrap interval.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.core.errors import UserError


@dataclass(frozen=True)
class Machine:
    """Hold what a reader needs to judge a timing.

    >>> "jax" in Machine.__dataclass_fields__ and "memory_gib" in Machine.__dataclass_fields__
    True
    """

    cpu: str
    cores: int
    memory_gib: float
    os: str
    python: str
    jax: str
    jaxlib: str
    numpy: str
    devices: tuple[str, ...] | None

    def __str__(self) -> str:
        devices = "" if self.devices is None else f"; {len(self.devices)} × {self.devices[0]}"
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB, {self.os}, Python "
            f"{self.python}, jax {self.jax}, jaxlib {self.jaxlib}, numpy {self.numpy}{devices}"
        )


@dataclass(frozen=True)
class Timing:
    """Hold the times of one function: every run, their median and its bootstrap interval.

    >>> Timing("step", (2.0, 1.0, 3.0), 2.0, (1.0, 3.0)).median_s
    2.0
    """

    name: str
    seconds: tuple[float, ...]
    median_s: float
    ci_s: tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """Hold the median of paired ratios and its bootstrap interval.

    >>> f"{Ratio(1.5, (1.4, 1.6)):.2f}"
    '1.50 [1.40, 1.60]'
    """

    median: float
    ci: tuple[float, float]

    def __format__(self, spec: str) -> str:
        low, high = self.ci
        return f"{self.median:{spec}} [{low:{spec}}, {high:{spec}}]"


def machine(*, devices: bool = False) -> Machine:
    """Describe this machine without touching a device.

    Args:
      devices: also list the JAX devices, initialising the backends if need be. Left out, devices
        are listed only if something else has initialised them already.

    Returns:
      The description; `devices` is None where they are not known.

    >>> machine().cores >= 1
    True
    """
    known = devices or _backends_initialised()
    return Machine(
        cpu=_cpu_model(),
        cores=_cores(),
        memory_gib=round(_memory_bytes() / 2**30, 1),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        jax=metadata.version("jax"),
        jaxlib=metadata.version("jaxlib"),
        numpy=metadata.version("numpy"),
        devices=_device_names() if known else None,
    )


def bootstrap_ci(
    samples: Sequence[float] | np.ndarray,
    *,
    statistic: Callable[..., Any] = np.median,
    level: float = 0.95,
    n: int = 1000,
    seed: int = 0,
    block: int = 1,
) -> tuple[float, float]:
    """Estimate a percentile bootstrap interval of a statistic.

    Args:
      samples: `[N]` measurements, independent unless drawn in blocks.
      statistic: `[N] -> scalar`.
      level: coverage aimed at, in (0, 1).
      n: number of resamples.
      seed: of the resampling; the same seed gives the same interval.
      block: neighbours that are drawn together, because they are alike (circular block bootstrap).

    Returns:
      The lower and the upper end. One sample gives an interval of no width.

    Raises:
      UserError: without samples, with a level outside (0, 1) or a block below 1.

    Reference: Politis and Romano, "A circular block-resampling procedure for stationary data",
    1992.

    >>> bootstrap_ci([1.0, 1.0, 1.0])
    (1.0, 1.0)
    >>> low, high = bootstrap_ci(np.arange(101.0), statistic=np.mean)
    >>> low < 50.0 < high
    True
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise UserError(f"samples have shape {values.shape}; pass a flat list of at least one time")
    if not 0 < level < 1:
        raise UserError(f"level is {level}; it must lie between 0 and 1, for example 0.95")
    if block < 1:
        raise UserError(f"block is {block}; pass the number of neighbours drawn together, from 1")
    blocks = -(-values.size // block)
    begins = np.random.default_rng(seed).integers(values.size, size=(n, blocks))
    drawn = (begins[..., None] + np.arange(block)).reshape(n, -1)[:, : values.size] % values.size
    estimates = [float(statistic(values[row])) for row in drawn]
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def block_of(runs: int) -> int:
    """Say how many neighbouring runs the interval of a `Timing` draws together: √N.

    Args:
      runs: N.

    >>> block_of(1), block_of(10), block_of(40)
    (1, 3, 6)
    """
    return max(1, round(runs**0.5))


def timing(name: str, seconds: Sequence[float]) -> Timing:
    """Summarise the times of one function.

    Times next to each other are alike, as a machine is slow for longer than one run; the interval
    is a bootstrap of blocks of √N runs.

    Args:
      name: what was timed.
      seconds: `[N]`, one time for each run, in the order of the runs.

    >>> timing("step", [2.0, 1.0, 3.0]).median_s
    2.0
    """
    interval = bootstrap_ci(seconds, block=block_of(len(seconds)))
    return Timing(name, tuple(seconds), float(np.median(seconds)), interval)


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    warmup: int = 2,
    runs: int = 10,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time several functions in turns, each round in a freshly shuffled order.

    Every call waits for the JAX arrays that it returns. Entry `i` of each `seconds` belongs to
    round `i`, so that `ratio` can pair them.

    Args:
      functions: name to function of no arguments.
      warmup: rounds that are not counted (compilation, caches).
      runs: rounds that are.
      seed: of the order.

    Returns:
      Name to `Timing`, in the order given.

    Raises:
      UserError: with fewer than one run.

    >>> times = interleaved({"a": lambda: sum(range(9)), "b": lambda: None}, runs=3)
    >>> list(times), len(times["a"].seconds)
    (['a', 'b'], 3)
    """
    if runs < 1:
        raise UserError(f"runs is {runs}; at least 1 is needed for a median")
    rng = np.random.default_rng(seed)
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(warmup + runs):
        for position in rng.permutation(len(names)):
            elapsed_s = _elapsed(functions[names[position]])
            if round_index >= warmup:
                seconds[names[position]].append(elapsed_s)
    return {name: timing(name, seconds[name]) for name in names}


def ratio(a: Timing, b: Timing, *, level: float = 0.95, seed: int = 0) -> Ratio:
    """Compare two interleaved timings as the median over rounds of a's time over b's.

    Args:
      a: numerator.
      b: denominator; above 1 means that b is faster.
      level: coverage of the interval.
      seed: of the bootstrap.

    Raises:
      UserError: if the two were not measured over the same number of rounds.

    >>> ratio(timing("a", [2.0, 4.0, 6.0]), timing("b", [1.0, 2.0, 3.0]))
    Ratio(median=2.0, ci=(2.0, 2.0))
    """
    if len(a.seconds) != len(b.seconds):
        raise UserError(
            f"{a.name} has {len(a.seconds)} runs and {b.name} has {len(b.seconds)}; "
            "only runs of one interleaved measurement can be paired"
        )
    pairs = np.asarray(a.seconds) / np.asarray(b.seconds)
    return Ratio(float(np.median(pairs)), bootstrap_ci(pairs, level=level, seed=seed))


def _elapsed(function: Callable[[], Any]) -> float:
    # Imported here: describing a machine or an interval must not pay for JAX.
    import jax

    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _backends_initialised() -> bool:
    # Looking the module up among those loaded keeps this from importing JAX, let alone starting it.
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bool(getattr(bridge, "_backends", None))


def _device_names() -> tuple[str, ...]:
    import jax

    return tuple(f"{d.platform}:{d.device_kind}" for d in jax.devices())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
