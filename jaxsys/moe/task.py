"""What a mixture-of-experts run trains: the model, the text and the parts of its layers."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxsys.core.errors import UserError
from jaxsys.data import (
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    python_docs,
    read_text,
    train_bpe,
    train_valid_split,
)
from jaxsys.models import lm
from jaxsys.moe import gates, gates_balanced, gates_dense, model
from jaxsys.moe.contract import Capacity, Dims, Experts, Gate, Losses, MoESpec
from jaxsys.moe.dispatch import TRANSPORTS
from jaxsys.moe.experts import gpt_ffn, swiglu
from jaxsys.moe.order import einsum_order, sparse_order
from jaxsys.moe.upcycle import upcycle

FORMS = ("gpt2", "mixtral")
GateName = Literal["gshard", "switch", "sigmoid", "x-moe", "choice", "sinkhorn", "bias", "soft"]
GATES: dict[str, Callable[["Task"], Gate]] = {
    "gshard": lambda task: gates.noisy_top_k(task.k),
    "switch": lambda task: gates.noisy_top_k(task.k, "all"),
    "sigmoid": lambda task: gates.sigmoid(task.k),
    "x-moe": lambda task: gates.cosine(task.k),
    "choice": lambda task: gates_dense.expert_choice(task.k),
    "sinkhorn": lambda task: gates_balanced.sinkhorn(task.k),
    "bias": lambda task: gates_balanced.bias_balanced(task.k),
    "soft": lambda task: gates_dense.soft_moe(max(1, task.k * task.length // task.experts)),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
      model: ``gpt2`` or ``mixtral``, a fresh model of that form and the sizes below; or a dense
        model to upcycle: tiny, smollm2, stories260k, or the path of a checkpoint.
      width: D of a fresh model.
      depth: its blocks, L.
      heads: its attention heads, H.
      hidden: F of one expert of a fresh model; 4·D by default.
      experts: E.
      k: experts of a token (tokens of an expert: that many times its even share).
      gate: choice and soft read the whole sequence, so a model that writes text must not use them.
      order: sparse (scatter and gather) or einsum (one-hot products).
      dispatch: flat, gather or ragged; see `jaxsys.moe.dispatch`.
      factor: capacity factor f.
      policy: who is dropped when an expert is full: position, probability, priority, dropless.
      balance: weight of the balance loss.
      z: weight of the z-loss.
      shared_hidden: width of an expert that every token visits; 0 for none.
      noise: of the copies of an upcycled feed-forward part, relative to its own spread.
      text: file to train on; the documentation that ships with Python by default.
      tokens: ``byte``, or ``bpe`` trained on the text; an upcycled model has its own.
      vocab: vocabulary of ``bpe``.
      batch: sequences per device and step.
      length: tokens per sequence.
      optimizer: name of an optimiser preset.
      lr: its learning rate.
    """

    model: str = "mixtral"
    width: int = 64
    depth: int = 4
    heads: int = 4
    hidden: int | None = None
    experts: int = 8
    k: int = 2
    gate: GateName = "gshard"
    order: Literal["sparse", "einsum"] = "sparse"
    dispatch: Literal["flat", "gather", "ragged"] = "flat"
    factor: float = 1.25
    policy: Literal["position", "probability", "priority", "dropless"] = "position"
    balance: float = 1e-2
    z: float = 0.0
    shared_hidden: int = 0
    noise: float = 0.05
    text: str | None = None
    tokens: Literal["byte", "bpe"] = "byte"
    vocab: int = 1024
    batch: int = 4
    length: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-3


class Setup(NamedTuple):
    """A task made concrete.

    Attributes:
      config: the dense model around the mixtures.
      spec: every mixture's parts.
      make: ``() ->`` the whole model's parameters.
      dims: every mixture's sizes.
      train: tokens to train on.
      valid: held-out windows, [n, T + 1].
      bytes_per_token: of the text.

    >>> Setup._fields[:2]
    ('config', 'spec')
    """

    config: lm.LMConfig
    spec: MoESpec
    make: Callable[[], Any]
    dims: Dims
    train: np.ndarray
    valid: np.ndarray
    bytes_per_token: float


def set_up(task: Task, seed: int) -> Setup:
    """Read text and model and choose the parts, checking everything on the way.

    Args:
      task: what is trained.
      seed: of fresh parameters.

    Returns:
      The task made concrete; parameters are drawn only when asked for.

    Raises:
      UserError: for a name that is not known, a text too short, or a model of another form.

    >>> setup = set_up(Task(width=8, heads=2, depth=1, length=16), 0)
    >>> setup.config.model_type, setup.spec.experts.matmuls, setup.valid.shape[1]
    ('llama', 3, 17)
    """
    for name, known in (("gate", GATES), ("dispatch", TRANSPORTS)):
        if getattr(task, name) not in known:
            raise UserError(
                f"{name} {getattr(task, name)!r} is not known; expected one of "
                f"{', '.join(known)}; choose one"
            )
    text = python_docs() if task.text is None else read_text(task.text)
    config, dense, tokenizer = _dense(task, text)
    if not 1 <= task.length <= config.max_positions:
        raise UserError(
            f"length is {task.length}; the model reads 1 to {config.max_positions} tokens; choose "
            "a length in that range"
        )
    moves = TRANSPORTS[task.dispatch]
    spec = MoESpec(
        GATES[task.gate](task),
        {"sparse": sparse_order, "einsum": einsum_order}[task.order](),
        _experts_for(config),
        moves.dispatch,
        moves.combine,
        capacity=Capacity(task.factor, task.policy),
        losses=Losses(balance=task.balance, z=task.z),
        shared=_experts_for(config) if task.shared_hidden else None,
        shared_hidden=task.shared_hidden,
    )
    dims = Dims(config.width, config.ffn_width, task.experts)
    key = jax.random.key(seed)

    def make() -> Any:
        if dense is None:
            return model.init(key, config, spec, dims)
        return upcycle(dense, config, spec, task.experts, key, noise=task.noise)

    ids = np.asarray(tokenizer.encode(text))
    train, valid = train_valid_split(ids)
    rows = min(64, (len(valid) - 1) // task.length)
    if rows < 1:
        raise UserError(
            f"the text has {len(ids)} tokens, of which {len(valid)} are held out, and a window has "
            f"{task.length}; expected at least one window; give a longer text or a smaller length"
        )
    windows = np.stack([valid[i * task.length : (i + 1) * task.length + 1] for i in range(rows)])
    return Setup(config, spec, make, dims, train, windows, len(text.encode()) / len(ids))


def _dense(task: Task, text: str) -> tuple[lm.LMConfig, Any, Tokenizer]:
    """Make or load the dense model around the mixtures; parameters only where it was loaded."""
    if task.model not in FORMS:
        path = lm.find_model(task.model)
        params, config = lm.load(path, dtype=np.float32)
        return config, params, load_tokenizer(path)
    tokenizer = ByteTokenizer() if task.tokens == "byte" else train_bpe(text, task.vocab)
    hidden = task.hidden or 4 * task.width
    sizes = {"vocab_size": tokenizer.vocab_size}
    if task.model == "gpt2":
        fields = {
            "model_type": "gpt2",
            "n_positions": task.length,
            "n_embd": task.width,
            "n_layer": task.depth,
            "n_head": task.heads,
            "n_inner": hidden,
        }
    else:  # Mixtral's attention is Llama's
        fields = {
            "model_type": "llama",
            "max_position_embeddings": task.length,
            "hidden_size": task.width,
            "num_hidden_layers": task.depth,
            "num_attention_heads": task.heads,
            "intermediate_size": hidden,
        }
    return lm.config_from_hf({**fields, **sizes}), None, tokenizer


def _experts_for(config: lm.LMConfig) -> Experts:
    if config.model_type == "gpt2":
        return gpt_ffn(config.activation)
    return swiglu(config.activation)
