"""Start a process for each device of a place, have them measure themselves and their links.

The program of one of these processes is ``python -m jaxsys.pipeline.measure SPEC.json``.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxsys.cluster import join, launch, leave
from jaxsys.cluster.events import Listener, say, say_mistake
from jaxsys.cluster.heap import keep_freed_memory
from jaxsys.cluster.sockets import connect
from jaxsys.cluster.throttle import throttle_of
from jaxsys.core.errors import UserError
from jaxsys.core.report import atomic_write
from jaxsys.pipeline.job import Task, set_up
from jaxsys.pipeline.place import Place, Standing
from jaxsys.pipeline.profile import Profile, profile
from jaxsys.train import optimizers

_MEET_S = 120.0  # processes with a small share of a core take long to start


def measure(
    task: Task,
    place: Place,
    micro_batches: int,
    out: str | Path,
    *,
    standing: Standing | None = None,
    seed: int = 0,
    granularity: str = "layer",
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Profile:
    """Measure a fleet that stands on this machine, with the model that it is to train.

    Args:
      task: what is to be trained.
      place: what stands for the devices.
      micro_batches: parts that a step's examples are dealt out to.
      out: folder that receives ``profile.json`` and the workers' log.
      standing: the place where it stands already.
      seed: of the data.
      granularity: of the graph's nodes.
      on_event: gets an event whenever something else is measured.

    Returns:
      The profile.

    Raises:
      UserError: a mistake in the task, or a place that cannot be had.
      RuntimeError: a process failed.

    >>> measure.__name__  # starts processes: see tests/pipeline/test_cli.py
    'measure'
    """
    if standing is None:
        with place.stand() as made:
            return measure(
                task, place, micro_batches, out, standing=made, seed=seed,
                granularity=granularity, on_event=on_event,
            )  # fmt: skip
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "task": dataclasses.asdict(task),
        "micro_batches": micro_batches,
        "seed": seed,
        "granularity": granularity,
        "sites": [
            next(k for k, group in enumerate(place.clusters) if i in group)
            for i in range(place.devices)
        ]
        if len(place.clusters) > 1
        else [],
    }
    atomic_write(folder / "measure.json", json.dumps(spec))
    found: list[Profile] = []

    def follow(event: dict[str, Any]) -> None:
        if event["event"] == "profile":
            found.append(Profile.from_json(event["profile"]))
        on_event(event)

    listener = Listener(folder, follow)
    report = launch(
        [sys.executable, "-m", "jaxsys.pipeline.measure", str(folder / "measure.json")],
        place.devices,
        wrap=standing.wrap,
        host=standing.hosts[0],
        on_line=listener,
    )
    if listener.mistakes:
        raise UserError(listener.mistakes[0])
    if report.exit_code or not found:
        last = report.attempts[-1]
        raise RuntimeError(
            f"process {last.first_failed} ended with status {last.code} while it was measured; its "
            f"last lines were:\n{listener.tail()}"
        )
    atomic_write(folder / "profile.json", found[0].to_json())
    return found[0]


def main(spec_file: str) -> None:
    """Measure in this process; a mistake is one marked sentence and status 2.

    Args:
      spec_file: what `measure` wrote.

    >>> main.__name__
    'main'
    """
    try:
        spec = json.loads(Path(spec_file).read_text())
        keep_freed_memory()
        member = join(local_devices=1, distributed=False)
        transport = connect(member, timeout_s=_MEET_S, silence_s=60.0)
        first = member.process_id == 0

        def on_event(what: str) -> None:
            if first:
                say({"event": "measure", "what": what})

        task = Task(**spec["task"])
        found = profile(
            set_up(task, spec["seed"]),
            spec["micro_batches"],
            transport,
            granularity=spec["granularity"],
            sites=spec["sites"],
            optimizer=optimizers.PRESETS[task.optimizer](lr=task.lr),
            throttle=throttle_of(),
            on_event=on_event,
        )
        if found is not None:
            say({"event": "profile", "profile": found.to_json()})
        transport.close()
    except UserError as error:
        say_mistake(error)
        leave(2)


if __name__ == "__main__":
    main(sys.argv[1])
