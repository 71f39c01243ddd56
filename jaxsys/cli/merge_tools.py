"""`jaxsys merge extract`, `upcycle` and `tune`: what stands beside the merging itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsys.cli.options import Common
from jaxsys.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExtractCommand(Common):
    """Write the difference of two models as a LoRA folder in PEFT's layout.

    Attributes:
      out: Folder of the adapter.
      seed: Not used; nothing is random.
      base: The model that was tuned, a folder or safetensors file.
      tuned: What came of it.
      rank: Rank of every matrix, or its bound where energy is given.
      energy: Take the smallest rank that holds this share of the squared difference instead.
      whole: Globs over names of tensors to store as they are.
    """

    base: str
    tuned: str
    rank: int | None = None
    energy: float | None = None
    whole: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UpcycleCommand(Common):
    """Join dense Llama or Mistral models as experts of one Mixtral-form mixture.

    Attributes:
      out: Folder of the mixture.
      seed: Seed of the gate `random`.
      recipe: YAML as mergekit-moe's: base_model, experts with source_model and positive_prompts,
        gate_mode (hidden, cheap_embed, random, zero), experts_per_token, dtype.
    """

    recipe: Path


@dataclass(frozen=True, kw_only=True)
class TuneCommand(Common):
    """Search a recipe's weights, densities and options for the least loss on a text.

    Attributes:
      out: Folder for the record and recipe.yaml, the recipe found; a stopped search goes on there.
      seed: Seed of the search.
      recipe: YAML with models, and base_model where the method needs one.
      text: What to predict: UTF-8 files.
      parameters: What is searched: weight, density, lambda_, t and so on.
      low: Lower end of each.
      high: Upper end of each.
      layer_groups: Groups of consecutive layers with values of their own.
      filters: Parts of tensor names with values of their own.
      generations: Of the search.
      population: Candidates in each generation; chosen by the number of parameters by default.
      rows: Rows of text in the objective.
      length: Tokens in a row.
    """

    recipe: Path
    text: tuple[Path, ...]
    parameters: tuple[str, ...] = ("weight",)
    low: float = 0.0
    high: float = 1.0
    layer_groups: int = 1
    filters: tuple[str, ...] = ()
    generations: int = 20
    population: int | None = None
    rows: int = 16
    length: int = 128


def run_extract(config: ExtractCommand) -> dict[str, Any]:
    """Write the adapter and print what it holds."""
    from jaxsys.core.report import print_table
    from jaxsys.merge.adapters import open_reference
    from jaxsys.merge.extract import extract_adapter

    rank = 16 if config.rank is None and config.energy is None else config.rank
    found = extract_adapter(
        open_reference(config.base),
        open_reference(config.tuned),
        _folder(config.out),
        rank=rank,
        energy=config.energy,
        whole=config.whole,
        in_out=_in_out(config.base),
        base_name=config.base,
    )
    rows = [{"tensor": n, "rank": r, "kept": found.kept[n]} for n, r in found.ranks.items()]
    if not config.json:
        print_table(rows, title=f"{config.out}: rank, and share of the squared difference kept")
        if found.left_out:
            print(f"changed and left out: {', '.join(found.left_out)}")
    files = [str(file) for file in found.files]
    return {"tensors": rows, "left_out": found.left_out, "files": files}


def run_upcycle(config: UpcycleCommand) -> dict[str, Any]:
    """Write the mixture."""
    import jax

    from jaxsys.data.text import read_text
    from jaxsys.merge.upcycle import upcycle
    from jaxsys.merge.upcycle_recipe import parse_mixture

    recipe = parse_mixture(read_text(config.recipe))
    found = upcycle(
        recipe.base,
        recipe.experts,
        _folder(config.out),
        gate=recipe.gate,
        experts_per_token=recipe.experts_per_token,
        key=jax.random.key(config.seed),
        dtype=recipe.dtype,
    )
    if not config.json:
        print(f"{config.out}: {found.config.experts} experts, ", end="")
        print(f"most alike router rows {max(found.alike):.3f} (cosine)")
    return {"files": [str(file) for file in found.files], "alike": found.alike}


def run_tune(config: TuneCommand) -> dict[str, Any]:
    """Search, and print start and best."""
    from jaxsys.core.report import print_table
    from jaxsys.evaluate.run import progress_bar
    from jaxsys.merge.space import Range
    from jaxsys.merge.tune import TuneConfig
    from jaxsys.merge.tune_recipe import read_document, text_rows, tune_recipe

    document = read_document(config.recipe)
    tokens = text_rows(document, config.text, config.rows, config.length, seed=config.seed)
    middle = (config.low + config.high) / 2
    with progress_bar("tune") as bar:
        found = tune_recipe(
            document,
            tokens,
            dict.fromkeys(config.parameters, Range(config.low, config.high, middle)),
            layer_groups=config.layer_groups,
            filters=config.filters,
            config=TuneConfig(config.generations, config.population, seed=config.seed),
            out=_folder(config.out),
            progress=lambda generation, value: bar(generation, config.generations),
        )
    tuned = found.tuned
    if not config.json:
        print_table([{"parameter": n, "value": v} for n, v in tuned.named.items()])
        print(f"nats per token: {tuned.start_value:.4f} -> {tuned.value:.4f}; {found.file}")
    return {
        "start": tuned.start_value,
        "best": tuned.value,
        "evaluations": tuned.evaluations,
        "parameters": tuned.named,
        "recipe": str(found.file),
    }


def _folder(out: Path | None) -> Path:
    if out is None:
        raise UserError("no folder for the result is named; pass --out FOLDER")
    return out


def _in_out(model: str) -> bool:
    """Say whether a model's matrices are [in, out], where its family is known."""
    from jaxsys.models import lm
    from jaxsys.models.lm.families import layout_of

    try:
        return layout_of(lm.load_config(lm.find_model(model))).in_out
    except (UserError, OSError):
        return False


COMMANDS = {
    "extract": (ExtractCommand, run_extract),
    "upcycle": (UpcycleCommand, run_upcycle),
    "tune": (TuneCommand, run_tune),
}
