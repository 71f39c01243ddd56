"""Meet before JAX does, so that a member that never comes is a sentence and not a crash.

``jax.distributed.initialize`` aborts the whole process from C++ when its coordinator cannot be
reached or a member is missing, and crashes when the port is occupied. No Python handler sees
either. So the processes first meet on the same port over plain TCP: everyone says who they are,
process 0 answers "go" when all are there, and only then JAX takes the port.
"""

import contextlib
import json
import socket
import time
from typing import Any

from jaxsys.cluster._ports import listen_on_all, split_address
from jaxsys.core.errors import UserError

_LINE_BYTES = 512
_TABLE_BYTES = 2**20  # of the answer, which lists everybody
_RETRY_S = 0.1
_GO = "go "


def meet(
    address: str, process_id: int, num_processes: int, timeout_s: float, card: str = ""
) -> tuple[tuple[str, str], ...]:
    """Wait until all processes of a job have come together.

    Args:
      address: ``HOST:PORT`` of process 0, free there until JAX's coordinator takes it.
      process_id: this process, from 0 to num_processes - 1.
      num_processes: how many must come.
      timeout_s: how long to wait for them.
      card: a short text that the others get, such as a port.

    Returns:
      Each process's host, as process 0 sees it, and card.

    Raises:
      UserError: the port is occupied, the coordinator does not answer, members are missing, or
        two of them disagree about the job.

    >>> meet("127.0.0.1:4000", 0, 1, timeout_s=1.0)  # a job of one has nobody to wait for
    (('127.0.0.1', ''),)
    """
    host, port = split_address(address)
    if num_processes == 1:
        return ((host, card),)
    deadline_s = time.monotonic() + timeout_s
    if process_id == 0:
        return _gather(port, num_processes, deadline_s, timeout_s, (host, card))
    hello = {"process_id": process_id, "num_processes": num_processes, "card": card}
    table = _report(host, port, hello, deadline_s, timeout_s)
    return tuple((str(h), str(c)) for h, c in table)


def _gather(
    port: int, num_processes: int, deadline_s: float, timeout_s: float, own: tuple[str, str]
) -> tuple[tuple[str, str], ...]:
    present: dict[int, socket.socket] = {}
    cards = {0: own}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(listen_on_all(port))
        problem = None
        while len(present) < num_processes - 1 and problem is None:
            left_s = deadline_s - time.monotonic()
            missing = sorted(set(range(1, num_processes)) - set(present))
            if left_s <= 0:
                problem = (
                    f"only {len(present) + 1} of {num_processes} processes came within "
                    f"{timeout_s:g} s; expected also process {_listed(missing)}; start them all "
                    "with the same coordinator and count"
                )
                break
            server.settimeout(left_s)
            try:
                peer, _ = server.accept()
            except TimeoutError:
                continue
            stack.enter_context(peer)
            problem = _admit(peer, present, cards, num_processes)
        table = tuple(cards[i] for i in sorted(cards))
        for peer in present.values():
            with contextlib.suppress(OSError):
                peer.sendall((problem or _GO + json.dumps(table)).encode() + b"\n")
        if problem:
            raise UserError(problem)
        return table


def _admit(
    peer: socket.socket,
    present: dict[int, socket.socket],
    cards: dict[int, tuple[str, str]],
    num_processes: int,
) -> str | None:
    """Read one greeting; strangers are ignored, contradictions are returned as a sentence."""
    try:
        peer.settimeout(2.0)
        hello = json.loads(_read_line(peer))
        process_id, count = int(hello["process_id"]), int(hello["num_processes"])
        card = str(hello.get("card", ""))
    except (OSError, ValueError, TypeError, KeyError):
        return None  # a port scanner or a health check, not one of ours
    if count != num_processes or not 0 < process_id < num_processes:
        problem = (
            f"process {process_id} of {count} came to a job of {num_processes} processes; expected "
            "one count everywhere and numbers below it; start all with the same -n"
        )
    elif process_id in present and _is_open(present[process_id]):
        problem = (
            f"two processes both say that they are number {process_id} of {num_processes}; "
            "expected each number once; give each its own --process-id"
        )
    else:
        present[process_id] = peer
        cards[process_id] = (peer.getpeername()[0].removeprefix("::ffff:"), card)
        return None
    with contextlib.suppress(OSError):
        peer.sendall(problem.encode() + b"\n")
    return problem


def _report(
    host: str, port: int, hello: dict[str, Any], deadline_s: float, timeout_s: float
) -> list[list[str]]:
    reason = "no answer"
    while time.monotonic() < deadline_s:
        left_s = deadline_s - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(left_s, 0.1)) as server:
                server.sendall(json.dumps(hello).encode() + b"\n")
                # a little longer than process 0 waits, so that its sentence arrives here too
                server.settimeout(max(left_s, 0.1) + 2.0)
                answer = _read_line(server, _TABLE_BYTES)
        except OSError as error:
            reason = error.strerror or str(error) or reason
        else:
            reason = "the connection was closed"
            if answer.startswith(_GO):
                with contextlib.suppress(ValueError):  # of a table that was cut off
                    return json.loads(answer[len(_GO) :])
            elif answer:
                raise UserError(answer)
        time.sleep(_RETRY_S)
    raise UserError(
        f"the coordinator {host}:{port} did not answer process {hello['process_id']} within "
        f"{timeout_s:g} s ({reason}); expected process 0 there; start it, or correct the address"
    )


def _read_line(peer: socket.socket, limit: int = _LINE_BYTES) -> str:
    data = b""
    while not data.endswith(b"\n") and len(data) < limit:
        part = peer.recv(limit - len(data))
        if not part:
            break
        data += part
    return data.decode(errors="replace").strip()


def _is_open(peer: socket.socket) -> bool:
    """Tell a waiting member from one that died and came back under the same number."""
    try:
        peer.setblocking(False)
        return peer.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        peer.setblocking(True)


def _listed(numbers: list[int], shown: int = 8) -> str:
    text = ", ".join(str(number) for number in numbers[:shown])
    return text + (f" and {len(numbers) - shown} more" if len(numbers) > shown else "")
