"""What a machine can do at most, and how near a measurement comes to it.

An operation that computes F operations and must move N bytes takes no less than
``max(F / peak, N / bandwidth)``: the roofline.

Reference: Williams, Waterman and Patterson, "Roofline" (2009).
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsys.core.errors import UserError
from jaxsys.core.measure import interleaved

# Dense rates of matrix units, with sums in float32; float32 is TF32, which XLA's default precision
# uses on these. Operations per second times 1e12 for bfloat16, float32 and int8; bytes times 1e9.
# From NVIDIA's data sheets: H100 (2023), H200 (2024), A100 (2021), L4 and L40S (2023), and the Ada
# (v2.1) and Ampere GA102 (v2.1) architecture papers for GeForce.
_KNOWN = {
    "NVIDIA H200": (989.4, 494.7, 1978.9, 4800.0),
    "NVIDIA H100 80GB HBM3": (989.4, 494.7, 1978.9, 3350.0),
    "NVIDIA H100 PCIe": (756.0, 378.0, 1513.0, 2000.0),
    "NVIDIA A100-SXM4-80GB": (312.0, 156.0, 624.0, 2039.0),
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0, 624.0, 1555.0),
    "NVIDIA A100 80GB PCIe": (312.0, 156.0, 624.0, 1935.0),
    "NVIDIA L40S": (362.0, 183.0, 733.0, 864.0),
    "NVIDIA L4": (121.0, 60.0, 242.0, 300.0),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6, 660.6, 1008.0),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6, 284.0, 936.0),
}
_COLUMNS = {"bfloat16": 0, "float16": 0, "float32": 1, "int8": 2}


class Peaks(NamedTuple):
    """The most that a device does.

    Attributes:
      flops_per_s: of products of matrices.
      bytes_per_s: read and written in its memory.
      source: where the two come from.

    >>> Peaks(1e12, 1e11, "a guess").balance
    10.0
    """

    flops_per_s: float
    bytes_per_s: float
    source: str

    @property
    def balance(self) -> float:
        """Operations per byte above which computing, not memory, is the bound."""
        return self.flops_per_s / self.bytes_per_s

    def to_dict(self) -> dict[str, Any]:
        """Give the three for a row of results."""
        return self._asdict()


def peaks(device: Any, dtype: Any = jnp.float32) -> Peaks:
    """Give a device's peaks: from a table for known GPUs, else measured once a process.

    Measured are the fastest of several products of square matrices, and of a sum and a copy of an
    array beyond any cache. Other work on the machine makes them too low.

    Args:
      device: such as ``jax.devices()[0]``.
      dtype: of the matrices.

    Returns:
      The peaks.

    Raises:
      UserError: a dtype that is no float and not int8.

    >>> found = peaks(jax.devices()[0])
    >>> found.flops_per_s > 0 and found.bytes_per_s > 0 and bool(found.source)
    True
    """
    name = jnp.dtype(dtype).name
    if name not in _COLUMNS:
        raise UserError(
            f"peaks are known for {', '.join(_COLUMNS)}, not for {name}; pass one of these dtypes"
        )
    return _known(device.device_kind, name) or _measured(device, name)


def _known(kind: str, dtype: str) -> Peaks | None:
    if kind not in _KNOWN:
        return None
    row = _KNOWN[kind]
    return Peaks(1e12 * row[_COLUMNS[dtype]], 1e9 * row[3], f"data sheet of {kind}, dense")


@cache
def _measured(device: Any, dtype: str) -> Peaks:
    sizes = (512, 1024) if device.platform == "cpu" else (4096, 8192)
    wide = jnp.int32 if dtype == "int8" else jnp.dtype(dtype)
    product = jax.jit(partial(jnp.matmul, preferred_element_type=wide))
    squares = {n: jax.device_put(jnp.ones((n, n), dtype), device) for n in sizes}
    calls = {str(n): partial(product, x, x) for n, x in squares.items()}
    times = interleaved(calls, warmup=1, runs=5)
    rate = max(2.0 * n**3 / min(times[str(n)].seconds) for n in sizes)
    bandwidth, how = _bandwidth(device)
    source = f"measured: {dtype} products of {sizes[0]} and {sizes[1]}, {how}, fastest runs"
    return Peaks(rate, bandwidth, source)


@cache
def _bandwidth(device: Any) -> tuple[float, str]:
    numbers = 2**25 if device.platform == "cpu" else 2**28
    long = jax.device_put(jnp.ones(numbers, jnp.float32), device)
    calls = {
        "sum": partial(jax.jit(jnp.sum), long),
        "copy": partial(jax.jit(lambda x: x + 1), long),
    }
    times = interleaved(calls, warmup=1, runs=5)
    rate = max(
        long.nbytes / min(times["sum"].seconds), 2 * long.nbytes / min(times["copy"].seconds)
    )
    return rate, f"sum and copy of {long.nbytes // 2**20} MiB"


def floor_s(flops: int | float, n_bytes: int | float, peak: Peaks) -> float:
    """Give the least seconds that some work takes.

    Args:
      flops: operations.
      n_bytes: read and written at least.
      peak: of the device.

    Returns:
      ``max(flops / peak, bytes / bandwidth)``.

    Reference: Williams, Waterman and Patterson, "Roofline" (2009).

    >>> floor_s(2e9, 1e9, Peaks(1e9, 1e9, ""))
    2.0
    """
    return max(flops / peak.flops_per_s, n_bytes / peak.bytes_per_s)


def against_floor(
    flops: int | float, n_bytes: int | float, seconds: int | float, peak: Peaks
) -> Mapping[str, float | str]:
    """Say how near a time comes to its floor.

    Args:
      flops: operations.
      n_bytes: read and written at least.
      seconds: measured.
      peak: of the device.

    Returns:
      ``flops``, ``bytes``, ``floor_s``, ``percent_of_floor`` (100 is as fast as can be; above it
      the array was in a cache) and ``bound`` (compute or memory).

    >>> against_floor(1e9, 1e9, 2.0, Peaks(2e9, 1e9, ""))["percent_of_floor"]
    50.0
    """
    least = floor_s(flops, n_bytes, peak)
    return {
        "flops": float(flops),
        "bytes": float(n_bytes),
        "floor_s": least,
        "percent_of_floor": 100.0 * least / seconds,
        "bound": "compute" if flops / peak.flops_per_s > n_bytes / peak.bytes_per_s else "memory",
    }
