"""Settings of each method for each size of model, and a rule for the others.

Sources: the papers' released settings for GPT-2, GPT-J, Pythia and Llama (as their codes and
EasyEdit's have them); SmolLM2-135M is our own tuning on CounterFact records from 5,000 on, which
no table of ours uses (experiments/edit/tune.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable
from jaxsys.edit.editable import down_name
from jaxsys.edit.prefixes import sample_prefixes

Settings = dict[str, Any]


def _target(steps: int, lr: float, clamp: float, decay: float, kl: float = 0.0625) -> Settings:
    return {"steps": steps, "lr": lr, "clamp": clamp, "weight_decay": decay, "kl": kl}


# What every model shares unless its own entry says otherwise.
COMMON: dict[str, Settings] = {
    "rome": {"target": _target(20, 0.5, 4.0, 0.5)},
    "memit": {"weight": 15000.0, "target": _target(25, 0.5, 0.75, 0.5)},
    "pmet": {"weight": 15000.0, "target": _target(20, 0.5, 1.0, 0.5)},
    "emmet": {"weight": 10000.0, "target": _target(20, 0.5, 0.75, 0.5)},
    "alphaedit": {
        "threshold": 0.02,
        "relative": False,
        "ridge": 10.0,
        "target": _target(25, 0.1, 0.75, 0.5),
    },
}

# In the manner of what a model writes after these beginnings; fixed, so that runs need not sample.
SMOLLM2_PREFIXES = ("The first time I saw the", "Therefore, the", "Because of the")
_SMOLLM2 = _target(12, 0.5, 4.0, 1e-3) | {"prefixes": SMOLLM2_PREFIXES}

# By model_type, layers, width and, where these do not tell models apart, vocabulary.
SIZES: dict[tuple, dict[str, Settings]] = {
    ("gpt2", 24, 1024): {"rome": {"layer": 8, "target": _target(20, 0.5, 3.0, 0.5)}},
    ("gpt2", 36, 1280): {"rome": {"layer": 12}},
    ("gpt2", 48, 1600): {
        "rome": {"layer": 17},
        "memit": {
            "layers": (13, 14, 15, 16, 17),
            "weight": 20000.0,
            "target": _target(20, 0.5, 0.75, 0.5),
        },
        "pmet": {"layers": (13, 14, 15, 16, 17)},
        "emmet": {"layers": (17,)},
        "alphaedit": {"layers": (13, 14, 15, 16, 17), "target": _target(20, 0.5, 0.75, 0.5)},
    },
    ("gptj", 28, 4096): {
        "rome": {"layer": 5},
        "memit": {"layers": (3, 4, 5, 6, 7, 8)},
        "pmet": {"layers": (3, 4, 5, 6, 7, 8), "target": _target(30, 0.2, 0.75, 0.5, 1.0)},
        "emmet": {"layers": (5,), "weight": 100000.0},
        "alphaedit": {"layers": (3, 4, 5, 6, 7, 8), "target": _target(25, 0.5, 0.75, 0.5)},
    },
    ("gpt_neox", 12, 768): {"rome": {"layer": 3}, "memit": {"layers": (0, 1, 2, 3, 4)}},
    ("llama", 30, 576): {
        "rome": {"layer": 5, "target": _SMOLLM2},
        "memit": {"layers": (3, 4, 5), "weight": 300.0, "target": _SMOLLM2},
        "pmet": {"layers": (3, 4, 5), "weight": 300.0, "target": _SMOLLM2},
        "emmet": {"layers": (5,), "weight": 1500.0, "target": _SMOLLM2},
        "alphaedit": {
            "layers": (3, 4, 5),
            "ridge": 1.0,  # not measured: η lowered with the keys' size, the threshold as published
            "target": _SMOLLM2,
        },
    },
    ("llama", 32, 4096, 32000): {
        "rome": {"layer": 5, "target": _target(25, 0.5, 4.0, 1e-3)},
        "memit": {"layers": (4, 5, 6, 7, 8), "target": _target(25, 0.5, 4.0, 1e-3)},
        "pmet": {"layers": (4, 5, 6, 7, 8)},
        "emmet": {"layers": (5,), "weight": 100000.0, "target": _target(25, 0.5, 4.0, 1e-3)},
        "alphaedit": {"layers": (4, 5, 6, 7, 8)},
    },
    ("llama", 32, 4096, 128256): {
        "rome": {"layer": 5, "target": _target(25, 0.5, 4.0, 1e-3)},
        "memit": {"layers": (4, 5, 6, 7, 8), "target": _target(25, 0.1, 0.75, 0.5)},
        "alphaedit": {"layers": (4, 5, 6, 7, 8), "target": _target(25, 0.1, 0.75, 0.5)},
    },
}


def settings(config: Any, method: str) -> Settings:
    """Give the settings of a method for a model.

    A model that is not in the table takes the common settings, ROME's and EMMET's layer at a third
    of GPT-2's depth and a sixth of the others', and up to five layers that end at a third and a
    quarter. Reconstruction: that rule is read off the published choices; `trace.choose_layers`
    measures instead.

    Args:
      config: an `LMConfig`.
      method: of `COMMON`.

    Raises:
      UserError: for a method without settings.

    >>> from jaxsys.models import lm
    >>> settings(lm.LMConfig("llama", 97, 32, 12, 4, 2, 8, 48, 64), "memit")["layers"]
    (0, 1, 2, 3)
    """
    if method not in COMMON:
        raise UserError(f"{method!r} has no settings by model; expected one of {', '.join(COMMON)}")
    key = (config.model_type, config.layers, config.width)
    own = SIZES.get((*key, config.vocab_size), SIZES.get(key, {})).get(method, {})
    early = config.model_type == "gpt2"
    one = min(config.layers - 1, round(config.layers * (1 / 3 if early else 1 / 6)))
    top = min(config.layers - 1, round(config.layers * (1 / 3 if early else 1 / 4)))
    several = tuple(range(max(0, top - 4), top + 1))
    place = {"rome": {"layer": one}, "emmet": {"layers": (one,)}}.get(method, {"layers": several})
    return _over(_over(COMMON[method], place), own)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _over(old, value) if isinstance(old, dict) else value
    return merged


def fill(config: Any, values: Mapping[str, Any]) -> Any:
    """Fill the fields of a frozen dataclass that are None, nested ones too.

    >>> from jaxsys.edit.targets import TargetConfig
    >>> fill(TargetConfig(steps=3), {"steps": 20, "lr": 0.5}).lr
    0.5
    """
    changes = {}
    for spot in fields(config):
        old = getattr(config, spot.name)
        if is_dataclass(old):
            changes[spot.name] = fill(old, values.get(spot.name, {}))
        elif old is None and spot.name in values:
            changes[spot.name] = values[spot.name]
    return replace(config, **changes)


def settle(
    config: Any, method: str, model: Editable, params: Any, samples: Sequence[tuple[int, int]]
) -> Any:
    """Fill every None of a method's config and sample prefixes where none are given.

    Args:
      config: with ``target`` and ``layer`` or ``layers``.
      method: whose settings.
      model: the model.
      params: as they are; sampled prefixes depend on them, so give fixed ones for a sequence.
      samples: see `sample_prefixes`.

    Raises:
      UserError: for layers that are not ascending or that the model lacks.

    >>> from jaxsys.edit.rome import RomeConfig, TargetConfig
    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 97, 32, 12, 4, 2, 8, 48, 64), None)
    >>> settle(RomeConfig(target=TargetConfig(prefixes=())), "rome", model, {}, ()).layer
    2
    """
    config = fill(config, settings(model.config, method))
    layers = getattr(config, "layers", None)
    for layer in [config.layer] if layers is None else layers:
        down_name(model.config, layer)
    if layers is not None and (not layers or list(layers) != sorted(set(layers))):
        raise UserError(
            f"the layers are {list(layers)}; expected at least one, ascending, none twice; put "
            "them in order"
        )
    if config.target.prefixes is None:
        prefixes = sample_prefixes(model, params, samples, config.target.seed)
        config = replace(config, target=replace(config.target, prefixes=prefixes))
    return config
