"""Word pieces of a sentence encoder, from the ``tokenizer.json`` of its checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from jaxsys.core.errors import UserError
from jaxsys.models.encoder import library, read_text
from jaxsys.models.lm.load import read_config
from jaxsys.models.minilm.config import BertConfig, config_from_hf

# Widths of batches are rounded up to this, so that few of them are compiled.
_WIDTH_STEP = 16


@dataclass(frozen=True, eq=False)
class SentenceTokenizer:
    """Turn sentences into the ids that `encode` takes; made by `load_tokenizer`.

    Attributes:
        tokenizer: of the tokenizers package.
        max_tokens: longer sentences are cut to this, with the tokens around them.

    >>> SentenceTokenizer(None, 256).max_tokens
    256
    """

    tokenizer: Any
    max_tokens: int

    def encode(
        self, sentences: Sequence[str], length: int | None = None
    ) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Turn sentences into ids and a mask; what is too long is cut, as its authors do.

        Args:
            sentences: at least one.
            length: T; None takes the longest, rounded up to a multiple of 16 where that fits.

        Returns:
            Ids, zero where the mask is False, and the mask.

        Raises:
            UserError: for no sentences, something else than strings, or a length out of range.
        """
        strings = not isinstance(sentences, str) and all(isinstance(s, str) for s in sentences)
        if not strings or not len(sentences):
            raise UserError(
                f"sentences is {str(sentences)[:80]!r}; expected a list of at least one string; "
                "give one"
            )
        if length is not None and not 3 <= length <= self.max_tokens:
            raise UserError(
                f"length is {length}; expected 3 to {self.max_tokens} tokens; change it"
            )
        self.tokenizer.enable_truncation(length or self.max_tokens)
        try:
            rows = [found.ids for found in self.tokenizer.encode_batch(list(sentences))]
        except (UnicodeEncodeError, TypeError):
            raise UserError(
                "a sentence holds half of a surrogate pair, which cannot be encoded; read it with "
                "the encoding that it was written in"
            ) from None
        longest = -(-max(map(len, rows)) // _WIDTH_STEP) * _WIDTH_STEP
        ids = np.zeros((len(rows), length or min(longest, self.max_tokens)), np.int32)
        mask = np.zeros(ids.shape, bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return ids, mask


def load_tokenizer(path: str | Path) -> SentenceTokenizer:
    """Load the tokenizer of a sentence encoder.

    Args:
        path: a folder with ``tokenizer.json``, and ``sentence_bert_config.json`` that says how long
            a sentence may be; without the second file, as long as `config.json` says.

    Raises:
        UserError: if there is none, it is unsound, or the tokenizers package is missing.

    >>> load_tokenizer("nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere/tokenizer.json cannot be read ...
    """
    path = Path(path)
    text = read_text(path / "tokenizer.json")
    try:
        tokenizer = library().Tokenizer.from_str(text)
    except UserError:
        raise
    except BaseException as error:
        # A panic in Rust arrives as a BaseException of a class that cannot be imported.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(
            f"{path / 'tokenizer.json'} holds no usable tokenizer ({str(error)[:160]}); use "
            "another file or mend this one"
        ) from None
    tokenizer.no_padding()
    most = BertConfig().max_positions
    if (path / "config.json").is_file():
        most = config_from_hf(read_config(path / "config.json")).max_positions
    own = path / "sentence_bert_config.json"
    if own.is_file():
        stated = read_config(own).get("max_seq_length")
        if stated is not None and (type(stated) is not int or not 3 <= stated <= most):
            raise UserError(
                f"{own} says max_seq_length is {str(stated)[:40]}; expected 3 to {most}; mend it"
            )
        most = stated or most
    return SentenceTokenizer(tokenizer, most)
