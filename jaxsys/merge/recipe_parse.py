"""Read mergekit's YAML into a `Recipe`; a key that is not supported is refused with its path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jaxsys.core.errors import UserError
from jaxsys.merge.recipe import Conditional, Input, Recipe, Slice, check_keys
from jaxsys.merge.tokenizers import parse_rule

_TOP = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
)
_DTYPES = ("float32", "bfloat16", "float16")


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
      path: of the file.

    Raises:
      UserError: for a file that cannot be read or that says what is not supported.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "recipe.yaml"
    >>> _ = file.write_text("merge_method: linear\\nmodels: [{model: a}, {model: b}]\\n")
    >>> read_recipe(file).models()
    ('a', 'b')
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the recipe {path} cannot be read ({error}); expected a YAML file; correct the path"
        ) from None
    return parse_recipe(text)


def parse_recipe(text: str) -> Recipe:
    """Read a recipe from YAML text.

    Args:
      text: as mergekit's configuration files.

    Raises:
      UserError: for text that is no YAML, and for keys or values that are not supported, with the
        path to each.

    >>> recipe = parse_recipe('''
    ... merge_method: slerp
    ... base_model: a
    ... models: [{model: a}, {model: b}]
    ... parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}
    ... ''')
    >>> recipe.parameters["t"][0]
    Conditional(value=(0, 1), filter='mlp')
    """
    return recipe_of(parse_yaml(text))


def parse_yaml(text: str) -> Any:
    """Read YAML that holds nothing but plain values.

    Raises:
      UserError: for what is no such YAML, or if its package is missing.

    >>> parse_yaml("a: [1, x]")
    {'a': [1, 'x']}
    """
    try:
        import yaml
    except ImportError:
        raise UserError(
            "recipes need the package pyyaml, which is missing; run pip install 'jaxsys[merge]'"
        ) from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"the recipe is no YAML ({told}); correct it") from None


def recipe_of(document: Any) -> Recipe:
    """Turn a parsed document into a recipe.

    Raises:
      UserError: as `parse_recipe`.

    >>> recipe_of({"merge_method": "linear"})
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the recipe has 0 of models, slices and modules; ...
    """
    document = _mapping(document, "the recipe")
    check_keys(document, _TOP, "")
    method = document.get("merge_method")
    if not isinstance(method, str):
        raise UserError("the recipe has no merge_method; name one, such as ties")
    given = [key for key in ("models", "slices", "modules") if document.get(key)]
    if len(given) != 1:
        raise UserError(
            f"the recipe has {len(given)} of models, slices and modules; expected exactly one"
        )
    if document.get("tokenizer_source") and document.get("tokenizer"):
        raise UserError("the recipe has tokenizer_source and tokenizer; expected one of them")
    part, where, module_parameters = document, "", {}
    if given == ["modules"]:
        part, where = _module(_mapping(document["modules"], "modules"))
        module_parameters = _parameters(part.get("parameters"), f"{where}.parameters")
        where += "."
    slices = (
        _slices(part["slices"], f"{where}slices")
        if part.get("slices")
        else (Slice(_inputs(part["models"], f"{where}models", ("model", "parameters"))),)
    )
    rule = document.get("tokenizer") or document.get("tokenizer_source")
    return Recipe(
        merge_method=method,
        slices=slices,
        base_model=_reference(document.get("base_model"), "base_model"),
        parameters=_parameters(document.get("parameters"), "parameters"),
        module_parameters=module_parameters,
        dtype=_dtype(document, "dtype"),
        out_dtype=_dtype(document, "out_dtype"),
        tokenizer=parse_rule(rule) if rule else None,
        renumber=bool(part.get("slices")),
    )


def _module(modules: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    if len(modules) != 1:
        raise UserError(
            f"modules names {', '.join(modules)}; only models of one module are supported; use "
            "models or slices"
        )
    [(name, part)] = modules.items()
    where = f"modules.{name}"
    part = _mapping(part, where)
    check_keys(part, ("models", "slices", "parameters"), where)
    if bool(part.get("models")) == bool(part.get("slices")):
        raise UserError(f"{where} must have either models or slices; give one of them")
    return part, where


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where} is {_short(value)}; expected keys with values; correct it")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is {_short(value)}; expected a list of entries; correct it")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _reference(value: Any, where: str) -> str | None:
    """Read a model's name; mergekit also writes it as a mapping."""
    if isinstance(value, Mapping):
        check_keys(value, ("model", "lora"), where)
        parts = [_reference(value.get(key), f"{where}.{key}") for key in ("model", "lora")]
        return "+".join(part for part in parts if part)
    if isinstance(value, Mapping | list | bool) or value == "":
        raise UserError(f"{where} is {_short(value)}; expected a folder or file; correct it")
    return None if value is None else str(value)


def _slices(value: Any, where: str) -> tuple[Slice, ...]:
    slices = []
    for i, part in enumerate(_list(value, where)):
        here = f"{where}[{i}]"
        part = _mapping(part, here)
        check_keys(part, ("sources", "base_model", "parameters"), here)
        sources = _inputs(
            part.get("sources"), f"{here}.sources", ("model", "layer_range", "parameters")
        )
        counts = {end - start for start, end in (s.layers for s in sources if s.layers)}
        if len(counts) > 1:
            raise UserError(f"{here}.sources take {sorted(counts)} layers; expected equally many")
        base = _reference(part.get("base_model"), f"{here}.base_model")
        slices.append(
            Slice(sources, base, _parameters(part.get("parameters"), f"{here}.parameters"))
        )
    return tuple(slices)


def _inputs(value: Any, where: str, keys: tuple[str, ...]) -> tuple[Input, ...]:
    inputs = []
    for i, part in enumerate(_list(value, where)):
        here = f"{where}[{i}]"
        part = _mapping(part, here)
        check_keys(part, keys, here)
        model = _reference(part.get("model"), f"{here}.model")
        if model is None:
            raise UserError(f"{here} names no model; add model: FOLDER")
        layers = _range(part.get("layer_range"), here) if "layer_range" in keys else None
        parameters = _parameters(part.get("parameters"), f"{here}.parameters")
        inputs.append(Input(model, parameters, layers))
    return tuple(inputs)


def _range(value: Any, where: str) -> tuple[int, int]:
    sound = isinstance(value, list) and len(value) == 2
    if not sound or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        raise UserError(f"{where}.layer_range is {_short(value)}; expected [first, end]")
    if not 0 <= value[0] < value[1]:
        raise UserError(f"{where}.layer_range is {value}; expected 0 ≤ first < end; correct it")
    return value[0], value[1]


def _parameters(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    return {key: _setting(v, f"{where}.{key}") for key, v in _mapping(value, where).items()}


def _setting(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return (_conditional(value, where),)
    if not isinstance(value, list):
        return _scalar(value, where)
    _list(value, where)
    if any(isinstance(entry, Mapping) for entry in value):
        return tuple(_conditional(entry, f"{where}[{i}]") for i, entry in enumerate(value))
    return tuple(_scalar(entry, f"{where}[{i}]") for i, entry in enumerate(value))


def _conditional(value: Any, where: str) -> Conditional:
    value = _mapping(value, where)
    check_keys(value, ("filter", "value"), where)
    if "value" not in value:
        raise UserError(f"{where} has a filter and no value; add one")
    name = value.get("filter")
    if name is not None and not isinstance(name, str):
        raise UserError(f"{where}.filter is {_short(name)}; expected a part of a tensor's name")
    inner = _setting(value["value"], f"{where}.value")
    if isinstance(inner, tuple) and isinstance(inner[0], Conditional):
        raise UserError(f"{where}.value holds filters again; expected a number or a list of them")
    return Conditional(inner, name)


def _scalar(value: Any, where: str) -> Any:
    if not isinstance(value, bool | int | float | str):
        raise UserError(f"{where} is {_short(value)}; expected a number; correct it")
    return value


def _dtype(document: Mapping[str, Any], key: str) -> Any:
    value = document.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES:
        raise UserError(f"{key} is {_short(value)}; expected one of {', '.join(_DTYPES)}")
    return cast(Any, value.removeprefix("torch."))
