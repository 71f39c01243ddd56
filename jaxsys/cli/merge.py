"""`jaxsys merge`: merge models from files to files."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxsys.cli import merge_route, merge_tools
from jaxsys.cli.options import Output
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunConfig(Output):
    """Merge models by a recipe in mergekit's YAML; a killed run goes on where it was.

    Attributes:
      recipe: The YAML file: merge_method, models (or slices, modules), base_model, parameters,
        dtype, out_dtype, tokenizer_source or tokenizer. Paths in it are relative to this process.
      out: Folder of the merged model.
      seed: Seed of methods that draw.
      dry_run: Check everything and print the plan; write nothing.
      shard_gb: Most gigabytes in one file.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    seed: int = 0
    dry_run: bool = False
    shard_gb: float = 5.0


def run_run(config: RunConfig) -> dict[str, Any]:
    """Merge, or print the plan."""
    import jax

    from jaxsys.core.report import format_bytes
    from jaxsys.evaluate.run import progress_bar
    from jaxsys.merge.budget import check_budget
    from jaxsys.merge.files import merge_files, plan_files
    from jaxsys.merge.recipe_parse import read_recipe

    recipe = read_recipe(config.recipe)
    if config.out is None and not config.dry_run:
        raise UserError("no folder for the result is named; pass --out FOLDER, or --dry-run")
    if config.dry_run:
        plan, budget = plan_files(recipe)
        if not config.json:
            _print_plan(plan)
            print(budget)
        check_budget(budget, config.out or Path())
        return {"plan": _rows(plan), "budget": budget._asdict()}
    assert config.out is not None
    with progress_bar("merge") as bar:
        merged = merge_files(
            recipe,
            config.out,
            key=jax.random.key(config.seed),
            shard_bytes=int(config.shard_gb * 1e9),
            progress=bar,
            tell=lambda budget: print(budget, file=sys.stderr),
        )
    rate = merged.budget.read_bytes / max(merged.seconds, 1e-9)
    if not config.json:
        if merged.resumed:
            print(f"went on after {merged.resumed} tensors of an earlier run")
        print(f"{config.out}: {merged.seconds:.1f} s, {format_bytes(rate)} of models a second")
    return {
        "files": [str(file) for file in merged.files],
        "seconds": merged.seconds,
        "resumed": merged.resumed,
        "budget": merged.budget._asdict(),
    }


def _rows(plan: Any) -> list[dict[str, Any]]:
    return [
        {
            "tensor": leaf.name,
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "from": [f"{plan.sources[n].name}:{name}" for n, name in leaf.inputs],
            "base": None if leaf.base is None else plan.sources[leaf.base[0]].name,
            "weights": list(leaf.weights),
            "options": "copied" if leaf.config is None else str(leaf.config),
        }
        for leaf in plan.leaves
    ]


def _print_plan(plan: Any) -> None:
    from jaxsys.core.report import print_table

    rows = [
        {
            "tensor": row["tensor"],
            "shape": "×".join(map(str, row["shape"])),
            "dtype": row["dtype"],
            "weights": " ".join(f"{w:g}" for w in row["weights"]),
            "options": row["options"],
        }
        for row in _rows(plan)
    ]
    print_table(rows, title=f"{len(plan.sources)} models")


COMMANDS = {"run": (RunConfig, run_run), **merge_route.COMMANDS, **merge_tools.COMMANDS}
