"""Calibration sequences from a text."""

from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxsys.core.errors import UserError
from jaxsys.data.stream import shuffled


def calibration(
    tokenizer: Any, text: str, sequences: int, length: int, *, seed: int = 0
) -> Int32[np.ndarray, "N T"]:
    """Draw windows of a text, none of which overlap.

    Args:
        tokenizer: with ``encode``.
        text: tokenised as a whole, without begin tokens between windows.
        sequences: N.
        length: T, in tokens.
        seed: of the draw.

    Returns:
        Token ids.

    Raises:
        UserError: for a text with fewer windows than asked for.

    >>> import types
    >>> letters = types.SimpleNamespace(encode=lambda s: [ord(c) for c in s])
    >>> calibration(letters, "abcdefgh", 2, 4).shape
    (2, 4)
    >>> calibration(letters, "abc", 1, 4)
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: the calibration text has 3 tokens, which is 0 windows of 4, ...
    """
    if sequences < 1 or length < 2:
        raise UserError(
            f"{sequences} calibration sequences of {length} tokens are asked for; expected at "
            "least 1 of at least 2 tokens; ask for more"
        )
    ids = np.asarray([int(i) for i in tokenizer.encode(text)], np.int32)
    windows = ids.size // length
    if windows < sequences:
        raise UserError(
            f"the calibration text has {ids.size} tokens, which is {windows} windows of {length}, "
            f"and {sequences} are asked for; give a longer text, or fewer or shorter sequences"
        )
    chosen = shuffled(windows, 0, sequences, seed)
    return ids[chosen[:, None] * length + np.arange(length)]
