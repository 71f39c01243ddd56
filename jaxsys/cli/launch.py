"""`jaxsys launch`: run a command in N local processes, or once as a member of a multi-host job."""

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from jaxsys.cli.options import Outcome, Output
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Output):
    """Run a command in N local processes joined by jax.distributed, or as one of a multi-host job.

    The command is written after two dashes: jaxsys launch -n 4 -- python train.py

    On several hosts run, on each: jaxsys launch --coordinator HOST:PORT --process-id I -n N -- CMD

    Attributes:
      json: Print one JSON object on standard output, and the workers' lines on standard error.
      command: The program to run and its arguments, after two dashes.
      workers: How many processes the job has.
      restarts: How often to start all workers again after one of them has died.
      bandwidth: Rate of each worker's link, such as 100mbit, or one rate for each worker; the
        workers then run in network namespaces joined by shaped links.
      port: Port on which worker 0 listens; a free one if left out.
      coordinator: HOST:PORT of process 0 of a multi-host job.
      process_id: Which process of the multi-host job this is, from 0.
    """

    spreads: ClassVar[bool] = True

    command: tyro.conf.Positional[tuple[str, ...]] = ()
    workers: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    restarts: int = 0
    bandwidth: tuple[str, ...] | None = None
    port: int | None = None
    coordinator: str | None = None
    process_id: int | None = None


def run(config: LaunchConfig) -> Outcome:
    """Start the workers and wait, or become the command."""
    if config.coordinator is not None or config.process_id is not None:
        _become(config)
    from jaxsys.cluster import launch, netlab

    if not config.bandwidth:
        report = launch(config.command, config.workers, restarts=config.restarts, port=config.port)
    else:
        rates = config.bandwidth[0] if len(config.bandwidth) == 1 else config.bandwidth
        with netlab(config.workers, rates) as lab:
            _show_links(lab)
            report = launch(
                config.command,
                config.workers,
                wrap=lab.wrap,
                host=lab.addresses[0],
                restarts=config.restarts,
                port=config.port,
            )
    attempts = [attempt.__dict__ for attempt in report.attempts]
    result = {"exit_code": report.exit_code, "restarts": report.restarts, "attempts": attempts}
    return Outcome(result, report.exit_code)


def _show_links(lab: Any) -> None:
    from jaxsys.cluster import format_rate

    for i, rate in enumerate(lab.verify()):
        print(
            f"jaxsys: link of worker {i}: {format_rate(lab.rates_bits_s[i])}, measured "
            f"{format_rate(rate.up_bits_s)} up, {format_rate(rate.down_bits_s)} down",
            file=sys.stderr,
        )


def _become(config: LaunchConfig) -> None:
    from jaxsys.cluster import read_environment
    from jaxsys.cluster.join import COORDINATOR, NUM_PROCESSES, PROCESS_ID

    if config.coordinator is None or config.process_id is None:
        raise UserError(
            f"got --coordinator {config.coordinator} and --process-id {config.process_id}; a "
            "multi-host job needs both, and -n; pass all three on every host"
        )
    if config.restarts or config.bandwidth or config.port is not None:
        raise UserError(
            "--restarts, --bandwidth and --port are for workers on this machine; leave them out "
            "when joining a multi-host job with --coordinator"
        )
    if not config.command:
        raise UserError("no command was given; write it after --, as in -- python train.py")
    joined = {
        COORDINATOR: config.coordinator,
        PROCESS_ID: str(config.process_id),
        NUM_PROCESSES: str(config.workers),
    }
    read_environment(joined)  # its checks are those that the command would meet
    if shutil.which(config.command[0]) is None:
        raise UserError(f"command {config.command[0]!r} was not found; check its name and PATH")
    sys.stdout.flush()
    os.execvpe(config.command[0], config.command, {**os.environ, **joined})


COMMANDS = {"": (LaunchConfig, run)}
