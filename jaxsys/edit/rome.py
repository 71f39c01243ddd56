"""ROME and R-ROME: one fact into one layer by a change of rank one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxsys.core.errors import UserError
from jaxsys.edit.closed import prepare
from jaxsys.edit.contract import Editable, Edited, Info, Request
from jaxsys.edit.editable import add_delta, matrix_path
from jaxsys.edit.factors import check_finite
from jaxsys.edit.keys import KeyReader
from jaxsys.edit.solves import rank_one
from jaxsys.edit.stats import Statistics
from jaxsys.edit.targets import TargetConfig, Targets


@dataclass(frozen=True)
class RomeConfig:
    """Choose how ROME edits; None: the default of the model's size.

    Attributes:
      layer: whose matrix is edited.
      statistics: C is that of the keys; False: the identity, as the code behind the paper on what
        editing does to models (arXiv 2410.18785) has it for every size.
      consistent: one key throughout, the mean over the prefixes (R-ROME); False: as released, the
        mean gives the direction and the bare prompt's key the length.
      target: how v* is found.

    >>> RomeConfig().consistent
    False
    """

    layer: int | None = None
    statistics: bool = True
    consistent: bool = False
    target: TargetConfig = field(default_factory=TargetConfig)


@dataclass(frozen=True)
class RRomeConfig(RomeConfig):
    """Choose how R-ROME edits: `RomeConfig` with one key throughout.

    >>> RRomeConfig().consistent
    True
    """

    consistent: bool = True


def edit(
    model: Editable,
    config: RomeConfig,
    params: Any,
    requests: Sequence[Request],
    stats: Statistics | None = None,
    state: Any = None,
    *,
    found: Targets | None = None,
) -> Edited:
    """Write one fact into one matrix.

        u = C⁻¹ k* / ‖C⁻¹ k*‖,     W ← W + (v* - W k) uᵀ / (kᵀ u)

    k* is the mean key over the prefixes; k is the bare prompt's key, or k* itself under
    ``consistent``, where the output W k is averaged over the prefixes too. The edited matrix maps k
    to v* exactly.

    Args:
      model: the model.
      config: see `RomeConfig`.
      params: its parameters.
      requests: exactly one.
      stats: of the layer's keys, unless ``config.statistics`` is off.
      state: passed on; ROME keeps none.
      found: from `closed.targets`, if it has been called.

    Raises:
      UserError: for more than one request, missing statistics, or a change that is not finite.

    Reference:
      arXiv 2202.05262, equations 2 to 4; arXiv 2403.07175 (R-ROME).

    >>> from jaxsys.models import lm
    >>> model = Editable(lm.LMConfig("llama", 256, 32, 6, 4, 2, 8, 48, 64), None)
    >>> config = RomeConfig(target=TargetConfig(prefixes=()))
    >>> edit(model, config, {}, [Request("Rome is in", "Rome", "Gaul")])
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ROME got no statistics of the keys of layers 1; make them ...
    """
    if len(requests) > 1:
        raise UserError(
            f"ROME got {len(requests)} requests; it takes one at a time; edit one after the other "
            "(turns.edit_all) or use MEMIT"
        )
    chosen, stats, found = prepare("rome", model, config, params, requests, stats, found)
    layer, path = chosen.layer, matrix_path(model.config, chosen.layer)
    moment = factor = None
    if chosen.statistics:
        moment, factor = stats.moment(layer), stats.factor(layer)
    reader = KeyReader(model, params, requests, chosen.target.prefixes)
    keys, outputs = (x[0] for x in reader.read(params, layer))
    direction = keys.mean(axis=0)
    key, output = (direction, outputs.mean(axis=0)) if chosen.consistent else (keys[0], outputs[0])
    a, b = rank_one(moment, direction, key, found.value[0] - output, factor)
    check_finite(path, a, b)
    notes = {"loss": found.loss, "nll": found.nll, "steps": found.steps}
    edited = add_delta(model.config, params, path, a, b)
    return Edited(edited, state, Info({path: (a, b)}, notes))
