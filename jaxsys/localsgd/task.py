"""What a local SGD job trains: a GPT-form model on text, made concrete on one worker."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.core.tree import Layer
from jaxsys.data import (
    ByteTokenizer,
    TokenStream,
    python_docs,
    read_text,
    train_bpe,
    train_valid_split,
)
from jaxsys.localsgd.layers import find_layers
from jaxsys.models import gpt2
from jaxsys.train import optimizers

MODELS = {"tiny": gpt2.tiny, "small": gpt2.small_bytes, "medium": lambda: gpt2.from_depth(6)}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what; the same for every strategy.

    Attributes:
      model: size of the GPT-form model: ``tiny`` (35 thousand parameters), ``small`` (3.3 million)
        or ``medium`` (10.8 million).
      text: file to train on; the documentation that ships with Python by default.
      tokens: ``byte``, or ``bpe`` trained on the text.
      vocab: vocabulary of ``bpe``.
      batch: sequences per worker and step.
      length: tokens per sequence; the model's longest by default.
      optimizer: name of an optimiser preset.
      lr: its learning rate.
      layers: globs over parameter paths, one per layer; modules in order of use by default.
      min_layer_bytes: smaller modules join the one that follows, since every message has a latency.
    """

    model: str = "small"
    text: str | None = None
    tokens: str = "byte"
    vocab: int = 1024
    batch: int = 8
    length: int | None = None
    optimizer: str = "adamw"
    lr: float = 5e-4
    layers: tuple[str, ...] | None = None
    min_layer_bytes: int = 250_000


class Setup(NamedTuple):
    """A task made concrete: ``loss_fn``, parameters, layers and data."""

    loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    layers: tuple[Layer, ...]
    train: TokenStream
    valid: np.ndarray
    bytes_per_token: float


def set_up(task: Task, seed: int, process_id: int = 0, workers: int = 1) -> Setup:
    """Read the text, build the model and find its layers, checking everything on the way.

    >>> setup = set_up(Task(model="tiny", batch=2), 0)
    >>> len(setup.layers), setup.valid.shape[1]
    (1, 33)
    """
    if task.model not in MODELS:
        raise UserError(
            f"model {task.model!r} is not known; expected one of {', '.join(MODELS)}; choose one"
        )
    if task.optimizer not in optimizers.PRESETS:
        raise UserError(
            f"optimizer {task.optimizer!r} is not known; expected one of "
            f"{', '.join(optimizers.PRESETS)}; choose one"
        )
    if task.tokens not in ("byte", "bpe"):
        raise UserError(f"tokens is {task.tokens!r}; expected 'byte' or 'bpe'; choose one of them")
    text = python_docs() if task.text is None else read_text(task.text)
    tokenizer = ByteTokenizer() if task.tokens == "byte" else train_bpe(text, task.vocab)
    ids = tokenizer.encode(text)
    config = dataclasses.replace(MODELS[task.model](), vocab_size=tokenizer.vocab_size)
    length = task.length or config.n_positions
    if not 1 <= length <= config.n_positions:
        raise UserError(
            f"length is {length}; the model {task.model!r} reads 1 to {config.n_positions} tokens; "
            "choose a length in that range"
        )
    train_ids, valid_ids = train_valid_split(ids)
    stream = TokenStream(
        train_ids,
        batch=task.batch,
        length=length,
        process_id=process_id,
        num_processes=workers,
        seed=seed,
    )
    rows = min(16, (len(valid_ids) - 1) // length)
    valid = np.stack([valid_ids[i * length : (i + 1) * length + 1] for i in range(rows)])
    params = gpt2.init(jax.random.key(seed), config)

    def loss_fn(params: Any, tokens: Any) -> jax.Array:
        return gpt2.loss(params, config, tokens)

    layers = find_layers(
        loss_fn,
        params,
        jax.ShapeDtypeStruct((task.batch, length + 1), jnp.int32),
        patterns=task.layers,
        min_bytes=task.min_layer_bytes if task.layers is None else 0,
    )
    bytes_per_token = len(text.encode()) / len(ids)
    return Setup(loss_fn, params, layers, stream, valid, bytes_per_token)
