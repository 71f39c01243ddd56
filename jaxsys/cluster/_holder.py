"""The process that holds a netlab's namespaces; run by path, standard library only.

It reads one line of JSON (the plan) from standard input, makes the namespaces, answers with lines
of JSON, and then waits for the end of its input. That end comes when the owner closes it or dies,
and then everything goes: the namespaces have no names, so the kernel removes them with the last
process inside. Should the pipe have leaked into another process, the kernel's parent-death signal
does the same.

    owner                 this process: user + net + mount namespace        one child per worker
    ------------------    ----------------------------------------------    -----------------------
    plan               →  own user namespace
    writes the id maps ←  {"stage": "user"}
    "mapped"           →  own net, mount, uts namespace, hosts, bridges →  own net, uts namespace
                          veth pair: jxI on its bridge, eth0 in the child →  address, rate of eth0
    uses the namespaces ← {"stage": "ready", "pid": …, "workers": […]}

A further bridge hangs on the first one by a veth pair with a rate of its own at both ends: the
link between two clusters. A worker without a rate is not shaped; timed exchanges end there.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any, NoReturn

_CLONE_NEWNS, _CLONE_NEWUTS = 0x00020000, 0x04000000
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG = 1


class _Failed(Exception):
    """Carries the stage that failed and what was said."""


def _check(stage: str, result: int) -> None:
    if result != 0:
        raise _Failed(stage, os.strerror(ctypes.get_errno()))


def _unshare(stage: str, flags: int) -> None:
    _check(stage, ctypes.CDLL(None, use_errno=True).unshare(flags))


def _mount(source: str, target: str, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _check("mount", libc.mount(source.encode(), target.encode(), None, flags, None))


def _die_with(parent_pid: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def _batch(stage: str, tool: str, lines: list[str]) -> None:
    """Run `ip` or `tc` once over several commands."""
    done = subprocess.run(
        [tool, "-batch", "-"], input="\n".join(lines) + "\n", text=True, capture_output=True
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise _Failed(stage, said[0] if said else f"{tool} ended with {done.returncode}")


def _shape(devices: list[str], link: dict[str, Any], plan: dict[str, Any]) -> None:
    """Put a token bucket on what leaves by each of these devices."""
    rate_bits_s = link["rate_bits_s"]
    if rate_bits_s is None:
        return
    bucket = f"tbf rate {round(rate_bits_s)}bit burst {link['burst_bytes']}b"
    queue = f"latency {round(plan['queue_s'] * 1e3)}ms"
    lines = [f"qdisc add dev {device} root {bucket} {queue}" for device in devices]
    _batch("tbf", plan["tc"], lines)


def _link(device: str, plan: dict[str, Any]) -> str:
    return f"link set dev {device} mtu {plan['mtu_bytes']} gso_max_size {plan['gso_bytes']} up"


def _silence_ipv6() -> None:
    """Keep the chatter of coming interfaces out of the counted bytes; loopback keeps its ::1."""
    with (
        contextlib.suppress(OSError),
        open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as f,
    ):
        f.write("1")


def _say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def _be_worker(plan: dict[str, Any], number: int, ready: int, go: int) -> NoReturn:
    """In a forked child: hold worker `number`'s namespaces until the parent ends."""
    worker = plan["workers"][number]
    try:
        _die_with(plan["holder_pid"])
        _unshare("network", _CLONE_NEWNET | _CLONE_NEWUTS)
        _silence_ipv6()
        socket.sethostname(worker["hostname"])
        os.write(ready, b"1")
        if os.read(go, 1) != b"1":
            os._exit(0)
        _batch(
            "address",
            plan["ip"],
            [
                "link set dev lo up",
                f"address add {worker['address']}/16 dev eth0",
                _link("eth0", plan),
            ],
        )
        _shape(["eth0"], worker, plan)
        os.write(ready, b"1")
    except _Failed as failure:
        os.write(ready, json.dumps(failure.args).encode())
        os._exit(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    while True:
        signal.pause()


def _await(ready: int) -> None:
    answer = os.read(ready, 4096)
    if answer != b"1":
        raise _Failed(*(json.loads(answer) if answer else ("network", "the process died")))


def _start_worker(plan: dict[str, Any], number: int) -> int:
    """Fork the holder of one worker's namespaces and lay its cable; give its process id."""
    worker = plan["workers"][number]
    ready, ready_end = os.pipe()
    go_end, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_worker(plan, number, ready_end, go_end)
    os.close(ready_end)
    os.close(go_end)
    try:
        _await(ready)
        device = f"jx{number}"
        _batch(
            "bridge",
            plan["ip"],
            [
                f"link add {device} type veth peer name eth0 netns {pid}",
                f"link set dev {device} master {worker['bridge']}",
                _link(device, plan),
            ],
        )
        _shape([device], worker, plan)
        os.write(go, b"1")
        _await(ready)
    finally:
        os.close(ready)
        os.close(go)
    return pid


def _build(plan: dict[str, Any]) -> list[int]:
    if plan["user_namespace"]:
        _unshare("user", _CLONE_NEWUSER)
        _say(stage="user")
        if sys.stdin.readline().strip() != "mapped":
            raise _Failed("user", "the id maps were not written")
    _die_with(plan["owner_pid"])
    _unshare("network", _CLONE_NEWNET | _CLONE_NEWNS | _CLONE_NEWUTS)
    _silence_ipv6()
    _mount("none", "/", _MS_REC | _MS_PRIVATE)
    _mount(plan["hosts_file"], "/etc/hosts", _MS_BIND)
    plan["holder_pid"] = os.getpid()
    _batch(
        "bridge",
        plan["ip"],
        [
            "link set dev lo up",
            "link add jxhub type bridge mcast_snooping 0",
            f"address add {plan['hub_address']}/16 dev jxhub",
            _link("jxhub", plan),
        ],
    )
    for trunk in plan["trunks"]:
        ends = [f"{trunk['bridge']}a", f"{trunk['bridge']}b"]
        _batch(
            "bridge",
            plan["ip"],
            [
                f"link add {trunk['bridge']} type bridge mcast_snooping 0",
                # it would answer for the first bridge's address, past the link between
                f"link set dev {trunk['bridge']} arp off",
                _link(trunk["bridge"], plan),
                f"link add {ends[0]} type veth peer name {ends[1]}",
                f"link set dev {ends[0]} master jxhub",
                f"link set dev {ends[1]} master {trunk['bridge']}",
                *(_link(end, plan) for end in ends),
            ],
        )
        _shape(ends, trunk, plan)
    return [_start_worker(plan, number) for number in range(len(plan["workers"]))]


def _main() -> int:
    plan = json.loads(sys.stdin.readline())
    try:
        workers = _build(plan)
    except _Failed as failure:
        stage, detail = failure.args
        _say(stage="failed", where=stage, detail=detail)
        return 1
    except OSError as error:
        _say(stage="failed", where="network", detail=str(error))
        return 1
    _say(stage="ready", pid=os.getpid(), workers=workers)
    sys.stdin.read()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
