"""Meshes and drivers: one function over a replica axis, run by `vmap`, `pmap` or `shard_map`.

On CPU a program runs its collectives in line with its compute, so nothing overlaps on one device.
Each process therefore owns two virtual devices: one computes, the other carries the collectives.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError

Driver = Literal["vmap", "pmap", "shard_map"]
REPLICA = "replica"  # the axis over which workers are averaged


def replica_mesh(devices: Sequence[Any] | None = None, axis_name: str = REPLICA) -> Mesh:
    """Make a one-dimensional mesh, one device a worker.

    Args:
      devices: the devices in worker order; all devices by default.
      axis_name: name of the only axis.

    Returns:
      A mesh whose axis is of type `Auto`.

    >>> replica_mesh(jax.devices()[:1]).axis_names
    ('replica',)
    """
    chosen = np.array(jax.devices() if devices is None else devices)
    return Mesh(chosen, (axis_name,), axis_types=(AxisType.Auto,))


class DevicePair(NamedTuple):
    """The devices of one process: one that computes, the mesh of those that communicate.

    >>> pair = device_pair()
    >>> pair.comm_mesh.axis_names
    ('replica',)
    """

    compute: Any
    comm: Any
    comm_mesh: Mesh


def on_cpu() -> bool:
    """Tell whether the default backend is the CPU, where one program overlaps nothing.

    >>> isinstance(on_cpu(), bool)
    True
    """
    return jax.default_backend() == "cpu"


def device_pair() -> DevicePair:
    """Choose this process's compute device and the mesh that carries collectives.

    With two or more local devices on CPU the last one communicates; otherwise one device does both,
    as is right on an accelerator, whose runtime overlaps streams by itself.

    >>> device_pair().compute == jax.local_devices()[0]
    True
    """
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    carrier = -1 if on_cpu() else 0
    carriers = [ds[carrier] for _, ds in sorted(by_process.items())]
    local = jax.local_devices()
    return DevicePair(local[0], local[carrier], replica_mesh(carriers))


def over_replicas(
    fn: Callable[..., Any],
    driver: Driver,
    *,
    mesh: Mesh | None = None,
    axis_name: str = REPLICA,
    check_vma: bool = True,
    donate: bool = False,
    keep_collectives: bool = False,
) -> Callable[..., Any]:
    """Lift a per-replica function with collectives over ``axis_name`` to stacked replicas.

    Args:
      fn: function of pytrees of one replica; it may use ``axis_name`` in collectives.
      driver: ``vmap`` (R simulated workers on one device), ``pmap`` (R local devices) or
        ``shard_map`` (the devices of ``mesh``, on any number of hosts).
      mesh: for ``shard_map``: a mesh with that axis; all devices by default.
      axis_name: name of the replica axis.
      check_vma: JAX's check of what varies over the mesh; switch it off only for models whose loops
        start from replicated values.
      donate: let the compiled function reuse the memory of its first argument.
      keep_collectives: for ``shard_map``: keep XLA from merging all-reduces into one, which would
        wait for the last of them, and let it schedule them behind compute where it can.

    Returns:
      A compiled function whose arguments and results have a leading axis R.

    >>> mean = over_replicas(lambda x: jax.lax.pmean(x, "replica"), "vmap")
    >>> mean(jnp.array([1.0, 3.0])).tolist()
    [2.0, 2.0]
    """
    donated = (0,) if donate else ()
    if driver == "vmap":
        return jax.jit(jax.vmap(fn, axis_name=axis_name), donate_argnums=donated)
    if driver == "pmap":
        return jax.pmap(fn, axis_name=axis_name, donate_argnums=donated)
    if driver != "shard_map":
        raise UserError(
            f"driver is {driver!r}; expected one of 'vmap', 'pmap', 'shard_map'; choose one of them"
        )
    mesh = replica_mesh(axis_name=axis_name) if mesh is None else mesh

    def one_block(*args: Any) -> Any:
        out = fn(*jax.tree.map(lambda x: jnp.squeeze(x, 0), args))
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), out)

    mapped = jax.shard_map(
        one_block, mesh=mesh, in_specs=P(axis_name), out_specs=P(axis_name), check_vma=check_vma
    )
    options = separate_collectives(mesh) if keep_collectives else None
    return jax.jit(mapped, donate_argnums=donated, compiler_options=options)


def separate_collectives(mesh: Mesh) -> dict[str, Any] | None:
    """Give the options of `jax.jit` that keep XLA from merging collectives on a mesh's devices.

    On CPU the combiner is a pass to switch off; on GPU it has a threshold, and the latency-hiding
    scheduler moves what is left behind compute. On TPU all-to-alls, in line with compute by
    default, become asynchronous.

    >>> isinstance(separate_collectives(replica_mesh(jax.devices()[:1])), dict | None)
    True
    """
    return _SEPARATE.get(mesh.devices.flat[0].platform)


_SEPARATE: dict[str, dict[str, Any]] = {
    "cpu": {"xla_disable_hlo_passes": "cpu-all-reduce-combiner"},
    "gpu": {
        "xla_gpu_all_reduce_combine_threshold_bytes": 1,
        "xla_gpu_enable_latency_hiding_scheduler": True,
    },
    "tpu": {"xla_tpu_enable_async_all_to_all": True},
}


def stack_local(tree: Any, mesh: Mesh, axis_name: str = REPLICA) -> Any:
    """Join each process's own tree into global arrays with a leading replica axis.

    Args:
      tree: arrays on this process's device of ``mesh``.
      mesh: one device per process (`DevicePair.comm_mesh`).
      axis_name: its axis.

    Returns:
      Arrays of shape [R, ...], sharded over ``axis_name``; nothing is sent.

    >>> stack_local(jnp.ones(3), replica_mesh(jax.devices()[:1])).shape
    (1, 3)
    """
    sharding = NamedSharding(mesh, P(axis_name))
    size = mesh.shape[axis_name]

    def join(x: Any) -> jax.Array:
        block = jnp.expand_dims(x, 0)
        return jax.make_array_from_single_device_arrays((size, *x.shape), sharding, [block])

    return jax.tree.map(join, tree)


def take_local(tree: Any) -> Any:
    """Return this process's replica of stacked arrays, the inverse of `stack_local`.

    >>> take_local(stack_local(jnp.ones(3), replica_mesh(jax.devices()[:1]))).shape
    (3,)
    """
    return jax.tree.map(lambda x: jnp.squeeze(x.addressable_shards[0].data, 0), tree)


def vary(tree: Any, axis_names: Sequence[str]) -> Any:
    """Mark values inside `jax.shard_map` as differing over mesh axes, where they are not yet.

    The gradient of a marked value is summed over the axes that were added, once, where it was
    marked; without the mark JAX sums it wherever the value meets one that differs. Outside
    `shard_map`, and for axes of `vmap`, nothing happens.

    Args:
      tree: arrays.
      axis_names: the axes.

    Returns:
      The same values.

    >>> mesh = replica_mesh(jax.devices()[:1])
    >>> run = jax.shard_map(lambda x: vary(x, ("replica",)), mesh=mesh, in_specs=P(),
    ...                     out_specs=P("replica"))
    >>> run(jnp.ones(2)).tolist()
    [1.0, 1.0]
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes

    def mark(x: Any) -> Any:
        missing = tuple(a for a in replicated_over(x, axis_names) if a in manual)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def replicated_over(x: Any, axis_names: Sequence[str]) -> tuple[str, ...]:
    """List the axes among some over which a value inside `jax.shard_map` is known to be equal.

    >>> replicated_over(jnp.ones(2), ("replica",))
    ('replica',)
    """
    # The name of this attribute is JAX's own affair, hence this function.
    varying = jax.typeof(x).manual_axis_type.varying
    return tuple(a for a in axis_names if a not in varying)
