"""Read mergekit-moe's YAML: which models become experts, and how their router is made."""

from dataclasses import dataclass
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.merge.recipe import check_keys
from jaxsys.merge.recipe_parse import parse_yaml
from jaxsys.merge.upcycle import Expert

_GATES = {
    "hidden": "hidden",
    "hidden_avg": "hidden",
    "cheap_embed": "embed",
    "embed": "embed",
    "uniform_random": "random",
    "random": "random",
    "zero": "zero",
}
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MixtureRecipe:
    """Hold the arguments of `jaxsys.merge.upcycle.upcycle`.

    Attributes:
      base: the model that gives all but the feed-forward blocks.
      experts: one for each feed-forward block.
      gate: where routers come from.
      experts_per_token: how many experts each token visits.
      dtype: of the files, None for the base's.

    >>> MixtureRecipe("a", (Expert("a"),)).gate
    'hidden'
    """

    base: str
    experts: tuple[Expert, ...]
    gate: str = "hidden"
    experts_per_token: int = 2
    dtype: str | None = None


def parse_mixture(text: str) -> MixtureRecipe:
    """Read a mixture's recipe from YAML text.

    Args:
      text: with ``base_model``, ``experts`` (``source_model``, ``positive_prompts``,
        ``negative_prompts``), ``gate_mode``, ``experts_per_token`` and ``dtype``.

    Raises:
      UserError: for text that is no such YAML, and for keys that are not supported, by name.

    >>> parse_mixture("{base_model: a, gate_mode: random, experts: [{source_model: b}]}").experts
    (Expert(model='b', prompts=(), negative=()),)
    """
    document = parse_yaml(text)
    known = ("base_model", "experts", "gate_mode", "experts_per_token", "dtype")
    if not isinstance(document, dict) or not isinstance(document.get("experts"), list):
        raise UserError(
            f"the recipe lacks experts; expected a mapping with {', '.join(known)}; add them"
        )
    check_keys(document, known, "")
    gate, dtype = document.get("gate_mode", "hidden"), document.get("dtype")
    if gate not in _GATES:
        raise UserError(f"gate_mode is {gate!r}; expected one of {', '.join(_GATES)}; choose one")
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}; choose one")
    count = document.get("experts_per_token", 2)
    if isinstance(count, bool) or not isinstance(count, int):
        raise UserError(f"experts_per_token is {count!r}; expected a whole number; correct it")
    base = _text(document.get("base_model"), "base_model")
    experts = tuple(_expert(e, f"experts[{i}]") for i, e in enumerate(document["experts"]))
    return MixtureRecipe(base, experts, _GATES[gate], count, dtype)


def _expert(value: Any, where: str) -> Expert:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; expected a mapping with source_model; correct it")
    check_keys(value, ("source_model", "positive_prompts", "negative_prompts"), where)
    prompts = []
    for key in ("positive_prompts", "negative_prompts"):
        texts = value.get(key) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}.{key} is no list of texts; correct it")
        prompts.append(tuple(texts))
    return Expert(_text(value.get("source_model"), f"{where}.source_model"), *prompts)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is {value!r}; expected a folder; correct it")
    return value
