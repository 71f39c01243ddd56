"""From a recipe and opened models to a list of leaves: where each is read, how it is merged."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.merge.contract import Method, check_inputs, find_method
from jaxsys.merge.methods import METHODS
from jaxsys.merge.recipe import Input, Recipe, Slice, look_up
from jaxsys.merge.sources import (
    Source,
    is_output,
    layer_prefix,
    open_source,
    output_config,
    settle_sources,
    split_layer,
)
from jaxsys.merge.vocabulary import EmbeddingPlan, has_token_rows

_PER_MODEL = ("weight", "density", "gamma", "epsilon", "scale")
_NEEDS_WEIGHT = ("linear", "nuslerp", "multislerp")


class Leaf(NamedTuple):
    """Say how one tensor of the result is made.

    Attributes:
      name: in the result.
      shape: of the result.
      dtype: of the result.
      inputs: models, as (number of the source, name of its tensor).
      base: likewise, or None.
      weights: w, one for each model.
      config: the method's options for this tensor; None copies the one input.
      rows: its rows are tokens, which the plan's `rows` brings into one order.

    >>> Leaf("w", (2,), np.dtype("f4"), ((0, "w"),), None, (1.0,), None, False).name
    'w'
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    inputs: tuple[tuple[int, str], ...]
    base: tuple[int, str] | None
    weights: tuple[float, ...]
    config: Any
    rows: bool


class MergePlan(NamedTuple):
    """Hold everything that is decided before a number is read.

    Attributes:
      method: how leaves are merged.
      sources: the models, opened.
      leaves: tensors of the result, in order.
      rows: how rows of embeddings move, or None.
      config_json: text of the result's config.json, or None.
      donor: number of the source whose other files are taken.

    >>> MergePlan._fields[2]
    'leaves'
    """

    method: Method
    sources: tuple[Source, ...]
    leaves: tuple[Leaf, ...]
    rows: EmbeddingPlan | None
    config_json: str | None
    donor: int


class _Part(NamedTuple):
    """One tensor of the result before shapes are looked at."""

    name: str
    sources: tuple[tuple[Input, str], ...]
    base: str | None
    depth: float
    part: Slice


def plan_merge(recipe: Recipe) -> MergePlan:
    """Open the models of a recipe and decide how each tensor of the result is made.

    Args:
      recipe: what to merge.

    Returns:
      The plan; headers of the files are all that was read.

    Raises:
      UserError: for models or options that do not fit the method, and for tensors that are missing
        or of another shape, all of them together.

    >>> plan_merge(Recipe("linear", (Slice((Input("nowhere"),)),)))
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the model nowhere is neither a folder nor a safetensors file; ...
    """
    method = find_method(METHODS, recipe.merge_method)
    _check_parameters(recipe, method)
    names = recipe.models()
    sources = [open_source(name) for name in names]
    donor = names.index(recipe.base_model) if recipe.base_model else 0
    sources, rows, tied = settle_sources(sources, donor, recipe.tokenizer)
    by_name = dict(zip(names, range(len(names)), strict=True))
    prefixes = [layer_prefix(s)[0] for s in sources] if recipe.renumber else None
    parts, layers = _parts(recipe, sources, by_name, prefixes)
    leaves = _leaves(recipe, method, parts, sources, by_name, rows)
    changes = {
        "layers": layers,
        "dtype": recipe.out_dtype or recipe.dtype,
        "rows": None if rows is None else rows.rows,
        "tied": tied,
    }
    config = sources[donor].config
    text = output_config(config, changes) if config else None
    return MergePlan(method, tuple(sources), tuple(leaves), rows, text, donor)


def _parts(
    recipe: Recipe,
    sources: Sequence[Source],
    by_name: Mapping[str, int],
    prefixes: Sequence[str] | None,
) -> tuple[list[_Part], int | None]:
    """List the result's tensors with where they come from, in order; count renumbered layers."""
    first, last = recipe.slices[0], recipe.slices[-1]
    if prefixes is None:
        whole = _with_base(recipe, first)
        names = dict.fromkeys(n for s in whole.sources for n in sources[by_name[s.model]].shapes)
        counts = [_count(n) for n in names]
        depth = max(counts, default=0)
        parts = [
            _Part(
                n,
                tuple((s, n) for s in whole.sources),
                whole.base_model,
                c / depth if c > 0 and depth else float(depth == 0 and c == 0),
                whole,
            )
            for n, c in zip(names, counts, strict=True)
        ]
        return parts, None
    parts, behind = [], []
    lead = by_name[first.sources[0].model]
    for n in sources[lead].shapes:
        parsed = split_layer(n)
        if not (parsed and parsed[0] == prefixes[lead]):
            part = last if is_output(n) else first
            one = _Part(n, tuple((s, n) for s in part.sources), part.base_model, 0.0, part)
            (behind if is_output(n) else parts).append(one)
    layers = 0
    for part in recipe.slices:
        part = dataclasses.replace(part, base_model=part.base_model or recipe.base_model)
        ranges = [_range(s, sources[by_name[s.model]]) for s in part.sources]
        count = ranges[0][1] - ranges[0][0]
        for i in range(count):
            parts += _layer(part, sources, by_name, prefixes, ranges, i, count, layers + i)
        layers += count
    parts = [p._replace(base=p.base or recipe.base_model) for p in [*parts, *behind]]
    return parts, layers


def _layer(part, sources, by_name, prefixes, ranges, i, count, number) -> list[_Part]:
    """List one layer's tensors, renumbered, with their names in each source."""
    lead = by_name[part.sources[0].model]
    rests = []
    for n in sources[lead].shapes:
        parsed = split_layer(n)
        if parsed and parsed[:2] == (prefixes[lead], ranges[0][0] + i):
            rests.append(parsed[2])
    depth = i / (count - 1) if count > 1 else 1.0
    made = []
    for rest in rests:
        inputs = []
        for source, (start, _) in zip(part.sources, ranges, strict=True):
            inputs.append((source, f"{prefixes[by_name[source.model]]}{start + i}{rest}"))
        name = f"{prefixes[lead]}{number}{rest}"
        made.append(_Part(name, tuple(inputs), part.base_model, depth, part))
    return made


def _count(name: str) -> int:
    parsed = split_layer(name)
    return -1 if parsed is None else parsed[1]


def _with_base(recipe: Recipe, part: Slice) -> Slice:
    """Take the base into the list of models, as mergekit does."""
    sources = part.sources
    if recipe.base_model and all(s.model != recipe.base_model for s in sources):
        sources = (*sources, Input(recipe.base_model))
    return Slice(sources, recipe.base_model, part.parameters)


def _range(source: Input, opened: Source) -> tuple[int, int]:
    count = layer_prefix(opened)[1]
    start, end = source.layers or (0, count)
    if end > count:
        raise UserError(
            f"layer_range [{start}, {end}] of {source.model} goes beyond its {count} layers; "
            "correct it"
        )
    return start, end


def _leaves(
    recipe: Recipe,
    method: Method,
    parts: Sequence[_Part],
    sources: Sequence[Source],
    by_name: Mapping[str, int],
    rows: EmbeddingPlan | None,
) -> list[Leaf]:
    leaves, wrong = [], []
    for part in parts:
        inputs, base = _split_base(part, method, by_name)
        everything = [*inputs, *([base] if base else [])]
        shapes = [_shape(sources[number], name, rows) for number, name in everything]
        if len(set(shapes)) > 1 or None in shapes:
            told = [
                f"{'missing' if shape is None else list(shape)} in {sources[number].name}"
                for (number, _), shape in zip(everything, shapes, strict=True)
            ]
            wrong.append(f"{part.name} is {', '.join(told)}")
            continue
        if inputs or base is None:  # a slice of the base alone is copied
            check_inputs(recipe.merge_method, method, len(inputs), has_base=base is not None)
        leaves.append(_leaf(recipe, method, part, inputs, base, sources, rows))
    if wrong:
        what = "1 tensor does" if len(wrong) == 1 else f"{len(wrong)} tensors do"
        raise UserError(
            f"{what} not fit: {'; '.join(wrong)}; merge models of one architecture, and give a "
            "tokenizer_source where vocabularies differ"
        )
    return leaves


def _shape(source: Source, name: str, rows: EmbeddingPlan | None) -> tuple[int, ...] | None:
    """Give the shape of a tensor once its rows are in order, or None if it is missing."""
    spec = source.shapes.get(name)
    if spec is None or rows is None or not has_token_rows(name):
        return None if spec is None else tuple(spec.shape)
    return (rows.rows, *spec.shape[1:])


def _split_base(part: _Part, method: Method, by_name: Mapping[str, int]):
    """Tell the base apart from the models, where the method has use for one."""
    inputs = [(by_name[source.model], name) for source, name in part.sources]
    if method.base == "unused" or part.base is None:
        return inputs, None
    number = by_name[part.base]
    own = [name for n, name in inputs if n == number]
    base = (number, own[0] if own else part.sources[0][1])
    return [pair for pair in inputs if pair[0] != number], base


def _leaf(recipe, method, part, inputs, base, sources, rows) -> Leaf:
    lead_number, lead = base or inputs[0]
    spec = sources[lead_number].shapes[lead]
    floating = np.issubdtype(spec.dtype, np.floating) or spec.dtype.kind == "V"
    own = recipe.out_dtype or recipe.dtype
    dtype = np.dtype(spec.dtype) if own is None or not floating else _dtype(own)
    shape, moved = tuple(spec.shape), False
    if rows is not None and has_token_rows(lead):
        shape, moved = (rows.rows, *shape[1:]), True
    numbers = {number for number, _ in inputs}
    chosen = [(s, n) for s, n in part.sources if sources_index(sources, s.model) in numbers]
    weights, config = _options(recipe, method, part, chosen)
    if not floating or not inputs:
        # Whole numbers are no weights: positions and their like are the same everywhere.
        inputs, base, config = [(lead_number, lead)], None, None
    return Leaf(part.name, shape, dtype, tuple(inputs), base, tuple(weights), config, moved)


def sources_index(sources: Sequence[Source], name: str) -> int:
    """Find a source by its name.

    >>> sources_index([Source("a", None, {}, {}, {})], "a")
    0
    """
    return next(i for i, source in enumerate(sources) if source.name == name)


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _options(recipe: Recipe, method: Method, part: _Part, chosen: Sequence[tuple[Input, str]]):
    """Look up weights and options of one tensor, and make the method's config of them."""
    shared = [part.part.parameters, recipe.module_parameters, recipe.parameters]
    fields = [f.name for f in dataclasses.fields(method.config)]
    per_model = _model_keys(method)

    def find(key: str, source: Input | None, name: str) -> Any:
        levels = shared if source is None else [source.parameters, *shared]
        return look_up(levels, key, name, part.depth)

    weights = []
    for source, name in chosen:
        weight = find("weight", source, name)
        if weight is None and _needs_weight(recipe.merge_method, method):
            raise UserError(
                f"{recipe.merge_method} has no weight for {source.model} at {name}; add "
                "parameters: weight: to the model or to the recipe"
            )
        weights.append(1.0 if weight is None else _number(weight, "weight"))
    options: dict[str, Any] = {}
    for key in fields:
        if key in per_model:
            default = getattr(method.config(), key)
            values = [find(key, source, name) for source, name in chosen]
            values = [default if v is None else _number(v, key) for v in values]
            options[key] = values[0] if len(set(values)) == 1 else tuple(values)
            continue
        value = find(key.rstrip("_"), None, part.name)
        if value is None and key == "t":
            raise UserError(f"{recipe.merge_method} has no t for {part.name}; add parameters: t:")
        if value is not None:
            options[key] = _typed(key, value, getattr(method.config(), key))
    return weights, method.config(**options)


def _typed(key: str, value: Any, default: Any) -> Any:
    if key == "rescale" and isinstance(value, bool):
        return "l1" if value else "none"
    if isinstance(default, bool):
        return bool(value)
    if isinstance(default, str):
        return str(value)
    number = _number(value, key)
    return int(number) if isinstance(default, int) else number


def _number(value: Any, key: str) -> float:
    if isinstance(value, str):
        raise UserError(f"{key} is {value!r}; expected a number; correct the recipe")
    return float(value)


def _needs_weight(name: str, method: Method) -> bool:
    fields = [f.name for f in dataclasses.fields(method.config)]
    return name in _NEEDS_WEIGHT or "lambda_" in fields


def _model_keys(method: Method) -> tuple[str, ...]:
    """Say which of a method's options each model has for itself."""
    fields = [f.name for f in dataclasses.fields(method.config)]
    if "density" in fields:
        return ("density", "gamma", "epsilon")
    return ("scale",) if "scale" in fields else ()


def _check_parameters(recipe: Recipe, method: Method) -> None:
    """Refuse parameters that the method does not have, with the path to each."""
    hidden = ("thresholds", "majority")
    fields = [f.name for f in dataclasses.fields(method.config) if f.name not in hidden]
    # int8_mask only made mergekit's masks smaller; here they are not stored.
    known = sorted({"weight", "int8_mask", *(name.rstrip("_") for name in fields)})
    places: list[tuple[str, Mapping[str, Any]]] = [
        ("parameters", recipe.parameters),
        ("modules.*.parameters", recipe.module_parameters),
    ]
    for i, part in enumerate(recipe.slices):
        where = f"slices[{i}]." if recipe.renumber else ""
        places.append((f"{where}parameters", part.parameters))
        kind = "sources" if recipe.renumber else "models"
        for j, source in enumerate(part.sources):
            places.append((f"{where}{kind}[{j}].parameters", source.parameters))
    odd = [f"{where}.{key}" for where, given in places for key in given if key not in known]
    if odd:
        raise UserError(
            f"{', '.join(odd)}: {recipe.merge_method} has no such parameter; it takes "
            f"{', '.join(known)}; correct or remove"
        )
