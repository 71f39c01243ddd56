"""Parameters of a merge as one flat vector of named, bounded coordinates.

One coordinate for each parameter, model (where a method takes one value a model), group of layers
and name filter, as in the parameter space of Evolutionary Model Merge (arXiv 2403.13187) and of
mergekit-evolve.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxsys.core.errors import UserError

# Options that a method takes one of for each model.
PER_MODEL = ("weight", "density", "gamma", "epsilon")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class Range(NamedTuple):
    """Bound one parameter.

    >>> Range(0.0, 1.0, 0.5).start
    0.5
    """

    low: float
    high: float
    start: float


class Coordinate(NamedTuple):
    """Name and bound one entry of the vector.

    >>> Coordinate("weight/model 0/all", 0.0, 1.0, 0.5).name
    'weight/model 0/all'
    """

    name: str
    low: float
    high: float
    start: float


class Space(NamedTuple):
    """Lay a merge's parameters out as one vector.

    Attributes:
      coordinates: the entries.
      slots: (parameter, model or None, group) to the entry.
      group_of: path of a tensor to its group.
      models: N.

    >>> Space._fields
    ('coordinates', 'slots', 'group_of', 'models')
    """

    coordinates: tuple[Coordinate, ...]
    slots: dict[tuple[str, int | None, str], int]
    group_of: dict[str, str]
    models: int


def parameter_space(
    paths: Sequence[str],
    n_models: int,
    ranges: Mapping[str, Range],
    *,
    layer_groups: int = 1,
    filters: Sequence[str] = (),
) -> Space:
    """Lay out which tensors share which parameters.

    Args:
      paths: of all tensors.
      n_models: N.
      ranges: by parameter: ``weight``, or a field of the method's options.
      layer_groups: how many groups of consecutive layers have parameters of their own; tensors
        outside the layers are a group of their own if there are several.
      filters: parts of names; a tensor belongs to the first that its path holds, or to the rest.

    Raises:
      UserError: for bounds that do not hold their start, more groups than layers, a filter that
        no path holds, or nothing to search.

    >>> space = parameter_space(["h.0.w", "h.1.w"], 2, {"weight": Range(0.0, 1.0, 0.5)})
    >>> [c.name for c in space.coordinates]
    ['weight/model 0/all', 'weight/model 1/all']
    """
    for name, (low, high, start) in ranges.items():
        if not low < high or not low <= start <= high:
            raise UserError(
                f"{name} is to be searched from {low} to {high}, beginning at {start}; expected "
                "the first below the second and the start between them; correct the range"
            )
    if not ranges or not paths:
        raise UserError("there is nothing to search; name at least one parameter and one tensor")
    group_of = {path: _group(path, g, filters) for path, g in _layers(paths, layer_groups).items()}
    for text in filters:
        if not any(text in path for path in paths):
            raise UserError(f"no tensor's name holds {text!r}, a filter; correct or remove it")
    slots, coordinates = {}, []
    for parameter, bounds in ranges.items():
        each = range(n_models) if parameter in PER_MODEL else (None,)
        for model in each:
            for group in dict.fromkeys(group_of.values()):
                slots[parameter, model, group] = len(coordinates)
                parts = (parameter, *(() if model is None else (f"model {model}",)), group)
                coordinates.append(Coordinate("/".join(parts), *map(float, bounds)))
    return Space(tuple(coordinates), slots, group_of, n_models)


def _layers(paths: Sequence[str], groups: int) -> dict[str, str]:
    if groups == 1:
        return dict.fromkeys(paths, "")
    found = {path: _LAYER.search(path) for path in paths}
    numbers = {path: int(m.group(1)) for path, m in found.items() if m}
    layers = max(numbers.values(), default=-1) + 1
    if not 1 <= groups <= layers:
        raise UserError(
            f"{groups} groups are wanted of {layers} layers; expected from 1 to as many as there "
            "are; change layer_groups"
        )
    edges = [i * layers // groups for i in range(groups + 1)]
    names = {
        layer: f"layers {edges[i]}-{edges[i + 1] - 1}"
        for i in range(groups)
        for layer in range(edges[i], edges[i + 1])
    }
    return {path: names[numbers[path]] if path in numbers else "outside" for path in paths}


def _group(path: str, layers: str, filters: Sequence[str]) -> str:
    kind = next((text for text in filters if text in path), "rest" if filters else "")
    return " ".join(part for part in (layers, kind) if part) or "all"


def settings(
    space: Space, vector: Any, config_of: Callable[[str], Any], weights_of: Callable[[str], Any]
) -> tuple[Callable[[str], Any], Callable[[str], Any]]:
    """Turn a vector into what `merge_tree` takes: weights and options by path.

    Args:
      space: the layout.
      vector: `[n]`, traced or not.
      config_of: path to the method's options, for what is not searched.
      weights_of: path to the weights, where they are not searched.

    >>> from jaxsys.merge.linear import TaskArithmetic
    >>> space = parameter_space(["w"], 1, {"lambda_": Range(0.0, 1.0, 0.3)})
    >>> fixed = lambda path: TaskArithmetic(), lambda path: [1.0]
    >>> settings(space, [0.25], *fixed)[1]("w").lambda_
    0.25
    """
    searched = dict.fromkeys(parameter for parameter, _, _ in space.slots)

    def value(parameter: str, path: str) -> Any:
        group = space.group_of[path]
        if (parameter, None, group) in space.slots:
            return vector[space.slots[parameter, None, group]]
        return tuple(vector[space.slots[parameter, m, group]] for m in range(space.models))

    def weights(path: str) -> Any:
        if "weight" in searched:
            return jnp.stack(value("weight", path))
        # Traced though not searched, so that merge_tree sees a program being made.
        return jnp.asarray(weights_of(path), jnp.float32) + 0 * vector[0]

    def config(path: str) -> Any:
        own = {name: value(name, path) for name in searched if name != "weight"}
        return replace(config_of(path), **own)

    return weights, config
