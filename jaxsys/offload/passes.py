"""One pass of tokens through a planned model as tasks on streams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from jaxsys.core.timeline import Task
from jaxsys.offload.assign import ExpertCosts, assign, expert_costs
from jaxsys.offload.cache import (
    CacheState,
    Event,
    Policy,
    admit,
    observe,
    prefetch,
    static,
)
from jaxsys.offload.choose import decide
from jaxsys.offload.cost import dram_s, link_s, run_s
from jaxsys.offload.partition import Whole, whole
from jaxsys.offload.predict import part_terms
from jaxsys.offload.traces import Trace
from jaxsys.offload.types import Assignment, Machine, Plan

Rule = Callable[[Sequence[int], Sequence[bool], ExpertCosts], Assignment]
STREAMS = ("cpu", "link", "accelerator", "memory")


class Strategy(NamedTuple):
    """Say how a run decides.

    Attributes:
        name: for tables.
        rule: gives whole experts out; None: the plan's column cuts, with `choose.decide`.
        policy: of the cache of experts.
        overlap: whether processors and link work at once.
        enter: whether experts that were copied over for a token stay.
        ahead: ``early`` copies for the next layer what its router picks when it is run early,
            ``values`` what the policy values most, ``none`` nothing. One copy a layer, and only
            where the link has nothing else to do.

    >>> Strategy("ours").overlap
    True
    """

    name: str
    rule: Rule | None = assign
    policy: Policy = static()
    overlap: bool = True
    enter: bool = False
    ahead: Literal["none", "early", "values"] = "none"


@dataclass
class Schedule:
    """Collect tasks and the clocks that they imply, each stream being served in order.

    Attributes:
        overlap: whether a task may begin before the one listed before it has ended.
        tasks: so far.
        free_s: of each stream, when it is free.
        end_s: of each task, when it ends.

    >>> schedule = Schedule()
    >>> _ = schedule.add("a", "cpu", 2.0), schedule.add("b", "link", 1.0, ("a",))
    >>> schedule.end_s["b"]
    3.0
    """

    overlap: bool = True
    tasks: list[Task] = field(default_factory=list)
    free_s: dict[str, float] = field(default_factory=dict)
    end_s: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, stream: str, seconds: float, after: Sequence[str] = ()) -> str:
        """Put a task at the end of a stream; its name comes back."""
        names = tuple(after)
        if not self.overlap and self.tasks:
            names = (*names, self.tasks[-1].name)
        self.tasks.append(Task(name, stream, seconds, names))
        begin_s = max(self.ready_s(names), self.free_s.get(stream, 0.0))
        self.end_s[name] = self.free_s[stream] = begin_s + seconds
        return name

    def ready_s(self, names: Sequence[str]) -> float:
        """Give when the last of some tasks ends; 0 for none."""
        return max((self.end_s[name] for name in names), default=0.0)


class Work(NamedTuple):
    """Say what one active expert does.

    Attributes:
        part: its place in the plan.
        tokens: that visit it.
        cpu: share of its columns that the CPU computes.
        moved: share that is copied over.
        here: share that is resident.
        after: name of a copy made ahead that it must wait for, or "".

    >>> Work(0, 1, 0.0, 0.0, 1.0).after
    ''
    """

    part: int
    tokens: int
    cpu: float
    moved: float
    here: float
    after: str = ""


@dataclass
class Pass:
    """Hold what a pass came to, beside its schedule.

    Attributes:
        fixed_s: seconds of each layer before its experts, and last of what follows the layers.
        modules: of each of these, the active experts as wholes with their resident share.
        hits: uses of experts that were resident and ready.
        uses: of experts.
        copied_bytes: over the link.

    >>> Pass().hits
    0
    """

    fixed_s: list[float] = field(default_factory=list)
    modules: list[list[tuple[Whole, float]]] = field(default_factory=list)
    hits: int = 0
    uses: int = 0
    copied_bytes: int = 0


@dataclass
class Walk:
    """Hold what every pass of a run shares.

    Args:
        plan: where everything is.
        machine: with an accelerator.
        trace: routing.
        strategy: how the run decides.
        filled: share of the cache of keys and values that is read.

    >>> Walk.__dataclass_fields__["filled"].type
    float | int
    """

    plan: Plan
    machine: Machine
    trace: Trace
    strategy: Strategy
    filled: float | int = 0.5

    def __post_init__(self):
        """Sort the plan's parts by layer."""
        parts = self.plan.parts
        self.experts: list[dict[int, int]] = [{} for _ in self.plan.cache_on]
        self.own: list[list[int]] = [[] for _ in self.plan.cache_on]
        for i, part in enumerate(parts):
            if part.kind == "expert":
                self.experts[part.layer][part.expert] = i
            elif part.layer >= 0:
                self.own[part.layer].append(i)
        outside = [i for i, part in enumerate(parts) if part.layer < 0]
        self.before = [i for i in outside if parts[i].kind == "embed"]
        self.after = [i for i in outside if parts[i].kind != "embed"]

    def run(self, rows: range, state: CacheState) -> tuple[Schedule, CacheState, Pass]:
        """Make the tasks of a pass of some of the trace's tokens.

        Args:
            rows: which tokens.
            state: of the cache before the pass.

        Returns:
            The tasks, the cache after the pass, and what was counted.
        """
        schedule, found, begin = Schedule(self.strategy.overlap), Pass(), state
        coming: dict[tuple[int, int], str] = {}  # (mixture layer, expert) to its copy under way
        last: tuple[str, ...] = ()
        row = 0
        for layer, experts in enumerate(self.experts):
            fixed_s = 0.0
            for i in (*(self.before if layer == 0 else ()), *self.own[layer]):
                seconds, last = self._part(schedule, i, len(rows), last)
                fixed_s += seconds
            found.fixed_s.append(fixed_s)
            found.modules.append([])
            if experts:
                layer_pass = _Mixture(self, schedule, found, coming, layer, row, rows, last)
                state, last = layer_pass.run(state, begin)
                row += 1
        fixed_s = 0.0
        for i in self.after:
            seconds, last = self._part(schedule, i, 1, last)
            fixed_s += seconds
        found.fixed_s.append(fixed_s)
        found.modules.append([])
        return schedule, state, found

    def _part(self, schedule: Schedule, i: int, tokens: int, last) -> tuple[float, tuple[str, ...]]:
        part = self.plan.parts[i]
        name = f"{part.kind} {part.layer}"
        if part.kind == "mlp":
            terms = decide(self.plan, self.machine, [(i, tokens)])[2]
            pairs = [(s, t) for s, t in zip(STREAMS, terms, strict=True) if t]
            names = tuple(schedule.add(f"{name} {s}", s, t, last) for s, t in pairs)
            return max(terms), names or last
        reads = self.filled * self.plan.cache_bytes if part.kind == "attention" else 0.0
        terms = part_terms(self.plan, self.machine, i, tokens, reads)
        for stream in ("link", "cpu", "accelerator"):
            seconds = getattr(terms, f"{stream}_s")
            if seconds:
                last = (schedule.add(f"{name} {stream}", stream, seconds, last),)
        return sum(terms), last


@dataclass
class _Mixture:
    """One mixture layer of a pass."""

    walk: Walk
    schedule: Schedule
    found: Pass
    coming: dict[tuple[int, int], str]
    layer: int
    row: int  # among the mixture layers
    rows: range
    last: tuple[str, ...]

    def run(self, state: CacheState, begin: CacheState) -> tuple[CacheState, tuple[str, ...]]:
        """Make its tasks; the cache and the names that the next layer waits for."""
        plan, trace, strategy = self.walk.plan, self.walk.trace, self.walk.strategy
        places = self.walk.experts[self.layer]
        chosen, counts = np.unique(trace.experts[list(self.rows), self.row], return_counts=True)
        active = list(zip(chosen.tolist(), counts.tolist(), strict=True))
        decided = self._planned(active) if strategy.rule is None else self._ruled(active, state)
        names = self._tasks([work for _, work in decided])
        self.found.uses += len(active)
        for e, work in decided:
            share = float(begin.resident[self.row, e]) if strategy.rule else work.here
            part = plan.parts[places[e]]
            self.found.modules[-1].append((whole(part, self.walk.machine, work.tokens), share))
            self.found.hits += work.here == 1
            self.found.copied_bytes += round(work.moved * part.n_bytes)
        for t in self.rows:
            event = Event(
                self.row, trace.experts[t, self.row].tolist(),
                trace.probabilities(t, self.row), int(trace.sequence[t]),
            )  # fmt: skip
            state = observe(strategy.policy, state, event)
        if strategy.enter:
            moved = [e for e, work in decided if work.moved]
            pinned = chosen.tolist()
            state = admit(strategy.policy, state, self.row, moved, pinned=pinned, force=True)
        if strategy.ahead != "none" and self.row + 1 < trace.experts.shape[1]:
            state = self._ahead(state, self.schedule.ready_s(names))
        return state, names

    def _planned(self, active: list[tuple[int, int]]) -> list[tuple[int, Work]]:
        """Cut as planned, or as `decide` says for many tokens."""
        plan, places = self.walk.plan, self.walk.experts[self.layer]
        pairs = [(places[e], n) for e, n in active]
        modes = decide(plan, self.walk.machine, pairs)[0]
        found = []
        for (e, n), (i, _), mode in zip(active, pairs, modes, strict=True):
            columns = plan.parts[i].columns
            c, p, g = (x / columns for x in (plan.on_cpu(i), plan.stream[i], plan.resident[i]))
            c, p = {"cpu": (c + p, 0.0), "moved": (0.0, c + p)}.get(mode, (c, p))
            found.append((e, Work(i, n, c, p, g)))
        return found

    def _ruled(self, active: list[tuple[int, int]], state: CacheState) -> list[tuple[int, Work]]:
        """Give whole experts out by the strategy's rule, in its order."""
        places, rule = self.walk.experts[self.layer], self.walk.strategy.rule
        assert rule is not None
        costs = expert_costs(self.walk.plan.parts[places[active[0][0]]], self.walk.machine)
        now_s = self.schedule.ready_s(self.last)
        resident, copies = [], []
        for e, n in active:
            copy = self.coming.get((self.row, e), "")
            late_s = max(0.0, self.schedule.end_s[copy] - now_s) if copy else 0.0
            # A copy that is under way is waited for unless the CPU would be done before.
            waited = not late_s or late_s + costs.accelerator_s(n) <= costs.cpu_s(n)
            resident.append(bool(state.resident[self.row, e] and waited))
            copies.append(copy if late_s and waited else "")
        busy_s = max(0.0, self.schedule.free_s.get("link", 0.0) - now_s)
        counts = [n for _, n in active]
        given = rule(counts, resident, costs._replace(move_s=costs.move_s + busy_s))
        found = []
        for j in given.order:
            e, n = active[j]
            on_cpu, moved = given.device[j] == "cpu", given.moved[j]
            here = not on_cpu and not moved
            shares = (float(on_cpu), float(moved), float(here))
            found.append((e, Work(places[e], n, *shares, after=copies[j] if here else "")))
        return found

    def _tasks(self, work: list[Work]) -> tuple[str, ...]:
        plan, machine, schedule = self.walk.plan, self.walk.machine, self.schedule
        assert machine.accelerator is not None
        home = plan.cache_on[self.layer]
        crossing = {"cpu": 2 * machine.link_latency_s, "accelerator": 2 * machine.link_latency_s}
        crossing[home] = 0.0
        names = []

        def run(w: Work, share: float, kind: str, stream: str, after: Sequence[str]) -> None:
            part = plan.parts[w.part]
            unit = machine.cpu if stream == "cpu" else machine.accelerator
            assert unit is not None
            seconds = run_s(part, unit.rates(part.kind), share, w.tokens) + crossing[stream]
            crossing[stream] = 0.0
            name = f"{kind} {self.layer} {part.expert}"
            names.append(schedule.add(name, stream, seconds, after))

        for w in work:
            if w.here:
                after = (*self.last, w.after) if w.after else self.last
                run(w, w.here, "resident", "accelerator", after)
        for w in work:
            if w.moved:
                part = plan.parts[w.part]
                name = f"copy {self.layer} {part.expert}"
                copy = schedule.add(name, "link", link_s(part, machine, w.moved), self.last)
                run(w, w.moved, "moved", "accelerator", (copy,))
        for w in work:
            if w.cpu:
                run(w, w.cpu, "cpu", "cpu", self.last)
        reads = sum(dram_s(plan.parts[w.part], machine, w.cpu + w.moved) for w in work)
        if reads and schedule.overlap:
            names.append(schedule.add(f"read {self.layer}", "memory", reads, self.last))
        return tuple(names) or self.last

    def _ahead(self, state: CacheState, end_s: float) -> CacheState:
        """Copy one expert of the next mixture layer if the link is free before this layer ends."""
        walk, row = self.walk, self.row + 1
        if self.schedule.free_s.get("link", 0.0) >= end_s:
            return state
        policy, trace = walk.strategy.policy, walk.trace
        if walk.strategy.ahead == "early":
            if trace.early is None:
                return state
            predicted = trace.early[list(self.rows), row].astype(np.float64).mean(0)
        else:
            predicted = policy.values(state.memory, row)
        k = trace.experts.shape[2]
        for e in prefetch(predicted, state.resident[row], k):
            best = np.argsort(-predicted, kind="stable")[:k].tolist()
            after = admit(policy, state, row, [e], pinned=best, force=True)
            if not after.resident[row, e]:
                continue
            next_layer = [i for i, x in enumerate(walk.experts) if x][row]
            part = walk.plan.parts[walk.experts[next_layer][e]]
            name = f"ahead {next_layer} {e}"
            seconds = link_s(part, walk.machine)
            self.coming[row, e] = self.schedule.add(name, "link", seconds, self.last)
            self.found.copied_bytes += part.n_bytes
            reads = dram_s(part, walk.machine)
            if reads:
                self.schedule.add(f"{name} read", "memory", reads, self.last)
            state = after
        return state
