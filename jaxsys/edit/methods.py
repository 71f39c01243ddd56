"""All editing methods by name."""

from functools import partial
from typing import Any

from jaxsys.edit import alphaedit, closed, emmet, memit, pmet, rome
from jaxsys.edit.contract import Method
from jaxsys.edit.finetune import FT, FTL, FTM, LoRA, edit_finetune, edit_lora
from jaxsys.edit.grace import GRACE, answering_grace, edit_grace
from jaxsys.edit.ike import IKE, answering_ike
from jaxsys.edit.kn import KN, edit_kn
from jaxsys.edit.memory import edit_memory
from jaxsys.edit.mend import MEND, edit_mend
from jaxsys.edit.serac import SERAC, answering_serac


def _closed(name: str, edit: Any, config: type) -> Method:
    """Describe a method that finds v* and then solves for the change."""
    return Method(
        edit,
        config,
        statistics=lambda config: getattr(config, "statistics", True),
        single=name == "rome",
        settle=partial(closed.settle, name),
        targets=partial(closed.targets, name),
    )


METHODS: dict[str, Method] = {
    "rome": _closed("rome", rome.edit, rome.RomeConfig),
    "r-rome": _closed("rome", rome.edit, rome.RRomeConfig),
    "memit": _closed("memit", memit.edit, memit.MemitConfig),
    "pmet": _closed("pmet", pmet.edit, pmet.PmetConfig),
    "emmet": _closed("emmet", emmet.edit, emmet.EmmetConfig),
    "alphaedit": _closed("alphaedit", alphaedit.edit, alphaedit.AlphaEditConfig),
    "ft": Method(edit_finetune, FT),
    "ft-l": Method(edit_finetune, FTL),
    "ft-m": Method(edit_finetune, FTM),
    "lora": Method(edit_lora, LoRA),
    "mend": Method(edit_mend, MEND, trained=True),
    "kn": Method(edit_kn, KN),
    "grace": Method(edit_grace, GRACE, answering=answering_grace),
    "serac": Method(edit_memory, SERAC, answering=answering_serac),
    "ike": Method(edit_memory, IKE, answering=answering_ike),
}
