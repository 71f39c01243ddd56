"""IKE: put the new fact, after demonstrations of how facts are used, before every prompt.

A demonstration is a fact and one use of it, ``New Fact: … / Prompt: …``, of one of three forms: the
fact itself (copy), a paraphrase with the new answer (update), and another subject with its own
answer (retain). The likest to the prompt stand nearest to it.

With several facts in memory the likest to the prompt is put; the paper has one.

Reference: arXiv 2305.12740, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Answering, Editable, Record, Request
from jaxsys.edit.memory import Memory, checked_codes, encoder_of
from jaxsys.evaluate.protocol import from_lm


@dataclass(frozen=True)
class IKE:
    """Set IKE.

    Attributes:
      demonstrations: facts with paraphrases and neighbourhoods to take demonstrations from, other
        than those to be edited; without any, the new fact stands alone.
      k: most demonstrations before a prompt; the released code takes 16.
      layer: of the model's own encoder; see `own_encoder`.
      encoder: texts to vectors [N, E]; None for the model's own.

    Raises:
      UserError: for a negative k.

    >>> IKE().k
    16
    """

    demonstrations: tuple[Record, ...] = ()
    k: int = 16
    layer: int = 0
    encoder: Any = None

    def __post_init__(self) -> None:
        if self.k < 0:
            raise UserError(f"k is {self.k}; expected 0 or more demonstrations; correct it")


def demonstrations(records: Sequence[Record]) -> list[str]:
    """Write each record's demonstrations: copy, update and retain.

    >>> fact = Record(Request("Rome is in", "Rome", "France"), ("Find Rome in",))
    >>> demonstrations([fact])[1]
    'New Fact: Rome is in France\\nPrompt: Find Rome in France'
    """
    texts = []
    for record in records:
        fact, target = _fact(record.request), record.request.target.strip()
        uses = [fact, *(f"{prompt.rstrip()} {target}" for prompt in record.paraphrases[:1])]
        uses += [f"{prompt.rstrip()} {answer}" for prompt, answer in record.neighbourhood[:1]]
        texts += [f"New Fact: {fact}\nPrompt: {use}" for use in uses]
    return texts


def _fact(request: Request) -> str:
    return f"{request.prompt.rstrip()} {request.target.strip()}"


def answering_ike(model: Editable, config: IKE, params: Any, state: Memory | None) -> Answering:
    """Give the base model, and the prompt that it sees: demonstrations, the fact, the prompt.

    Args:
      model: configuration and tokenizer.
      config: as it was for the edits.
      params: of the model.
      state: the memory; None for the unedited model.

    >>> from jaxsys.models import lm
    >>> from jaxsys.edit.memory import edit_memory
    >>> import jax
    >>> lm_config = lm.LMConfig("llama", 256, 8, 1, 2, 2, 4, 12, 64)
    >>> model, params = Editable(lm_config, None), lm.init(jax.random.key(0), lm_config)
    >>> config = IKE(encoder=lambda texts: np.ones((len(texts), 2)))
    >>> state = edit_memory(model, config, params, [Request("Rome is in", "Rome", "France")]).state
    >>> answering_ike(model, config, params, state).rewrite("Rome lies in")
    'New Fact: Rome is in France\\nPrompt: Rome lies in'
    """
    base = from_lm(params, model.config)
    if state is None:
        return Answering(base)
    encode = encoder_of(model, config, params)
    shown = demonstrations(config.demonstrations) if config.k else []
    codes = checked_codes(encode, shown) if shown else np.zeros((0, state.codes.shape[1]))

    def rewrite(prompt: str) -> str:
        nearest = int((state.codes @ checked_codes(encode, [prompt])[0]).argmax())
        edit = f"New Fact: {_fact(state.requests[nearest])}\nPrompt: {prompt}"
        if not shown:
            return edit
        likeness = codes @ checked_codes(encode, [edit])[0]
        # The likest last, next to the edit.
        chosen = np.argsort(likeness, kind="stable")[-config.k :]
        return "\n\n".join([*(shown[int(i)] for i in chosen), edit])

    return Answering(base, rewrite)
