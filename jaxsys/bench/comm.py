"""Copies between host and device, and collectives over all devices, with the lines they lie on.

Times of several sizes are fitted by t = α + β·n (`core.cost.fit_linear`); a line that explains too
little is refused, and the row says so instead of giving one.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.bench.records import figure_of, record
from jaxsys.core.cost import PoorFitError, fit_linear
from jaxsys.core.errors import UserError
from jaxsys.core.measure import Timing, interleaved
from jaxsys.core.mesh import REPLICA, over_replicas, replica_mesh

SIZES = tuple(4**k for k in range(5, 13))  # 1 KiB to 16 MiB
COPIES = ("numpy to device", "pinned to device", "device to pinned")


def _next(x: Any) -> Any:
    n = jax.lax.axis_size(REPLICA)
    return jax.lax.ppermute(x, REPLICA, [(i, (i + 1) % n) for i in range(n)])


# Each takes a device's [n] numbers, n a multiple of the number of devices.
COLLECTIVES: dict[str, Callable[[Any], Any]] = {
    "all-reduce": partial(jax.lax.psum, axis_name=REPLICA),
    "all-gather": partial(jax.lax.all_gather, axis_name=REPLICA, tiled=True),
    "reduce-scatter": partial(jax.lax.psum_scatter, axis_name=REPLICA, tiled=True),
    "all-to-all": partial(
        jax.lax.all_to_all, axis_name=REPLICA, split_axis=0, concat_axis=0, tiled=True
    ),
    "permute": _next,
}


def measure(
    sizes: Sequence[int] = SIZES,
    *,
    devices: Sequence[Any] | None = None,
    dtype: str = "float32",
    runs: int = 10,
    on_event: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time copies and collectives of several sizes in turns, and fit a line to each.

    Args:
      sizes: bytes that each device gives (all-gather gets that many from each), or that are copied.
      devices: for the collectives; the first is that of the copies. All by default.
      dtype: of the numbers.
      runs: timed rounds, after two that warm up.
      on_event: told what is being timed.

    Returns:
      A row of kind ``comm`` for each operation and size, with ``time`` and ``bytes_per_s`` (of the
      size, not of what passes a wire), and one for each operation with ``line`` (α in seconds, β in
      seconds a byte and how well they fit) or ``refused``. On one device the collectives are one
      row each that says so.

    Raises:
      UserError: no sizes, or one that is too small to give each device a number.

    >>> rows = measure((4096, 65536, 2**20), devices=jax.devices()[:1], runs=2)
    >>> rows[-1]["flags"]["operator"], rows[-1]["status"], "line" in rows[3] or "refused" in rows[3]
    ('permute', 'not here', True)
    """
    devices = list(jax.devices() if devices is None else devices)
    least = len(devices) * jnp.dtype(dtype).itemsize
    if not sizes or min(sizes) < least:
        raise UserError(
            f"the sizes are {list(sizes)} bytes for {len(devices)} devices; expected some, each of "
            f"at least {least}; correct them"
        )
    lengths = [size // least * len(devices) for size in sizes]
    rows = []
    for name in COPIES:
        on_event(f"{name}, {len(lengths)} sizes")
        rows += _rows(
            name, lengths, dtype, devices[:1], _copies(name, jnp.dtype(dtype), devices[0]), runs
        )
    for name, function in COLLECTIVES.items():
        if len(devices) == 1:
            rows.append(_alone(name, dtype, devices))
            continue
        on_event(f"{name} over {len(devices)} devices, {len(lengths)} sizes")
        collective = partial(_collective, function, devices, dtype)
        rows += _rows(name, lengths, dtype, devices, collective, runs)
    return rows


def _alone(name: str, dtype: str, devices: Sequence[Any]) -> dict[str, Any]:
    why = "there is one device, and nobody to exchange with"
    return record("comm", None, _flags(name, None, dtype, devices), status="not here", why=why)


def _copies(name: str, dtype: Any, device: Any) -> Callable[[int], Callable[[], Any] | None]:
    kinds = [memory.kind for memory in device.addressable_memories()]
    here = jax.sharding.SingleDeviceSharding(device)
    if name == "numpy to device":
        return lambda n: partial(jax.device_put, np.ones(n, dtype), here, may_alias=False)
    if "pinned_host" not in kinds:
        return lambda n: None
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    start, end = (pinned, here) if name == "pinned to device" else (here, pinned)
    return lambda n: partial(jax.device_put, jax.device_put(np.ones(n, dtype), start), end)


def _collective(
    function: Callable[[Any], Any], devices: Sequence[Any], dtype: str, n: int
) -> Callable[[], Any]:
    mesh = replica_mesh(devices)
    run = over_replicas(function, "shard_map", mesh=mesh, check_vma=False)
    x = jax.device_put(jnp.ones((len(devices), n), dtype), NamedSharding(mesh, P(REPLICA)))
    return partial(run, x)


def _rows(
    name: str,
    lengths: Sequence[int],
    dtype: str,
    devices: Sequence[Any],
    make: Callable[[int], Callable[[], Any] | None],
    runs: int,
) -> list[dict[str, Any]]:
    calls = {n: make(n) for n in lengths}
    if any(call is None for call in calls.values()):
        why = f"devices of {devices[0].platform} address no pinned_host memory here"
        flags = _flags(name, None, dtype, devices)
        return [record("comm", None, flags, status="not here", why=why)]
    times = interleaved({str(n): call for n, call in calls.items() if call}, runs=runs)
    width = jnp.dtype(dtype).itemsize
    rows = []
    for n in lengths:
        time = figure_of(times[str(n)])
        flags = _flags(name, n * width, dtype, devices)
        rate = n * width / time["median_s"]
        rows.append(record("comm", None, flags, time=time, bytes_per_s=rate))
    flags = _flags(name, None, dtype, devices)
    rows.append(record("comm", None, flags, **_line({n * width: times[str(n)] for n in lengths})))
    return rows


def _line(times: Mapping[int, Timing]) -> dict[str, Any]:
    """Fit a line to the medians, or say why there is none."""
    try:
        line = fit_linear(list(times), [timing.median_s for timing in times.values()])
    except PoorFitError as error:
        return {"refused": str(error)}
    return {"line": line.to_dict()}


def _flags(name: str, size: int | None, dtype: str, devices: Sequence[Any]) -> dict[str, Any]:
    return {
        "operator": name,
        "bytes": size,
        "dtype": dtype,
        "devices": len(devices),
        "device": devices[0].device_kind,
    }
