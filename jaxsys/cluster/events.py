"""What a worker tells its supervisor: marked lines of JSON on standard output, and their reading.

A worker prints events and, when the user has made a mistake, one sentence; everything else that it
prints goes to a log. `Listener` is the ``on_line`` of `jaxsys.cluster.launch`.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxsys.core.report import append_jsonl, to_json

EVENT, MISTAKE = "@jaxsys ", "!jaxsys "


def say(event: Mapping[str, Any]) -> None:
    """Tell the supervisor of an event.

    Args:
      event: what JSON can hold.

    >>> say({"event": "step", "step": 3})
    @jaxsys {"event": "step", "step": 3}
    """
    print(EVENT + to_json(event), flush=True)


def say_mistake(sentence: object) -> None:
    """Tell the supervisor of a user's mistake, before this worker ends.

    Args:
      sentence: such as a `UserError`.

    >>> say_mistake("the batch is 0; expected 1 or more; raise it")
    !jaxsys the batch is 0; expected 1 or more; raise it
    """
    print(MISTAKE + " ".join(str(sentence).split()), flush=True)


class Listener:
    """Sort the workers' lines: events, mistakes, and the rest.

    Attributes:
      out: folder of ``events.jsonl`` and ``workers.log``.
      began_s: `time.monotonic` at the start; events get the seconds since then as ``at_s``.
      mistakes: sentences of workers, in the order in which they came.

    >>> import tempfile
    >>> seen = []
    >>> listener = Listener(Path(tempfile.mkdtemp()), seen.append)
    >>> listener(0, '@jaxsys {"event": "step"}'), listener(1, "hello"), seen[0]["event"]
    (None, None, 'step')
    >>> listener.tail()
    '[1] hello'
    """

    def __init__(self, out: Path, on_event: Callable[[dict[str, Any]], None]):
        self.out, self.began_s = out, time.monotonic()
        self.mistakes: list[str] = []
        self._on_event = on_event

    def __call__(self, worker: int, line: str) -> None:
        """Take one line of one worker."""
        if line.startswith(EVENT):
            self.tell(json.loads(line[len(EVENT) :]))
        elif line.startswith(MISTAKE):
            self.mistakes.append(line[len(MISTAKE) :])
        else:
            with (self.out / "workers.log").open("a") as log:
                log.write(f"[{worker}] {line}\n")

    def tell(self, event: dict[str, Any]) -> None:
        """Record an event of the supervisor's own and hand it on.

        Args:
          event: what JSON can hold.
        """
        event = event | {"at_s": self.now_s()}
        append_jsonl(self.out / "events.jsonl", event)
        self._on_event(event)

    def now_s(self) -> float:
        """Give the seconds since the start."""
        return time.monotonic() - self.began_s

    def tail(self, lines: int = 15) -> str:
        """Give the last lines of the log.

        Args:
          lines: how many.
        """
        log = self.out / "workers.log"
        return "\n".join(log.read_text().splitlines()[-lines:]) if log.exists() else ""
