"""Named arrays by JAX's own transfer engine: buffers go from device to device, not through Python.

The engine moves the arrays; a `Sockets` transport beside it exchanges addresses and notices lost
processes, which the engine does only where a connection ends.

It is experimental: with jaxlib 0.12 on CPU, single messages of 8 MiB over a link shaped to 100
Mbit/s stopped for good, and those of 1 MiB arrived. Hence plain TCP is the default, and waiting for
the engine has an end.
"""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxsys.cluster.sockets import Sockets
from jaxsys.cluster.transport import Key, PeerLost, check_peer, message_bytes
from jaxsys.core.errors import UserError

_ADDRESS_KEY = (-1, -1)
_ADDRESS_BYTES = 64
_LOOK_S = 0.25  # between two looks at whether the sender is still there
_NAMING_S = 2.0  # for which a broken pull waits to learn who is lost


class Engine:
    """The transport of one process over `jax.experimental.transfer`.

    Every process of the job must make one, at the same time.

    Args:
      control: connected sockets of the same job.
      timeout_s: how long a message is waited for while its sender lives, in seconds; longer than
        any step.

    Attributes:
      rank: this process's number.
      size: how many processes there are.
      sent_bytes: receiver to bytes offered so far, with a header for each message as other
        transports have it; the engine's own frames are not known.

    >>> from jaxsys.cluster.join import Membership
    >>> from jaxsys.cluster.sockets import connect
    >>> Engine(connect(Membership(0, 1, None, "single"))).sent_bytes
    {}
    """

    def __init__(self, control: Sockets, timeout_s: float | int = 600) -> None:
        self.rank, self.size = control.rank, control.size
        self.sent_bytes = dict.fromkeys(control.sent_bytes, 0)
        self._control, self._timeout_s = control, timeout_s
        self._peers: dict[int, Any] = {}
        self._under_way: dict[tuple[int, Key], Future[list[np.ndarray]]] = {}
        self._waiters = ThreadPoolExecutor(64, thread_name_prefix="engine")
        if not self.sent_bytes:
            return
        self._server = _start_server(control.host)
        own = np.frombuffer(self._server.address().encode().ljust(_ADDRESS_BYTES), np.uint8)
        for peer in self.sent_bytes:
            control.send(peer, _ADDRESS_KEY, [own])
        for peer in self.sent_bytes:
            (theirs,) = control.receive(peer, _ADDRESS_KEY, [own])
            self._peers[peer] = self._server.connect(theirs.tobytes().decode().strip())

    def send(self, to: int, key: Key, arrays: Sequence[Any]) -> None:
        """Offer a message to its receiver; returns at once."""
        check_peer(to, self.rank, self.size)
        self._control.check()
        self.sent_bytes[to] += message_bytes(arrays)
        offered = [_on_device(x) for x in arrays if x.size]
        if offered:
            self._server.await_pull(_number(self.rank, to, key), offered)

    def expect(self, source: int, key: Key, specs: Sequence[Any]) -> None:
        """Begin to fetch a message as soon as it is offered."""
        import jax

        check_peer(source, self.rank, self.size)
        if (source, key) in self._under_way:
            return
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = [jax.ShapeDtypeStruct(*_laid_out(s), sharding=here) for s in specs if _size(s)]
        number = _number(source, self.rank, key)
        pulled = iter(self._peers[source].pull(number, wanted) if wanted else ())

        def wait() -> list[np.ndarray]:
            return [
                np.asarray(next(pulled)).view(s.dtype).reshape(s.shape)
                if _size(s)
                else np.zeros(s.shape, s.dtype)
                for s in specs
            ]

        self._under_way[source, key] = self._waiters.submit(wait)

    def receive(self, source: int, key: Key, specs: Sequence[Any]) -> list[np.ndarray]:
        """Wait for a message."""
        self.expect(source, key, specs)
        future = self._under_way.pop((source, key))
        left = round(_NAMING_S / _LOOK_S)
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            try:
                return future.result(_LOOK_S)
            except TimeoutError:
                self._control.check()
                if time.monotonic() > deadline_s:
                    raise UserError(
                        f"the transfer engine has not brought message {key} of process {source} "
                        f"within {self._timeout_s:g} s although that process is there; expected "
                        "it sooner; use the transport sockets"
                    ) from None
            except Exception as error:  # the engine's own types differ between versions
                self._control.check()
                left -= 1
                if left == 0:
                    raise PeerLost(source, str(error).partition("\n")[0]) from error
                self._control.pause(_LOOK_S)

    def close(self, lost: PeerLost | None = None) -> None:
        """Wait until all others have come to their end too, then part."""
        self._control.close(lost)
        self._waiters.shutdown(wait=False, cancel_futures=True)


def _start_server(host: str) -> Any:
    """Start the engine's server: the only place that knows this experimental part of JAX."""
    import jax
    from jax.experimental import transfer

    address = f"[{host}]:0" if ":" in host else f"{host}:0"
    return transfer.start_transfer_server(jax.local_devices()[0].client, address, [address])


def _size(spec: Any) -> int:
    return int(np.prod(spec.shape, dtype=np.int64))


def _laid_out(spec: Any) -> tuple[tuple[int, ...], Any]:
    """Give shape and dtype in which the engine carries an array; 64 bits go as bytes."""
    if np.dtype(spec.dtype).itemsize < 8:
        return spec.shape, spec.dtype
    return (8 * _size(spec),), np.uint8


def _on_device(x: Any) -> Any:
    import jax.numpy as jnp

    shape, dtype = _laid_out(x)
    if shape == x.shape:
        return jnp.asarray(x)
    # Without x64 a device would halve them.
    return jnp.asarray(np.ascontiguousarray(np.asarray(x)).reshape(-1).view(dtype))


def _number(source: int, target: int, key: Key) -> int:
    """Number a message; the engine knows no keys."""
    digest = hashlib.blake2b(repr((source, target, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
