"""Vocabularies of several models as one: which tokens there are, and each model's row of them.

Works on ``tokenizer.json`` alone, for BPE, WordPiece, WordLevel and Unigram models. The rules are
those that mergekit's users know (``tokenizer_source: union | base | a model``), with one difference
that is named at `merge_tokenizers`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError

_MOST_FILE_BYTES = 1 << 28
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class TokenizerFile(NamedTuple):
    """Hold a parsed ``tokenizer.json``.

    Attributes:
      document: the file as parsed.
      vocab: every token, added ones too, and its id.
      folder: where it came from.

    >>> TokenizerFile({}, {"a": 0}, Path(".")).vocab
    {'a': 0}
    """

    document: dict[str, Any]
    vocab: dict[str, int]
    folder: Path


@dataclass(frozen=True)
class TokenSource:
    """Say where one token's row comes from (mergekit's ``tokenizer: tokens:``).

    Attributes:
      model: the model whose row is taken.
      token: take the row of this token instead, by its text in that model.
      token_id: or by its id there.
      zero: a row of zeros instead of any model's.
      force: also for models that have a row of their own.

    >>> TokenSource("chat", token="<|end|>").force
    False
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    zero: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.zero == (self.model is not None) or None not in (self.token, self.token_id):
            raise UserError(
                f"{self} names not exactly one source of a row; expected a model (with token or "
                "token_id, if it is another token's row) or zero; correct the tokenizer section"
            )


@dataclass(frozen=True)
class TokenizerRule:
    """Say which vocabulary the merged model has.

    Attributes:
      source: ``union`` of all, ``base`` (the base model's), or a model's name or folder.
      tokens: exceptions by token.
      pad_to_multiple_of: round the number of rows up; None adds none.

    >>> TokenizerRule().source
    'union'
    """

    source: str = "union"
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise UserError(
                f"pad_to_multiple_of is {self.pad_to_multiple_of}; expected a whole number from 1 "
                "up; correct the tokenizer section"
            )


def parse_rule(section: Any) -> TokenizerRule:
    """Read ``tokenizer_source: union`` or a recipe's ``tokenizer:`` section.

    Args:
      section: a source's name, or a mapping with ``source``, ``tokens`` and ``pad_to_multiple_of``.

    Raises:
      UserError: for a key or a kind of source that is not known, by name.

    >>> parse_rule({"source": "base", "tokens": {"<s>": {"source": {"kind": "zero"}}}}).tokens
    {'<s>': TokenSource(model=None, token=None, token_id=None, zero=True, force=False)}
    """
    if isinstance(section, str):
        return TokenizerRule(section)
    fields = _fields(section, "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
    tokens = fields.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise UserError("tokenizer.tokens is no mapping from a token to its source; correct it")
    pad = fields.get("pad_to_multiple_of")
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int)):
        raise UserError(f"pad_to_multiple_of is {pad!r}; expected a whole number; correct it")
    rules = {str(token): _token_source(str(token), rule) for token, rule in tokens.items()}
    return TokenizerRule(str(fields.get("source") or "union"), rules, pad)


def _fields(section: Any, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(section, Mapping):
        raise UserError(f"{where} is {section!r}; expected a mapping with {', '.join(known)}")
    for key in section:
        if key not in known:
            raise UserError(
                f"{where} has the key {key!r}, which is not known; expected {', '.join(known)}; "
                "remove or correct it"
            )
    return section


def _token_source(token: str, rule: Any) -> TokenSource:
    where = f"tokenizer.tokens.{token}"
    fields = _fields(rule, where, ("source", "force"))
    source, force = fields.get("source"), bool(fields.get("force", False))
    if source is None:
        raise UserError(f"{where} has no source; expected a model or kind: zero; add one")
    if isinstance(source, str):
        return TokenSource(source, force=force)
    inner = _fields(source, f"{where}.source", ("kind", "model", "token", "token_id"))
    if inner.get("kind") == "zero":
        return TokenSource(zero=True, force=force)
    if inner.get("kind") != "model_token" or "model" not in inner:
        raise UserError(
            f"{where}.source is {dict(inner)}; expected a model, kind: zero, or kind: model_token "
            "with model and token or token_id; correct it"
        )
    return TokenSource(str(inner["model"]), inner.get("token"), inner.get("token_id"), force=force)


def read_tokenizer(path: str | Path) -> TokenizerFile:
    """Read a ``tokenizer.json``.

    Args:
      path: the file or its folder.

    Raises:
      UserError: if it is absent, too large, or of a form that is not known.

    >>> read_tokenizer("nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere is no readable tokenizer.json (...
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.stat().st_size > _MOST_FILE_BYTES:
            raise ValueError(f"more than {_MOST_FILE_BYTES} bytes")
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("not an object")
        vocab = _vocab(document)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{file} is no readable tokenizer.json ({reason[:160]}); expected one of a BPE, "
            "WordPiece, WordLevel or Unigram model; save the tokenizer once more with transformers"
        ) from None
    return TokenizerFile(document, vocab, file.parent)


def _vocab(document: Mapping[str, Any]) -> dict[str, int]:
    inside = document["model"]["vocab"]
    if isinstance(inside, list):
        vocab = {piece: i for i, (piece, _) in enumerate(inside)}
    else:
        vocab = dict(inside)
    for token in document.get("added_tokens") or ():
        vocab.setdefault(token["content"], token["id"])
    for token, i in vocab.items():
        if not isinstance(i, int) or not 0 <= i < 2**31:
            raise ValueError(f"token {token[:40]!r} has the id {i!r}")
    return vocab


def strip(file: TokenizerFile, rows: int) -> TokenizerFile:
    """Leave out tokens without a row in the model's matrix.

    Args:
      file: the tokenizer.
      rows: of the embedding.

    >>> document = {"model": {"vocab": {"a": 0, "b": 1}, "merges": []}}
    >>> strip(TokenizerFile(document, {"a": 0, "b": 1}, Path(".")), 1).vocab
    {'a': 0}
    """
    gone = {token for token, i in file.vocab.items() if i >= rows}
    if not gone:
        return file
    model = dict(file.document["model"])
    inside = model["vocab"]
    if isinstance(inside, list):
        model["vocab"] = inside[:rows]
    else:
        model["vocab"] = {token: i for token, i in inside.items() if token not in gone}
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if not gone & {*_pair(m), "".join(_pair(m))}]
    added = [t for t in file.document.get("added_tokens") or () if t["content"] not in gone]
    vocab = {token: i for token, i in file.vocab.items() if token not in gone}
    return file._replace(
        document=dict(file.document) | {"model": model, "added_tokens": added}, vocab=vocab
    )


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def merge_tokenizers(files: Sequence[TokenizerFile]) -> TokenizerFile:
    """Join vocabularies: the first one's ids stay, the others' new tokens follow.

    A new token of a tokenizer that cuts text as the first one does (same kind, normaliser and
    pre-tokenizer; not Unigram) enters the vocabulary proper, with its merges after all that are
    there. mergekit registers such tokens as whole added tokens instead, which text hardly ever
    matches (``Ġfoo`` is the written form of `` foo``); here that is only done where the tokenizers
    cut text differently. Their rows are the same either way. Settings of an added token that
    several have are those of the first.

    Args:
      files: the base's first.

    >>> def one(*tokens):
    ...     vocab = {t: i for i, t in enumerate(tokens)}
    ...     return TokenizerFile({"model": {"type": "WordLevel", "vocab": vocab}}, vocab, Path())
    >>> merge_tokenizers([one("a", "b"), one("c", "b")]).vocab
    {'a': 0, 'b': 1, 'c': 2}
    """
    first = files[0]
    document = dict(first.document)
    model = document["model"] = dict(document["model"])
    by_list = isinstance(model["vocab"], list)
    vocab, added = dict(first.vocab), list(document.get("added_tokens") or ())
    merges = list(model.get("merges") or ())
    known = {_pair(m) for m in merges}
    following = max(vocab.values(), default=-1) + 1
    for file in files[1:]:
        same = not by_list and _cuts_alike(document, file.document)
        theirs = {t["content"]: t for t in file.document.get("added_tokens") or ()}
        # Plain tokens before added ones, each in the order of its ids.
        order = sorted(file.vocab.items(), key=lambda item: (item[0] in theirs, item[1]))
        for token, _ in order:
            if token in vocab:
                continue
            vocab[token] = following
            if token in theirs or not same:
                added.append(theirs.get(token, _plain(token)) | {"id": following})
            following += 1
        if same:
            new = [_pair(m) for m in file.document["model"].get("merges") or ()]
            fresh = [p for p in new if p not in known and "".join(p) in vocab]
            known.update(fresh)
            merges += fresh
    if not by_list:
        # Every id is written out: readers number added tokens anew that are not in here.
        model["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    if "merges" in model:
        lists = any(not isinstance(m, str) for m in merges)
        model["merges"] = [list(_pair(m)) for m in merges] if lists else merges
    document["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return TokenizerFile(document, vocab, first.folder)


def _cuts_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    def cutting(document: Mapping[str, Any]) -> tuple[Any, ...]:
        model = {k: v for k, v in document["model"].items() if k not in ("vocab", "merges")}
        return model, document.get("normalizer"), document.get("pre_tokenizer")

    return cutting(a) == cutting(b)


def _plain(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"content": token, "normalized": True} | flags


def write_tokenizer(folder: str | Path, file: TokenizerFile) -> list[Path]:
    """Write ``tokenizer.json``, and copy what stands beside the one that it came from.

    Args:
      folder: made if need be.
      file: the tokenizer.

    Returns:
      The files.

    >>> import tempfile
    >>> [f.name for f in write_tokenizer(tempfile.mkdtemp(), TokenizerFile({}, {}, Path("none")))]
    ['tokenizer.json']
    """
    from jaxsys.core.report import atomic_write

    folder = Path(folder)
    files = [folder / "tokenizer.json"]
    atomic_write(files[0], json.dumps(file.document, ensure_ascii=False, indent=1) + "\n")
    for name in _SIDE_FILES:
        source = file.folder / name
        if not source.is_file() or source.stat().st_size > _MOST_FILE_BYTES:
            continue
        text = source.read_text(encoding="utf-8")
        if name == "tokenizer_config.json":
            settings = json.loads(text)
            settings.pop("added_tokens_decoder", None)  # tokenizer.json says it, and is up to date
            text = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
        files.append(folder / name)
        atomic_write(files[-1], text)
    return files
