"""Which operation of a compiled program ran when, from JAX's profiler.

Events carry the name of the instruction that they run; joined with the compiled text (`core.hlo`)
they tell which `jax.named_scope` the time went to, with no list of kernel names.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Event(NamedTuple):
    """An operation under way.

    Attributes:
      op: name of the instruction in the compiled text.
      module: name of the program.
      device: on which it ran.
      start_s: on the profiler's clock.
      end_s: likewise.

    >>> Event("add.1", "jit_f", "0", 0.0, 1.0).op
    'add.1'
    """

    op: str
    module: str
    device: str
    start_s: float
    end_s: float


def capture(function: Callable[[], Any]) -> tuple[list[Event], float]:
    """Run a function once under the profiler.

    On a CPU an operation may be handed to other threads; it is under way from the moment when it is
    started until it is reported as ended. On an accelerator each kernel is an event of its own.

    Args:
      function: of no arguments; its JAX arrays are waited for.

    Returns:
      The events by start, and the seconds that the call took.

    >>> double = jax.jit(lambda x: x @ x)
    >>> x = jax.numpy.ones((64, 64))
    >>> _ = double(x)
    >>> events, seconds = capture(lambda: double(x))
    >>> all(0 <= e.end_s - e.start_s < seconds for e in events)
    True
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would be most of the events
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds = time.perf_counter() - start
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        events = [event for file in files for event in _events(file)]
    return sorted(events, key=lambda event: event.start_s), seconds


def _events(file: Path) -> list[Event]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the reader's own C++ types
        planes = [(p.name, [_of_line(p.name, line) for line in p.lines]) for p in _planes(file)]
        on_device = [lines for name, lines in planes if name.startswith("/device:")]
        found = on_device if any(e for lines in on_device for e, _ in lines) else [
            lines for _, lines in planes
        ]  # fmt: skip
    ends = {key: at for lines in found for _, more in lines for key, at in more.items()}
    begun = [pair for lines in found for events, _ in lines for pair in events]
    return [e._replace(end_s=max(e.end_s, ends.get(key, 0.0))) for e, key in begun]


def _planes(file: Path) -> Iterator[Any]:
    yield from jax.profiler.ProfileData.from_file(str(file)).planes


def _of_line(plane: str, line: Any) -> tuple[list[tuple[Event, Any]], dict[Any, float]]:
    """Events of one line of a trace with what links them to their ends, and those ends."""
    begun, ends = [], {}
    for event in line.events:
        if event.name.startswith("end: "):
            stats = dict(event.stats)
            ends[stats.get("_ct"), stats.get("_c")] = event.start_ns * 1e-9
        elif not event.name.startswith("Threadpool"):  # many, and of no use here
            stats = dict(event.stats)
            if "hlo_op" not in stats:
                continue
            start, length = event.start_ns * 1e-9, event.duration_ns * 1e-9
            device = str(stats.get("device_ordinal", plane))
            module = str(stats.get("hlo_module", ""))
            one = Event(str(stats["hlo_op"]), module, device, start, start + length)
            key = (stats["_pt"], stats["_p"]) if "_p" in stats else None
            begun.append((one, key))
    return begun, ends


def shared(events: Iterable[Event]) -> dict[str, float]:
    """Share out time among operations: every instant is divided equally by those under way.

    So the shares add up to the time in which anything was under way, whatever overlaps.

    Args:
      events: of one device.

    Returns:
      Name of the operation to its seconds.

    >>> shared([Event("a", "", "", 0.0, 2.0), Event("b", "", "", 1.0, 3.0)])
    {'a': 1.5, 'b': 1.5}
    """
    events = [event for event in events if event.end_s > event.start_s]
    edges = [(e.start_s, 1, i) for i, e in enumerate(events)]
    edges += [(e.end_s, 0, i) for i, e in enumerate(events)]
    seconds = {e.op: 0.0 for e in events}
    under_way: set[int] = set()
    before = 0.0
    for at, opens, i in sorted(edges):
        for j in under_way:
            seconds[events[j].op] += (at - before) / len(under_way)
        before = at
        if opens:
            under_way.add(i)
        else:
            under_way.discard(i)
    return seconds
