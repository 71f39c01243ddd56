"""What the parts of a mixture-of-experts layer hand one another.

A layer runs: ``before_moe_start`` → gate → slots (drop policy) → order → [``before_dispatch`` →
dispatch → ``after_dispatch`` → experts → ``before_combine`` → combine → ``after_combine``, in r
chunks of the capacity axis] → inverse order → ``before_moe_end``.

Axis letters: ``B`` sequences, ``T`` tokens of one, ``N`` = B·T rows, ``D`` model width, ``F`` width
of an expert, ``E`` experts, ``k`` experts of a token, ``C`` capacity: slots of an expert.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from jaxsys.core.errors import UserError

POLICIES = ("position", "probability", "priority", "dropless")


@dataclass(frozen=True)
class Dims:
    """Say how large a layer is.

    Args:
        width: D.
        hidden: F of one expert.
        experts: E.

    Raises:
        UserError: for a size below 1.

    >>> Dims(width=64, hidden=172, experts=8).experts
    8
    """

    width: int
    hidden: int
    experts: int

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} is {value}; expected a whole number from 1 up; change it")


@dataclass(frozen=True)
class Axes:
    """Name the mesh axes that a layer is sharded over; None where it is not.

    Tokens are sharded over all of them: data and expert ranks hold different sequences, and the
    ranks of a tensor axis, which split each expert's hidden width (ESP), different parts of them.

    >>> Axes(expert="node", tensor="local").tokens
    ('node', 'local')
    """

    data: str | None = None
    expert: str | tuple[str, ...] | None = None
    tensor: str | None = None

    @property
    def tokens(self) -> tuple[str, ...]:
        """Return the axes over which sums of tokens go, outermost first."""
        expert = (self.expert,) if isinstance(self.expert, str | None) else self.expert
        return tuple(name for name in (self.data, *expert, self.tensor) if name)


@dataclass(frozen=True)
class Capacity:
    """Say how many slots an expert has and who gets them.

    C = ⌈factor · k · N / E⌉, rounded up to a multiple of every pipeline degree.

    Args:
        factor: f; ignored by ``dropless``, whose capacity is the most that can happen, N.
        policy: who is dropped when an expert is full: ``position`` (later tokens; all first
            choices stand before all second ones), ``probability`` (the least weight),
            ``priority`` (whole tokens, the least sure ones last: batch-prioritised routing) or
            ``dropless`` (nobody).

    Raises:
        UserError: for a factor that leaves no slot, or an unknown policy.

    >>> Capacity(1.25).policy
    'position'
    """

    factor: float | int = 1.25
    policy: str = "position"

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise UserError(
                f"the drop policy is {self.policy!r}; expected one of {', '.join(POLICIES)}; "
                "choose one"
            )
        if not self.factor > 0:
            raise UserError(
                f"the capacity factor is {self.factor}, which leaves no slot; expected a number "
                "above 0, or the policy dropless; change it"
            )


class TokenChoice(NamedTuple):
    """Experts that each token chose: what most gates give.

    Attributes:
        weights: of the chosen experts' outputs, differentiable.
        experts: which, best first.
        scores: what the balance losses take as p; each row sums to one.
        logits: what the scores were made of, without noise.
        ranked: the logits with the noise that the choice was made by, or None.
        noise: standard deviation of that noise, or None.

    >>> TokenChoice._fields
    ('weights', 'experts', 'scores', 'logits', 'ranked', 'noise')
    """

    weights: Float[Array, "N k"]
    experts: Int[Array, "N k"]
    scores: Float[Array, "N E"]
    logits: Float[Array, "N E"]
    ranked: Float[Array, "N E"] | None = None
    noise: Float[Array, "N E"] | None = None


class ExpertChoice(NamedTuple):
    """Tokens that each expert chose; nobody is dropped for want of room.

    Attributes:
        weights: of its output for the token, differentiable.
        tokens: which, best first.
        scores: see `TokenChoice`.
        logits: see `TokenChoice`.

    >>> ExpertChoice._fields
    ('weights', 'tokens', 'scores', 'logits')
    """

    weights: Float[Array, "E C"]
    tokens: Int[Array, "E C"]
    scores: Float[Array, "N E"]
    logits: Float[Array, "N E"]


class Mixing(NamedTuple):
    """Every slot a mean of a sequence's tokens, every token a mean of the slots (SoftMoE).

    Attributes:
        dispatch: over T each [B, :, E, C] sums to one.
        combine: over E and C each [B, T] sums to one.
        logits: what both were made of.

    >>> Mixing._fields
    ('dispatch', 'combine', 'logits')
    """

    dispatch: Float[Array, "B T E C"]
    combine: Float[Array, "B T E C"]
    logits: Float[Array, "B T E C"]


Routed = TokenChoice | ExpertChoice | Mixing


class Slots(NamedTuple):
    """Who sits in which slot, after the drop policy.

    Attributes:
        tokens: row in each slot; N where the slot is empty.
        places: slot e·C + c of each token's choices, E·C where it was dropped; None where experts
            chose.
        weights: [N, k] beside ``places``, [E, C] without.

    >>> Slots._fields
    ('tokens', 'places', 'weights')
    """

    tokens: Int[Array, "E C"]
    places: Int[Array, "N k"] | None
    weights: Float[Array, "..."]


class Gate(NamedTuple):
    """Routing as two pure functions.

    Attributes:
        init: ``(key, dims) -> params``.
        route: ``(params, x [B, T, D], key or None, token axes) -> Routed``; without a key there is
            no noise. The axes serve gates that normalise over all tokens (sinkhorn).
        k: experts of a token; expert choice: tokens of an expert as a multiple of N / E.

    >>> Gate._fields
    ('init', 'route', 'k')
    """

    init: Callable[..., Any]
    route: Callable[..., Routed]
    k: int | float


class Order(NamedTuple):
    """The permutation from rows to experts' slots, and back with weights.

    Attributes:
        forward: ``(x [N, D], Slots) -> buffer [E, C, D]``, zeros in empty slots.
        inverse: ``(buffer [E, C, D], Slots, N) -> y [N, D]``.

    >>> Order._fields
    ('forward', 'inverse')
    """

    forward: Callable[..., Array]
    inverse: Callable[..., Array]


class Experts(NamedTuple):
    """E feed-forward blocks side by side.

    Attributes:
        init: ``(key, dims) -> params``, leaves with E in front.
        apply: ``(params, buffer [E, C, D]) -> [E, C, D]``; a sharded layer passes its own experts
            only, each with its part of the hidden width, and sums the parts.
        ragged: ``(params, rows [M, D] sorted by expert, sizes [E]) -> [M, D]``, or None where the
            back end needs equal sizes.
        hidden_axis: per leaf of params the axis that holds F (negative), None where it has none: a
            bias of the output, of which each part of an expert adds its share.
        matmuls: matrices of one expert, 2 or 3.

    >>> Experts._fields
    ('init', 'apply', 'ragged', 'hidden_axis', 'matmuls')
    """

    init: Callable[..., Any]
    apply: Callable[..., Array]
    ragged: Callable[..., Array] | None
    hidden_axis: Mapping[str, int | None]
    matmuls: int


def unchanged(batch: Any) -> Any:
    """Return what is given: the hook that does nothing.

    >>> unchanged(3)
    3
    """
    return batch


class Hooks(NamedTuple):
    """Six functions between the parts of a layer, batch to batch.

    The outer two see x [B, T, D] and y [B, T, D]. What ``before_dispatch`` makes of a chunk
    [E, c, D] may be a tree, every leaf [E, c, ...], which is moved leaf by leaf and which
    ``after_dispatch`` makes an array again; so with ``before_combine`` and ``after_combine``.

    Attributes:
        straight_through: the gradient passes the inner four as if they returned what they got,
            which compression (rounding has no gradient) needs.

    >>> Hooks().before_dispatch(1.0)
    1.0
    """

    before_moe_start: Callable[[Any], Any] = unchanged
    before_dispatch: Callable[[Any], Any] = unchanged
    after_dispatch: Callable[[Any], Any] = unchanged
    before_combine: Callable[[Any], Any] = unchanged
    after_combine: Callable[[Any], Any] = unchanged
    before_moe_end: Callable[[Any], Any] = unchanged
    straight_through: bool = False


NO_HOOKS = Hooks()


def stay(tree: Any, axes: Axes) -> Any:
    """Move nothing: dispatch and combine of a layer whose experts are all here.

    >>> stay(1.0, Axes())
    1.0
    """
    del axes
    return tree


@dataclass(frozen=True)
class Losses:
    """Weigh the auxiliary terms of a layer; a term of weight 0 is not computed.

    Args:
        balance: Switch's and GShard's E/(N²·k)·Σ_e (Σ_t p_te)·count_e; 1 when balanced.
        importance_load: squared variations of importance and load, halved.
        z: mean squared log-sum-exp of the logits.

    >>> Losses(z=1e-3).balance
    0.01
    """

    balance: float | int = 1e-2
    importance_load: float | int = 0.0
    z: float | int = 0.0


@dataclass(frozen=True)
class MoESpec:
    """Choose the parts of a layer.

    Args:
        gate: see `Gate`.
        order: see `Order`.
        experts: see `Experts`.
        dispatch: ``(tree of [E, c, ...], Axes) -> tree of [E/ranks, ranks·c, ...]``.
        combine: its inverse.
        hooks: see `Hooks`.
        capacity: see `Capacity`.
        losses: see `Losses`.
        shared: experts that every token visits with weight 1: their total hidden width is
            ``shared_hidden``; None for none.
        shared_hidden: width in all of the shared experts.

    >>> MoESpec.__dataclass_fields__["dispatch"].default is stay
    True
    """

    gate: Gate
    order: Order
    experts: Experts
    dispatch: Callable[[Any, Axes], Any] = stay
    combine: Callable[[Any, Axes], Any] = stay
    hooks: Hooks = NO_HOOKS
    capacity: Capacity = Capacity()
    losses: Losses = Losses()
    shared: Experts | None = None
    shared_hidden: int = 0


@dataclass(frozen=True)
class LayerPlan:
    """Say how one layer is pipelined.

    Args:
        forward: r_f, chunks of the capacity axis in the forward pass.
        backward: r_b.
        gradient_bytes: dense gradient reduced between its backward dispatches and combines.
        predicted_s: time of the layer that the planner expects.
        forward_lead: all-gathers issued before the first reduce-scatter, then they take turns; 0
            for all (the paper's order).
        backward_lead: the same in the backward pass.
        dense_bytes: dense gradient reduced while the dense part before the layer runs backward.

    Raises:
        UserError: for a degree below 1, or negative bytes.

    >>> LayerPlan(forward=4, backward=8).forward
    4
    """

    forward: int = 1
    backward: int = 1
    gradient_bytes: int = 0
    predicted_s: float | int = 0.0
    forward_lead: int = 0
    backward_lead: int = 0
    dense_bytes: int = 0

    def __post_init__(self):
        if self.forward < 1 or self.backward < 1:
            raise UserError(
                f"the pipeline degrees are {self.forward} and {self.backward}; expected whole "
                "numbers from 1 up; change the plan"
            )
        for name in ("gradient_bytes", "forward_lead", "backward_lead", "dense_bytes"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"{name} is {getattr(self, name)}; expected 0 or more; change the plan"
                )


@dataclass(frozen=True)
class MoEPlan:
    """Plan every layer; hashable, so static under jit.

    Args:
        layers: one plan per MoE layer, in forward order.
        predicted_s: time of all that the planner expects.

    >>> plan = MoEPlan((LayerPlan(), LayerPlan(2, 4, 1024)), predicted_s=0.5)
    >>> MoEPlan.from_json(plan.to_json()) == plan
    True
    """

    layers: tuple[LayerPlan, ...] = field(default=(LayerPlan(),))
    predicted_s: float | int = 0.0

    def to_json(self) -> str:
        """Return JSON text that `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "MoEPlan":
        """Read what `to_json` wrote.

        Raises:
            UserError: for other text.
        """
        try:
            found = json.loads(text)
            layers = tuple(LayerPlan(**layer) for layer in found.pop("layers"))
            return cls(layers, **found)
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"the text is no plan of MoE layers ({error}); it must be what `to_json` wrote; "
                "write it again"
            ) from error


class Info(NamedTuple):
    """What a layer tells about a call; the same whatever the sharding.

    Attributes:
        loss: weighted sum of the auxiliary losses, to be added to the training loss.
        losses: each of them, unweighted.
        load: share of all choices that went to each expert, before any was dropped.
        dropped: share of the choices that found no slot.
        capacity: C of one rank's tokens, or N where unequal groups are run without slots.
        entropy: mean over tokens of the entropy of its scores, in nats.

    >>> Info._fields
    ('loss', 'losses', 'load', 'dropped', 'capacity', 'entropy')
    """

    loss: Float[Array, ""]
    losses: Mapping[str, Float[Array, ""]]
    load: Float[Array, "E"]
    dropped: Float[Array, ""]
    capacity: int | Int[Array, ""]
    entropy: Float[Array, ""]
