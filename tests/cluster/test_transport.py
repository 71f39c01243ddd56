"""Messages between processes: what arrives, what is counted, and how a lost process shows."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.cluster import Membership, _ports
from jaxsys.cluster.engine import Engine
from jaxsys.cluster.sockets import connect
from jaxsys.cluster.transport import PeerLost, in_memory, message_bytes
from jaxsys.core.errors import UserError


def _together(work, n):
    """Call work(rank) for every rank at the same time."""
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, range(n), timeout=60.0))


def _sockets(n, **options):
    address = f"127.0.0.1:{_ports.free_port()}"
    return _together(lambda i: connect(Membership(i, n, address, "test"), **options), n)


def _engines(n):
    controls = _sockets(n)
    return _together(lambda i: Engine(controls[i]), n)


BACK_ENDS = {"memory": in_memory, "sockets": _sockets, "engine": _engines}


def _close(ends):
    _together(lambda i: ends[i].close(), len(ends))


@pytest.mark.parametrize("kind", BACK_ENDS)
def test_messages_arrive_whole_in_any_order_and_are_counted(kind):
    ends = BACK_ENDS[kind](3)
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
        jnp.asarray(rng.normal(size=7), jnp.bfloat16),
        np.float32(2.5) * np.ones((), np.float32),
        np.array([True, False]),
        np.zeros((0, 4), np.int32),
        np.arange(5, dtype=np.int8),
        np.array([[2**40, 1]], np.int64),
    ]
    specs = [np.empty(x.shape, x.dtype) for x in arrays]
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    for a, b in pairs:
        for number in range(2):
            ends[a].send(b, (a, number), [x + x.dtype.type(number) for x in arrays])
    for a, b in pairs:
        for number in (1, 0):  # not in the order of sending
            ends[b].expect(a, (a, number), specs)
            got = ends[b].receive(a, (a, number), specs)
            for x, y in zip(arrays, got, strict=True):
                assert y.dtype == x.dtype
                np.testing.assert_array_equal(np.asarray(x + x.dtype.type(number)), y)
    for end in ends:
        assert set(end.sent_bytes.values()) == {2 * message_bytes(specs)}
    _close(ends)


def test_sending_does_not_wait_for_the_link():
    a, b = _sockets(2, hold_s=lambda to, n_bytes: 0.3)
    began = time.perf_counter()
    for number in range(2):
        a.send(1, (number,), [np.zeros(10_000)])
    handed_over_s = time.perf_counter() - began
    b.receive(0, (1,), [np.zeros(10_000)])
    assert handed_over_s < time.perf_counter() - began
    _close([a, b])


def test_a_process_that_has_left_is_named():
    a, b, c = _sockets(3)
    closing = threading.Thread(target=a.close)
    closing.start()
    with pytest.raises(PeerLost, match="process 0 is lost: it has left") as caught:
        b.receive(0, (1,), [])
    assert caught.value.peer == 0
    c.send(1, (2,), [np.ones(1)])  # the others go on
    assert b.receive(2, (2,), [np.ones(1)])[0].tolist() == [1.0]
    _close([b, c])
    closing.join(20.0)
    assert not closing.is_alive()


def test_a_silent_process_is_named_and_a_live_one_is_not():
    a, b = _sockets(2, silence_s=1.0)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(b.receive, 0, (1,), [np.ones(1)])
        time.sleep(1.5)
        assert not waiting.done()  # heartbeats say that a is alive
        a._closing.set()  # they end, and the connection stays
        with pytest.raises(PeerLost, match="silent for 1 s"):
            waiting.result(20.0)


def test_whoever_notices_a_loss_tells_the_others_its_number():
    ends = _sockets(4)
    ends[0].close(PeerLost(3, "seen by process 0 only"), wait_s=0.1)
    for end in ends[1:3]:
        with pytest.raises(PeerLost, match="process 3 is lost: process 0 has noticed") as caught:
            end.receive(1 if end.rank == 2 else 2, (5,), [])
        assert caught.value.peer == 3


def test_waiting_for_the_engine_has_an_end():
    controls = _sockets(2)
    ends = _together(lambda i: Engine(controls[i], timeout_s=0.3), 2)
    with pytest.raises(UserError, match=r"not brought message .* use the transport sockets"):
        ends[1].receive(0, (1,), [np.ones(1)])
    ends[0].send(1, (1,), [np.ones(1)])  # lets the fetch end, and its thread with it
    _close(ends)


PROGRAM = """
import sys, numpy as np
from jaxsys.cluster import Membership
from jaxsys.cluster.sockets import connect
end = connect(Membership(int(sys.argv[1]), 3, sys.argv[2], "test"))
assert "jax" not in sys.modules
end.send(0, (1,), [np.ones(4)])
end.receive(0, (2,), [np.ones(4)])
"""


def test_a_killed_process_is_named_within_seconds():
    address = f"127.0.0.1:{_ports.free_port()}"
    peers = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(i), address], stderr=subprocess.PIPE)
        for i in (1, 2)
    ]
    end = connect(Membership(0, 3, address, "test"))
    for i in (1, 2):
        assert end.receive(i, (1,), [np.ones(4)])[0].tolist() == [1.0] * 4
    began = time.monotonic()
    peers[0].send_signal(signal.SIGKILL)
    with pytest.raises(PeerLost) as caught:
        end.receive(2, (3,), [np.ones(4)])
    assert caught.value.peer == 1
    assert time.monotonic() - began < 5.0
    _, said = peers[1].communicate(timeout=30)
    assert b"PeerLost: process 1 is lost" in said
    with pytest.raises(PeerLost):
        end.send(2, (4,), [])
    end.close(caught.value)
    peers[0].communicate(timeout=30)


def test_mistakes_are_one_sentence():
    a, b = _sockets(2)
    with pytest.raises(UserError, match="expected another number from 0 to 1"):
        a.send(2, (1,), [])
    with pytest.raises(UserError, match="at most 5 fit"):
        a.send(1, (1, 2, 3, 4, 5, 6), [])
    a.send(1, (1,), [np.ones(3)])
    with pytest.raises(UserError, match=r"sent 24 bytes as message \(1,\); expected 8"):
        b.receive(0, (1,), [np.ones(1)])
    _close([a, b])
    first, _ = in_memory(2)
    first.send(1, (1,), [])
    with pytest.raises(UserError, match="sent to process 1 twice"):
        first.send(1, (1,), [])


def test_strangers_at_the_listening_port_are_sent_away():
    address = f"127.0.0.1:{_ports.free_port()}"
    listening = []
    original = _ports.listen_on_all

    def bother():
        while len(listening) < 2:
            time.sleep(0.01)
        for port in listening:  # one of the two takes no calls and may be gone
            with (
                contextlib.suppress(OSError),
                _ports.socket.create_connection(("127.0.0.1", port), timeout=5.0) as peer,
            ):
                peer.sendall(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n")

    def listen(port):
        server = original(port)
        if port == 0:
            listening.append(server.getsockname()[1])
        return server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxsys.cluster.sockets.listen_on_all", listen)
        stranger = threading.Thread(target=bother)
        stranger.start()
        ends = _together(lambda i: connect(Membership(i, 2, address, "test")), 2)
        stranger.join()
    ends[0].send(1, (0,), [np.ones(1)])
    assert ends[1].receive(0, (0,), [np.ones(1)])[0].tolist() == [1.0]
    _close(ends)
