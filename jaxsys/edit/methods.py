"""All editing methods by name."""

from jaxsys.edit.contract import Method
from jaxsys.edit.finetune import FT, FTL, FTM, LoRA, edit_finetune, edit_lora

METHODS: dict[str, Method] = {
    "ft": Method(edit_finetune, FT),
    "ft-l": Method(edit_finetune, FTL),
    "ft-m": Method(edit_finetune, FTM),
    "lora": Method(edit_lora, LoRA),
}
