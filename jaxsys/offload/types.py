"""What planner, simulator and engine share: parts of a model, a machine, a plan, an assignment."""

import json
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal, NamedTuple

from jaxsys.core.cost import LinearCost
from jaxsys.core.errors import UserError
from jaxsys.core.fields import check_fields, read_object, reading

Kind = Literal["attention", "mlp", "expert", "embed", "head", "norms"]
Where = Literal["accelerator", "cpu"]
KINDS = ("attention", "mlp", "expert", "embed", "head", "norms")
PLACES = ("accelerator", "cpu")


class Part(NamedTuple):
    """Describe one module of a model, the unit of placement.

    Attributes:
        layer: index of its layer; -1 for what stands before or after the layers.
        kind: attention (with the router and the layer's norms), mlp, expert, embed, head, norms.
        n_bytes: bytes of its weights.
        flops_per_token: FLOPs for each token that passes it.
        columns: feed-forward columns F along which it may be cut; 0 where it cannot be.
        expert: index of the expert in its layer; -1 for other kinds.
        frequency: expected activations per token; 1 for dense parts, k / E for experts without a
            profile, 1 / V for an embedding, of which a token reads one row.

    >>> Part(0, "mlp", n_bytes=600, flops_per_token=300.0, columns=100).frequency
    1.0
    """

    layer: int
    kind: Kind
    n_bytes: int
    flops_per_token: float
    columns: int = 0
    expert: int = -1
    frequency: float = 1.0


def column_bytes(part: Part, columns: int) -> int:
    """Count the bytes of some columns of a part, rounded up; of an uncuttable part 0 or all.

    Args:
        part: the part.
        columns: how many of its columns; of an uncuttable part 0 or 1.

    Returns:
        Bytes.

    >>> mlp = Part(0, "mlp", n_bytes=600, flops_per_token=300.0, columns=100)
    >>> column_bytes(mlp, 25), column_bytes(mlp._replace(columns=0), 1)
    (150, 600)
    """
    return -(-part.n_bytes * columns // max(part.columns, 1))


class Rates(NamedTuple):
    """Say how fast a processor runs modules of a kind: ``launch + max(bytes / B, FLOPs / C)``.

    Attributes:
        bytes_per_s: B, rate at which weights are read from its memory.
        flops_s: C, FLOPs per second on many tokens.
        launch_s: seconds before a module's work begins.

    >>> Rates(1e10, 1e12, 1e-5).launch_s
    1e-05
    """

    bytes_per_s: float | int
    flops_s: float | int
    launch_s: float | int = 0.0


@dataclass(frozen=True)
class Processor:
    """Describe the CPU or the accelerator.

    Attributes:
        bytes_per_s: rate at which weights are read, B_c or B_g.
        flops_s: FLOPs per second on many tokens, C_c or C_g.
        memory_bytes: bytes of its memory.
        launch_s: seconds before a module's work begins, a_c or a_g.
        kinds: rates fitted for single kinds of parts, in place of the three above.

    >>> Processor(1e10, 1e12, 2**34, kinds=(("expert", Rates(2e10, 1e12)),)).rates("expert")
    Rates(bytes_per_s=20000000000.0, flops_s=1000000000000.0, launch_s=0.0)
    """

    bytes_per_s: float | int
    flops_s: float | int
    memory_bytes: float | int
    launch_s: float | int = 0.0
    kinds: tuple[tuple[str, Rates], ...] = ()

    def rates(self, kind: str) -> Rates:
        """Give the rates at which a kind of part runs.

        >>> Processor(1.0, 2.0, 3.0).rates("mlp")
        Rates(bytes_per_s=1.0, flops_s=2.0, launch_s=0.0)
        """
        return dict(self.kinds).get(kind, Rates(self.bytes_per_s, self.flops_s, self.launch_s))


@dataclass(frozen=True)
class Machine:
    """Describe what a plan is made for; hashable, and JSON both ways.

    Attributes:
        cpu: the processor whose memory holds every weight.
        accelerator: the other one, or None for a CPU alone.
        link_bytes_per_s: B_p, rate of copies from the CPU's memory to the accelerator's.
        link_latency_s: a_p, seconds before a copy's first byte arrives.
        dram_bytes_per_s: rate of the CPU's memory, shared by the CPU's reads and the copies; 0:
            never the bound.
        name: for tables.
        lines: measured lines behind the rates, for the record.

    Raises:
        UserError: a rate that is not above 0, or a negative latency.

    >>> machine = Machine(Processor(55e9, 1e12, 2**36), Processor(9e11, 1e14, 24e9), 25e9)
    >>> Machine.from_json(machine.to_json()) == machine
    True
    """

    cpu: Processor
    accelerator: Processor | None = None
    link_bytes_per_s: float | int = 0.0
    link_latency_s: float | int = 0.0
    dram_bytes_per_s: float | int = 0.0
    name: str = ""
    lines: tuple[tuple[str, LinearCost], ...] = ()

    def __post_init__(self):
        """Check the numbers."""
        for name, unit in (("cpu", self.cpu), ("accelerator", self.accelerator)):
            if unit is None:
                continue
            own = Rates(unit.bytes_per_s, unit.flops_s, unit.launch_s)
            for kind, rates in (("", own), *unit.kinds):
                of = f"{name}'s {kind} rates" if kind else name
                if kind and kind not in KINDS:
                    raise UserError(
                        f"{name} has rates for {kind!r}; expected one of {', '.join(KINDS)}; "
                        "correct the kind"
                    )
                _above(of, "bytes_per_s", rates.bytes_per_s)
                _above(of, "flops_s", rates.flops_s)
                _above(of, "launch_s", rates.launch_s, or_zero=True)
            _above(name, "memory_bytes", unit.memory_bytes)
        if self.accelerator is not None:
            _above("the machine", "link_bytes_per_s", self.link_bytes_per_s)
        _above("the machine", "link_latency_s", self.link_latency_s, or_zero=True)
        _above("the machine", "dram_bytes_per_s", self.dram_bytes_per_s, or_zero=True)

    def to_json(self) -> str:
        """Write the machine as one JSON object that `from_json` reads back.

        >>> '"link_latency_s": 0.0' in Machine(Processor(1.0, 1.0, 1.0)).to_json()
        True
        """
        found = asdict(self)
        for unit in (found["cpu"], found["accelerator"]):
            if unit is not None:
                unit["kinds"] = {kind: dict(Rates(*r)._asdict()) for kind, r in unit["kinds"]}
        found["lines"] = {name: line.to_dict() for name, line in self.lines}
        return json.dumps(found)

    @classmethod
    def from_json(cls, text: str) -> "Machine":
        """Read a machine, checking it as a foreign file.

        Args:
            text: what `to_json` wrote, or the like by hand; what has a default may be left out.

        Returns:
            The machine.

        Raises:
            UserError: no JSON object, a field missing, unknown or of the wrong kind.

        >>> cpu = '{"bytes_per_s": 5e10, "flops_s": 2e11, "memory_bytes": 1e10}'
        >>> Machine.from_json('{"cpu": ' + cpu + '}').accelerator is None
        True
        """
        found = check_fields(read_object(text, "machine"), cls, "machine")
        for name in ("cpu", "accelerator"):
            if found.get(name) is not None:
                found[name] = _processor(found[name], name)
        lines = found.get("lines", {})
        if not isinstance(lines, dict) or not all(isinstance(x, dict) for x in lines.values()):
            raise UserError("lines of the machine must be an object of lines; mend the file")
        found["lines"] = tuple((name, LinearCost.from_dict(x)) for name, x in lines.items())
        with reading("machine"):
            return cls(**found)


class Terms(NamedTuple):
    """Split seconds by what they are spent on; the four overlap, so they do not add up to a step.

    Attributes:
        cpu_s: the CPU computing.
        link_s: weights crossing the link.
        accelerator_s: the accelerator computing.
        dram_s: the CPU's memory serving the CPU and the link.

    >>> Terms(1.0, 2.0, 3.0, 4.0).link_s
    2.0
    """

    cpu_s: float | int = 0.0
    link_s: float | int = 0.0
    accelerator_s: float | int = 0.0
    dram_s: float | int = 0.0


@dataclass(frozen=True)
class Plan:
    """Say where every part of a model lives and runs, and what that should take.

    Of a part's columns the first ``resident`` live on the accelerator, the next ``stream`` are
    copied there each time they are used, and the CPU computes the rest in place. An uncuttable part
    counts as one column.

    Attributes:
        parts: of the model, P of them.
        resident: columns of each part that live on the accelerator, [P].
        stream: columns of each part that are copied over per use and run there, [P].
        cache_on: where each layer's keys and values live, and so where its attention runs, [L].
        budget_bytes: accelerator memory that may be used; -1: as much as it takes.
        workspace_bytes: accelerator memory for activations and logits.
        buffer_bytes: accelerator memory for the ring of transfer buffers.
        cache_bytes: keys and values of one layer.
        predicted_s: predicted seconds per decoded token.
        limit_s: seconds per decoded token that the machine allows with this residency.
        terms: of ``predicted_s``.

    Raises:
        UserError: lengths that differ, columns that a part does not have, or a budget that is
            exceeded (by how much).

    >>> mlp = Part(0, "mlp", n_bytes=600, flops_per_token=300.0, columns=100)
    >>> plan = Plan((mlp,), (25,), (25,), ("cpu",))
    >>> plan.resident_bytes, plan.on_cpu(0), Plan.from_json(plan.to_json()) == plan
    (150, 50, True)
    """

    parts: tuple[Part, ...]
    resident: tuple[int, ...]
    stream: tuple[int, ...]
    cache_on: tuple[Where, ...]
    budget_bytes: int = -1
    workspace_bytes: int = 0
    buffer_bytes: int = 0
    cache_bytes: int = 0
    predicted_s: float | int = 0.0
    limit_s: float | int = 0.0
    terms: Terms = field(default_factory=Terms)

    def __post_init__(self):
        """Check the plan against itself and fill a budget that was left out."""
        _check_plan(self)
        if self.budget_bytes == -1:
            object.__setattr__(self, "budget_bytes", self.accelerator_bytes)
        if self.accelerator_bytes > self.budget_bytes:
            over = self.accelerator_bytes - self.budget_bytes
            raise UserError(
                f"the plan needs {self.accelerator_bytes} bytes on the accelerator and its budget "
                f"is {self.budget_bytes}, {over} too few; raise the budget or keep less there"
            )

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that live on the accelerator."""
        return sum(map(column_bytes, self.parts, self.resident))

    @property
    def accelerator_bytes(self) -> int:
        """Bytes that the plan takes on the accelerator: weights, keys and values, workspace."""
        cache = self.cache_bytes * self.cache_on.count("accelerator")
        return self.resident_bytes + cache + self.workspace_bytes + self.buffer_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of weights (mapped from the file where they are cold) and caches on the CPU."""
        cold = sum(part.n_bytes for part in self.parts) - self.resident_bytes
        return cold + self.cache_bytes * self.cache_on.count("cpu")

    def on_cpu(self, i: int) -> int:
        """Count the columns of part i that the CPU computes; of an uncuttable part 0 or 1.

        >>> Plan((Part(0, "attention", 8, 4.0),), (1,), (0,), ("accelerator",)).on_cpu(0)
        0
        """
        return max(self.parts[i].columns, 1) - self.resident[i] - self.stream[i]

    def to_json(self) -> str:
        """Write the plan as one JSON object that `from_json` reads back.

        >>> Plan((), (), (), ()).to_json()[:40]
        '{"parts": [], "resident": [], "stream": '
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

        >>> Plan.from_json('{"parts": []}')
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: the plan lacks resident, stream, cache_on; ...
        """
        found = check_fields(read_object(text, "plan"), cls, "plan")
        with reading("plan"):
            found["parts"] = tuple(Part(*part) for part in found["parts"])
            for name in ("resident", "stream"):
                found[name] = tuple(int(n) for n in found[name])
            found["cache_on"] = tuple(found["cache_on"])
            found["terms"] = Terms(*found.get("terms", ()))
            return cls(**found)


class Assignment(NamedTuple):
    """Say which processor runs each of one layer's active experts, and in which order.

    Attributes:
        device: of each active expert, [A].
        order: indices into the active experts; each processor runs its own in this order, [A].
        moved: whether the expert's weights cross the link for it, [A].
        predicted_s: seconds until the last of them has run.

    >>> Assignment(("cpu", "accelerator"), (1, 0), (False, False)).order
    (1, 0)
    """

    device: tuple[Where, ...]
    order: tuple[int, ...]
    moved: tuple[bool, ...]
    predicted_s: float = 0.0


def _above(of: str, name: str, value: Any, *, or_zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not (number and (value > 0 or (or_zero and value == 0))):
        least = "0 or more" if or_zero else "above 0"
        raise UserError(
            f"{name} of {of} is {value!r}; expected a finite number, {least}; measure again or "
            "correct it"
        )


def _processor(given: Any, name: str) -> Processor:
    found = check_fields(given, Processor, name)
    kinds = found.get("kinds", {})
    try:
        found["kinds"] = tuple((kind, Rates(**rates)) for kind, rates in kinds.items())
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"kinds of {name} must be an object of {', '.join(Rates._fields)} ({error}); mend it"
        ) from error
    with reading(name):
        return Processor(**found)


def _check_plan(plan: Plan) -> None:
    n = len(plan.parts)
    if len(plan.resident) != n or len(plan.stream) != n:
        raise UserError(
            f"the plan has {n} parts, {len(plan.resident)} resident and {len(plan.stream)} stream "
            "entries; expected one of each per part; mend the plan"
        )
    for part, here, over in zip(plan.parts, plan.resident, plan.stream, strict=True):
        whole = max(part.columns, 1)
        if part.kind not in KINDS or min(here, over) < 0 or here + over > whole:
            raise UserError(
                f"layer {part.layer}'s {part.kind} keeps {here} columns and streams {over} of "
                f"{whole}; expected no more than there are, of a known kind; mend the plan"
            )
    layers = 1 + max((part.layer for part in plan.parts), default=-1)
    if len(plan.cache_on) != layers or not set(plan.cache_on) <= set(PLACES):
        raise UserError(
            f"cache_on is {plan.cache_on} for {layers} layers; expected {' or '.join(PLACES)} for "
            "each; mend the plan"
        )
    sizes = (plan.workspace_bytes, plan.buffer_bytes, plan.cache_bytes, plan.budget_bytes + 1)
    seconds = (plan.predicted_s, plan.limit_s, *plan.terms)
    if min(sizes) < 0 or not all(isfinite(s) and s >= 0 for s in seconds):
        raise UserError(
            f"the plan's bytes are {sizes[:3]} and its seconds {seconds}; expected none of them "
            "negative; make the plan again"
        )
