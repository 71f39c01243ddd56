"""Verbs of `jaxsys bench`: training, fine-tuning and the static report."""

import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from jaxsys.cli.options import Common
from jaxsys.core.errors import UserError

Model = Annotated[str, tyro.conf.Positional]
Recompute = Literal["none", "full", "dots", "weight_dots", "host_dots"]
Attention = Literal["plain", "xla", "cudnn"]
Offload = Literal["none", "optimizer", "parameters"]


@dataclass(frozen=True, kw_only=True)
class GridConfig(Common):
    """What the verbs share that compile steps under combinations of techniques.

    Attributes:
      out: Folder to whose results file rows are added.
      seed: Seed of weights and text.
      model: A named shape (small, llama-1.3b, llama2-7b, llama2-13b, llama2-70b, …) or a model's
        path, of which the configuration is read.
      batch: Rows of a step over all devices.
      tokens: Tokens of a row.
      most: Techniques that are changed at once at most, from the base.
      recompute: What the backward pass computes again; the first value of each of these options is
        the base, and every further value is tried.
      attention: How attention is computed.
      zero: Stage of ZeRO over the devices.
      offload: What rests in host memory.
      weights: Of frozen matrices, where some are frozen.
      dtype: Of numbers: all float32, all bfloat16, or float32 kept and bfloat16 computed.
      layers: One after another in the program, or one block in a loop, which compiles in seconds at
        any depth.
      accumulate: Micro-batches to a step.
      virtual: On a CPU, this many virtual devices; 0 leaves the devices as they are.
      budget_gib: Memory of one device that may be used; 0: what is free.
    """

    model: Model = "small"
    batch: int = 4
    tokens: int = 256
    most: int = 1
    recompute: tuple[Recompute, ...] = ("none", "full", "weight_dots")
    attention: tuple[Attention, ...] = ("plain", "xla", "cudnn")
    zero: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    offload: tuple[Offload, ...] = ("none", "optimizer", "parameters")
    weights: tuple[Literal["full", "int8", "4bit"], ...] = ("full",)
    dtype: tuple[Literal["f32", "bf16", "mixed"], ...] = ("f32", "bf16", "mixed")
    layers: tuple[Literal["unrolled", "scan"], ...] = ("unrolled", "scan")
    accumulate: tuple[int, ...] = (1, 4)
    virtual: int = 0
    budget_gib: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig(GridConfig):
    """Measure a training step under combinations of techniques; weights and text are random.

    Attributes:
      out: Folder to whose train.jsonl rows are added; cells that are in it already are not run.
      seed: Seed of weights, text and the order of timing.
      donate: The step writes over the state that it was given.
      runs: Timed rounds.
      memory: Measure peak memory too, each cell in a process of its own.
    """

    donate: tuple[bool, ...] = (False, True)
    runs: int = 10
    memory: bool = True


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Measure fine-tuning steps: full, LoRA, QLoRA, prompt tuning; weights and text are random.

    Attributes:
      out: Folder to whose finetune.jsonl rows are added; cells that are in it already are not run.
      weights: Of frozen matrices; with qlora it is 4bit whatever stands here.
      methods: What is trained; qlora is LoRA beside 4-bit codes, qlora8 beside 8-bit ones.
      rank: Of adapters.
      prompt_tokens: Vectors of a prompt.
    """

    most: int = 0
    methods: tuple[Literal["full", "lora", "qlora", "qlora8", "prompt"], ...] = (
        "full",
        "lora",
        "qlora",
        "prompt",
    )
    rank: int = 8
    prompt_tokens: int = 20


@dataclass(frozen=True, kw_only=True)
class StaticConfig(GridConfig):
    """Report a step that is never run: operations, bytes, memory, exchange, least time; what fits.

    Each step is compiled with and without donation.

    Attributes:
      out: Folder to whose static.jsonl rows are added.
      seed: Seed; nothing here is random.
      method: What is trained.
      fits: Find the largest batch of each combination within the budget instead.
    """

    recompute: tuple[Recompute, ...] = ("none", "full")
    attention: tuple[Attention, ...] = ("plain",)
    offload: tuple[Offload, ...] = ("none",)
    dtype: tuple[Literal["f32", "bf16", "mixed"], ...] = ("f32",)
    layers: tuple[Literal["unrolled", "scan"], ...] = ("scan",)
    accumulate: tuple[int, ...] = (1,)
    method: Literal["pretrain", "full", "lora", "prompt"] = "pretrain"
    fits: bool = False


_FIELDS = ("recompute", "attention", "zero", "offload", "weights", "dtype", "layers",
           "accumulate")  # fmt: skip


def _check(config: GridConfig) -> None:
    for name, least in (("batch", 1), ("tokens", 1), ("most", 0), ("runs", 1), ("virtual", 0)):
        value = getattr(config, name, least)
        if value < least:
            raise UserError(f"--{name} is {value}; expected {least} or more; raise it")
    if any(n < 1 for n in config.accumulate):
        raise UserError(f"--accumulate is {config.accumulate}; expected 1 or more; raise it")
    if empty := [name for name in (*_FIELDS, "donate") if not getattr(config, name, True)]:
        raise UserError(f"--{empty[0]} has no value; expected one at least; give it or leave it")
    if config.budget_gib < 0:
        raise UserError(f"--budget-gib is {config.budget_gib}; expected 0 or more; raise it")


def _devices(config: GridConfig) -> None:
    """Settle the devices; before this nothing may have started JAX."""
    import os

    # The processes in which memory is measured need room beside this one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if config.virtual:
        import jax

        if config.virtual > 64:
            raise UserError(f"--virtual is {config.virtual}; expected 64 at most; lower it")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.virtual)


def _techniques(config: GridConfig) -> Any:
    from jaxsys.bench.techniques import Technique, combinations

    choices = {name: getattr(config, name) for name in _FIELDS}
    choices["donate"] = getattr(config, "donate", (True,))
    base = Technique(**{name: values[0] for name, values in choices.items()})
    return combinations(choices, base=base, most=config.most)


def _earlier(config: TrainConfig, kind: str) -> list[dict[str, Any]]:
    from jaxsys.bench.records import read

    path = config.out / f"{kind}.jsonl" if config.out else None
    return read(path) if path is not None and path.exists() else []


def _keeper(config: GridConfig, kind: str, bar: Any, total: int) -> Any:
    from jaxsys.core.report import append_jsonl

    seen: list[Any] = []

    def keep(row: dict[str, Any]) -> None:
        seen.append(row)
        bar(len(seen), total)
        if config.out:
            append_jsonl(config.out / f"{kind}.jsonl", row)

    return keep


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(config: GridConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from jaxsys.bench.report import sections
    from jaxsys.core.report import print_table

    if not config.json:
        for section in sections(rows)[1:]:
            print_table(section.rows, title=section.title)
    return {"rows": rows}


def run_train(config: TrainConfig) -> dict[str, Any]:
    """Measure a grid of training steps."""
    return _measure(config, "train", ("pretrain",))


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Measure a grid of fine-tuning steps."""
    return _measure(config, "finetune", config.methods)


def _measure(config: Any, kind: str, methods: tuple[str, ...]) -> dict[str, Any]:
    _check(config)
    _devices(config)
    from jaxsys.bench import finetune, train
    from jaxsys.bench.shapes import config_of
    from jaxsys.bench.step import Task
    from jaxsys.evaluate.run import progress_bar

    model, techniques = config_of(config.model), _techniques(config)
    sizes = {"batch": config.batch, "tokens": config.tokens, "seed": config.seed}
    budget = int(config.budget_gib * 2**30) or None
    with progress_bar(kind) as bar:
        options: dict[str, Any] = {
            "budget_bytes": budget,
            "runs": config.runs,
            "memory": config.memory,
            "done": _earlier(config, kind),
            "on_event": _tell,
            "on_row": _keeper(config, kind, bar, len(methods) * len(techniques)),
        }
        if kind == "train":
            rows = train.measure(config.model, model, techniques, Task(**sizes), **options)
        else:
            task = Task(rank=config.rank, prompt_tokens=config.prompt_tokens, **sizes)
            rows = finetune.measure(config.model, model, methods, techniques, task, **options)
    return _show(config, rows)


def run_static(config: StaticConfig) -> dict[str, Any]:
    """Report steps that are never run."""
    _check(config)
    _devices(config)
    import jax

    from jaxsys.bench import fits, static
    from jaxsys.bench.shapes import config_of
    from jaxsys.bench.step import Task
    from jaxsys.evaluate.run import progress_bar

    model, techniques = config_of(config.model), _techniques(config)
    task = Task(config.method, batch=config.batch, tokens=config.tokens, seed=config.seed)
    with progress_bar("static") as bar:
        keep = _keeper(config, "static", bar, len(techniques))
        if config.fits:
            from jaxsys.bench.train import free_bytes

            budget = config.budget_gib * 2**30 or free_bytes(jax.devices()[0])
            rows = fits.search(
                config.model, model, techniques, task, budget, on_event=_tell, on_row=keep
            )
        else:
            rows = static.measure(config.model, model, techniques, task, on_event=_tell)
            for row in rows:
                keep(row)
    return _show(config, rows)


COMMANDS: dict[str, tuple[Any, Any]] = {
    "train": (TrainConfig, run_train),
    "finetune": (FinetuneConfig, run_finetune),
    "static": (StaticConfig, run_static),
}
