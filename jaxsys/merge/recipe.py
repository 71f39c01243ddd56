"""Recipes: what to merge, as frozen dataclasses; their YAML form is that of mergekit's users.

A parameter is a scalar, a list that is interpolated over depth, or a list of values with filters
on tensor names. It is looked up in the source of a slice, the slice, the module, and the recipe, in
this order; the first that says something holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxsys.core.errors import UserError
from jaxsys.merge.tokenizers import TokenizerRule

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Conditional:
    """Hold one value and the part of a tensor's name that it is for.

    Attributes:
      value: a scalar or a gradient.
      filter: text that the name must contain; None or ``*`` is for all.

    >>> Conditional(0.5, "mlp").filter
    'mlp'
    """

    value: Any
    filter: str | None = None


Setting = Scalar | tuple[Scalar, ...] | tuple[Conditional, ...]
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Input:
    """Name one model of a slice.

    Attributes:
      model: a folder, a safetensors file, or ``model+lora folder``.
      parameters: of this model.
      layers: first layer and end of the range taken; None takes all.

    >>> Input("folder", layers=(0, 4)).layers
    (0, 4)
    """

    model: str
    parameters: Parameters = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Describe consecutive layers of the result.

    Attributes:
      sources: what is merged into them, each with equally many layers.
      base_model: for this slice instead of the recipe's.
      parameters: of this slice.

    >>> Slice((Input("a"),)).base_model is None
    True
    """

    sources: tuple[Input, ...]
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Say what is merged, how, and in which form the result is written.

    Attributes:
      merge_method: a name in `jaxsys.merge.methods.METHODS`.
      slices: the result's layers from first to last; ``models`` of a file is one slice of all.
      base_model: θ_0, and the model whose config and tokenizer are taken.
      parameters: of the whole merge.
      module_parameters: of the one module, where a file has ``modules``.
      dtype: of the result where out_dtype is None; None keeps that of the base or first model.
      out_dtype: of the result.
      tokenizer: which vocabulary is wanted; None insists on one.
      renumber: the slices name layer ranges.

    >>> Recipe("linear", (Slice((Input("a"), Input("b"))),)).models()
    ('a', 'b')
    """

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)
    module_parameters: Parameters = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    out_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    tokenizer: TokenizerRule | None = None
    renumber: bool = False

    def models(self) -> tuple[str, ...]:
        """List every model once, the base first."""
        found = [self.base_model] if self.base_model else []
        for part in self.slices:
            found += [part.base_model] if part.base_model else []
            found += [source.model for source in part.sources]
        return tuple(dict.fromkeys(found))


def evaluate(setting: Any, name: str, depth: float) -> Any:
    """Give a setting's value for a tensor.

    Args:
      setting: scalar, gradient or conditionals.
      name: of the tensor.
      depth: 0 for the first layer of the slice, 1 for its last.

    Returns:
      The value, or None if no filter matches.

    >>> evaluate((0.0, 1.0, 0.0), "w", 0.25)
    0.5
    >>> evaluate((Conditional(0.1, "mlp"), Conditional(0.9)), "h.0.mlp.w", 0.0)
    0.1
    """
    if not isinstance(setting, tuple):
        return setting
    if isinstance(setting[0], Conditional):
        for one in setting:
            if one.filter in (None, "*") or one.filter in name:
                return evaluate(one.value, name, depth)
        return None
    place = depth * (len(setting) - 1)
    if not all(isinstance(value, int | float) for value in setting):
        return setting[int(place)]
    first = int(place)
    second, share = min(len(setting) - 1, first + 1), place - first
    return (1 - share) * setting[first] + share * setting[second]


def look_up(levels: Sequence[Parameters], key: str, name: str, depth: float) -> Any:
    """Give a parameter from the first level that says something about a tensor.

    Args:
      levels: parameters in order of precedence.
      key: of the parameter.
      name: of the tensor.
      depth: as for `evaluate`.

    >>> look_up([{}, {"t": (0.0, 1.0)}, {"t": 9}], "t", "w", 0.5)
    0.5
    """
    for level in levels:
        if key in level:
            value = evaluate(level[key], name, depth)
            if value is not None:
                return value
    return None


def check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse keys that are not known, with the path to them.

    Raises:
      UserError: naming every such key.

    >>> check_keys({"modle": 1}, ("model",), "models[0]")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: models[0].modle is not supported; expected only model; ...
    """
    odd = [f"{where}.{key}" if where else str(key) for key in given if key not in known]
    if odd:
        verb = "is" if len(odd) == 1 else "are"
        raise UserError(
            f"{', '.join(odd)} {verb} not supported; expected only {', '.join(known)}; correct or "
            "remove"
        )
