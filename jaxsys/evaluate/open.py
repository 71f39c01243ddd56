"""Open a model by name, with its tokenizer."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

from jaxsys.core.errors import UserError
from jaxsys.core.report import format_bytes
from jaxsys.evaluate.protocol import Model, from_lm
from jaxsys.evaluate.score import prefix_id


class Opened(NamedTuple):
    """Hold a model that is ready to be asked.

    Attributes:
      model: see `Model`.
      tokenizer: its own.
      config: the `LMConfig`.
      path: where it came from.
      end_ids: tokens that end a text.

    >>> Opened._fields
    ('model', 'tokenizer', 'config', 'path', 'end_ids')
    """

    model: Model
    tokenizer: Any
    config: Any
    path: Path
    end_ids: frozenset[int]


def open_model(name: str | Path, dtype: Any = None) -> Opened:
    """Load a model and its tokenizer.

    Args:
      name: a name that `jaxsys.models.lm.find_model` knows, or a path.
      dtype: of the parameters; that of the file by default.

    Raises:
      UserError: if there is no such model, it is damaged, or it has no tokenizer.

    >>> open_model("no/such/model")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    from jaxsys.data.tokenizer import load_tokenizer
    from jaxsys.models import lm

    path = lm.find_model(name)
    # The tokenizer first: it is small, and a mistake shows before the weights are read.
    tokenizer = load_tokenizer(path)
    params, config = lm.load(path, dtype=dtype)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer of {path} knows {tokenizer.vocab_size} tokens and the model "
            f"{config.vocab_size}; use the tokenizer that belongs to the model"
        )
    ends = {*config.eos_ids, *(() if tokenizer.eos_id is None else (tokenizer.eos_id,))}
    return Opened(from_lm(params, config), tokenizer, config, path, frozenset(ends))


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Turn a prompt into ids; an empty one becomes the begin token, or else the end token.

    Args:
      tokenizer: as `open_model` gives it.
      prompt: text.
      chat: put it into the chat template, as the user's message.

    >>> import types
    >>> nothing = types.SimpleNamespace(encode=lambda text: [], bos_id=1, eos_id=2)
    >>> encode_prompt(nothing, "")
    [1]
    """
    if chat:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    ids = [int(i) for i in tokenizer.encode(prompt)]
    begin = tokenizer.bos_id
    if chat and begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]  # the template and the tokenizer both put one
    return ids or [prefix_id(tokenizer)]


def describe_model(name: str | Path) -> dict[str, Any]:
    """Say what a model is, reading no more than its configuration and tokenizer.

    Args:
      name: as `open_model` takes it.

    Returns:
      Facts by name: path, file size, parameters, configuration, tokenizer.

    >>> describe_model("no/such/model")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: ...
    """
    from jaxsys.data.tokenizer import load_tokenizer
    from jaxsys.models import lm

    path = lm.find_model(name)
    config = lm.load_config(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    shapes = lm.shapes(config)
    tokenizer = load_tokenizer(path)
    plain = dataclasses.asdict(config)
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    return {
        "path": str(path),
        "files": format_bytes(sum(file.stat().st_size for file in files)),
        "parameters": sum(math.prod(leaf.shape) for leaf in shapes.values()),
        "tensors": len(shapes),
        **{k: v for k, v in plain.items() if v != usual[k]},
        "tokenizer": f"{tokenizer.vocab_size} tokens",
        "begin_id": tokenizer.bos_id,
        "end_id": tokenizer.eos_id,
        "chat_template": tokenizer.chat_template is not None,
    }
