"""Search the numbers of a recipe for the least loss of the merged language model on a text."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from jaxsys.core import report
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, unflatten
from jaxsys.data import TokenStream, load_tokenizer, read_text
from jaxsys.merge.adapters import split_reference
from jaxsys.merge.plan import Leaf, MergePlan, plan_merge
from jaxsys.merge.recipe_parse import read_recipe, recipe_of
from jaxsys.merge.space import Range, Space, parameter_space
from jaxsys.merge.tune import TuneConfig, Tuned, merge_objective, tune
from jaxsys.merge.vocabulary import reorder_rows
from jaxsys.models import lm

FOUND = "recipe.yaml"


class TunedRecipe(NamedTuple):
    """Say what the search found.

    Attributes:
      tuned: the search.
      document: the recipe with the best values, as YAML holds it.
      file: where it was written, or None.

    >>> TunedRecipe._fields
    ('tuned', 'document', 'file')
    """

    tuned: Tuned
    document: dict[str, Any]
    file: Path | None


def tune_recipe(
    document: Mapping[str, Any],
    tokens: Integer[np.ndarray, "B T"],
    ranges: Mapping[str, Range],
    *,
    layer_groups: int = 1,
    filters: Sequence[str] = (),
    config: TuneConfig | None = None,
    out: str | Path | None = None,
    key: jax.Array | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> TunedRecipe:
    """Merge by a recipe again and again, each time by other numbers, and keep the best.

    All models of the recipe are in memory at once, in the dtype of their files, and one merged
    model in float32 for each candidate that is scored at a time.

    Args:
      document: a recipe as YAML gives it, with ``models`` (slices and modules have no search).
      tokens: rows of text in ids of the merged model; the objective is the mean loss of all but
        the first token of each.
      ranges: what is searched, by the method's name for it (``weight``, ``density``, ``lambda``).
      layer_groups: as `parameter_space`.
      filters: as `parameter_space`.
      config: the search; its defaults by default.
      out: folder for the record and ``recipe.yaml``, the recipe found.
      key: of methods that draw; that of `merge_files` by default.
      progress: called with generation and best value.

    Returns:
      The search and the recipe.

    Raises:
      UserError: for a recipe that cannot be merged or searched, and as `tune`.

    >>> tune_recipe({"merge_method": "linear", "models": [{"model": "nowhere"}]},
    ...             np.zeros((1, 4), np.int32), {"weight": Range(0.0, 1.0, 0.5)})
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the model nowhere is neither a folder nor a safetensors file; ...
    """
    recipe = recipe_of(document)
    if recipe.renumber or "models" not in document:
        raise UserError(
            "the recipe has slices or modules, which have no search; expected models; write the "
            "merge as models with filters"
        )
    # A method that insists on a number must not miss the one that is searched.
    starts = {name: bounds.start for name, bounds in ranges.items()}
    plan = plan_merge(replace(recipe, parameters=starts | dict(recipe.parameters)))
    merged = [leaf for leaf in plan.leaves if leaf.config is not None]
    n_models = len(merged[0].inputs)
    space = parameter_space(
        [leaf.name for leaf in merged],
        n_models,
        {_field(name): bounds for name, bounds in ranges.items()},
        layer_groups=layer_groups,
        filters=filters,
    )
    model = lm.config_from_hf(json.loads(plan.config_json or "{}"))
    copied, base, models = _load(plan, n_models)

    def score(params: Any, copied: Any, tokens: Any) -> Any:
        return lm.loss(unflatten(copied | flatten(params)), model, tokens)

    leaves = {leaf.name: leaf for leaf in merged}
    objective = merge_objective(
        plan.method,
        space,
        score,
        config=lambda path: leaves[path].config,
        weights=lambda path: leaves[path].weights,
        key=jax.random.key(0) if key is None else key,
    )
    operands = (models, base, copied, jnp.asarray(tokens))
    search = config or TuneConfig()
    found = tune(
        objective,
        space.coordinates,
        operands,
        search,
        out=out,
        identity=_identity(document, plan, tokens, key),
        progress=progress,
    )
    names = [plan.sources[number].name for number, _ in merged[0].inputs]
    best = write_values(document, space, found.best, names)
    file = None
    if out is not None:
        import yaml

        file = Path(out) / FOUND
        report.atomic_write(file, yaml.safe_dump(best, sort_keys=False))
    return TunedRecipe(found, best, file)


def _identity(document: Mapping[str, Any], plan: MergePlan, tokens: Any, key: Any) -> str:
    """Hash what decides a candidate's value: recipe, text, key, and the models' files by age."""
    told = [json.dumps(document, sort_keys=True, default=str), repr(np.asarray(tokens).tolist())]
    told.append("" if key is None else repr(jax.random.key_data(key).tolist()))
    for source in plan.sources:
        place = source.folder or Path(split_reference(source.name)[0])
        for file in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
            told.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}")
    return hashlib.blake2b("\n".join(told).encode(), digest_size=16).hexdigest()


def _field(name: str) -> str:
    return "lambda_" if name == "lambda" else name


def _load(plan: MergePlan, n_models: int) -> tuple[dict[str, Any], Any, list[dict[str, Any]]]:
    """Read what is copied, the base, and the models, each flat, with rows in the plan's order."""
    copied: dict[str, Any] = {}
    base: dict[str, Any] = {}
    models: list[dict[str, Any]] = [{} for _ in range(n_models)]
    for leaf in plan.leaves:
        own_base, arrays = _read(plan, leaf)
        if leaf.config is None:
            copied[leaf.name] = jnp.asarray(arrays[0])
            continue
        if own_base is not None:
            base[leaf.name] = jnp.asarray(own_base)
        for model, array in zip(models, arrays, strict=True):
            model[leaf.name] = jnp.asarray(array)
    return copied, base or None, models


def _read(plan: MergePlan, leaf: Leaf) -> tuple[Any, list[Any]]:
    names = dict(leaf.inputs) | (dict([leaf.base]) if leaf.base else {})
    if leaf.rows and plan.rows is not None:
        whole = [s.tensors[names.get(i, leaf.name)] for i, s in enumerate(plan.sources)]
        moved: Mapping[int, Any] = dict(enumerate(reorder_rows(plan.rows, whole)))
    else:
        moved = {number: plan.sources[number].tensors[name] for number, name in names.items()}
    return leaf.base and moved[leaf.base[0]], [moved[number] for number, _ in leaf.inputs]


def write_values(
    document: Mapping[str, Any], space: Space, vector: Any, models: Sequence[str]
) -> dict[str, Any]:
    """Put a vector's values into a recipe, as numbers or as lists of filters with numbers.

    Args:
      document: the recipe; not changed.
      space: what the vector says.
      vector: `[n]`.
      models: names of the N models, in the vector's order.

    >>> space = parameter_space(["w"], 1, {"weight": Range(0.0, 1.0, 0.5)})
    >>> write_values({"models": [{"model": "a"}]}, space, [0.25], ["a"])["models"]
    [{'model': 'a', 'parameters': {'weight': 0.25}}]
    """
    entries = [dict(entry) for entry in document["models"]]
    by_name = {_name(entry["model"]): entry for entry in entries}
    shared = dict(document.get("parameters") or {})
    for parameter, model in dict.fromkeys((p, m) for p, m, _ in space.slots):
        values = {
            path: round(float(vector[space.slots[parameter, model, group]]), 6)
            for path, group in space.group_of.items()
        }
        key = "lambda" if parameter == "lambda_" else parameter
        if model is None:
            shared[key] = _setting(values)
            continue
        if models[model] not in by_name:  # the base, which methods without one count as a model
            by_name[models[model]] = {"model": models[model]}
            entries.append(by_name[models[model]])
        entry = by_name[models[model]]
        entry["parameters"] = dict(entry.get("parameters") or {}) | {key: _setting(values)}
    return dict(document) | {"models": entries} | ({"parameters": shared} if shared else {})


def _name(model: Any) -> str:
    if isinstance(model, Mapping):
        return "+".join(str(model[key]) for key in ("model", "lora") if model.get(key))
    return str(model)


def _setting(values: Mapping[str, float]) -> Any:
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    # Longer names first: a filter holds for every name that contains it.
    order = sorted(values, key=len, reverse=True)
    return [{"filter": path, "value": values[path]} for path in order]


def read_document(path: str | Path) -> dict[str, Any]:
    """Read a recipe's YAML as it stands.

    Raises:
      UserError: for a file that cannot be read or is no mapping.

    >>> read_document("nowhere.yaml")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    import yaml

    read_recipe(path)  # says what is wrong with it
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def text_rows(
    document: Mapping[str, Any],
    texts: Sequence[str | Path],
    rows: int,
    length: int,
    *,
    seed: int = 0,
) -> Integer[np.ndarray, "B T"]:
    """Cut rows from texts in ids of the recipe's base, or first, model.

    Args:
      document: the recipe.
      texts: UTF-8 files, which give equally many rows.
      rows: in all.
      length: tokens of each.
      seed: of the order.

    Raises:
      UserError: for texts that are too short, or a model without a tokenizer.

    >>> text_rows({"base_model": "nowhere"}, [], 4, 8)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: there is no text to predict; ...
    """
    if not texts:
        raise UserError("there is no text to predict; expected UTF-8 files; name some")
    if rows < len(texts) or length < 2:
        raise UserError(
            f"{rows} rows of {length} tokens are wanted from {len(texts)} texts; expected at "
            "least one row for each and two tokens in a row; raise the numbers"
        )
    model = document.get("base_model") or document["models"][0]["model"]
    folder, _ = split_reference(_name(model))
    tokenizer = load_tokenizer(folder)
    found = []
    for i, text in enumerate(texts):
        ids = np.asarray(tokenizer.encode(read_text(text)), np.int32)
        count = rows // len(texts) + (i < rows % len(texts))
        found.append(TokenStream(ids, count, length - 1, seed=seed).batch_at(0))
    return np.concatenate(found)
