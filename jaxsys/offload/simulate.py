"""Run plans over recorded routing in virtual time, and compare strategies with a lower bound.

Times here are modelled. The streams are the CPU, the link, the accelerator and the CPU's memory,
each in order; what a layer reads from memory takes its time on the memory's stream, so the CPU and
the link slow each other down where the memory cannot feed both.
"""

from typing import NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.timeline import Timeline, simulate
from jaxsys.offload.assign import assign
from jaxsys.offload.bound import layer_bound_s, pass_bound_s
from jaxsys.offload.cache import init_cache, lru, score
from jaxsys.offload.passes import STREAMS, Pass, Strategy, Walk
from jaxsys.offload.rules import all_moved, fiddler, list_schedule, on_cpu
from jaxsys.offload.traces import Trace
from jaxsys.offload.types import Machine, Plan, Terms

# What is compared: baselines as far as their rule is public, then ours.
STRATEGIES = (
    Strategy("misses on the CPU", on_cpu),  # llama.cpp with experts kept on the CPU
    Strategy("misses copied", all_moved),  # weight streaming
    Strategy("misses copied, LRU", all_moved, lru(), enter=True),  # mixtral-offloading
    Strategy("Fiddler", fiddler, overlap=False),
    Strategy("HybriMoE", list_schedule, score(), enter=True, ahead="values"),
    Strategy("ours, whole experts", assign),
    Strategy("ours, early router", assign, score(), enter=True, ahead="early"),
)


class Run(NamedTuple):
    """Hold what a simulated run took.

    Attributes:
        name: of the strategy.
        pass_s: seconds of each pass, [S].
        bound_s: lower bound of each pass with the residency that it began with, [S].
        tokens: in all.
        hits: uses of experts that were resident and ready.
        uses: of experts (each once for a pass and layer, however many its tokens).
        copied_bytes: over the link.
        terms: seconds that each stream was busy.
        first: timeline of the first pass.

    >>> Run("ours", np.array([0.5]), np.array([0.4]), 1, 1, 2, 0, Terms(), None).tokens_per_s
    2.0
    """

    name: str
    pass_s: np.ndarray
    bound_s: np.ndarray
    tokens: int
    hits: int
    uses: int
    copied_bytes: int
    terms: Terms
    first: Timeline | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.tokens / float(self.pass_s.sum())

    @property
    def hit_rate(self) -> float:
        """Share of uses that found their expert ready on the accelerator; nan without any."""
        return self.hits / self.uses if self.uses else float("nan")


def simulate_run(
    plan: Plan,
    machine: Machine,
    trace: Trace,
    strategy: Strategy | None = None,
    *,
    chunk: int = 1,
    filled: float | int = 0.5,
    bound: bool = True,
) -> Run:
    """Run a plan over recorded routing.

    Args:
        plan: of a model with mixture layers; whole resident experts fill the cache at first.
        machine: with an accelerator.
        trace: routing of as many mixture layers and experts.
        strategy: how the run decides; the plan's own cuts and decisions without it.
        chunk: tokens of one pass; 1 decodes, more read prompts. A pass may hold the end of one
            sequence and the beginning of the next.
        filled: share of the cache of keys and values that is read.
        bound: also compute lower bounds, see `bound.pass_bound_s`.

    Returns:
        What the run took, modelled.

    Raises:
        UserError: no accelerator, no tokens, or a trace of another shape than the plan's mixture
            layers.

    >>> from jaxsys.offload.traces import synthetic_trace
    >>> from jaxsys.offload.types import Part, Processor
    >>> machine = Machine(Processor(1.0, 99.0, 9.0), Processor(9.0, 99.0, 9.0), 0.5)
    >>> parts = tuple(Part(0, "expert", 4, 1.0, 4, e, 0.25) for e in range(4))
    >>> plan = Plan(parts, (4, 4, 0, 0), (0,) * 4, ("accelerator",), buffer_bytes=8)
    >>> run = simulate_run(plan, machine, synthetic_trace(8, 1, 4, 1))
    >>> bool((run.pass_s >= run.bound_s - 1e-9).all())
    True
    """
    walk = Walk(plan, machine, trace, strategy or Strategy("the plan", None), filled)
    _check(walk)
    state = init_cache(walk.strategy.policy, _resident(walk))
    pass_s, bounds, busy = [], [], np.zeros(len(STREAMS))
    hits = uses = copied = 0
    first = None
    for begin in range(0, len(trace), chunk):
        rows = range(begin, min(begin + chunk, len(trace)))
        schedule, state, found = walk.run(rows, state)
        timeline = simulate(schedule.tasks)
        first = first or timeline
        pass_s.append(timeline.makespan_s)
        busy += [timeline.busy_s(stream) for stream in STREAMS]
        hits, uses = hits + found.hits, uses + found.uses
        copied += found.copied_bytes
        if bound:
            bounds.append(_bound_s(found, walk.strategy.ahead != "none"))
    return Run(
        walk.strategy.name, np.array(pass_s), np.array(bounds), len(trace), hits, uses, copied,
        Terms(*busy.tolist()), first,
    )  # fmt: skip


def _bound_s(found: Pass, lookahead: bool) -> float:
    if lookahead:
        return pass_bound_s(found.fixed_s, found.modules, lookahead=True)
    # Without it the layers are independent, and alike ones are solved once.
    return sum(found.fixed_s) + sum(layer_bound_s(layer) for layer in found.modules if layer)


def _check(walk: Walk) -> None:
    if walk.machine.accelerator is None or not len(walk.trace):
        raise UserError(
            f"the machine {walk.machine.name!r} has "
            f"{'no' if walk.machine.accelerator is None else 'an'} accelerator and the trace "
            f"{len(walk.trace)} tokens; expected both; use `predict` for a CPU alone"
        )
    sizes = {len(experts) for experts in walk.experts if experts}
    n_layers = sum(bool(experts) for experts in walk.experts)
    if n_layers != walk.trace.experts.shape[1] or sizes != {walk.trace.n_experts}:
        raise UserError(
            f"the trace has {walk.trace.experts.shape[1]} layers of {walk.trace.n_experts} experts "
            f"and the plan {n_layers} of {sorted(sizes)}; expected the same; record or draw a "
            "trace of this model"
        )


def _resident(walk: Walk) -> np.ndarray:
    rows = [experts for experts in walk.experts if experts]
    found = np.zeros((len(rows), walk.trace.n_experts), bool)
    for row, experts in enumerate(rows):
        for e, i in experts.items():
            found[row, e] = walk.plan.resident[i] == walk.plan.parts[i].columns
    return found
