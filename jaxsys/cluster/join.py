"""Join a multi-process job, however it was started.

One program runs unchanged in a notebook, under ``jaxsys launch``, under Slurm, Open MPI or
Kubernetes, and by hand on several hosts. The first of these that applies says who we are:

1. explicit arguments (``--coordinator HOST:PORT --process-id I -n N``);
2. the environment that `jaxsys.cluster.launch` sets;
3. JAX's own detection of the cluster that it runs in;
4. nothing: a single process, without ``jax.distributed``.
"""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import NoReturn

from jaxsys.cluster._ports import split_address
from jaxsys.cluster._rendezvous import meet
from jaxsys.core.errors import UserError

COORDINATOR = "JAXSYS_COORDINATOR"
PROCESS_ID = "JAXSYS_PROCESS_ID"
NUM_PROCESSES = "JAXSYS_NUM_PROCESSES"


@dataclasses.dataclass(frozen=True)
class Membership:
    """This process's place in a job.

    Attributes:
      process_id: from 0 to num_processes - 1.
      num_processes: how many processes the job has.
      coordinator: ``HOST:PORT`` of process 0; None in a single process.
      how: what said so: ``arguments``, ``launcher``, ``single``, or the name that JAX gives to the
        cluster (``slurm``, ``ompi``, ``k8s``, …).

    >>> Membership(process_id=1, num_processes=4, coordinator="node0:4000", how="arguments").how
    'arguments'
    """

    process_id: int
    num_processes: int
    coordinator: str | None
    how: str


_joined: Membership | None = None


def join(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    *,
    local_devices: int = 2,
    heartbeat_s: int = 10,
    init_timeout_s: int = 60,
    shutdown_s: int = 10,
    distributed: bool = True,
) -> Membership:
    """Join the job that this process was started for; call it before JAX is first used.

    A second call returns the same membership. On CPU each process gets `local_devices` virtual
    devices, because a second one can carry the collectives while the first computes; a larger
    number that the user set is left as it is. Collectives on CPU go over gloo, JAX's default.

    Args:
      coordinator: ``HOST:PORT`` on which process 0 is reached by the others.
      process_id: this process's number; given together with the coordinator.
      num_processes: how many processes join; given together with the coordinator.
      local_devices: virtual CPU devices of this process.
      heartbeat_s: silence after which a member counts as dead and the others are ended, in seconds.
      init_timeout_s: how long to wait for all members, in seconds.
      shutdown_s: how long a member that ends waits for the others, in seconds.
      distributed: whether JAX itself joins the processes, as its collectives need it; without, each
        keeps a JAX of its own and a lost member ends nobody else's.

    Returns:
      The membership.

    Raises:
      UserError: arguments are missing or contradict, the coordinator's port is occupied, the
        coordinator does not answer, members are missing, or JAX was already in use.

    >>> me = join()  # under no launcher: a job of one
    >>> me.process_id, me.num_processes, join() is me
    (0, 1, True)
    """
    global _joined
    given = _from_arguments(coordinator, process_id, num_processes)
    if _joined is not None:
        if given is not None and given != dataclasses.replace(_joined, how="arguments"):
            raise UserError(
                f"this process is already number {_joined.process_id} of {_joined.num_processes}; "
                "it cannot join another job; start a new process for that"
            )
        return _joined
    local_device_ids = None
    member = given or read_environment(os.environ)
    if member is None:
        member, local_device_ids = _from_jax_detection(init_timeout_s)
    if member is None:
        member = Membership(0, 1, None, "single")
    _set_cpu_devices(local_devices)
    if member.num_processes > 1 and distributed:
        _initialize(member, local_device_ids, heartbeat_s, init_timeout_s, shutdown_s)
    _joined = member
    return member


def leave(code: int) -> NoReturn:
    """End this process; with a bad status at once, without waiting for the other members.

    An ordinary exit first waits until all members have come to theirs. A member that fails must
    not: the others may be inside a collective that waits for it, and only its death ends that.

    Args:
      code: the exit status.

    >>> leave(0)
    Traceback (most recent call last):
    ...
    SystemExit: 0
    """
    abandon(code)
    raise SystemExit(code)


def abandon(code: int) -> None:
    """End this process at once if it is a member of a job that failed; otherwise do nothing.

    Args:
      code: the exit status; 0 is no failure.

    >>> abandon(2)  # a job of one has nobody to hold up
    """
    if code != 0 and _joined is not None and _joined.num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def read_environment(environ: Mapping[str, str]) -> Membership | None:
    """Read the membership that `jaxsys.cluster.launch` hands to its workers.

    Args:
      environ: environment variables, usually ``os.environ``.

    Returns:
      The membership, or None where none of the three variables is set.

    Raises:
      UserError: only some are set, or their values are no valid membership.

    >>> read_environment({"JAXSYS_COORDINATOR": "127.0.0.1:4000", "JAXSYS_PROCESS_ID": "1",
    ...                   "JAXSYS_NUM_PROCESSES": "2"}).process_id
    1
    >>> read_environment({}) is None
    True
    """
    values = {name: environ.get(name) for name in (COORDINATOR, PROCESS_ID, NUM_PROCESSES)}
    if not any(values.values()):
        return None
    numbers = []
    for name in (PROCESS_ID, NUM_PROCESSES):
        text = values[name] or ""
        if not text.isascii() or not text.isdigit():
            raise UserError(
                f"{name} is {text!r}; expected a whole number, as jaxsys launch sets it; "
                "set all three JAXSYS_ variables of the job or none"
            )
        numbers.append(int(text))
    return _checked(values[COORDINATOR] or "", numbers[0], numbers[1], "launcher")


def launched_as(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Tell which of how many processes this is, by what launchers leave in the environment.

    `jaxsys launch`, Slurm and Open MPI are known; nothing is joined or checked.

    Args:
      environ: environment variables.

    Returns:
      This process's number and how many there are; 0 and 1 where no launcher says anything.

    >>> launched_as({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}), launched_as({})
    ((3, 4), (0, 1))
    """
    names = (
        (PROCESS_ID, NUM_PROCESSES),
        ("SLURM_PROCID", "SLURM_NTASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    )
    for number, count in names:
        if number in environ or count in environ:
            return int(environ.get(number) or 0), int(environ.get(count) or 1)
    return 0, 1


def _from_arguments(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> Membership | None:
    given = (coordinator, process_id, num_processes)
    if all(value is None for value in given):
        return None
    if coordinator is None or process_id is None or num_processes is None:
        raise UserError(
            f"got coordinator={coordinator}, process_id={process_id}, "
            f"num_processes={num_processes}; expected all three or none; "
            "pass --coordinator HOST:PORT --process-id I -n N"
        )
    return _checked(coordinator, process_id, num_processes, "arguments")


def _checked(coordinator: str, process_id: int, num_processes: int, how: str) -> Membership:
    split_address(coordinator)
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process id {process_id} of {num_processes} processes; expected a number from 0 to "
            "the number of processes less one; correct one of them"
        )
    return Membership(process_id, num_processes, coordinator, how)


def _from_jax_detection(timeout_s: int) -> tuple[Membership | None, Sequence[int] | None]:
    """Ask JAX which cluster this is; private names of JAX stay in here."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        if "JOB_COMPLETION_INDEX" not in os.environ:
            return None, None  # any pod, a notebook for one: not a member of an indexed Job
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this is a pod of an indexed Kubernetes Job without the Python package kubernetes; "
                "JAX needs it to find the other pods; install it or set the JAXSYS_ variables"
            )
    from jax._src.clusters import ClusterEnv

    try:
        kind = next(
            (
                kind
                for kind in ClusterEnv._cluster_types
                if not kind.opt_in_only_method and kind.is_env_present()
            ),
            None,
        )
        if kind is None:
            return None, None
        address, count, number, local_ids = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, kind.name, timeout_s
        )
    except (RuntimeError, KeyError, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"JAX recognises a cluster here but cannot read it ({first_line}); expected a job "
            "started by its launcher; mend that or pass --coordinator, --process-id and -n"
        ) from error
    if address is None or count is None or number is None:
        return None, None
    return _checked(address, number, count, kind.name), local_ids


def _set_cpu_devices(count: int) -> None:
    """Give the CPU platform its virtual devices while that is still possible."""
    import jax
    from jax._src import xla_bridge

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return  # the user's own number; JAX refuses both settings together
    if jax.config.jax_num_cpu_devices >= count:
        return
    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_num_cpu_devices", count)
    elif jax.default_backend() == "cpu" and jax.local_device_count() < count:
        raise UserError(
            f"JAX was used before join() and has {jax.local_device_count()} CPU device; expected "
            f"{count}; call jaxsys.cluster.join() before anything else touches JAX"
        )


def _initialize(
    member: Membership,
    local_device_ids: Sequence[int] | None,
    heartbeat_s: int,
    init_timeout_s: int,
    shutdown_s: int,
) -> None:
    import jax
    from jax._src import xla_bridge

    if jax.distributed.is_initialized() or xla_bridge.backends_are_initialized():
        raise UserError(
            "JAX was already in use when join() was called; a job of "
            f"{member.num_processes} processes must be joined first; call join() before that"
        )
    assert member.coordinator is not None
    meet(member.coordinator, member.process_id, member.num_processes, float(init_timeout_s))
    jax.distributed.initialize(
        member.coordinator,
        member.num_processes,
        member.process_id,
        local_device_ids=local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=init_timeout_s,
        heartbeat_timeout_seconds=heartbeat_s,
        shutdown_timeout_seconds=shutdown_s,
    )
    sys.excepthook = _report_and_leave(sys.excepthook)


def _report_and_leave(report: Callable[..., object]) -> Callable[..., None]:
    """Make an uncaught exception end the process at once, after its traceback; see `leave`."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        report(kind, error, trace)
        leave(130 if issubclass(kind, KeyboardInterrupt) else 1)

    return hook
