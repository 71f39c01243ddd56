"""Turn text into numbers and back: bytes, or byte pairs merged by frequency."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from jaxsys.core.errors import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """Say what every tokenizer can do.

    >>> isinstance(ByteTokenizer(), Tokenizer)
    True
    """

    @property
    def vocab_size(self) -> int:
        """Count the token ids."""
        ...

    def encode(self, text: str) -> Int32[np.ndarray, "N"]:
        """Turn text into token ids."""
        ...

    def decode(self, ids: Any) -> str:
        """Turn token ids into text."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """Take each UTF-8 byte as a token; ids are 0 to 255.

    >>> ByteTokenizer().encode("aé").tolist()
    [97, 195, 169]
    >>> ByteTokenizer().decode([97, 195, 169])
    'aé'
    """

    vocab_size: int = 256

    def encode(self, text: str) -> Int32[np.ndarray, "N"]:
        """Turn text into its bytes."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> str:
        """Turn bytes into text; a broken character becomes U+FFFD.

        Raises:
          UserError: for an id outside 0 to 255.
        """
        values = _checked(ids, self.vocab_size)
        return values.astype(np.uint8).tobytes().decode(errors="replace")


@dataclass(frozen=True)
class BpeTokenizer:
    """Take byte pairs merged by frequency as tokens; made by `train_bpe`.

    >>> train_bpe("low lower lowest " * 9, 260).encode("low").size < 3
    True
    """

    tokenizer: Any  # tokenizers.Tokenizer, absent without the extra

    @property
    def vocab_size(self) -> int:
        """Count the token ids."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> Int32[np.ndarray, "N"]:
        """Turn text into token ids."""
        return np.array(self.tokenizer.encode(text).ids, np.int32)

    def decode(self, ids: Any) -> str:
        """Turn token ids into text; a broken character becomes U+FFFD.

        Raises:
          UserError: for an id that is not in the vocabulary.
        """
        return self.tokenizer.decode(_checked(ids, self.vocab_size).tolist())


def train_bpe(text: str, vocab_size: int) -> BpeTokenizer:
    """Learn a byte-level byte-pair encoding from a text.

    Any text can be encoded and comes back unchanged. The same text gives the same encoding in every
    process.

    Args:
      text: to learn from.
      vocab_size: token ids wanted, at least 256 (the bytes); a short text may give fewer.

    Raises:
      UserError: if the `tokenizers` package is missing, or fewer than 256 ids are wanted.

    >>> bpe = train_bpe("the cat sat on the mat; " * 20, 280)
    >>> bpe.decode(bpe.encode("the ñandú sat"))
    'the ñandú sat'
    """
    if vocab_size < 256:
        raise UserError(f"vocab_size is {vocab_size}; the bytes alone need 256; ask for more")
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError(
            "byte-pair tokens need the package tokenizers, which is missing; run "
            "pip install 'jaxsys[bpe]' or use byte tokens"
        ) from None
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return BpeTokenizer(tokenizer)


def _checked(ids: Any, vocab_size: int) -> np.ndarray:
    values = np.asarray(ids, np.int64).reshape(-1)
    if values.size and not (values.min() >= 0 and values.max() < vocab_size):
        wrong = values[(values < 0) | (values >= vocab_size)][0]
        raise UserError(f"token id {wrong} is outside the vocabulary of 0 to {vocab_size - 1}")
    return values
