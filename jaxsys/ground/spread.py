"""Lay a step's rows over devices and processes; parameters and tables are on each of them.

The program is written for the whole batch: XLA splits it, so that a contrast over all rows gathers
its negatives from every device by itself, and dropout draws what one device would draw.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import replica_mesh

_AXIS = "data"


@lru_cache(maxsize=8)
def _mesh(devices: tuple[Any, ...]) -> Mesh:
    return replica_mesh(devices, _AXIS)


def row_mesh(batch: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay devices out in a row, each to take an equal part of a batch.

    Args:
        batch: rows of a step.
        devices: all devices of all processes by default.

    Raises:
        UserError: for a batch that they do not divide.

    >>> row_mesh(64, jax.devices()[:1]).size
    1
    """
    chosen = tuple(jax.devices() if devices is None else devices)
    if batch % len(chosen):
        raise UserError(
            f"a batch has {batch} rows and there are {len(chosen)} devices; expected the same "
            "number of rows on each; choose a multiple, or fewer devices"
        )
    return _mesh(chosen)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put the same arrays on every device of a mesh.

    Args:
        tree: of arrays that every process holds.
        mesh: from `row_mesh`.

    >>> replicate({"w": np.ones(2)}, row_mesh(1, jax.devices()[:1]))["w"].shape
    (2,)
    """
    sharding = NamedSharding(mesh, P())

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        if mesh.is_multi_process:
            held = np.asarray(x)
            return jax.make_array_from_callback(held.shape, sharding, lambda at: held[at])
        return jax.device_put(x, sharding)

    return jax.tree.map(put, tree)


def own_rows(count: int, mesh: Mesh) -> slice:
    """Say which rows of a batch this process's devices take.

    >>> own_rows(8, row_mesh(8, jax.devices()[:1]))
    slice(0, 8, None)
    """
    held = NamedSharding(mesh, P(_AXIS)).addressable_devices_indices_map((count,)).values()
    parts = [at[0].indices(count) for at in held if at is not None]
    return slice(min(p[0] for p in parts), max(p[1] for p in parts))


def split(tree: Any, mesh: Mesh) -> Any:
    """Join every process's rows of a batch into one, spread over the mesh.

    Args:
        tree: of arrays with the rows of `own_rows` on their first axis.
        mesh: from `row_mesh`.

    >>> split({"x": np.ones((4, 2))}, row_mesh(4, jax.devices()[:1]))["x"].shape
    (4, 2)
    """
    sharding = NamedSharding(mesh, P(_AXIS))
    put = lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x))  # noqa: E731
    return jax.tree.map(put, tree)


def spread(tree: Any, mesh: Mesh) -> Any:
    """Tell the compiler to split the first axis over the mesh; inside `jax.jit`.

    >>> mesh = row_mesh(4, jax.devices()[:1])
    >>> jax.jit(lambda x: spread(x, mesh))(np.ones(4)).shape
    (4,)
    """
    if mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(_AXIS)))
