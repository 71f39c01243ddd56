"""Build fast tokenizers from the vocabularies inside GGUF and llama2.c files."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# token_type of GGUF (llama.cpp's enumeration).
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_MOST_TOKENS = 1 << 22
_MOST_PIECE_BYTES = 1 << 16

_GPT4_LIKE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before pairs are merged, by llama.cpp's names: by GPT-2's expression, by that one
# after single digits, or by an expression of its own.
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "default")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")


class Vocabulary(NamedTuple):
    """Hold a fast tokenizer and what surrounds it in its file."""

    tokenizer: Any
    bos_id: int | None
    eos_id: int | None
    chat_template: str | None = None


class Unsound(Exception):
    """Say what is wrong with a vocabulary."""


def from_gguf(metadata: Mapping[str, Any]) -> Vocabulary:
    """Build the tokenizer that the metadata of a GGUF file describes.

    Raises:
      Unsound: for a kind that is not known or fields that do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokens")
    if len(set(tokens)) != len(tokens):
        raise Unsound("its vocabulary holds a token twice")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = np.full(len(tokens), _NORMAL)
    if not (isinstance(types, np.ndarray) and types.shape == (len(tokens),)):
        raise Unsound("it has not one token_type for each token")
    control = [t for t, k in zip(tokens, types.tolist(), strict=True) if k in (_CONTROL, _UNKNOWN)]
    user = [t for t, k in zip(tokens, types.tolist(), strict=True) if k == _USER]
    ids = {
        name: _id(metadata, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "unknown")
    }
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, _texts(metadata, "merges"), pre)
    elif kind == "llama":
        scores = metadata.get("tokenizer.ggml.scores")
        if not (isinstance(scores, np.ndarray) and scores.shape == (len(tokens),)):
            raise Unsound("it has not one score for each token")
        mergeable = np.isin(types, (_NORMAL, _USER))
        prefix = _flag(metadata, "add_space_prefix", True)
        unknown = None if ids["unknown"] is None else tokens[ids["unknown"]]
        tokenizer = _sentencepiece(tokens, scores, mergeable, unknown, "▁", prefix)
    else:
        raise Unsound(f"its tokenizer is of the kind {str(kind)[:40]!r}, not gpt2 or llama")
    _add(tokenizer, control, special=True)
    _add(tokenizer, user, special=False)
    # llama.cpp's defaults where a file does not say.
    if _flag(metadata, "add_bos_token", kind == "llama" or pre in _LLAMA3):
        _begin_with(tokenizer, ids["bos"])
    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    return Vocabulary(tokenizer, ids["bos"], ids["eos"], template)


def read_llama2c_vocabulary(path: Path) -> Vocabulary:
    """Read llama2.c's tokenizer file: longest piece, then score, byte length and bytes of each.

    Ids 0, 1 and 2 are unknown, begin and end; 3 to 258 are the bytes.

    Raises:
      Unsound: if the file is anything else.
    """
    pieces, scores = _llama2c_records(path)
    if len(pieces) < 259 or pieces[3:259] != [f"<0x{i:02X}>" for i in range(256)]:
        raise Unsound("ids 3 to 258 are not the bytes")
    tokens = ["<unk>", "<s>", "</s>", *pieces[3:]]
    if len(set(tokens)) != len(tokens):
        raise Unsound("it holds a piece twice")
    mergeable = np.arange(len(tokens)) >= 259
    tokenizer = _sentencepiece(tokens, np.array(scores), mergeable, "<unk>", " ", prefix=True)
    _add(tokenizer, tokens[:3], special=True)
    _begin_with(tokenizer, 1)
    return Vocabulary(tokenizer, bos_id=1, eos_id=2)


def _llama2c_records(path: Path) -> tuple[list[str], list[float]]:
    size = path.stat().st_size
    # A model's file may be meant by mistake; a tokenizer of this many bytes does not exist.
    if not 4 <= size <= _MOST_TOKENS * 8:
        raise Unsound(f"it has {size} bytes")
    data = path.read_bytes()
    # The first number, the length of the longest piece, is for C's buffers.
    pieces, scores, here = [], [], 4
    while here < size:
        if size - here < 8:
            raise Unsound("it ends within a record")
        score, length = struct.unpack_from("<fi", data, here)
        here += 8
        if not 0 <= length <= min(_MOST_PIECE_BYTES, size - here):
            raise Unsound(f"piece {len(pieces)} claims {length} bytes")
        try:
            pieces.append(data[here : here + length].decode())
        except UnicodeDecodeError:
            raise Unsound(f"piece {len(pieces)} is not UTF-8") from None
        scores.append(score)
        here += length
    return pieces, scores


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not (isinstance(value, list) and 0 < len(value) <= _MOST_TOKENS):
        raise Unsound(f"it has no list tokenizer.ggml.{name}")
    if max(map(len, value)) > _MOST_PIECE_BYTES:
        raise Unsound(f"tokenizer.ggml.{name} holds a text of absurd length")
    return value


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise Unsound(f"tokenizer.ggml.{name} is no truth value")
    return value


def _id(metadata: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < vocab_size:
        raise Unsound(f"tokenizer.ggml.{name} is {str(value)[:40]}, no id below {vocab_size}")
    return value


def _add(tokenizer: Any, tokens: Sequence[str], *, special: bool) -> None:
    from tokenizers import AddedToken

    added = [AddedToken(t, special=special, normalized=False) for t in tokens if t]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def _begin_with(tokenizer: Any, bos_id: int | None) -> None:
    """Let every encoded text begin with a token."""
    from tokenizers.processors import TemplateProcessing

    if bos_id is None:
        raise Unsound("it wants a begin token before every text and names none")
    name = tokenizer.id_to_token(bos_id)
    try:
        pieces = TemplateProcessing(
            single=[name, "$A"], pair=[name, "$A", "$B"], special_tokens=[(name, bos_id)]
        )
    except Exception:
        raise Unsound(f"its begin token {name[:40]!r} cannot be put before texts") from None
    tokenizer.post_processor = pieces


def _bpe(tokens: Sequence[str], merges: Iterable[tuple[str, str]], **options: Any) -> Any:
    from tokenizers import Tokenizer, models

    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocabulary, list(merges), **options))
    except Exception as error:
        raise Unsound(f"its merges do not fit its tokens ({str(error)[:120]})") from None


def _byte_level(tokens: Sequence[str], merges: Sequence[str], pre: Any) -> Any:
    """Build the GPT-2 kind: bytes written as letters, pairs merged by rank."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or " " in right:
            raise Unsound(f"the merge {merge[:40]!r} is no pair")
        pairs.append((left, right))
    tokenizer = _bpe(tokens, pairs, ignore_merges=pre in _LLAMA3)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _GPT2:
        tokenizer.pre_tokenizer = plain
    elif pre in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
    elif pre in (*_LLAMA3, *_QWEN2):
        expression = _GPT4_LIKE % ("{1,3}" if pre in _LLAMA3 else "")
        cut = pre_tokenizers.Split(Regex(expression), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, letters])
        if pre in _QWEN2:
            tokenizer.normalizer = normalizers.NFC()
    else:
        known = ", ".join((*_GPT2, *_SINGLE_DIGITS, *_LLAMA3, *_QWEN2))
        raise Unsound(f"its text is cut by {str(pre)[:40]!r}, not one of {known}")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    tokens: Sequence[str],
    scores: np.ndarray,
    mergeable: np.ndarray,
    unknown: str | None,
    space: str,
    prefix: bool,
) -> Any:
    """Build the SentencePiece kind: the pair whose piece has the highest score merges first."""
    from tokenizers import decoders, normalizers

    known = {token for token, able in zip(tokens, mergeable.tolist(), strict=True) if able}
    merges = []
    for i in np.argsort(-scores, kind="stable").tolist():
        piece = tokens[i]
        if piece in known:
            splits = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
            merges += [(a, b) for a, b in splits if a in known and b in known]
    unk = {} if unknown is None else {"unk_token": unknown, "fuse_unk": True}
    tokenizer = _bpe(tokens, merges, byte_fallback=True, **unk)
    steps: list[Any] = [normalizers.Prepend(space)] if prefix else []
    steps += [normalizers.Replace(" ", space)] if space != " " else []
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    undo: list[Any] = [decoders.Replace(space, " ")] if space != " " else []
    undo += [decoders.ByteFallback(), decoders.Fuse()]
    undo += [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer
