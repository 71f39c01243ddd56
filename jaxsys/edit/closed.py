"""What the methods with a closed form share: which values they seek where, and what they need."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from jaxsys.edit import defaults
from jaxsys.edit.contract import Editable, Request, check_requests
from jaxsys.edit.prefixes import MEMIT_SAMPLES, ROME_SAMPLES
from jaxsys.edit.stats import Statistics, need
from jaxsys.edit.targets import Targets, find_targets


class Form(NamedTuple):
    """Describe a method with a closed form.

    Attributes:
      title: for messages.
      kind: where its values are sought; see `targets.points`.
      samples: prefixes to sample where none are given; see `sample_prefixes`.

    >>> FORMS["pmet"].kind
    'joint'
    """

    title: str
    kind: str
    samples: tuple[tuple[int, int], ...] = MEMIT_SAMPLES


FORMS = {
    "rome": Form("ROME", "mlp", ROME_SAMPLES),
    "memit": Form("MEMIT", "layer"),
    "pmet": Form("PMET", "joint"),
    "emmet": Form("EMMET", "layer"),
    "alphaedit": Form("AlphaEdit", "layer"),
}


def settle(name: str, model: Editable, config: Any, params: Any) -> Any:
    """Fill a config for a model; see `defaults.settle`.

    Args:
      name: of `FORMS`.
      model: the model.
      config: of the method.
      params: before any edit.

    >>> from jaxsys.edit.memit import MemitConfig, TargetConfig
    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 97, 32, 12, 4, 2, 8, 48, 64), None)
    >>> settle("memit", model, MemitConfig(target=TargetConfig(prefixes=())), {}).layers
    (0, 1, 2, 3)
    """
    return defaults.settle(config, name, model, params, FORMS[name].samples)


def layers_of(config: Any) -> tuple[int, ...]:
    """Give the layers of a settled config; the values are sought at the last.

    >>> from jaxsys.edit.rome import RomeConfig
    >>> layers_of(RomeConfig(layer=5))
    (5,)
    """
    return config.layers if hasattr(config, "layers") else (config.layer,)


def targets(
    name: str, model: Editable, config: Any, params: Any, requests: Sequence[Request]
) -> Targets:
    """Find the values of many requests at a time, for edits that each start from ``params``.

    Args:
      name: of `FORMS`.
      model: the model.
      config: of the method.
      params: that every edit starts from.
      requests: N; the same prompt may be there twice.

    Raises:
      UserError: for a request that cannot be edited, and as `find_targets` does.

    >>> targets("rome", Editable(None, None), None, {}, [Request("Paris is in", "Rome", "Gaul")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: request 0: the prompt 'Paris is in' does not name ...
    """
    for request in requests:
        check_requests([request])
    chosen = settle(name, model, config, params)
    return sought(name, model, chosen, params, requests)


def sought(
    name: str, model: Editable, config: Any, params: Any, requests: Sequence[Request]
) -> Targets:
    """Find the values of checked requests with a settled config; as `targets`.

    >>> from jaxsys.data import ByteTokenizer
    >>> from jaxsys.edit.rome import RomeConfig, TargetConfig
    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64), ByteTokenizer())
    >>> config = RomeConfig(layer=9, target=TargetConfig(2, 0.5, 4.0, 0.5, 0.0625, prefixes=()))
    >>> sought("rome", model, config, {}, [Request("Rome is in", "Rome", "G")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: layer 9 is asked for; the model has layers 0 to 1; choose ...
    """
    kind = FORMS[name].kind
    return find_targets(model, params, requests, layers_of(config)[-1], kind, config.target)


class Ready(NamedTuple):
    """Hold what an edit starts with.

    Attributes:
      config: settled.
      stats: of all its layers; what was given, be it None, where the method does without.
      found: v* of the requests.

    >>> Ready(None, None, None).stats
    """

    config: Any
    stats: Statistics
    found: Targets


def prepare(
    name: str,
    model: Editable,
    config: Any,
    params: Any,
    requests: Sequence[Request],
    stats: Statistics | None,
    found: Targets | None,
) -> Ready:
    """Check a batch, settle the config, ask for statistics, and find v* unless it is there.

    Args:
      name: of `FORMS`.
      model: the model.
      config: of the method.
      params: before the edit.
      requests: one batch.
      stats: of the keys; not asked for if the config says ``statistics=False``.
      found: from `targets`, if it has been called.

    Raises:
      UserError: for requests that cannot be edited together, missing statistics, or a value that is
        not finite.

    >>> from jaxsys.edit.memit import MemitConfig, TargetConfig
    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 6, 4, 2, 8, 48, 64), None)
    >>> config = MemitConfig(target=TargetConfig(prefixes=()))
    >>> prepare("memit", model, config, {}, [Request("Rome is", "Rome", "x")], None, None)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: MEMIT got no statistics of the keys of layers 0 1 2; make them ...
    """
    check_requests(requests)
    chosen = settle(name, model, config, params)
    if getattr(chosen, "statistics", True):
        stats = need(stats, FORMS[name].title, layers_of(chosen))
    if found is None:
        found = sought(name, model, chosen, params, requests)
    return Ready(chosen, cast(Statistics, stats), found)
