"""The wire: one thread and one device per process that carry messages behind the compute."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.mesh import REPLICA, DevicePair, over_replicas, stack_local, take_local
from jaxsys.localsgd.codec import codec_bytes
from jaxsys.localsgd.exchange import exchange, message_key


class Message(NamedTuple):
    """A message that has arrived.

    Attributes:
      mean: the mean over the workers, flat, on the compute device.
      lost: what the codec lost, flat; None without error feedback.
      start_s: when the wire took it up, on the clock of `time.perf_counter`.
      end_s: when the mean was there.
    """

    mean: jax.Array
    lost: jax.Array | None
    start_s: float
    end_s: float


class Wire:
    """Carry messages in the order in which they are handed over.

    All workers must hand over the same messages in the same order; that follows from equal plans,
    which are checked at start-up.

    Args:
      pair: this process's devices.
      hold_s: emulated link: seconds to hold the communication device for a message of that many
        bytes on the wire, after it was really exchanged. None: the real link is all there is.

    >>> from jaxsys.core.mesh import replica_mesh, device_pair
    >>> first = jax.devices()[:1]
    >>> wire = Wire(device_pair()._replace(comm=first[0], comm_mesh=replica_mesh(first)))
    >>> key = jnp.zeros(2, jnp.uint32)
    >>> wire.send((0,), "f32", [jnp.ones(2)], None, None, key, 0).result().mean.tolist()
    [1.0, 1.0]
    >>> wire.close()
    """

    def __init__(self, pair: DevicePair, hold_s: Callable[[float], float] | None = None) -> None:
        self.pair = pair
        self._hold_s = hold_s
        self._lane = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wire")
        self._programs: dict[Any, Any] = {}

    @property
    def workers(self) -> int:
        """Number of workers on the wire."""
        return self.pair.comm_mesh.size

    def send(
        self,
        group: tuple[int, ...],
        codec: str,
        leaves: Sequence[Any],
        anchor: Any,
        residual: Any,
        key_data: Any,
        step: Any,
    ) -> "Future[Message]":
        """Hand over a message; returns at once.

        Args:
          group: indices of the layers that it holds (they seed the codec's randomness).
          codec: form on the wire.
          leaves: arrays that are laid end to end.
          anchor: flat vector last agreed on, or None.
          residual: flat vector that the codec lost last time, or None.
          key_data: data of the random key, uint32 (`State.key`).
          step: step number.

        Returns:
          A future of the `Message`.
        """
        program = self._program(group, codec)
        n_elements = sum(int(np.prod(x.shape)) for x in leaves)
        payload = (list(leaves), anchor, residual, key_data, jnp.asarray(step))

        def carry() -> Message:
            start = time.perf_counter()
            there = jax.device_put(payload, self.pair.comm)
            result = jax.block_until_ready(program(*stack_local(there, self.pair.comm_mesh)))
            if self._hold_s is not None:
                time.sleep(self._hold_s(codec_bytes(n_elements, codec, self.workers)))
            mean, lost = jax.device_put(take_local(result), self.pair.compute)
            jax.block_until_ready(mean)
            return Message(mean, lost, start, time.perf_counter())

        return self._lane.submit(carry)

    def run(self, program: Callable[[Any], Any], tree: Any) -> Any:
        """Run any per-replica function of this worker's tree in its turn, and wait for it."""
        mapped = self._programs.get(program)
        if mapped is None:
            mapped = over_replicas(program, "shard_map", mesh=self.pair.comm_mesh)
            self._programs[program] = mapped

        def carry() -> Any:
            there = stack_local(jax.device_put(tree, self.pair.comm), self.pair.comm_mesh)
            return jax.block_until_ready(mapped(there))

        result = take_local(self._lane.submit(carry).result())
        return jax.device_put(result, self.pair.compute)

    def gather(self, values: Any) -> np.ndarray:
        """Collect one small vector from every worker, [R, ...]; also a barrier."""
        return np.asarray(self.run(_gather, jnp.asarray(values)))

    def close(self) -> None:
        """Stop the thread once the messages under way have arrived."""
        self._lane.shutdown()

    def _program(self, group: tuple[int, ...], codec: str) -> Any:
        if (group, codec) not in self._programs:

            def run(leaves: Any, anchor: Any, residual: Any, key_data: Any, step: Any) -> Any:
                vector = jnp.concatenate([jnp.ravel(x) for x in leaves])
                key = message_key(key_data, step, group)
                return exchange(vector, anchor, residual, key, codec=codec, axis_name=REPLICA)

            self._programs[group, codec] = over_replicas(run, "shard_map", mesh=self.pair.comm_mesh)
        return self._programs[group, codec]


def _gather(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, REPLICA)
