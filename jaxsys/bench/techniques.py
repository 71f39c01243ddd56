"""What can be switched on in training, all meaningful combinations, and why some cannot be.

Reference: Zhang et al., "Dissecting the Runtime Performance of the Training, Fine-tuning, and
Inference of Large Language Models" (arXiv 2311.03687), section III.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

import jax

from jaxsys.core.errors import UserError
from jaxsys.models.lm import LMConfig
from jaxsys.models.lm.execution import why_not_stacked

Method = Literal["pretrain", "full", "lora", "prompt"]


@dataclass(frozen=True)
class Technique:
    """Say how a training step is run; the defaults are the naive step.

    Attributes:
      recompute: what the backward pass computes again; see `models.lm.Execution`.
      attention: ``plain``, ``xla`` (JAX's operation) or ``cudnn`` (FlashAttention on NVIDIA GPUs).
      zero: stage of ZeRO: over the devices are split 1: the optimizer's state, 2: also gradients,
        3: also parameters. Batches are split in every stage.
      offload: what rests in host memory between uses: nothing, the optimizer's state, or that and
        the parameters that are trained.
      weights: of the frozen matrices: as they are, or codes of 8 or 4 bits.
      dtype: ``f32``: everything; ``bf16``: everything, the optimizer's state as well; ``mixed``:
        what is trained and the optimizer's state in float32, the computation in bfloat16.
      donate: the step may write over the state that it was given.
      layers: one after another in the program, or one block in a loop.
      accumulate: micro-batches to a step.

    Reference: ZeRO (arXiv 1910.02054); ZeRO-Offload (arXiv 2101.06840); QLoRA (arXiv 2305.14314).

    >>> Technique(recompute="full", zero=2).name
    'recompute full, zero 2'
    """

    recompute: Literal["none", "full", "dots", "weight_dots", "host_dots"] = "none"
    attention: Literal["plain", "xla", "cudnn"] = "plain"
    zero: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    weights: Literal["full", "int8", "4bit"] = "full"
    dtype: Literal["f32", "bf16", "mixed"] = "f32"
    donate: bool = False
    layers: Literal["unrolled", "scan"] = "unrolled"
    accumulate: int = 1

    @property
    def name(self) -> str:
        """What differs from the naive step, for a table."""
        naive = asdict(Technique())
        found = {key: value for key, value in asdict(self).items() if value != naive[key]}
        parts = (key if value is True else f"{key} {value}" for key, value in found.items())
        return ", ".join(parts) or "naive"


class Where(NamedTuple):
    """What a step would run on.

    Attributes:
      platform: ``cpu``, ``gpu`` or ``tpu``.
      count: number of devices.
      memories: kinds of memory that a device can address.

    >>> Where.here().count >= 1
    True
    """

    platform: str
    count: int
    memories: tuple[str, ...]

    @classmethod
    def here(cls, devices: Sequence[Any] | None = None) -> "Where":
        """Describe some devices, all of this process by default."""
        found = jax.devices() if devices is None else devices
        kinds = tuple(memory.kind for memory in found[0].addressable_memories())
        return cls(found[0].platform, len(found), kinds)


CHOICES: dict[str, tuple[Any, ...]] = {
    "recompute": ("none", "full", "dots", "weight_dots", "host_dots"),
    "attention": ("plain", "xla", "cudnn"),
    "zero": (0, 1, 2, 3),
    "offload": ("none", "optimizer", "parameters"),
    "weights": ("full", "int8", "4bit"),
    "dtype": ("f32", "bf16", "mixed"),
    "donate": (False, True),
    "layers": ("unrolled", "scan"),
    "accumulate": (1, 4),
}


def combinations(
    choices: Mapping[str, Sequence[Any]] = CHOICES,
    *,
    base: Technique = Technique(),
    most: int | None = 2,
) -> tuple[Technique, ...]:
    """Make all combinations of techniques, fewest changes first.

    Args:
      choices: field to the values that it may take; fields left out stay as in `base`.
      base: what is changed.
      most: largest number of fields that differ from `base`; None: any. The paper's grid goes to
        four, most of it singles and pairs.

    Returns:
      The techniques without repetition, `base` first. Some may be impossible (`why_not`).

    Raises:
      UserError: an unknown field or value.

    >>> [t.name for t in combinations({"zero": (0, 2), "donate": (True,)})]
    ['naive', 'donate', 'zero 2', 'zero 2, donate']
    >>> len(combinations(most=1)), len(combinations(most=2)), len(combinations(most=None))
    (19, 159, 12960)
    """
    known = {field.name for field in fields(Technique)}
    for key, values in choices.items():
        allowed = CHOICES.get(key, ())
        odd = [v for v in values if v not in allowed and not (key == "accumulate" and v > 0)]
        if key not in known or odd:
            raise UserError(
                f"technique {key} = {[*odd]} is not known; expected {_listed()}; correct it"
            )
    axes = [
        [(key, value) for value in dict.fromkeys((getattr(base, key), *values))]
        for key, values in choices.items()
    ]
    found: dict[Technique, int] = {}
    for chosen in itertools.product(*axes):
        changed = sum(value != getattr(base, key) for key, value in chosen)
        if most is None or changed <= most:
            found[Technique(**{**asdict(base), **dict(chosen)})] = changed
    return tuple(sorted(found, key=lambda technique: found[technique]))


def _listed() -> str:
    return "; ".join(f"{key}: {', '.join(map(str, values))}" for key, values in CHOICES.items())


def why_not(
    technique: Technique,
    config: LMConfig,
    where: Where,
    *,
    method: Method = "pretrain",
    batch: int = 1,
) -> str | None:
    """Say why a technique cannot be used, or None where it can.

    Args:
      technique: the technique.
      config: the model.
      where: from `Where.here`.
      method: what is trained.
      batch: rows of a step over all devices.

    Returns:
      One sentence.

    >>> where = Where("cpu", 1, ("device", "pinned_host"))
    >>> small = LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64)
    >>> why_not(Technique(weights="int8"), small, where)
    'codes of int8 cannot be trained: the method pretrain trains them; use lora or prompt'
    >>> why_not(Technique(recompute="full"), small, where) is None
    True
    """
    t, rows = technique, technique.accumulate * (where.count if where.count > 1 else 1)
    if t.weights != "full" and method in ("pretrain", "full"):
        return (
            f"codes of {t.weights} cannot be trained: the method {method} trains them; use lora or "
            "prompt"
        )
    if t.zero and where.count == 1:
        return f"ZeRO-{t.zero} splits state over devices, and there is one"
    if batch % rows:
        return (
            f"a batch of {batch} cannot be split over {where.count} devices and {t.accumulate} "
            "micro-batches"
        )
    if t.layers == "scan" and (reason := why_not_stacked(config)):
        return f"blocks cannot be scanned: {reason}"
    host = t.offload != "none" or t.recompute == "host_dots"
    if host and "pinned_host" not in where.memories:
        return f"devices of {where.platform} address no pinned_host memory here"
    return _why_not_cudnn(t, config, where) if t.attention == "cudnn" else None


def _why_not_cudnn(t: Technique, config: LMConfig, where: Where) -> str | None:
    if where.platform != "gpu":
        return f"cuDNN attention needs an NVIDIA GPU, and the devices are {where.platform}"
    if t.dtype == "f32":
        return "cuDNN attention takes 16-bit numbers; use dtype bf16 or mixed"
    if config.head_width % 8 or config.head_width > 128:
        return f"cuDNN attention takes heads of 8, 16, … 128 numbers, not {config.head_width}"
    return None
