"""A thread and a device per process that carry collectives behind the compute.

One XLA:CPU program runs its collectives in line with its compute. A second virtual device, driven
by a thread of its own, does not wait for the first.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.core.mesh import REPLICA, DevicePair, over_replicas, stack_local, take_local


class Carried(NamedTuple):
    """What a collective gave, and when.

    Attributes:
      value: its result, on the compute device.
      start_s: when the lane took it up, on the clock of `time.perf_counter`.
      end_s: when the result was there.

    >>> Carried(None, 0.0, 1.5).end_s
    1.5
    """

    value: Any
    start_s: float
    end_s: float


class Lane:
    """Run per-replica functions over the communication devices, in the order handed over.

    All processes must hand over the same functions in the same order.

    Args:
      pair: this process's devices.

    >>> import jax.numpy as jnp
    >>> from jaxsys.core.mesh import device_pair, replica_mesh
    >>> first = jax.devices()[:1]
    >>> lane = Lane(device_pair()._replace(comm=first[0], comm_mesh=replica_mesh(first)))
    >>> lane.submit(lambda x: jax.lax.psum(x, "replica"), (jnp.ones(2),)).result().value.tolist()
    [1.0, 1.0]
    >>> lane.close()
    """

    def __init__(self, pair: DevicePair) -> None:
        self.pair = pair
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lane")
        self._mapped: dict[Any, Any] = {}

    @property
    def workers(self) -> int:
        """Number of processes on the lane."""
        return self.pair.comm_mesh.size

    def submit(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        hold_s: float = 0.0,
        wrap: Callable[[Any, float, float], Any] = Carried,
    ) -> "Future[Any]":
        """Hand over a function of this process's own arrays; returns at once.

        Args:
          function: with collectives over the replica axis; compiled once for each identity.
          args: its arguments, on any device.
          hold_s: emulated link: seconds to hold the lane after the exchange.
          wrap: what to make of the value, the start and the end.

        Returns:
          A future of what ``wrap`` gave.
        """
        mapped = self._mapped.get(function)
        if mapped is None:
            mapped = over_replicas(function, "shard_map", mesh=self.pair.comm_mesh)
            self._mapped[function] = mapped

        def carry() -> Any:
            start_s = time.perf_counter()
            there = jax.device_put(args, self.pair.comm)
            result = jax.block_until_ready(mapped(*stack_local(there, self.pair.comm_mesh)))
            if hold_s:
                time.sleep(hold_s)
            value = jax.device_put(take_local(result), self.pair.compute)
            jax.block_until_ready(value)
            return wrap(value, start_s, time.perf_counter())

        return self._thread.submit(carry)

    def run(self, function: Callable[[Any], Any], tree: Any) -> Any:
        """Run a function in its turn and wait for its value."""
        return self.submit(function, (tree,)).result().value

    def gather(self, values: Any) -> np.ndarray:
        """Collect one small vector from every process, [R, ...]; also a barrier."""
        return np.asarray(self.run(_gather, jax.numpy.asarray(values)))

    def close(self) -> None:
        """Stop the thread once everything handed over has arrived."""
        self._thread.shutdown()


def _gather(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, REPLICA)
