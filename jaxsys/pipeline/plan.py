"""A plan: which nodes run where, in which order, how compressed, and what that should take."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.core.fields import check_fields, read_object, reading
from jaxsys.pipeline.schedule import ORDERS

CODECS = ("dense", "topk", "int8", "int4")


@dataclass(frozen=True)
class Plan:
    """Say which stage runs where and how the stages work together.

    Stage s holds the nodes ``boundaries[s−1] … boundaries[s] − 1`` of the graph (from 0 for the
    first, to the end for the last). A value that stage s makes and stage t > s reads travels
    straight from one's device to the other's.

    Attributes:
        n_nodes: nodes of the graph that was planned.
        boundaries: nodes at which stages 1 … S−1 begin, ascending, [S − 1].
        devices: index in the fleet of each stage's device, [S]. All differ, unless the order is
            ``interleaved``: then they repeat with a period of P workers.
        order: how micro-batches follow one another, one of `schedule.ORDERS`.
        micro_batches: micro-batches in one step.
        codec: how values travel between devices, one of `CODECS`.
        ratios_forward: compression ratio r ≥ 1 of the activations at each boundary, [S − 1]; with
            ``topk`` the largest ``⌈n / r⌉`` elements are kept, and 1 is dense whatever the codec.
        ratios_backward: the same for cotangents, [S − 1].
        replicas: further chains, each the devices of its stages, [S]; none by default.
        predicted_s: predicted seconds of one step.
        memory_bytes: predicted bytes that each stage needs on its device, [S].
        method: what made the plan.

    >>> plan = Plan(4, (1, 3), (2, 0, 1), micro_batches=8)
    >>> plan.nodes(1), plan.n_stages, plan.ratio(0, 2)
    (range(1, 3), 3, 1.0)
    """

    n_nodes: int
    boundaries: tuple[int, ...]
    devices: tuple[int, ...]
    order: str = "1f1b"
    micro_batches: int = 1
    codec: str = "dense"
    ratios_forward: tuple[float, ...] = ()
    ratios_backward: tuple[float, ...] = ()
    replicas: tuple[tuple[int, ...], ...] = ()
    predicted_s: float | int = 0.0
    memory_bytes: tuple[int, ...] = ()
    method: str = "manual"

    def __post_init__(self):
        """Fill the ratios and bytes that were left out and check the rest."""
        dense = (1.0,) * (len(self.devices) - 1)
        for name, default in (
            ("ratios_forward", dense),
            ("ratios_backward", dense),
            ("memory_bytes", (0,) * len(self.devices)),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, default)
        _check_plan(self)

    @property
    def n_stages(self) -> int:
        """Number of stages S."""
        return len(self.devices)

    @property
    def n_workers(self) -> int:
        """Number of devices P in a chain; S unless the order is ``interleaved``."""
        return len(set(self.devices))

    @property
    def chunks(self) -> int:
        """Stages that each worker has; 1 unless the order is ``interleaved``."""
        return self.n_stages // self.n_workers

    @property
    def chains(self) -> tuple[tuple[int, ...], ...]:
        """The devices of the stages of every chain, the first one and the replicas."""
        return (self.devices, *self.replicas)

    def nodes(self, stage: int) -> range:
        """Nodes of the graph that a stage holds.

        Args:
            stage: index of the stage.

        Returns:
            The range of node indices.

        >>> Plan(5, (2,), (0, 1)).nodes(1)
        range(2, 5)
        """
        edges = (0, *self.boundaries, self.n_nodes)
        return range(edges[stage], edges[stage + 1])

    def ratio(self, source: int, target: int, *, backward: bool = False) -> float:
        """Compression ratio of a value between two stages.

        A value that skips stages takes the largest ratio of the boundaries that it crosses, and one
        between two stages of the same device is not compressed.

        Args:
            source: the earlier stage, which makes the value.
            target: the later stage, which reads it.
            backward: whether it is the cotangent on its way back.

        Returns:
            The ratio, at least 1.

        >>> plan = Plan(4, (1, 3), (2, 0, 1), codec="topk", ratios_forward=(1.0, 8.0))
        >>> plan.ratio(0, 1), plan.ratio(0, 2), plan.ratio(0, 2, backward=True)
        (1.0, 8.0, 1.0)
        """
        if self.devices[source] == self.devices[target]:
            return 1.0
        ratios = self.ratios_backward if backward else self.ratios_forward
        return max(ratios[source:target])

    def to_json(self) -> str:
        """Write the plan as one JSON object.

        Returns:
            JSON text that `from_json` reads back.

        >>> plan = Plan(4, (1, 3), (2, 0, 1), micro_batches=8)
        >>> Plan.from_json(plan.to_json()) == plan
        True
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan, checking it as a foreign file.

        Args:
            text: what `to_json` wrote.

        Returns:
            The plan.

        Raises:
            UserError: no JSON object, a field missing, unknown or of the wrong kind, or a plan that
                contradicts itself.

        >>> Plan.from_json("[]")
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: the plan is a list; ...
        """
        found = check_fields(read_object(text, "plan"), cls, "plan", complete=True)
        with reading("plan"):
            return cls(**{name: _KINDS[name](value) for name, value in found.items()})


def _each(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda given: tuple(kind(x) for x in given)


_KINDS: dict[str, Callable[[Any], Any]] = {
    "n_nodes": int,
    "boundaries": _each(int),
    "devices": _each(int),
    "order": str,
    "micro_batches": int,
    "codec": str,
    "ratios_forward": _each(float),
    "ratios_backward": _each(float),
    "replicas": _each(_each(int)),
    "predicted_s": float,
    "memory_bytes": _each(int),
    "method": str,
}


def _check_plan(plan: Plan) -> None:
    n = plan.n_stages
    edges = (0, *plan.boundaries, plan.n_nodes)
    if n == 0 or len(edges) != n + 1 or list(edges) != sorted(set(edges)):
        raise UserError(
            f"a plan of {n} stages over {plan.n_nodes} nodes has the boundaries "
            f"{list(plan.boundaries)}; it needs {max(0, n - 1)} ascending ones from 1 to "
            f"{plan.n_nodes - 1}; give every stage a node"
        )
    if plan.order not in ORDERS or plan.codec not in CODECS:
        raise UserError(
            f"order is {plan.order!r} and codec {plan.codec!r}; they must be one of "
            f"{', '.join(ORDERS)} and one of {', '.join(CODECS)}; pass these"
        )
    for chain in plan.chains:
        workers = len(set(chain))
        one_each = workers == n
        in_turn = n % workers == 0 and chain == chain[:workers] * (n // workers)
        if len(chain) != n or not (one_each or (plan.order == "interleaved" and in_turn)):
            raise UserError(
                f"a chain of {n} stages has the devices {list(chain)}; each stage needs a device "
                "of its own, or with order 'interleaved' the same workers in turn; mend the list"
            )
    if len({len(set(chain)) for chain in plan.chains}) > 1 or any(
        set(a) & set(b) for i, a in enumerate(plan.chains) for b in plan.chains[:i]
    ):
        raise UserError(
            f"the chains {[list(chain) for chain in plan.chains]} share a device or differ in "
            "their number of workers; replicas must be alike and apart; mend the replicas"
        )
    if plan.micro_batches < 1 or min(plan.devices) < 0:
        raise UserError(
            f"micro_batches is {plan.micro_batches} and the least device {min(plan.devices)}; "
            "they must be at least 1 and 0; mend the plan"
        )
    for name, ratios in (("forward", plan.ratios_forward), ("backward", plan.ratios_backward)):
        if len(ratios) != n - 1 or not all(isfinite(r) and r >= 1 for r in ratios):
            raise UserError(
                f"ratios_{name} is {list(ratios)}; it must have {n - 1} numbers of at least 1, one "
                "per boundary; mend the plan"
            )
    numbers = (plan.predicted_s, *plan.memory_bytes)
    if len(plan.memory_bytes) != n or not all(isfinite(x) and x >= 0 for x in numbers):
        raise UserError(
            f"predicted_s is {plan.predicted_s} and memory_bytes {list(plan.memory_bytes)}; they "
            f"must be not negative, {n} sizes in all; make the plan again"
        )
