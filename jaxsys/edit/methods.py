"""All editing methods by name."""

from functools import partial
from typing import Any

from jaxsys.edit import alphaedit, emmet, memit, pmet, rome
from jaxsys.edit.contract import Editable, Method
from jaxsys.edit.defaults import settle
from jaxsys.edit.finetune import FT, FTL, FTM, LoRA, edit_finetune, edit_lora
from jaxsys.edit.grace import GRACE, answering_grace, edit_grace
from jaxsys.edit.ike import IKE, answering_ike, edit_ike
from jaxsys.edit.kn import KN, edit_kn
from jaxsys.edit.mend import MEND, edit_mend
from jaxsys.edit.prefixes import MEMIT_SAMPLES, ROME_SAMPLES
from jaxsys.edit.serac import SERAC, answering_serac, edit_serac


def _settle(name: str, samples: Any, model: Editable, config: Any, params: Any) -> Any:
    return settle(config, name, model, params, samples)


def _closed(name: str, module: Any, config: type, samples: Any = MEMIT_SAMPLES) -> Method:
    """Describe a method that finds v* and then solves for the change."""
    return Method(
        module.edit,
        config,
        statistics=lambda config: getattr(config, "statistics", True),
        single=module is rome,
        settle=partial(_settle, name, samples),
        targets=module.targets,
    )


METHODS: dict[str, Method] = {
    "rome": _closed("rome", rome, rome.RomeConfig, ROME_SAMPLES),
    "r-rome": _closed("rome", rome, rome.RRomeConfig, ROME_SAMPLES),
    "memit": _closed("memit", memit, memit.MemitConfig),
    "pmet": _closed("pmet", pmet, pmet.PmetConfig),
    "emmet": _closed("emmet", emmet, emmet.EmmetConfig),
    "alphaedit": _closed("alphaedit", alphaedit, alphaedit.AlphaEditConfig),
    "ft": Method(edit_finetune, FT),
    "ft-l": Method(edit_finetune, FTL),
    "ft-m": Method(edit_finetune, FTM),
    "lora": Method(edit_lora, LoRA),
    "mend": Method(edit_mend, MEND, trained=True),
    "kn": Method(edit_kn, KN),
    "grace": Method(edit_grace, GRACE, answering=answering_grace),
    "serac": Method(edit_serac, SERAC, answering=answering_serac),
    "ike": Method(edit_ike, IKE, answering=answering_ike),
}
