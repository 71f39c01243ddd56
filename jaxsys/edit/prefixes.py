"""Texts that stand before a prompt, so that an edit holds whatever was written before."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Editable

# The words with which the published codes let the model begin.
BEGINNINGS = ("The", "Therefore", "Because", "I", "You")
ROME_SAMPLES = ((5, 10), (10, 10))  # (tokens, number)
MEMIT_SAMPLES = ((10, 5),)


def sample_prefixes(
    model: Editable, params: Any, samples: Sequence[tuple[int, int]], seed: int = 0
) -> tuple[str, ...]:
    """Let the model write short texts, as ROME and MEMIT do.

    Args:
      model: the model.
      params: its parameters, before any edit.
      samples: (tokens, number) of each kind; the number is divided among `BEGINNINGS`.
      seed: of the draws among the five likeliest tokens.

    Returns:
      Texts, which `editable.encode` joins to the prompt by a full stop.

    Raises:
      UserError: for a number that five does not divide, or no token.

    Reference:
      arXiv 2202.05262, section 3.1 and appendix E.5; arXiv 2210.07229, section 4.3.

    >>> from jaxsys.data import ByteTokenizer
    >>> sample_prefixes(Editable(None, ByteTokenizer()), {}, ((1, 5),))
    ('T', 'T', 'B', 'I', 'Y')
    """
    from jaxsys.evaluate.generate import generate
    from jaxsys.evaluate.protocol import from_lm
    from jaxsys.evaluate.sampling import Sampling

    texts: list[str] = []
    for tokens, number in samples:
        if number % len(BEGINNINGS) or tokens < 1 or number < 1:
            raise UserError(
                f"{number} prefixes of {tokens} tokens are asked for; expected a multiple of "
                f"{len(BEGINNINGS)} and at least one token; change the numbers"
            )
        starts = [
            [int(i) for i in model.tokenizer.encode(word)][:tokens]
            for word in BEGINNINGS
            for _ in range(number // len(BEGINNINGS))
        ]
        shortest = min(len(start) for start in starts)
        if tokens > shortest:
            key = jax.random.fold_in(jax.random.key(seed), tokens)
            found = generate(
                from_lm(params, model.config),
                starts,
                max_tokens=tokens - shortest,
                sampling=Sampling(temperature=1.0, top_k=5),
                key=key,
            )
            starts = [[*a, *b][:tokens] for a, b in zip(starts, found.tokens, strict=True)]
        texts += [model.tokenizer.decode(start) for start in starts]
    return tuple(text.strip() or BEGINNINGS[0] for text in texts)
