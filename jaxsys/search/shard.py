"""Spread individuals over devices and hosts.

Axes: ``P`` population.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def over_individuals(fn: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Split the first argument of a function over the devices of a mesh.

    Every device runs the same program on its share, so the result is the same as on one device.
    Individuals that are missing for equal shares are copies of the last one and are dropped again.

    Args:
      fn: takes individuals, arrays `[P, ...]`, and anything else, which all devices have; returns
        arrays `[P, ...]`. For use under `jit`.
      mesh: with one axis; None for the device that JAX uses anyway.

    Returns:
      A function like `fn` whose result every device has.

    >>> from jaxsys.core.mesh import replica_mesh
    >>> double = over_individuals(lambda x, k: k * x, replica_mesh(jax.devices()[:1]))
    >>> jax.jit(double)(jnp.arange(3), 2).tolist()
    [0, 2, 4]
    """
    if mesh is None:
        return fn
    (axis,), n_devices = mesh.axis_names, mesh.size
    own, all_ = PartitionSpec(axis), PartitionSpec()

    def spread(individuals: Any, *rest: Any) -> Any:
        n = jax.tree.leaves(individuals)[0].shape[0]
        extra = -n % n_devices

        def fill(x: Any) -> Any:
            return jnp.concatenate([x, jnp.repeat(x[-1:], extra, axis=0)]) if extra else x

        specs = (own, *(all_ for _ in rest))
        # Loops inside start from values that all devices have, which the check refuses.
        run = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
        found = run(jax.tree.map(fill, individuals), *rest)
        gather = NamedSharding(mesh, all_)
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, gather)[:n], found)

    return spread


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Give every device of a mesh the same arrays; all processes must have equal ones.

    >>> replicate({"w": jnp.ones(2)}, None)["w"].tolist()
    [1.0, 1.0]
    """
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(x: Any) -> Any:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            wrap = partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x))
            return jax.jit(wrap)(put(jax.random.key_data(x)))
        # Devices of other processes are out of reach of device_put.
        here = np.asarray(x)
        return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])

    return jax.tree.map(put, tree)
