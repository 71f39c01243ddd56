"""SERAC: a memory of facts, a scope, and a second model that answers within it.

    σ_i(x) = exp(−s ‖e(x) − e(x_i)‖²);   in scope if max_i σ_i(x) > 1/2

In scope the prompt goes, with the nearest fact before it, to the counterfactual model; else to the
base model, untouched.

Departure: the counterfactual model is the base model itself, with the fact in its prompt, where the
authors train a small model on such texts; and the scope is one number s, found by `fit_scope` on
facts with paraphrases and neighbours, where they train the encoder.

Reference: arXiv 2206.06520, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Answering, Editable, Record
from jaxsys.edit.memory import (
    Encoder,
    Memory,
    checked_codes,
    encoder_of,
    squared_distances,
)
from jaxsys.evaluate.protocol import from_lm


@dataclass(frozen=True)
class SERAC:
    """Set SERAC.

    Attributes:
      scale: s; 1.25 is what `fit_scope` gave for SmolLM2-135M's embeddings on CounterFact records
        5,100 to 5,149, 78 % of whose paraphrases and neighbours fell on the right side.
      layer: of the model's own encoder; see `own_encoder`.
      encoder: texts to vectors [N, E]; None for the model's own.
      template: how a fact stands before a prompt; ``{fact}`` and ``{prompt}`` are replaced.

    Raises:
      UserError: for a scale that is not positive, or a template without its two slots.

    >>> SERAC().template.format(fact="Rome is in France", prompt="Rome lies in")
    'Rome is in France.\\nRome lies in'
    """

    scale: float = 1.25
    layer: int = 0
    encoder: Any = None
    template: str = "{fact}.\n{prompt}"

    def __post_init__(self) -> None:
        if self.scale <= 0 or any(slot not in self.template for slot in ("{fact}", "{prompt}")):
            raise UserError(
                f"scale is {self.scale} and template {self.template[:80]!r}; expected a positive "
                "number, and a text with {fact} and {prompt}; correct them"
            )


def answering_serac(model: Editable, config: SERAC, params: Any, state: Memory | None) -> Answering:
    """Give the base model, and the prompt that it sees: with a fact before it, or as it is.

    Args:
      model: configuration and tokenizer.
      config: as it was for the edits.
      params: of the model.
      state: the memory; None for the unedited model.

    >>> from jaxsys.models import lm
    >>> from jaxsys.edit.contract import Request
    >>> from jaxsys.edit.memory import edit_memory
    >>> import jax
    >>> lm_config = lm.LMConfig("llama", 256, 8, 1, 2, 2, 4, 12, 64)
    >>> config = SERAC(encoder=lambda texts: np.array([[float("Rome" in t)] for t in texts]))
    >>> model, params = Editable(lm_config, None), lm.init(jax.random.key(0), lm_config)
    >>> state = edit_memory(model, config, params, [Request("Rome is in", "Rome", "France")]).state
    >>> rewrite = answering_serac(model, config, params, state).rewrite
    >>> rewrite("Rome lies in"), rewrite("Oslo is in")
    ('Rome is in France.\\nRome lies in', 'Oslo is in')
    """
    base = from_lm(params, model.config)
    if state is None:
        return Answering(base)
    encode = encoder_of(model, config, params)

    def rewrite(prompt: str) -> str:
        far = squared_distances(checked_codes(encode, [prompt])[0], state.codes)
        nearest = int(far.argmin())
        if np.exp(-config.scale * far[nearest]) <= 0.5:
            return prompt
        request = state.requests[nearest]
        fact = f"{request.prompt.rstrip()} {request.target.strip()}"
        # Not str.format: facts and prompts may have braces of their own.
        before, _, after = config.template.partition("{fact}")
        parts = [part.replace("{prompt}", prompt) for part in (before, after)]
        return fact.join(parts)

    return Answering(base, rewrite)


class Scope(NamedTuple):
    """Hold a fitted scope.

    Attributes:
      scale: s.
      accuracy: mean of the part of paraphrases in scope and of neighbours out of it.

    >>> Scope(1.0, 0.5).accuracy
    0.5
    """

    scale: float
    accuracy: float


def fit_scope(encode: Encoder, records: Sequence[Record]) -> Scope:
    """Choose s so that paraphrases fall into the scope of their facts, and neighbours out of it.

    The border σ = 1/2 lies at the squared distance ln 2 / s; of all borders between two distances
    seen, the one with the best balanced accuracy is taken.

    Args:
      encode: texts to vectors.
      records: facts with paraphrases and neighbourhoods, not those that are to be edited.

    Raises:
      UserError: without a paraphrase or without a neighbour.

    >>> from jaxsys.edit.contract import Request
    >>> encode = lambda texts: np.array([[float(len(t))] for t in texts])
    >>> fact = Record(Request("ab", "ab", "c"), ("abc",), (("abcde", "d"),))
    >>> fit_scope(encode, [fact]).accuracy
    1.0
    """
    inside: list[float] = []
    outside: list[float] = []
    for record in records:
        near = [prompt for prompt, _ in record.neighbourhood]
        texts = [record.request.prompt, *record.paraphrases, *near]
        codes = checked_codes(encode, texts)
        far = squared_distances(codes[0], codes[1:])
        inside += far[: len(record.paraphrases)].tolist()
        outside += far[len(record.paraphrases) :].tolist()
    if not inside or not outside:
        raise UserError(
            f"there are {len(inside)} paraphrases and {len(outside)} neighbours; expected some of "
            "both; give other records"
        )
    seen = np.unique([*inside, *outside])
    borders = np.append((seen[1:] + seen[:-1]) / 2, seen[-1] * 1.01 + 1e-9)
    right = [(np.less(inside, b).mean() + np.greater(outside, b).mean()) / 2 for b in borders]
    best = int(np.argmax(right))
    return Scope(float(np.log(2) / borders[best]), float(right[best]))
