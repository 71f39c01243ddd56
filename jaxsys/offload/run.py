"""From a model's name and a budget to a plan, and from a plan to an engine and a report."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.fields import read_object
from jaxsys.evaluate.buckets import bucket
from jaxsys.models import lm
from jaxsys.offload.cache import frequency, lru, score
from jaxsys.offload.choose import chooser
from jaxsys.offload.engine import Engine, as_planned, forward, init_state, make_engine
from jaxsys.offload.load import open_model, place_model, tensor_bytes
from jaxsys.offload.monitor import Monitor, terms
from jaxsys.offload.parts import cache_bytes, parts_of, workspace_bytes
from jaxsys.offload.place import Devices, find_devices
from jaxsys.offload.plan import make_plan
from jaxsys.offload.probe import measure_machine
from jaxsys.offload.types import Machine, Plan

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Say what is to be planned or run.

    Args:
        model: a path that `lm.load` takes.
        accelerator: ``auto`` (the first device that is no CPU), ``none``, or ``virtual`` (two
            virtual CPU devices).
        budget: accelerator memory, such as ``8GiB``, ``500MB`` or ``75%`` of the weights.
        machine: a file with a machine; it is measured without one.
        dtype: of the parameters; None keeps the file's.
        int8: round the matrices of layers to 8 bits while they are loaded.
        batch: rows that are decoded together.
        context: most tokens of a row, prompt and answer.
        chunk: tokens of a prompt that are read at once.
        cache: which experts that were copied over stay on the accelerator in place of others;
            ``none`` leaves the plan's there.
        early: run the next mixture layer's router early and copy ahead what it names.

    >>> Request(model=Path("somewhere")).budget
    '75%'
    """

    model: Path
    accelerator: Literal["auto", "none", "virtual"] = "auto"
    budget: str = "75%"
    machine: Path | None = None
    dtype: Any = None
    int8: bool = False
    batch: int = 1
    context: int = 1024
    chunk: int = 256
    cache: Literal["none", "lru", "frequency", "score"] = "none"
    early: bool = False


class Prepared(NamedTuple):
    """Hold what is known before any weight is read.

    >>> Prepared._fields
    ('request', 'config', 'devices', 'machine', 'plan')
    """

    request: Request
    config: lm.LMConfig
    devices: Devices
    machine: Machine
    plan: Plan


def parse_bytes(text: str, whole: int) -> int:
    """Read an amount of memory.

    Args:
        text: a number with a unit (B, kB, MB, GB, KiB, MiB, GiB) or a share of ``whole`` in %.
        whole: bytes that 100 % stands for.

    Returns:
        Bytes.

    Raises:
        UserError: for anything else.

    >>> parse_bytes("1.5GiB", 0), parse_bytes("50%", 10), parse_bytes("20MB", 0)
    (1610612736, 5, 20000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[kmg]?i?)b?\s*", text.lower())
    if not found or (found[2] != "%" and found[2] not in UNITS):
        raise UserError(
            f"{text!r} is no amount of memory; expected a number with a unit or a share of the "
            "weights; write it as 8GiB, 500MB or 75%"
        )
    unit = whole / 100 if found[2] == "%" else UNITS[found[2]]
    return round(float(found[1]) * unit)


def prepare(request: Request, on_event: Callable[[str], None] = lambda _: None) -> Prepared:
    """Find devices, measure or read the machine, and plan; no weight is read.

    Args:
        request: what is wanted.
        on_event: told what is being done.

    Returns:
        What `start` takes.

    Raises:
        UserError: for models, devices, budgets or machine files that will not do.

    >>> prepare(Request(model=Path("nowhere")))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere is no model; ...
    """
    config, tensors, _ = open_model(request.model)
    sizes = tensor_bytes(tensors, dtype=request.dtype, int8=request.int8)
    parts = parts_of(config, sizes=sizes)
    devices = find_devices(request.accelerator)
    machine = _machine(request, devices, on_event)
    if devices.accelerator is None:
        machine = replace(machine, accelerator=None)
    weights = sum(part.n_bytes for part in parts)
    slots = min(bucket(request.context), config.max_positions)
    width = np.dtype(_activations(config, tensors, request)).itemsize
    rows = {"batch": request.batch, "number_bytes": width}
    kept = cache_bytes(config, slots, **rows)
    room = workspace_bytes(config, min(request.chunk, slots), slots, **rows)
    budget = parse_bytes(request.budget, weights + kept * config.layers + room)
    plan = make_plan(
        parts,
        machine,
        budget if devices.accelerator is not None else 0,
        cache_bytes=kept,
        workspace_bytes=room if devices.accelerator is not None else 0,
    )
    return Prepared(request, config, devices, machine, plan)


def _activations(config: lm.LMConfig, tensors: Any, request: Request) -> Any:
    if request.dtype is not None:
        return request.dtype
    known = getattr(tensors, "dtypes", None)
    name = next(iter(lm.shapes(config)))
    return known[name] if known else tensors[name].dtype


def _machine(request: Request, devices: Devices, on_event: Callable[[str], None]) -> Machine:
    if request.machine is not None:
        try:
            return Machine.from_json(request.machine.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{request.machine} cannot be read ({error.strerror}); expected a machine.json of "
                "`jaxsys offload plan`; correct the path"
            ) from None
    coded = np.int8 if request.int8 else np.float32
    return measure_machine(
        devices.cpu, devices.accelerator, dtype=coded, strict=False, on_event=on_event
    )


def read_plan(path: Path) -> Plan:
    """Read a plan that `jaxsys offload plan` wrote.

    >>> read_plan(Path("nowhere.json"))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere.json cannot be read ...
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a plan.json of "
            "`jaxsys offload plan`; correct the path"
        ) from None
    read_object(text, "plan")
    return Plan.from_json(text)


def start(prepared: Prepared) -> Engine:
    """Load the model as planned and make its engine.

    Args:
        prepared: from `prepare`.

    Returns:
        The engine.

    Raises:
        UserError: as `place_model`; or for a cache or an early router without experts or without
            an accelerator.

    >>> start(prepare(Request(model=Path("nowhere"))))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere is no model; ...
    """
    request, devices = prepared.request, prepared.devices
    alone = prepared.machine.accelerator is None
    policies = {"none": None, "lru": lru(), "frequency": frequency(), "score": score()}
    policy = policies[request.cache]
    if (policy or request.early) and (alone or not prepared.config.experts):
        raise UserError(
            "a cache of experts or an early router was asked for, and the run has no "
            f"{'accelerator' if alone else 'experts'}; expected both; leave these options out"
        )
    placed = place_model(
        request.model,
        prepared.plan,
        devices,
        dtype=request.dtype,
        int8=request.int8,
        fixed=policy is None,
    )
    choose = as_planned if alone else chooser(prepared.plan, prepared.machine)
    return make_engine(placed, choose=choose, policy=policy, early=request.early)


def where_time_goes(
    engine: Engine, machine: Machine, *, batch: int = 1, slots: int = 16, steps: int = 3
) -> dict[str, Any]:
    """Run a few decode steps one task at a time, and say what each resource took of a step.

    Args:
        engine: of the run; its counts are not touched.
        machine: for the term of the memory, which is modelled.
        batch: rows.
        slots: of a small cache.
        steps: timed ones, after two that warm up.

    Returns:
        ``cpu_s``, ``link_s``, ``accelerator_s`` and ``dram_s`` of a step (the last one modelled),
        and ``moved_bytes`` of a step.

    >>> where_time_goes.__name__  # a run is in the tests
    'where_time_goes'
    """
    own = engine._replace(monitor=Monitor(blocking=True), recorder=None)
    state = init_state(engine.placed, batch, slots)
    tokens = np.ones((batch, 1), np.int32)
    for step in range(steps + 2):
        if step == 2:
            own = own._replace(monitor=Monitor(blocking=True))
        logits, state = forward(own, state, tokens)
        jax.block_until_ready(logits)
    found = {name: value / steps for name, value in terms(own.monitor, machine)._asdict().items()}
    return found | {"moved_bytes": own.monitor.moved_bytes / steps}
