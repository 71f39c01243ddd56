"""Tasks on serial streams: when each runs, what the whole takes, and a Gantt figure of it."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from jaxsys.core.errors import UserError
from jaxsys.core.report import COLOURS


@dataclass(frozen=True)
class Task:
    """Describe one piece of work on one stream.

    Attributes:
        name: unique name.
        stream: the serial resource that runs it (``compute``, ``comm``, a link, a stage).
        duration_s: seconds it takes.
        after: names of the tasks that must have finished before it starts.
        release_s: earliest start, seconds from the beginning.

    >>> Task("sync 0", "comm", 2.0, after=("backward 0",)).stream
    'comm'
    """

    name: str
    stream: str
    duration_s: int | float
    after: tuple[str, ...] = ()
    release_s: int | float = 0.0


class Span(NamedTuple):
    """Say when a piece of work ran, planned or measured.

    >>> Span("sync 0", "comm", 1.0, 3.0).end_s
    3.0
    """

    name: str
    stream: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """Hold the simulated spans, in task order, and what each one waited for last.

    Attributes:
        spans: one per task, in the order given to `simulate`.
        waited_for: per task the name of the task whose end set its start, or None where its release
            time did.

    >>> simulate([Task("a", "x", 1.0), Task("b", "y", 2.0, after=("a",))]).makespan_s
    3.0
    """

    spans: tuple[Span, ...]
    waited_for: tuple[str | None, ...]

    @property
    def makespan_s(self) -> float:
        """Seconds from 0 to the end of the last task."""
        return max((span.end_s for span in self.spans), default=0.0)

    @property
    def start_s(self) -> dict[str, float]:
        """Start of each task, by name."""
        return {span.name: span.start_s for span in self.spans}

    @property
    def end_s(self) -> dict[str, float]:
        """End of each task, by name."""
        return {span.name: span.end_s for span in self.spans}

    def busy_s(self, stream: str) -> float:
        """Sum the durations on one stream.

        Args:
            stream: the stream's name.

        Returns:
            Seconds during which it works; 0 for a stream without tasks.

        >>> simulate([Task("a", "x", 1.0, release_s=5.0)]).busy_s("x")
        1.0
        """
        mine = (span for span in self.spans if span.stream == stream)
        return sum((span.end_s - span.start_s for span in mine), 0.0)

    def critical_path(self) -> tuple[str, ...]:
        """Trace back from the task that ends last through what each one waited for.

        Returns:
            Task names, first to last. Shortening a task that is not among them leaves the makespan.

        >>> tasks = [Task("a", "x", 1.0), Task("b", "x", 1.0), Task("c", "y", 5.0, after=("a",))]
        >>> simulate(tasks).critical_path()
        ('a', 'c')
        """
        if not self.spans:
            return ()
        before = dict(zip((span.name for span in self.spans), self.waited_for, strict=True))
        name: str | None = max(self.spans, key=lambda span: span.end_s).name
        path = []
        while name is not None:
            path.append(name)
            name = before[name]
        return tuple(reversed(path))


def simulate(tasks: Iterable[Task]) -> Timeline:
    """Run tasks on serial streams and say when each starts and ends.

    ``start = max(release, end of the stream's previous task, ends of all predecessors)``. A stream
    runs its tasks in the order in which they are listed.

    Args:
        tasks: any number of tasks; a task may name predecessors that stand later in the list, on
            other streams.

    Returns:
        The timeline, spans in the order of the tasks.

    Raises:
        UserError: a name used twice, a duration or release that is negative or not finite, an
            unknown predecessor, or tasks that wait for each other in a circle.

    >>> timeline = simulate([Task("a", "x", 2.0), Task("b", "y", 1.0), Task("c", "y", 1.0, ("a",))])
    >>> timeline.start_s
    {'a': 0.0, 'b': 0.0, 'c': 2.0}
    """
    tasks = tuple(tasks)
    by_name = _check_tasks(tasks)
    waits: dict[str, list[str]] = {}
    last_on: dict[str, str] = {}
    for task in tasks:
        waits[task.name] = [*task.after]
        if task.stream in last_on:
            waits[task.name].append(last_on[task.stream])
        last_on[task.stream] = task.name

    followers: dict[str, list[str]] = {name: [] for name in by_name}
    missing = {name: len(names) for name, names in waits.items()}
    for name, names in waits.items():
        for before in names:
            followers[before].append(name)
    ready = [name for name, count in missing.items() if count == 0]
    spans: dict[str, Span] = {}
    waited_for: dict[str, str | None] = {}
    while ready:
        task = by_name[ready.pop()]
        start, cause = float(task.release_s), None
        for before in waits[task.name]:
            if spans[before].end_s > start:
                start, cause = spans[before].end_s, before
        spans[task.name] = Span(task.name, task.stream, start, float(start + task.duration_s))
        waited_for[task.name] = cause
        for name in followers[task.name]:
            missing[name] -= 1
            if missing[name] == 0:
                ready.append(name)
    if len(spans) < len(tasks):
        stuck = next(task.name for task in tasks if task.name not in spans)
        raise UserError(
            f"task {stuck!r} can never start because tasks wait for each other in a circle; every "
            "task must follow its predecessors on its stream; remove one `after` or reorder"
        )
    return Timeline(
        tuple(spans[task.name] for task in tasks), tuple(waited_for[task.name] for task in tasks)
    )


def simulate_shared(tasks: Iterable[Task], shares: Mapping[str, str]) -> Timeline:
    """Run tasks on streams of which some share a resource in turns, as messages share a queue.

    Of the tasks whose predecessors have ended the one that has waited longest goes first (of
    several the one listed first), and none is interrupted. Each stream still runs its own tasks one
    after the other, in their order.

    Args:
        tasks: as for `simulate`.
        shares: stream to the resource that it shares; streams that are not in it have their own.

    Returns:
        The timeline, spans in the order of the tasks. Without shares it is that of `simulate`.

    Raises:
        UserError: as `simulate`.

    >>> two = [Task("a", "x", 1.0), Task("b", "y", 3.0)]
    >>> simulate_shared(two, {"x": "link", "y": "link"}).end_s
    {'a': 1.0, 'b': 4.0}
    """
    tasks = tuple(tasks)
    simulate(tasks)  # for its checks
    number = {task.name: i for i, task in enumerate(tasks)}
    followers: list[list[int]] = [[] for _ in tasks]
    behind: dict[int, int] = {}  # task to the next of its stream
    missing = [len(task.after) for task in tasks]
    ready_s = [float(task.release_s) for task in tasks]
    last_of: dict[str, int] = {}
    for i, task in enumerate(tasks):
        for name in task.after:
            followers[number[name]].append(i)
        if task.stream in last_of:
            behind[last_of[task.stream]] = i
            missing[i] += 1
        last_of[task.stream] = i
    spans: dict[int, Span] = {}
    waited_for: dict[int, str | None] = {}
    queues: dict[str, list[tuple[float, int]]] = {}  # of each resource: ready since, task
    ran: dict[str, int] = {}  # resource to the task that it runs or ran last
    # What happens next: time, whether a task arrives in its queue (or ends), task.
    events = [(ready_s[i], True, i) for i, count in enumerate(missing) if count == 0]
    heapq.heapify(events)

    def one_less(i: int, now_s: float) -> None:
        missing[i] -= 1
        if missing[i] == 0:
            heapq.heappush(events, (max(ready_s[i], now_s), True, i))

    while events:
        now_s = events[0][0]
        touched: dict[str, None] = {}
        while events and events[0][0] == now_s:
            _, arrives, i = heapq.heappop(events)
            resource = shares.get(tasks[i].stream, tasks[i].stream)
            touched[resource] = None
            if arrives:
                heapq.heappush(queues.setdefault(resource, []), (ready_s[i], i))
                continue
            for follower in followers[i]:
                ready_s[follower] = max(ready_s[follower], now_s)
                one_less(follower, now_s)
        for resource in touched:
            before = ran.get(resource)
            if not queues.get(resource) or (before is not None and spans[before].end_s > now_s):
                continue
            _, i = heapq.heappop(queues[resource])
            task = tasks[i]
            causes = [*(number[name] for name in task.after), *([] if before is None else [before])]
            ends = [tasks[c].name for c in causes if spans[c].end_s == now_s > task.release_s]
            waited_for[i] = ends[0] if ends else None
            spans[i] = Span(task.name, task.stream, now_s, now_s + float(task.duration_s))
            ran[resource] = i
            heapq.heappush(events, (spans[i].end_s, False, i))
            if i in behind:
                one_less(behind[i], now_s)
    count = range(len(tasks))
    return Timeline(tuple(spans[i] for i in count), tuple(waited_for[i] for i in count))


def _check_tasks(tasks: Sequence[Task]) -> dict[str, Task]:
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        raise UserError(
            f"{len(tasks)} tasks have {len(by_name)} different names; names must be unique; number "
            "the repeated ones"
        )
    for task in tasks:
        for what, seconds in (("duration_s", task.duration_s), ("release_s", task.release_s)):
            if not (isfinite(seconds) and seconds >= 0):
                raise UserError(
                    f"{what} of task {task.name!r} is {seconds}; it must be finite and not "
                    "negative; mend the task"
                )
        for before in task.after:
            if before not in by_name:
                raise UserError(
                    f"task {task.name!r} follows {before!r}, which is not among the {len(tasks)} "
                    "tasks; every predecessor must be given; add it or mend the name"
                )
    return by_name


def gantt(ax, timeline: Timeline | Sequence[tuple[str, str, float, float]], *, labels: bool = True):
    """Draw spans as bars, one row per stream.

    Args:
        ax: matplotlib axes.
        timeline: a simulated timeline, or measured ``(name, stream, start_s, end_s)`` tuples; names
            may repeat among measured ones.
        labels: whether to write each span's name into its bar.

    Returns:
        The axes. Rows stand in the order in which the streams first appear, the first on top; the
        colour follows the first word of the name, so all ``sync`` bars look alike.

    Raises:
        UserError: a measured span that ends before it starts.

    >>> from matplotlib.figure import Figure
    >>> ax = gantt(Figure().add_subplot(), [("step 0", "compute", 0.0, 1.0)])
    >>> [tick.get_text() for tick in ax.get_yticklabels()]
    ['compute']
    """
    given = timeline.spans if isinstance(timeline, Timeline) else timeline
    spans = [Span(*span) for span in given]
    for span in spans:
        if not span.end_s >= span.start_s:
            raise UserError(
                f"span {span.name!r} starts at {span.start_s} s and ends at {span.end_s} s; it "
                "must not end before it starts; mend the measurement"
            )
    rows = {stream: row for row, stream in enumerate(dict.fromkeys(s.stream for s in spans))}
    kinds = dict.fromkeys(span.name.split(" ")[0] for span in spans)
    colours = {kind: COLOURS[k % len(COLOURS)] for k, kind in enumerate(kinds)}
    for span in spans:
        row, width = rows[span.stream], span.end_s - span.start_s
        colour = colours[span.name.split(" ")[0]]
        ax.barh(
            row,
            width,
            left=span.start_s,
            height=0.8,
            color=colour,
            edgecolor="white",
            linewidth=0.5,
        )
        if labels and width > 0:
            middle = span.start_s + width / 2
            style = {"ha": "center", "va": "center", "fontsize": "x-small", "clip_on": True}
            ax.text(middle, row, span.name, **style)
    ax.set_yticks(list(rows.values()), list(rows))
    if rows:
        ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("seconds")
    return ax
