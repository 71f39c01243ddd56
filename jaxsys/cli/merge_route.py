"""`jaxsys merge route` and `merge conflicts`: where experts differ, and serving them in parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxsys.cli.options import Common, Output
from jaxsys.core.errors import UserError

Built = Annotated[Path | None, tyro.conf.Positional]
Definition = Literal["pairwise_sign", "any_sign", "magnitude"]


@dataclass(frozen=True, kw_only=True)
class ConflictsCommand(Output):
    """Say where experts of one base pull apart, by layer and by tensor.

    Attributes:
      out: Folder for conflicts.json, the table and a heat map.
      base: What all experts began with: a model's name or path.
      models: Two experts or more.
      quantile: Entries below this quantile of a task vector's magnitudes are left out of the two
        definitions by signs; 0 leaves out none.
    """

    base: str
    models: tuple[str, ...]
    out: Path | None = None
    quantile: float = 0.8


@dataclass(frozen=True, kw_only=True)
class RouteCommand(Common):
    """Build Mediator from experts (--base, --models, --out), or answer from one (DIR --prompt).

    Attributes:
      built: A folder that this command built, to answer from.
      prompt: What to continue, with a folder.
      max_tokens: New tokens at most.
      out: Folder to build.
      base: What all experts began with: a model's name or path.
      models: The experts.
      names: Of the experts; their paths' last parts by default.
      texts: A text file of each expert's task, on which the router is trained.
      router: head: trained on the texts; entropy or nll: the experts' own uncertainty.
      quantile: Of the denoising before conflict is measured.
      conflict: How conflict is measured.
      layers: How the layers to route are chosen.
      value: λ of gaussian, q of quantile, k of topk, t of absolute.
      density: Share of entries that an expert's sparse part keeps.
      bits: Of a sparse value.
      threshold: Uncertainty below which one expert serves alone.
    """

    built: Built = None
    prompt: str | None = None
    max_tokens: int = 64
    base: str | None = None
    models: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()
    router: Literal["head", "entropy", "nll"] = "head"
    quantile: float = 0.8
    conflict: Definition = "pairwise_sign"
    layers: Literal["gaussian", "quantile", "topk", "absolute"] = "gaussian"
    value: float = 1.0
    density: float = 0.1
    bits: Literal[32, 16, 8, 4, 2] = 16
    threshold: float = 0.5


def run_conflicts(config: ConflictsCommand) -> dict[str, Any]:
    """Print the table of layers; write it, the JSON and the heat map."""
    from jaxsys.core.report import atomic_write, markdown_table, print_table, save_figure, to_json
    from jaxsys.merge.conflict import conflicts
    from jaxsys.merge.figures import heat_map
    from jaxsys.models import lm

    if len(config.models) < 2:
        raise UserError(f"got {len(config.models)} models; conflict takes two; name more")
    base, *models = (lm.open_tensors(lm.find_model(n))[1] for n in (config.base, *config.models))
    found = conflicts(base, models, quantile=config.quantile)
    rows = [
        {"layer": layer, "parameters": found.sizes[layer]} | {k: round(v, 4) for k, v in d.items()}
        for layer, d in found.layers.items()
    ]
    result = {
        "base": config.base,
        "models": config.models,
        "quantile": config.quantile,
        "layers": found.layers,
        "tensors": found.tensors,
    }
    if not config.json:
        print_table(rows)
    if config.out:
        atomic_write(config.out / "conflicts.json", to_json(result) + "\n")
        atomic_write(config.out / "conflicts.md", markdown_table(rows))
        save_figure(heat_map(found), config.out / "conflicts.png")
    return result


def run_route(config: RouteCommand) -> dict[str, Any]:
    """Build a folder, or answer from one."""
    if config.built is not None and config.base is None:
        return _answer(config)
    if config.base is None or not config.models or config.out is None or config.built is not None:
        raise UserError(
            "neither a build nor a question; expected --base, --models and --out to build, or the "
            "folder of a build and --prompt to answer; give one of the two"
        )
    from jaxsys.core.report import print_table
    from jaxsys.merge.mediator import LayerChoice, MediatorConfig
    from jaxsys.merge.route import RouterPlan, build_route
    from jaxsys.merge.router import BlendConfig

    mediator = MediatorConfig(
        quantile=config.quantile,
        conflict=config.conflict,
        choice=LayerChoice(config.layers, config.value),
        density=config.density,
        bits=config.bits,
    )
    plan = RouterPlan(config.router, config.texts, blend=BlendConfig(config.threshold))
    built = build_route(
        config.base,
        config.models,
        config.out,
        mediator,
        plan,
        names=config.names,
        seed=config.seed,
    )
    if not config.json:
        d = built.conflicts.of_layers(config.conflict)
        print_table(
            [
                {"layer": layer, "conflict": round(d[layer], 4), "routed": layer in built.layers}
                for layer in d
            ]
        )
        told = f"{built.cost.stored_bytes} bytes, {built.cost.ratio:.3f} times one model"
        print(f"{config.out}: {told}")
    return {"out": config.out, "layers": built.layers, "cost": built.cost._asdict()}


def _answer(config: RouteCommand) -> dict[str, Any]:
    from jaxsys.core.report import atomic_write, to_json
    from jaxsys.merge.route import Route

    if config.prompt is None:
        raise UserError("there is nothing to answer; expected --prompt with a folder; give one")
    assert config.built is not None
    told = Route(config.built).answer(config.prompt, max_tokens=config.max_tokens)
    if not config.json:
        shown = ", ".join(f"{name} {weight:.2f}" for name, weight in told.weights.items())
        print(f"[{shown}; uncertainty {told.uncertainty:.2f}]")
        print(told.text)
    result = told._asdict()
    if config.out:
        atomic_write(config.out / "route.json", to_json(result) + "\n")
    return result


COMMANDS = {
    "route": (RouteCommand, run_route),
    "conflicts": (ConflictsCommand, run_conflicts),
}
