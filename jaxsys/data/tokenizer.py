"""Tokenizers of checkpoints: ``tokenizer.json``, inside GGUF, and llama2.c's, with chat templates.

All run in the tokenizers package; what the other two forms hold is turned into its objects. A chat
template is a program that came with a checkpoint. It runs in jinja2's immutable sandbox, which
keeps it from files and from Python's inner parts, not from using time or memory.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Int32

from jaxsys.core import report
from jaxsys.core.checkpoint import read_gguf, read_llama2c
from jaxsys.core.errors import UserError
from jaxsys.data._vocabulary import Unsound, Vocabulary, from_gguf, read_llama2c_vocabulary

_MOST_FILE_BYTES = 1 << 28
_MOST_TEMPLATE = 1 << 20


@dataclass(frozen=True, eq=False)
class LMTokenizer:
    """Turn text into the ids of a checkpoint and back; made by `load_tokenizer`.

    Attributes:
      tokenizer: of the tokenizers package.
      bos_id: begins a text; None where there is none.
      eos_id: ends a text; None where there is none.
      chat_template: jinja2 source; None where there is none.

    >>> from jaxsys.data import train_bpe
    >>> tokenizer = LMTokenizer(train_bpe("the cat sat on the mat " * 9, 260).tokenizer)
    >>> tokenizer.decode(tokenizer.encode("the cat"))
    'the cat'
    """

    tokenizer: Any
    bos_id: int | None = None
    eos_id: int | None = None
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        """Count the token ids; a model may have more rows, which stand for nothing."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> Int32[np.ndarray, "N"]:
        """Turn text into token ids, with those that the checkpoint puts around every text.

        Names of special tokens within the text become these tokens. A vocabulary may lack a byte,
        as SmolLM2's lacks some that begin rare characters: such a byte is left out, as llama.cpp
        and the checkpoint's own tokenizer do.

        Raises:
          UserError: for text with half a surrogate pair, which no encoding has.
        """
        try:
            ids = self.tokenizer.encode(text).ids
        except (UnicodeEncodeError, TypeError):
            raise UserError(
                "the text holds half of a surrogate pair, which cannot be encoded; read the text "
                "with the encoding that it was written in"
            ) from None
        return np.array(ids, np.int32)

    def decode(self, ids: Any) -> str:
        """Turn token ids into text without special tokens; ids of no token give nothing.

        Raises:
          UserError: for a negative id.
        """
        values = np.asarray(ids, np.int64).reshape(-1)
        if values.size and not 0 <= values.min() <= values.max() < 2**31:
            raise UserError(
                f"token ids reach from {values.min()} to {values.max()}; expected 0 to "
                f"{self.vocab_size - 1}; pass ids of this tokenizer"
            )
        return self.tokenizer.decode(values.tolist(), skip_special_tokens=True)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as the text that the checkpoint was trained on.

        The text names its special tokens, so encode it as it is; where it and `encode` both put the
        begin token first, one of the two is too many.

        Args:
          messages: each with ``role`` and ``content``.
          add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
          UserError: if the checkpoint has no template, jinja2 is missing, or the template fails or
            refuses the messages.

        >>> LMTokenizer(None).apply_chat_template([])
        Traceback (most recent call last):
        ...
        jaxsys.core.errors.UserError: the checkpoint has no chat template; ...
        """
        if self.chat_template is None:
            raise UserError(
                "the checkpoint has no chat template; expected one of an instruction-tuned model; "
                "give plain text instead"
            )
        if len(self.chat_template) > _MOST_TEMPLATE:
            raise UserError(
                f"the chat template has {len(self.chat_template)} characters, over the limit of "
                f"{_MOST_TEMPLATE}; use another"
            )
        return _render(
            self.chat_template,
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=self._name(self.bos_id),
            eos_token=self._name(self.eos_id),
        )

    def _name(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.id_to_token(token) or ""


def load_tokenizer(path: str | Path) -> LMTokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
      path: a folder with ``tokenizer.json`` (and ``tokenizer_config.json``), that file itself, a
        GGUF file, llama2.c's tokenizer file, or a llama2.c model beside its tokenizer, named
        ``tok<vocab size>.bin`` or ``tokenizer.bin``.

    Raises:
      UserError: if there is none, it is unsound or of a kind that is not known, or the tokenizers
        package is missing.

    >>> import tempfile
    >>> from jaxsys.data import train_bpe
    >>> file = Path(tempfile.mkdtemp()) / "tokenizer.json"
    >>> train_bpe("low lower lowest " * 9, 260).tokenizer.save(str(file))
    >>> load_tokenizer(file.parent).vocab_size
    260
    """
    path = Path(path)
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise UserError(
            "tokenizers of checkpoints need the package tokenizers, which is missing; run "
            "pip install 'jaxsys[lm]'"
        ) from None
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{path} is no file; expected a tokenizer.json, a .gguf file or llama2.c's tokenizer; "
            "with only vocab.json and merges.txt, save the tokenizer once more with transformers"
        )
    try:
        if path.suffix == ".gguf":
            return LMTokenizer(*from_gguf(read_gguf(path).metadata))
        if path.suffix == ".bin":
            return LMTokenizer(*_llama2c(path))
        return LMTokenizer(*_from_json(path))
    except Unsound as error:
        raise UserError(
            f"{path} holds no usable tokenizer: {error}; use another file or mend this one"
        ) from None


def save_tokenizer(folder: str | Path, tokenizer: LMTokenizer) -> list[Path]:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers reads too.

    Args:
      folder: made if need be.
      tokenizer: of any origin.

    Returns:
      The two paths.

    >>> import tempfile
    >>> from jaxsys.data import train_bpe
    >>> bpe = train_bpe("low lower lowest " * 9, 260).tokenizer
    >>> [file.name for file in save_tokenizer(tempfile.mkdtemp(), LMTokenizer(bpe))]
    ['tokenizer.json', 'tokenizer_config.json']
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for kind, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if token is not None:
            settings[f"{kind}_token"] = tokenizer.tokenizer.id_to_token(token)
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    files = [Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"]
    report.atomic_write(files[0], tokenizer.tokenizer.to_str(pretty=True))
    report.atomic_write(files[1], json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return files


def _llama2c(path: Path) -> Vocabulary:
    try:
        return read_llama2c_vocabulary(path)
    except Unsound as error:
        try:
            header, _ = read_llama2c(path)
        except UserError:
            raise error from None
    for name in (f"tok{header.vocab_size}.bin", "tokenizer.bin"):
        if (path.parent / name).is_file():
            return read_llama2c_vocabulary(path.parent / name)
    raise Unsound(f"it is a model, and tok{header.vocab_size}.bin is not beside it")


def _from_json(path: Path) -> Vocabulary:
    from tokenizers import Tokenizer

    text = _text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:
        # A panic in Rust arrives as a BaseException of a class that cannot be imported.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise Unsound(f"the tokenizers package refuses it ({str(error)[:160]})") from None
    settings = _object(path.with_name("tokenizer_config.json"))
    model = _object(path.with_name("config.json"))
    return Vocabulary(
        tokenizer,
        _special(tokenizer, settings, model, "bos"),
        _special(tokenizer, settings, model, "eos"),
        chat_template=_template(path, settings),
    )


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_FILE_BYTES:
        raise Unsound(f"{path.name} has over {_MOST_FILE_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Unsound(f"{path.name} is not UTF-8") from None


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise Unsound(f"{path.name} is not JSON ({str(error)[:80]})") from None
    if not isinstance(document, dict):
        raise Unsound(f"{path.name} is no JSON object")
    return document


def _special(
    tokenizer: Any, settings: Mapping[str, Any], model: Mapping[str, Any], kind: str
) -> int | None:
    """Find a special token by name, or by number in the model's own configuration."""
    name = settings.get(f"{kind}_token")
    if isinstance(name, Mapping):
        name = name.get("content")
    if isinstance(name, str):
        return tokenizer.token_to_id(name)
    number = model.get(f"{kind}_token_id")
    if isinstance(number, list) and number:
        number = number[0]
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
        return None
    return number if tokenizer.id_to_token(number) is not None else None


def _template(path: Path, settings: Mapping[str, Any]) -> str | None:
    file = path.with_name("chat_template.jinja")
    if file.is_file():
        return _text(file)
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _render(template: str, **values: Any) -> str:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError(
            "chat templates need the package jinja2, which is missing; run pip install 'jaxsys[lm]'"
        ) from None

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        # Jinja's own would escape <, > and & for web pages.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(tools=None, documents=None, **values)
    except Exception as error:
        raise UserError(
            f"the chat template refuses the conversation ({type(error).__name__}: "
            f"{str(error)[:160]}); check roles and contents"
        ) from None
