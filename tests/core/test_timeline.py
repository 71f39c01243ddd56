"""Simulated timelines against a clock that is stepped from event to event, and their laws."""

import matplotlib.figure
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.core.timeline import Span, Task, Timeline, gantt, simulate, simulate_shared


@st.composite
def task_fields(draw):
    n = draw(st.integers(0, 9))
    fields = []
    for i in range(n):
        before = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        fields.append(
            (
                f"task {i}",
                draw(st.sampled_from("xyz")),
                float(draw(st.integers(0, 5))),
                tuple(f"task {j}" for j in sorted(before)),
                float(draw(st.sampled_from([0, 0, 1, 7]))),
            )
        )
    return fields


def step_the_clock(tasks):
    """Advance time to the next event and start whatever may start; integers, so no rounding."""
    start, end, now = {}, {}, 0.0
    while len(end) < len(tasks):
        progress = True
        while progress:
            progress = False
            for task in tasks:
                if task.name in start:
                    continue
                mine = [other for other in tasks if other.stream == task.stream]
                earlier = mine[: mine.index(task)]
                gates = [*task.after, *(other.name for other in earlier)]
                if now >= task.release_s and all(g in end and end[g] <= now for g in gates):
                    start[task.name] = now
                    end[task.name] = now + task.duration_s
                    progress = True
        later = [t for t in [*end.values(), *(t.release_s for t in tasks)] if t > now]
        if later:
            now = min(later)
    return start, end


@settings(max_examples=200, deadline=None)
@given(task_fields())
def test_simulation_equals_a_stepped_clock_and_obeys_its_laws(fields):
    tasks = [Task(*values) for values in fields]
    timeline = simulate(tasks)
    start, end = step_the_clock(tasks)
    assert timeline.start_s == start
    assert timeline.end_s == end
    assert timeline.makespan_s == max(end.values(), default=0.0)
    for stream in "xyz":
        busy = sum(task.duration_s for task in tasks if task.stream == stream)
        assert timeline.busy_s(stream) == busy
        assert timeline.makespan_s >= busy
    by_name = {task.name: task for task in tasks}
    path = timeline.critical_path()
    assert len(set(path)) == len(path)
    if tasks:
        # From its first release on, the path runs without a gap to the very end.
        length = by_name[path[0]].release_s + sum(by_name[name].duration_s for name in path)
        assert length == timeline.makespan_s
        assert start[path[0]] == by_name[path[0]].release_s


@settings(max_examples=100, deadline=None)
@given(task_fields())
def test_streams_that_share_nothing_run_as_before_and_sharing_only_delays(fields):
    tasks = [Task(*values) for values in fields]
    alone = simulate(tasks)
    assert simulate_shared(tasks, {}).spans == alone.spans
    shared = simulate_shared(tasks, {"x": "link", "y": "link"})
    both = sum(task.duration_s for task in tasks if task.stream in "xy")
    assert shared.makespan_s >= max(alone.makespan_s, both) - 1e-9
    for task in tasks:
        begin = shared.start_s[task.name]
        assert begin >= max([task.release_s, *(shared.end_s[name] for name in task.after)]) - 1e-9
        assert shared.end_s[task.name] - begin >= task.duration_s - 1e-9


def test_of_streams_that_share_the_task_that_has_waited_longest_goes_first():
    tasks = [
        *(Task("a", "x", 2.0), Task("d", "x", 1.0, release_s=1.5)),
        *(Task("b", "y", 2.0, release_s=1.0), Task("c", "y", 1.0)),
    ]
    timeline = simulate_shared(tasks, {"x": "link", "y": "link"})
    # b waits since 1, d since 1.5; c has been ready from the beginning, but b is before it
    assert timeline.end_s == {"a": 2.0, "b": 4.0, "c": 5.0, "d": 6.0}
    assert timeline.critical_path() == ("a", "b", "c", "d")


def test_a_predecessor_may_stand_later_in_the_list():
    timeline = simulate([Task("b", "x", 1.0, after=("a",)), Task("a", "y", 2.0)])
    assert timeline.start_s == {"b": 2.0, "a": 0.0}
    assert timeline.critical_path() == ("a", "b")


def test_no_tasks_take_no_time():
    assert simulate([]).makespan_s == 0
    assert simulate([]).critical_path() == ()


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ([Task("a", "x", 1.0, after=("b",)), Task("b", "y", 1.0, after=("a",))], "circle"),
        ([Task("a", "x", 1.0, after=("b",)), Task("b", "x", 1.0)], "circle"),
        ([Task("a", "x", 1.0, after=("a",))], "circle"),
        ([Task("a", "x", 1.0, after=("ghost",))], "'ghost'"),
        ([Task("a", "x", 1.0), Task("a", "y", 1.0)], "1 different names"),
        ([Task("a", "x", -1.0)], "duration_s of task 'a' is -1"),
        ([Task("a", "x", float("nan"))], "duration_s of task 'a' is nan"),
        ([Task("a", "x", 1.0, release_s=float("inf"))], "release_s of task 'a' is inf"),
    ],
)
def test_impossible_tasks_are_refused(tasks, says):
    with pytest.raises(UserError, match=says):
        simulate(tasks)


def test_gantt_draws_planned_and_measured_spans():
    planned = simulate([Task("backward 0", "compute", 2.0), Task("sync 0", "comm", 1.0)])
    measured = [("backward 0", "compute", 0.0, 2.5), ("backward 0", "compute", 3.0, 4.0)]
    for spans, bars, rows in ((planned, 2, ["compute", "comm"]), (measured, 2, ["compute"])):
        ax = gantt(matplotlib.figure.Figure().add_subplot(), spans)
        assert [tick.get_text() for tick in ax.get_yticklabels()] == rows
        assert len(ax.patches) == bars
        want = spans.spans if isinstance(spans, Timeline) else [Span(*span) for span in spans]
        for patch, span in zip(ax.patches, want, strict=True):
            assert patch.get_x() == span.start_s
            assert patch.get_width() == span.end_s - span.start_s
    assert len(gantt(matplotlib.figure.Figure().add_subplot(), planned, labels=False).texts) == 0
    with pytest.raises(UserError, match="before it starts"):
        gantt(matplotlib.figure.Figure().add_subplot(), [("a", "x", 2.0, 1.0)])
