"""From a plan to tensors: which part holds which, and which of its columns go where."""

import contextlib
from typing import Any, Literal, NamedTuple

import jax

from jaxsys.core.errors import UserError
from jaxsys.models import lm
from jaxsys.offload.parts import part_names
from jaxsys.offload.types import Part, Plan

Role = Literal["resident", "stream", "cpu"]
Key = tuple[int, str, int]  # layer, kind, expert


class Devices(NamedTuple):
    """Name the two devices of a run; without an accelerator the CPU does everything.

    >>> Devices(jax.devices("cpu")[0], None).accelerator is None
    True
    """

    cpu: Any
    accelerator: Any | None


class Slice(NamedTuple):
    """Say which columns of a part have which role; see `Plan`.

    >>> Slice("stream", 0, 8).stop
    8
    """

    role: Role
    start: int
    stop: int


def find_devices(kind: Literal["auto", "none", "virtual"] = "auto") -> Devices:
    """Find what a run may use.

    Args:
        kind: ``auto`` takes the first device that is no CPU, if there is one; ``none`` the CPU
            alone; ``virtual`` two virtual CPU devices, the first as the accelerator.

    Returns:
        The devices.

    Raises:
        UserError: no CPU device beside the accelerator, or fewer than two virtual ones.

    >>> find_devices("none").accelerator is None
    True
    """
    if kind == "virtual" and jax.config.jax_num_cpu_devices < 2:  # type: ignore[attr-defined]
        # Refused once JAX has been used, or where the number is set by a flag: then it is counted.
        with contextlib.suppress(RuntimeError, ValueError):
            jax.config.update("jax_num_cpu_devices", 2)
    try:
        cpus = jax.local_devices(backend="cpu")
    except RuntimeError:
        raise UserError(
            "this process has no CPU device beside its accelerator; expected both; put cpu last "
            "into JAX_PLATFORMS, such as JAX_PLATFORMS=cuda,cpu"
        ) from None
    if kind == "virtual":
        if len(cpus) < 2:
            raise UserError(
                "this process has one CPU device; expected two virtual ones; set the JAX option "
                "jax_num_cpu_devices to 2 before the first computation"
            )
        return Devices(cpus[1], cpus[0])
    others = [d for d in jax.local_devices() if d.platform != "cpu"] if kind == "auto" else []
    return Devices(cpus[0], others[0] if others else None)


def slices(plan: Plan, i: int) -> tuple[Slice, ...]:
    """Cut part i by its roles, leaving out empty slices.

    >>> plan = Plan((Part(0, "mlp", 8, 4.0, columns=4),), (1,), (0,), ("cpu",))
    >>> slices(plan, 0)
    (Slice(role='resident', start=0, stop=1), Slice(role='cpu', start=1, stop=4))
    """
    kept, moved = plan.resident[i], plan.resident[i] + plan.stream[i]
    whole = max(plan.parts[i].columns, 1)
    found = (Slice("resident", 0, kept), Slice("stream", kept, moved), Slice("cpu", moved, whole))
    return tuple(s for s in found if s.stop > s.start)


def check_plan(plan: Plan, config: lm.LMConfig, devices: Devices) -> dict[Key, int]:
    """Compare a plan with the model and the devices.

    Args:
        plan: of the same parts as `parts_of` gives, in any order.
        config: the model.
        devices: of the run.

    Returns:
        (layer, kind, expert) to the part's place in the plan.

    Raises:
        UserError: for parts of another model, work for an accelerator that is absent, a family
            that cannot be run in pieces, or attention that runs elsewhere than its cache is.

    >>> config = lm.LMConfig("llama", 97, 32, 1, 4, 2, 8, 48, 64)
    >>> check_plan(Plan((), (), (), ()), config, find_devices("none"))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the plan is for other parts than the model has: ...
    """
    wanted = part_names(config)
    found = {(p.layer, p.kind, p.expert): i for i, p in enumerate(plan.parts)}
    odd = sorted(set(wanted) ^ set(found))
    for key, i in found.items():
        columns = {"mlp": config.ffn_width, "expert": config.expert_width}.get(key[1], 0)
        if key in wanted and plan.parts[i].columns != columns:
            odd.append(key)
    if odd or len(found) != len(plan.parts):
        raise UserError(
            f"the plan is for other parts than the model has: {len(plan.parts)} where there are "
            f"{len(wanted)}, the first that differs being {odd[0] if odd else 'named twice'}; make "
            "a plan for this model"
        )
    if not config.pre_norm:
        raise UserError(
            f"a {config.model_type} model normalises what its blocks have written; expected a "
            "family that normalises what they read; choose another model"
        )
    if devices.accelerator is None and (
        any(plan.resident) or any(plan.stream) or "accelerator" in plan.cache_on
    ):
        raise UserError(
            "the plan gives work to an accelerator and this run has none; expected a plan for the "
            "CPU alone; plan again for this machine"
        )
    for i, where in enumerate(plan.cache_on):
        own = found[i, "attention", -1]
        if (where == "accelerator") == bool(plan.on_cpu(own)):
            raise UserError(
                f"layer {i}'s keys and values are on the {where} and its attention's weights are "
                "not; expected attention to run where its cache is; mend the plan"
            )
    return found


def cpu_plan(parts: tuple[Part, ...]) -> Plan:
    """Plan a run on the CPU alone.

    >>> cpu_plan((Part(0, "attention", 8, 4.0),)).cache_on
    ('cpu',)
    """
    layers = 1 + max((part.layer for part in parts), default=-1)
    none = (0,) * len(parts)
    return Plan(parts, none, none, ("cpu",) * layers)
