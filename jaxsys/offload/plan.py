"""Choose where every part of a model lives, under a budget of accelerator memory."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import ceil, floor

from jaxsys.core.errors import UserError
from jaxsys.core.report import format_bytes, format_seconds, markdown_table
from jaxsys.offload.cost import accelerator_s, cpu_s
from jaxsys.offload.limit import limit
from jaxsys.offload.partition import split, terms_of, whole
from jaxsys.offload.predict import hit_rate, predict, predicted_prefill_s
from jaxsys.offload.types import Machine, Part, Plan, Terms, Where, column_bytes

BUFFERS = 2  # one is filled while the other is read
_UNITS = ("cpu", "accelerator")


def make_plan(
    parts: Sequence[Part],
    machine: Machine,
    budget_bytes: float | int,
    *,
    cache_bytes: int = 0,
    workspace_bytes: int = 0,
    cut_experts: bool | None = None,
    column_step: int = 128,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
) -> Plan:
    """Plan residency, copies per use and the caches' places, for the least predicted time.

    Attention comes first, each layer's with its cache, then the head (both only where the
    accelerator is the faster one, for nothing runs beside them), then MLPs and experts by
    activations per byte until the budget is full, or until the CPU is just kept busy by the rest.
    What is not resident is split between CPU and link by `partition.split`. Several such plans are
    predicted and the fastest is taken: with buffers for whole copies (which prompts want), for
    planned ones, or without; MLPs and experts filled one after another or all by the same share;
    experts cut by columns or whole, about which is decided as they are used; and everything on the
    CPU.

    Reconstruction: ScheInfer's adaptive partition is described by its aim only.

    Args:
        parts: from `parts_of`.
        machine: rates; without an accelerator everything is planned for the CPU.
        budget_bytes: accelerator memory that may be used; 0 for the CPU alone.
        cache_bytes: keys and values of one layer.
        workspace_bytes: activations that the accelerator needs room for.
        cut_experts: cut experts by columns, or never; None tries both.
        column_step: columns are kept and copied in multiples of this (or of an eighth of them).
        prompt_tokens: tokens of the prompt that the plan is for.
        new_tokens: tokens that it should decode after the prompt.

    Returns:
        The plan, with its prediction and the limit of the machine at this residency.

    Raises:
        UserError: a budget below what the accelerator needs at least, its workspace, by how much.

    >>> from jaxsys.offload.types import Processor
    >>> machine = Machine(Processor(1e9, 1e12, 9e9), Processor(8e9, 1e12, 9e9), 5e8)
    >>> parts = [Part(0, "attention", 4000, 8e3), Part(0, "mlp", 12000, 2e4, 1200)]
    >>> plan = make_plan(parts, machine, 12000)
    >>> plan.resident, plan.cache_on, plan.resident_bytes <= 12000
    ((1, 768), ('accelerator',), True)
    """
    parts, budget = tuple(parts), int(budget_bytes)
    cpu_only = _finish(parts, machine, (0,) * len(parts), (0,) * len(parts), cache_bytes)
    if machine.accelerator is None or budget == 0:
        return replace(cpu_only, budget_bytes=budget if machine.accelerator else 0)
    if budget < workspace_bytes:
        raise UserError(
            f"the budget is {budget} bytes ({format_bytes(budget)}) and the accelerator's "
            f"workspace alone needs {workspace_bytes}, {workspace_bytes - budget} more; raise the "
            "budget, or give 0 for the CPU alone"
        )
    sparse = any(part.kind == "expert" for part in parts)
    cuts = ((False, True) if sparse else (False,)) if cut_experts is None else (cut_experts,)
    found = [replace(cpu_only, budget_bytes=budget)]
    most_kept = (1.0, _busy_share(parts, machine))
    fills = product(cuts, ("whole", "planned", "none"), (True, False), most_kept)
    for cut, copies, even, most in fills:
        buffer = _buffer_bytes(parts, machine, cut, copies)
        room = budget - workspace_bytes - buffer
        if room < 0 or (copies != "none" and not buffer):
            continue
        resident = _fill(parts, machine, room, most, cache_bytes, even, cut, column_step)
        stream = _streams(parts, machine, resident, buffer, cut, column_step)
        found.append(
            _finish(
                parts, machine, resident, stream, cache_bytes,
                budget_bytes=budget, workspace_bytes=workspace_bytes, buffer_bytes=buffer,
            )
        )  # fmt: skip

    def judge(plan: Plan) -> float:
        prompt = predicted_prefill_s(plan, machine, prompt_tokens) if prompt_tokens else 0.0
        return prompt + new_tokens * plan.predicted_s

    return min(found, key=judge)


def _finish(parts, machine, resident, stream, cache_bytes, **more) -> Plan:
    """Make a plan of the columns and add what it should take."""
    layers = 1 + max((part.layer for part in parts), default=-1)
    places: list[Where] = ["cpu"] * layers
    for part, here in zip(parts, resident, strict=True):
        if part.kind == "attention" and here:
            places[part.layer] = "accelerator"
    plan = Plan(
        tuple(parts), tuple(resident), tuple(stream), tuple(places), cache_bytes=cache_bytes, **more
    )
    seconds, terms = predict(plan, machine)
    bound = limit(parts, machine, resident=plan.resident).predicted_s
    return replace(plan, predicted_s=seconds, limit_s=bound, terms=terms)


def _step(part: Part, column_step: int) -> int:
    return max(1, min(column_step, part.columns // 8))


def _buffer_bytes(parts: Sequence[Part], machine: Machine, cut: bool, copies: str) -> int:
    """Room for two of the largest copies that could be wanted."""
    largest = 0
    for part in {p._replace(layer=0, expert=0) for p in parts if p.kind in ("mlp", "expert")}:
        share = 1.0 if copies == "whole" else 0.0
        if copies == "planned" and (part.kind == "mlp" or cut):
            share = split(whole(part, machine)).stream
        largest = max(largest, ceil(share * part.n_bytes))
    return BUFFERS * largest


def _busy_share(parts: Sequence[Part], machine: Machine) -> float:
    """The resident share of feed-forward parts at which CPU and accelerator end together."""
    modules = [whole(part, machine) for part in parts if part.kind in ("mlp", "expert")]
    cpu, accelerator = (sum(getattr(w, f"{unit}_s") for w in modules) for unit in _UNITS)
    return cpu / (cpu + accelerator) if modules else 1.0


def _fill(
    parts,
    machine,
    room: int,
    most: float,
    cache_bytes: int,
    even: bool,
    cut: bool,
    column_step: int,
) -> list[int]:
    """Choose resident columns: attention, head, then by activations per byte; embeddings last."""
    resident = [0] * len(parts)
    rank = {"attention": 0, "norms": 1, "head": 1, "mlp": 2, "expert": 2, "embed": 3}
    order = sorted(
        (i for i, part in enumerate(parts) if part.n_bytes),
        # Equals from all layers in turn: a layer of misses alone leaves the accelerator idle.
        key=lambda i: (
            rank[parts[i].kind],
            -parts[i].frequency / parts[i].n_bytes,
            parts[i].expert,
        ),
    )

    def take(i: int, columns: int) -> None:
        nonlocal room
        extra = cache_bytes if parts[i].kind == "attention" else 0
        n_bytes = column_bytes(parts[i], columns) + extra
        if columns and n_bytes <= room:
            resident[i], room = columns, room - n_bytes

    faster = [i for i in order if accelerator_s(parts[i], machine) <= cpu_s(parts[i], machine)]
    for i in faster:
        if rank[parts[i].kind] < 2:
            take(i, 1)
    ffn = [i for i in order if rank[parts[i].kind] == 2]
    spare = max(0, room - ceil(most * sum(parts[i].n_bytes for i in ffn)))
    room -= spare
    if even:
        for i, share in _even(parts, ffn, room, cut).items():
            step = _step(parts[i], column_step)
            take(i, int(share * parts[i].columns) // step * step)
    for i in ffn:
        columns, step = parts[i].columns, _step(parts[i], column_step)
        if resident[i] == columns or not columns:
            continue
        room += column_bytes(parts[i], resident[i])
        fits = room * columns // parts[i].n_bytes if parts[i].kind == "mlp" or cut else 0
        whole_fits = column_bytes(parts[i], columns) <= room
        take(i, columns if whole_fits else max(resident[i], min(fits, columns) // step * step))
    room += spare
    for i in faster:
        if parts[i].kind == "embed":
            take(i, 1)
    return resident


def _even(parts: Sequence[Part], ffn: list[int], room: int, cut: bool) -> dict[int, float]:
    """Give every part that can be cut the same share of its columns."""
    chosen = [i for i in ffn if parts[i].kind == "mlp" or cut]
    total = sum(parts[i].n_bytes for i in chosen)
    return dict.fromkeys(chosen, min(1.0, room / total)) if total else {}


def _streams(parts, machine, resident, buffer: int, cut: bool, column_step: int) -> list[int]:
    found = []
    for part, here in zip(parts, resident, strict=True):
        may = part.kind == "mlp" or (part.kind == "expert" and cut)
        wanted = buffer and may and here < part.columns
        found.append(_copied(part, machine, here, buffer, column_step) if wanted else 0)
    return found


def _copied(part: Part, machine: Machine, here: int, buffer: int, column_step: int) -> int:
    """Choose how many columns are copied per use: steps next to the exact share, none or most."""
    module, kept = whole(part, machine), here / part.columns
    step, cold = _step(part, column_step), part.columns - here
    most = min(cold, buffer // BUFFERS * part.columns // part.n_bytes)
    steps = split(module, kept).stream * part.columns / step

    def seconds(n: int) -> float:
        shares = ((cold - n) / part.columns, n / part.columns, kept)
        return max(terms_of([module], *([share] for share in shares)))

    near = {min(round_to(steps) * step, most) for round_to in (floor, ceil)}
    return min(sorted(near | {0, most}), key=seconds)


def describe(plan: Plan, machine: Machine | None = None) -> str:
    """Write a plan as a table, to be read before anything is loaded.

    Args:
        plan: any.
        machine: named above the table, if given.

    Returns:
        Markdown: a row for each kind of part (layers and experts together), then memory, prediction
        and limit.

    >>> mlp = Part(0, "mlp", n_bytes=600, flops_per_token=300.0, columns=100)
    >>> print(describe(Plan((mlp,), (25,), (25,), ("cpu",), predicted_s=0.5, limit_s=0.25)))
    | kind | parts | bytes | resident | copied per use | on the CPU |
    | :--- | ----: | :---- | :------- | :------------- | :--------- |
    | mlp  |     1 | 600 B | 150 B    | 150 B          | 300 B      |
    <BLANKLINE>
    Accelerator: 150 B of 150 B (weights 150 B, caches 0 B, workspace 0 B, buffers 0 B).
    Host: 450 B (weights mapped from the file, caches 0 B).
    Predicted: 500 ms a token, 2 tokens/s, 50 % of the limit of 4; CPU 0 s, link 0 s, accelerator
    0 s, memory 0 s.
    """
    rows = []
    for kind in dict.fromkeys(part.kind for part in plan.parts):
        mine = [i for i, part in enumerate(plan.parts) if part.kind == kind]
        here = sum(column_bytes(plan.parts[i], plan.resident[i]) for i in mine)
        over = sum(column_bytes(plan.parts[i], plan.stream[i]) for i in mine)
        total = sum(plan.parts[i].n_bytes for i in mine)
        sizes = (total, here, over, max(0, total - here - over))
        names = ("bytes", "resident", "copied per use", "on the CPU")
        texts = dict(zip(names, map(format_bytes, sizes), strict=True))
        rows.append({"kind": kind, "parts": len(mine), **texts})
    on = plan.cache_bytes * plan.cache_on.count("accelerator")
    off = plan.cache_bytes * plan.cache_on.count("cpu")
    lines = [
        f"Accelerator: {format_bytes(plan.accelerator_bytes)} of "
        f"{format_bytes(plan.budget_bytes)} (weights {format_bytes(plan.resident_bytes)}, caches "
        f"{format_bytes(on)}, workspace {format_bytes(plan.workspace_bytes)}, buffers "
        f"{format_bytes(plan.buffer_bytes)}).",
        f"Host: {format_bytes(plan.host_bytes)} (weights mapped from the file, caches "
        f"{format_bytes(off)}).",
    ]
    if hit_rate(plan) == hit_rate(plan):  # not nan
        lines.append(f"Experts found resident: {100 * hit_rate(plan):.1f} % of activations.")
    if plan.predicted_s and plan.limit_s:
        c, p, g, d = map(format_seconds, Terms(*plan.terms))
        lines.append(
            f"Predicted: {format_seconds(plan.predicted_s)} a token, {1 / plan.predicted_s:.3g} "
            f"tokens/s, {100 * plan.limit_s / plan.predicted_s:.3g} % of the limit of "
            f"{1 / plan.limit_s:.3g}; CPU {c}, link {p}, accelerator {g}, memory {d}."
        )
    head = [f"{machine.name}\n"] if machine is not None and machine.name else []
    return "\n".join([*head, markdown_table(rows), *lines])
