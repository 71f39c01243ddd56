"""CLIP's byte-pair tokens, from a user's vocabulary or the merges that open_clip_torch carries.

The vocabulary is lower-cased bytes written as printable characters, with ``</w>`` at the end of a
word. Text is cleaned as in OpenAI's code (HTML entities resolved twice, white space collapsed,
lower case) and put into Unicode's composed form; only the repair of wrongly decoded text, which
OpenAI leaves to the package ftfy, is not done.
"""

import gzip
import html
import json
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxsys.core.errors import UserError
from jaxsys.models.encoder import library, package_file, read_text

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_SUFFIX = "</w>"
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_MOST_MERGES_BYTES = 1 << 26
# The published file goes on with merges that no model has.
_OPENAI_MERGES = 49152 - 256 - 2
_REMEDY = "pip install --no-deps open_clip_torch"


@dataclass(frozen=True, eq=False)
class ClipTokenizer:
    """Turn texts into the ids that `encode_text` takes; made by `load_tokenizer`.

    Attributes:
        tokenizer: of the tokenizers package.
        begin_id: of the token before every text.
        end_id: of the token after every text.

    >>> from jaxsys.models.clip.tokens import build
    >>> tokenizer = build(None, [("a", "t</w>")])
    >>> tokenizer.vocab_size
    515
    """

    tokenizer: Any
    begin_id: int
    end_id: int

    @property
    def vocab_size(self) -> int:
        """Count the token ids."""
        return self.tokenizer.get_vocab_size()

    def encode(
        self, texts: Sequence[str], length: int = 77, *, truncate: bool = False
    ) -> Int32[np.ndarray, "B {length}"]:
        """Turn texts into rows of equal length: begin, tokens, end, zeros.

        Args:
            texts: any number.
            length: T; 77 in OpenAI's models.
            truncate: cut longer texts before the end token instead of refusing them.

        Raises:
            UserError: for a text that is too long, no text, or half of a surrogate pair.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"texts is {str(texts)[:80]!r}; expected a list of strings; give one")
        if length < 2:
            raise UserError(f"length is {length}; begin and end alone take 2; raise it")
        ids = np.zeros((len(texts), length), np.int32)
        for row, text in zip(ids, texts, strict=True):
            try:
                found = self.tokenizer.encode(clean(text)).ids
            except (UnicodeEncodeError, TypeError):
                raise UserError(
                    "a text holds half of a surrogate pair, which cannot be encoded; read it with "
                    "the encoding that it was written in"
                ) from None
            if len(found) > length - 2 and not truncate:
                raise UserError(
                    f"the text {text[:40]!r} has {len(found)} tokens; expected up to {length - 2}; "
                    "shorten it or pass truncate=True"
                )
            found = [self.begin_id, *found[: length - 2], self.end_id]
            row[: len(found)] = found
        return ids


def clean(text: str) -> str:
    """Clean a text as CLIP's training did.

    >>> clean("  A &amp;amp; B\\n\\tC ")
    'a & b c'
    """
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)))
    return " ".join(text.split()).lower()


def byte_characters() -> dict[int, str]:
    """Give the printable character that stands for each byte, in the order of the vocabulary.

    Bytes that print stand for themselves, the other 68 for characters from U+0100 on.

    >>> characters = byte_characters()
    >>> characters[97], characters[32], next(iter(characters))
    ('a', 'Ġ', 33)
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + i) for i, byte in enumerate(hidden)
    }


def load_tokenizer(path: str | Path | None = None) -> ClipTokenizer:
    """Load CLIP's tokenizer.

    Args:
        path: a folder with ``vocab.json`` and ``merges.txt`` or with ``tokenizer.json``, that file
            itself, or OpenAI's merges (``bpe_simple_vocab_16e6.txt.gz``, packed or not); None
            takes the merges out of the installed package open_clip_torch, without importing it.

    Raises:
        UserError: if there is none, it is unsound, or the tokenizers package is missing.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "merges.txt"
    >>> _ = file.write_text("#version: 0.2\\nc a\\nca t</w>\\n")
    >>> load_tokenizer(file).encode(["A cat"], 6).tolist()
    [[514, 320, 513, 515, 0, 0]]
    """
    if path is None:
        path = package_file("open_clip", "bpe_simple_vocab_16e6.txt.gz", "open_clip_torch", _REMEDY)
    path = Path(path)
    if path.is_dir():
        parts = path / "vocab.json", path / "merges.txt"
        if all(part.is_file() for part in parts):
            vocab = _json(parts[0])
            return build(vocab, _pairs(_lines(read_text(parts[1]))[1:], parts[1]))
        path = path / "tokenizer.json"
    if path.suffix == ".json":
        model = _json(path).get("model")
        fields = model if isinstance(model, dict) else {}
        vocab, merges = fields.get("vocab"), fields.get("merges")
        if not isinstance(vocab, dict) or not isinstance(merges, list):
            raise UserError(
                f"{path} holds no byte-pair model; expected a CLIP tokenizer.json; use another file"
            )
        return build(vocab, _pairs(merges, path))
    lines = _lines(_unpack(path) if path.suffix == ".gz" else read_text(path))
    return build(None, _pairs(lines[1 : _OPENAI_MERGES + 1], path))


def build(vocab: Mapping[str, int] | None, merges: Sequence[tuple[str, str]]) -> ClipTokenizer:
    """Make the tokenizer of a vocabulary and its merges.

    Args:
        vocab: token to id; None for OpenAI's order: bytes, bytes that end a word, merges, and the
            two tokens around a text.
        merges: pairs, the most wanted first.

    Raises:
        UserError: if they do not fit together or the tokenizers package is missing.

    >>> build(None, [("h", "i</w>")]).encode(["Hi hi"], 5).tolist()
    [[513, 512, 512, 514, 0]]
    """
    tokenizers = library()
    from tokenizers import models, pre_tokenizers

    characters = list(byte_characters().values())
    if vocab is None:
        names = [*characters, *(c + _SUFFIX for c in characters), *map("".join, merges)]
        vocab = {name: i for i, name in enumerate([*names, _BEGIN, _END])}
    _check(vocab, characters, merges)
    model = models.BPE(vocab=dict(vocab), merges=list(merges), end_of_word_suffix=_SUFFIX)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # Their names within a text stand for the tokens themselves, as in OpenAI's code.
    tokenizer.add_special_tokens([_BEGIN, _END])
    return ClipTokenizer(tokenizer, vocab[_BEGIN], vocab[_END])


def _check(
    vocab: Mapping[Any, Any], characters: list[str], merges: Sequence[tuple[str, str]]
) -> None:
    for name, i in vocab.items():
        if type(i) is not int or not 0 <= i < 2**31:
            raise UserError(
                f"the vocabulary gives {str(name)[:40]!r} the id {str(i)[:40]}; expected a whole "
                "number from 0; use another file"
            )
    needed = [*characters, *(c + _SUFFIX for c in characters), _BEGIN, _END]
    for pair in merges:
        needed += [*pair, "".join(pair)]
    missing = [name for name in needed if name not in vocab]
    if missing:
        raise UserError(
            f"the vocabulary lacks {missing[0][:40]!r} and {len(missing) - 1} more tokens that "
            "CLIP's bytes, merges or ends need; expected vocabulary and merges of one CLIP; use "
            "the files of one checkpoint"
        )


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").split("\n")


def _pairs(lines: Sequence[Any], path: Path) -> list[tuple[str, str]]:
    pairs = []
    for line in lines:
        pair = line.split(" ") if isinstance(line, str) else line
        if pair == [""]:
            continue
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(x, str) for x in pair)
        ):
            raise UserError(
                f"{path} has the merge {str(line)[:40]!r}; expected two tokens; use another file"
            )
        pairs.append((pair[0], pair[1]))
    return pairs


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(read_text(path))
        if isinstance(document, dict):
            return document
        reason = "no object"
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error)[:160]
    raise UserError(f"{path} cannot be read as JSON ({reason}); use another file or mend this one")


def _unpack(path: Path) -> str:
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(_MOST_MERGES_BYTES + 1)
        if len(content) > _MOST_MERGES_BYTES:
            raise ValueError(f"more than {_MOST_MERGES_BYTES} bytes unpacked")
        return content.decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path} cannot be read ({reason}); expected CLIP's packed merges; correct the path"
        ) from None
