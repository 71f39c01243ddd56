"""Strategies: what is averaged, when, and by which rule; all under one step interface."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import optax

from jaxsys.core.errors import UserError
from jaxsys.localsgd.plan import SyncPlan, plan_sync, wait_s

Rule = Literal["pre", "post"]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How replicas are kept together.

    Attributes:
      sends: ``gradients`` are averaged before the optimiser step (S-SGD), ``parameters`` around it.
      schedule: how layers are spread over the period: ``every`` step; ``full``, all at its end;
        ``equal``, ``dreamddp``, ``dfs`` or ``best``, see `jaxsys.localsgd.plan.plan_sync`;
        ``fragments``, equal groups spaced over the period (Streaming DiLoCo).
      launch: ``gated`` sends a layer once its gradient is known (the paper's order), ``eager`` as
        soon as the step begins (possible because nothing is updated in place; costs one buffer a
        layer in flight), ``after`` in one message when the step is done.
      rule: ``pre``, w' = mean_j(w_j) - U_k(g_k) (released code), or ``post``,
        w' = mean_j(w_j - U_j(g_j)) (textbook). Only ``pre`` can overlap with the backward pass.
      period: H, the number of steps in which every layer is averaged once.
      fill: also send layers wherever the plan says that it adds no time (bubble filling).
      fill_margin: share by which messages are taken to be longer while filling; 0 in the paper, a
        quarter in the presets, because bubbles filled to the brim turn jitter into waiting.
      fragments: number of groups, for the schedule ``fragments``.
      codec: form of what is sent: ``f32``, ``f16``, ``int8`` or ``int4`` (stochastic rounding).
      error_feedback: add what the codec lost to the next message of the same layer.
      outer: ``none`` or ``nesterov``: an optimiser over the averaged change (DiLoCo).
      outer_lr: its learning rate; 0.7 in DiLoCo (2311.08105).
      outer_momentum: its momentum; 0.9 there.
      delay: steps between sending a layer and using the result (Streaming DiLoCo, 2501.18512).
      mixing: share of the own value that is kept when the agreed one arrives.
      moment_periods: pairs (glob over optimiser-state paths, period): these moments are averaged
        too, each with its own period (DES-LOC, 2505.22549); by default they stay local.

    >>> Strategy(schedule="dreamddp", period=5).rule
    'pre'
    """

    sends: Literal["gradients", "parameters"] = "parameters"
    schedule: Literal["every", "full", "equal", "dreamddp", "dfs", "best", "fragments"] = "dreamddp"
    launch: Literal["gated", "eager", "after"] = "gated"
    rule: Rule = "pre"
    period: int = 5
    fill: bool = False
    fill_margin: float = 0.0
    fragments: int = 4
    codec: Literal["f32", "f16", "int8", "int4"] = "f32"
    error_feedback: bool = False
    outer: Literal["none", "nesterov"] = "none"
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    delay: int = 0
    mixing: float = 0.0
    moment_periods: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.period < 1:
            raise UserError(f"period is {self.period}; expected at least 1; raise the period")
        if self.rule == "post" and self.launch != "after":
            raise UserError(
                f"rule 'post' was asked to launch {self.launch!r}; it averages what the optimiser "
                "has updated, so nothing can be sent earlier; use launch 'after' or rule 'pre'"
            )
        if self.sends == "gradients" and (self.schedule != "every" or self.launch == "eager"):
            raise UserError(
                f"gradients with schedule {self.schedule!r} and launch {self.launch!r}; expected "
                "schedule 'every' and launch 'gated' or 'after'; send parameters instead"
            )
        if not 0 <= self.delay < self.period:
            raise UserError(
                f"delay is {self.delay} with period {self.period}; expected 0 <= delay < period; "
                "shorten the delay"
            )
        if not 0.0 <= self.mixing < 1.0:
            raise UserError(f"mixing is {self.mixing}; expected 0 <= mixing < 1; lower it")

    @property
    def anchored(self) -> bool:
        """Whether each layer keeps its last agreed value, against which changes are sent."""
        return self.sends == "parameters" and (self.codec != "f32" or self.outer != "none")

    @property
    def waits_always(self) -> bool:
        """Whether every step sends, and waits for what it sent until the slowest worker has.

        What is sent eagerly has a whole step to arrive, and full local SGD waits once a period.
        """
        always = self.period == 1 or self.schedule in ("every", "equal", "dreamddp", "dfs", "best")
        return always and self.launch != "eager" and self.delay == 0

    def outer_optimizer(self) -> optax.GradientTransformation | None:
        """Build the outer optimiser, or None."""
        if self.outer == "none":
            return None
        return optax.sgd(self.outer_lr, momentum=self.outer_momentum, nesterov=True)


def presets(period: int = 5) -> dict[str, Strategy]:
    """List the named strategies for a period.

    >>> sorted(presets())[:3]
    ['best', 'diloco', 'dreamddp']
    """
    every = Strategy(sends="gradients", schedule="every", period=1)
    partial = Strategy(period=period)
    change = dataclasses.replace
    delay = min(period - 1, 2)
    return {
        "ssgd": change(every, launch="after"),
        "wfbp": every,
        "local": change(partial, schedule="full", rule="post", launch="after"),
        "equal": change(partial, schedule="equal"),
        "dreamddp": change(partial, fill=True, fill_margin=0.25),
        "dreamddp-nofill": partial,
        "dreamddp-eager": change(partial, launch="eager"),
        "best": change(partial, schedule="best"),
        "diloco": change(partial, schedule="full", rule="post", launch="after", outer="nesterov"),
        "streaming": change(
            partial,
            schedule="fragments",
            launch="eager",
            fragments=min(period, 4),
            outer="nesterov",
            delay=delay,
            mixing=0.5,
        ),
    }


def choose(names: Sequence[str], period: int) -> dict[str, Strategy]:
    """Look up strategies by name.

    Raises:
      UserError: a name is not known.

    >>> list(choose(["ssgd", "local"], 5))
    ['ssgd', 'local']
    """
    known = presets(period)
    for name in names:
        if name not in known:
            raise UserError(
                f"strategy {name!r} is not known; expected one of {', '.join(sorted(known))}; "
                "correct the name"
            )
    return {name: known[name] for name in names}


def _fixed_phases(strategy: Strategy, n_layers: int) -> tuple[tuple[int, ...], ...]:
    if strategy.schedule == "fragments":
        return fragment_phases(n_layers, strategy.fragments, strategy.period)
    return ((),) * (strategy.period - 1) + (tuple(range(n_layers)),)


def make_plan(
    strategy: Strategy,
    backward_s: Sequence[float],
    comm_s: Sequence[float],
    *,
    forward_s: float = 0.0,
    tail_s: float = 0.0,
    merged_s: float | None = None,
    phases: tuple[tuple[int, ...], ...] | None = None,
) -> SyncPlan:
    """Spread the layers over the period as the strategy says, and predict the step time.

    Args:
      strategy: what to plan for.
      backward_s: seconds of each layer's backward pass, [L], nearest the loss first.
      comm_s: seconds that each layer's message takes alone, [L].
      forward_s: seconds of the whole forward pass.
      tail_s: seconds of the optimiser step, behind which communication may still hide.
      merged_s: seconds of one message holding all layers, used where the strategy sends one.
      phases: which layers each step of the period sends, where that is settled and only the times
        are to be predicted.

    Returns:
      A `SyncPlan` with its own prediction.

    >>> plan = make_plan(presets(2)["equal"], [1.0, 1.0], [1.0, 1.0])
    >>> plan.phases
    ((0,), (1,))
    """
    n = len(backward_s)
    planned = strategy.schedule in ("equal", "dreamddp", "dfs", "best")
    if planned and phases is None:
        return plan_sync(
            backward_s,
            comm_s,
            strategy.period,
            forward_s=forward_s,
            tail_s=tail_s,
            method=strategy.schedule,
            launch=strategy.launch,
            fill=strategy.fill,
            fill_margin=strategy.fill_margin,
        )
    if phases is None:
        phases = _fixed_phases(strategy, n)
    if strategy.launch == "after" and merged_s is not None and not planned:
        comm_s = [merged_s, *[0.0] * (n - 1)]
    compute_s = forward_s + sum(backward_s) + tail_s
    times = {"launch": strategy.launch, "forward_s": forward_s, "tail_s": tail_s}
    if strategy.delay:
        waits = _delayed_waits(phases, comm_s, compute_s, strategy.delay)
    else:
        waits = tuple(wait_s(layers, backward_s, comm_s, **times) for layers in phases)
    return SyncPlan(
        method=strategy.schedule,
        launch=strategy.launch,
        fill=False,
        n_layers=n,
        phases=phases,
        wait_s=waits,
        comm_s=tuple(float(sum(comm_s[i] for i in layers)) for layers in phases),
        compute_s=float(compute_s),
    )


def _delayed_waits(
    phases: Sequence[tuple[int, ...]], comm_s: Sequence[float], compute_s: float, delay: int
) -> tuple[float, ...]:
    """Follow a serial channel through three periods of steps that await what left ``delay`` ago."""
    period = len(phases)
    clock = channel = 0.0
    arrival, waits = [], []
    for step in range(3 * period):
        channel = max(channel, clock) + sum(comm_s[i] for i in phases[step % period])
        arrival.append(channel)
        clock += compute_s
        wait = max(0.0, arrival[step - delay] - clock) if step >= delay else 0.0
        if not phases[(step - delay) % period]:
            wait = 0.0
        waits.append(wait)
        clock += wait
    return tuple(waits[-period:])


def fragment_phases(n_layers: int, fragments: int, period: int) -> tuple[tuple[int, ...], ...]:
    """Deal layers into fragments in strides and space the fragments over the period.

    Streaming DiLoCo (2501.18512) found strided fragments slightly better than contiguous ones.

    >>> fragment_phases(5, 2, 4)
    ((0, 2, 4), (), (1, 3), ())
    """
    if not 1 <= fragments <= period:
        raise UserError(
            f"{fragments} fragments in a period of {period} steps; expected 1 to {period}; change "
            "either"
        )
    phases: list[tuple[int, ...]] = [()] * period
    for f in range(fragments):
        phases[f * period // fragments] = tuple(range(f, n_layers, fragments))
    return tuple(phases)
