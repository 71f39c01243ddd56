"""The wire: one thread and one device per process that carry messages behind the compute."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.lane import Lane
from jaxsys.core.mesh import REPLICA, DevicePair
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


class Wire(Lane):
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
        super().__init__(pair)
        self._hold_s = hold_s
        self._programs: dict[Any, Any] = {}

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

        hold_s = self._hold_s(codec_bytes(n_elements, codec, self.workers)) if self._hold_s else 0.0
        return self.submit(program, payload, hold_s=hold_s, wrap=_to_message)

    def _program(self, group: tuple[int, ...], codec: str) -> Any:
        if (group, codec) not in self._programs:

            def run(leaves: Any, anchor: Any, residual: Any, key_data: Any, step: Any) -> Any:
                vector = jnp.concatenate([jnp.ravel(x) for x in leaves])
                key = message_key(key_data, step, group)
                return exchange(vector, anchor, residual, key, codec=codec, axis_name=REPLICA)

            self._programs[group, codec] = run
        return self._programs[group, codec]


def _to_message(value: tuple[Any, Any], start_s: float, end_s: float) -> Message:
    return Message(*value, start_s, end_s)
