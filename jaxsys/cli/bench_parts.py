"""Verbs of `jaxsys bench`: modules, operators, communication, report and compare."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxsys.cli.options import Common, Output
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModulesConfig(Common):
    """Split a training step's time over the parts of a model, profiled and part by part.

    Attributes:
      out: Folder to whose modules.jsonl the row is added.
      seed: Seed of parameters and data.
      model: A named shape (small, llama-1.3b, llama2-7b, …) or a model's path.
      batch: Rows of a step.
      tokens: Tokens of a row.
      recompute: What the backward pass computes again.
      attention: How attention is computed.
      dtype: Of parameters and computation.
      layers: One after another in the program, or one block in a loop.
      rounds: Timed rounds.
    """

    model: str = "small"
    batch: int = 4
    tokens: int = 256
    recompute: Literal["none", "full", "dots", "weight_dots", "host_dots"] = "none"
    attention: Literal["plain", "xla", "cudnn"] = "plain"
    dtype: Literal["f32", "bf16", "mixed"] = "f32"
    layers: Literal["unrolled", "scan"] = "unrolled"
    rounds: int = 10


@dataclass(frozen=True, kw_only=True)
class OpsConfig(Common):
    """Time single operators beside the least time that they could take (the roofline).

    Attributes:
      out: Folder to whose ops.jsonl the rows are added.
      seed: Seed; the operators' inputs are always the same.
      groups: Of matmul, attention, norm, softmax, elementwise, gather; all if left out.
      size: How large: for a test, for a processor, for a GPU; auto looks at the first device.
      runs: Timed rounds.
    """

    groups: tuple[str, ...] = ()
    size: Literal["auto", "smoke", "cpu", "gpu"] = "auto"
    runs: int = 10


@dataclass(frozen=True, kw_only=True)
class CommConfig(Common):
    """Time host-device copies and collectives over all devices, and fit t = α + β·n to each.

    Attributes:
      out: Folder to whose comm.jsonl the rows are added.
      seed: Seed; nothing here is random.
      virtual: On a CPU, this many virtual devices; 0 leaves the devices as they are.
      sizes: Bytes; 1 KiB to 16 MiB if left out.
      runs: Timed rounds.
    """

    virtual: int = 0
    sizes: tuple[int, ...] = ()
    runs: int = 10


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Output):
    """Write tables and figures of results, as Markdown and as one HTML page.

    Attributes:
      results: Folder of .jsonl files, or one file.
      out: Folder for report.md, report.html and figures; that of the results if left out.
      title: Heading.
    """

    results: Path
    out: Path | None = None
    title: str = "Where the time goes"


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Output):
    """Compare two sets of results: ratios with intervals, and which differences are significant.

    Attributes:
      a: Results file or folder.
      b: Likewise; ratios are B / A.
    """

    a: Path
    b: Path


def _keep(config: Common, rows: list[dict[str, Any]]) -> None:
    from jaxsys.core.report import append_jsonl

    if config.out:
        for row in rows:
            append_jsonl(config.out / f"{row['kind']}.jsonl", row)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(config: Output, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print what the report would say of some rows, and give them as the result."""
    from jaxsys.bench.report import sections
    from jaxsys.core.report import print_table

    if not config.json:
        for section in sections(rows)[1:]:
            print_table(section.rows, title=section.title)
            print(*section.notes, sep="\n")
    return {"rows": rows}


def run_modules(config: ModulesConfig) -> dict[str, Any]:
    """Take a step apart."""
    from jaxsys.bench.dissect import measure
    from jaxsys.bench.shapes import config_of
    from jaxsys.bench.step import Task
    from jaxsys.bench.techniques import Technique

    _positive(batch=config.batch, tokens=config.tokens, rounds=config.rounds)
    technique = Technique(
        recompute=config.recompute,
        attention=config.attention,
        dtype=config.dtype,
        layers=config.layers,
    )
    flags = {
        "model": config.model,
        "batch": config.batch,
        "tokens": config.tokens,
        "technique": technique.name,
    }
    task = Task(batch=config.batch, tokens=config.tokens, seed=config.seed)
    model = config_of(config.model)
    row = measure(model, technique, task, flags, rounds=config.rounds, on_event=_tell)
    _keep(config, [row])
    return _show(config, [row])


def run_ops(config: OpsConfig) -> dict[str, Any]:
    """Time operators."""
    from dataclasses import replace

    import jax

    from jaxsys.bench import ops

    _positive(runs=config.runs)
    sizes = {"smoke": ops.SMOKE, "cpu": ops.Sweep(), "gpu": ops.ON_GPU}
    platform = "cpu" if jax.devices()[0].platform == "cpu" else "gpu"
    sweep = sizes[platform if config.size == "auto" else config.size]
    if config.groups:
        sweep = replace(sweep, groups=config.groups)
    rows = ops.measure(sweep, runs=config.runs, on_event=_tell)
    _keep(config, rows)
    return _show(config, rows)


def run_comm(config: CommConfig) -> dict[str, Any]:
    """Time copies and collectives."""
    import jax

    _positive(runs=config.runs)
    if config.virtual:
        if not 1 <= config.virtual <= 64:
            raise UserError(
                f"--virtual is {config.virtual}; expected 1 to 64 virtual devices; change it"
            )
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", config.virtual)
    from jaxsys.bench import comm

    rows = comm.measure(config.sizes or comm.SIZES, runs=config.runs, on_event=_tell)
    _keep(config, rows)
    return _show(config, rows)


def run_report(config: ReportConfig) -> dict[str, Any]:
    """Write a report."""
    from jaxsys.bench.records import read_all
    from jaxsys.bench.report import write

    rows = read_all(config.results)
    folder = config.out or (config.results if config.results.is_dir() else config.results.parent)
    files = write(rows, folder, title=config.title)
    if not config.json:
        print(*files, sep="\n")
    return {"rows": len(rows), "files": files}


def run_compare(config: CompareConfig) -> dict[str, Any]:
    """Compare two sets of results."""
    from jaxsys.bench.compare import compare
    from jaxsys.bench.records import read_all
    from jaxsys.core.report import print_table

    found = compare(read_all(config.a), read_all(config.b))
    changes = [{**change._asdict(), "significant": change.significant} for change in found.changes]
    if not config.json:
        print_table([_line(change) for change in changes], title="B / A")
        for kind, row, one, other in found.statuses:
            print(f"{kind}, {row}: {one} in A, {other} in B")
        for name, only in (("A", found.only_a), ("B", found.only_b)):
            for kind, row in only:
                print(f"only in {name}: {kind}, {row}")
        if found.repeated:
            print(f"{found.repeated} rows have the flags of a later row, which alone counts")
    return {
        "changes": changes,
        "statuses": found.statuses,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "repeated": found.repeated,
    }


def _line(change: dict[str, Any]) -> dict[str, Any]:
    low, high, p = change["low"], change["high"], change["p"]
    verdict = {True: "yes", False: "no", None: "not tested"}[change["significant"]]
    return {
        "kind": change["kind"],
        "row": change["row"],
        "figure": change["figure"],
        "A": change["a"],
        "B": change["b"],
        "ratio": change["ratio"],
        "95 %": None if low is None else f"{low:.3f} to {high:.3f}",
        "p (Holm)": None if p is None else f"{p:.2g}",
        "significant": verdict,
    }


def _positive(**given: int) -> None:
    for name, value in given.items():
        if value < 1:
            raise UserError(f"--{name} is {value}; expected 1 or more; raise it")


COMMANDS: dict[str, tuple[Any, Any]] = {
    "modules": (ModulesConfig, run_modules),
    "ops": (OpsConfig, run_ops),
    "comm": (CommConfig, run_comm),
    "report": (ReportConfig, run_report),
    "compare": (CompareConfig, run_compare),
}
