"""Dense models of one architecture as one mixture of experts, in Mixtral's form.

Attention, norms and embeddings come from a base model, each expert's feed-forward block from one
model. The router's row of an expert is drawn at random (for training on), zero, or made from
prompts that the expert is for, so that the mixture is of use at once.

Copies of one model give that model: the chosen experts' weights add up to one, so whatever the
router says, the block's output is the dense one (sparse upcycling, arXiv 2212.05055).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsys.core.errors import UserError
from jaxsys.core.tree import path_key, unflatten
from jaxsys.merge.tokenizers import read_tokenizer, write_tokenizer
from jaxsys.models import lm

GATES = ("hidden", "embed", "random", "zero")
_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
# Fields in which an expert may differ: its feed-forward blocks do not know them.
_FREE = (
    *("model_type", "vocab_size", "tied", "max_positions", "prefix"),
    *("init_std", "bos_id", "eos_ids", "pad_id"),
)


@dataclass(frozen=True)
class Expert:
    """Describe one expert.

    Attributes:
      model: anything that `jaxsys.models.lm.open_tensors` opens.
      prompts: texts that should reach this expert.
      negative: texts that should not.

    >>> Expert("coder", ("def f(x):",)).negative
    ()
    """

    model: str | Path
    prompts: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


class Upcycled(NamedTuple):
    """Say what `upcycle` wrote.

    Attributes:
      config: the mixture's.
      files: what was written.
      alike: largest cosine between two experts' rows of a router, layer by layer; near 1, some
        experts will hardly be chosen apart.

    >>> Upcycled._fields
    ('config', 'files', 'alike')
    """

    config: lm.LMConfig
    files: list[Path]
    alike: list[float]


def upcycle(
    base: str | Path,
    experts: Sequence[Expert],
    out: str | Path,
    *,
    gate: str = "hidden",
    experts_per_token: int = 2,
    key: jax.Array | None = None,
    encode: Callable[[str], Any] | None = None,
    dtype: Any = None,
    shard_bytes: int = 5 << 30,
) -> Upcycled:
    """Write a mixture of experts that `jaxsys.models.lm.load` and transformers open.

    One tensor is in memory at a time, beside the base model for the gate ``hidden``.

    Args:
      base: the model that gives all but the feed-forward blocks: Llama or Mistral without biases.
      experts: E models of the same shapes.
      out: folder, made if need be.
      gate: where the routers' rows come from: ``hidden`` (what each router reads when the base
        model reads the prompts, averaged over tokens and prompts), ``embed`` (the prompts'
        embeddings, the same in all layers), ``random`` (uniform in ±1/√D, as a fresh linear
        layer has it) or ``zero``.
      experts_per_token: how many experts each token visits.
      key: random key of the gate ``random``.
      encode: text to ids, for prompts; the base's own tokenizer by default.
      dtype: of the files; that of the base by default.
      shard_bytes: largest file.

    Returns:
      The configuration, the files, and how much alike the routers' rows are.

    Raises:
      UserError: for models that are not Llama or Mistral or do not fit one another (all
        differences are listed), a lack of prompts, or numbers of experts that make no sense.

    Reference: arXiv 2401.04088 (the form); mergekit-moe (the gates; its ``hidden`` takes what
    enters the layer at the last token, here it is what the router itself reads).

    >>> import tempfile
    >>> config = lm.LMConfig("llama", 19, 8, 1, 2, 2, 4, 8, 16)
    >>> folder = tempfile.mkdtemp()
    >>> _ = lm.save(folder, lm.init(jax.random.key(0), config), config)
    >>> upcycle(folder, [Expert(folder)] * 3, folder + "/moe", gate="zero").config.experts
    3
    """
    _check(experts, gate, experts_per_token)
    config, tensors = lm.open_tensors(base)
    opened = [lm.open_tensors(expert.model) for expert in experts]
    _check_shapes(config, tensors, experts, opened)
    mixture = replace(
        config,
        model_type="mixtral",
        experts=len(experts),
        experts_per_token=experts_per_token,
        expert_width=config.ffn_width,
    )
    kind = np.dtype(dtype or tensors[next(iter(tensors))].dtype)
    routers = _routers(gate, config, tensors, base, experts, key, encode)

    def produce(name: str) -> Any:
        head, _, rest = name.partition(".block_sparse_moe.")
        if not rest:
            return np.asarray(tensors[name]).astype(kind)
        if rest == "gate.weight":
            return routers[int(head.rsplit(".", 1)[-1])].astype(kind)
        _, e, role, _ = rest.split(".")
        dense = next(k for k, v in _NAMES.items() if v == role)
        return np.asarray(opened[int(e)][1][f"{head}.mlp.{dense}.weight"]).astype(kind)

    named = lm.shapes(mixture, kind)
    files = lm.write_folder(out, mixture, named, produce, shard_bytes)
    if (Path(base) / "tokenizer.json").is_file():
        files += write_tokenizer(out, read_tokenizer(base))
    return Upcycled(mixture, files, [_alike(router) for router in routers])


def _check(experts: Sequence[Expert], gate: str, experts_per_token: int) -> None:
    if gate not in GATES:
        raise UserError(f"gate is {gate!r}; expected one of {', '.join(GATES)}; choose one")
    if not 1 <= experts_per_token <= len(experts):
        raise UserError(
            f"each token visits {experts_per_token} of {len(experts)} experts; expected from 1 to "
            "all of them; change experts_per_token or add experts"
        )
    if gate in ("hidden", "embed"):
        silent = [str(expert.model) for expert in experts if not expert.prompts]
        if silent:
            raise UserError(
                f"{', '.join(silent)} have no prompts, which the gate {gate!r} needs; give some "
                "that the expert is for, or take the gate random or zero and train on"
            )


def _check_shapes(config, tensors, experts, opened) -> None:
    plain = config.model_type in ("llama", "mistral")
    if not plain or config.qkv_bias or config.out_bias or config.ffn_bias:
        raise UserError(
            f"the base is a {config.model_type} model{' with biases' if plain else ''}; Mixtral's "
            "form holds Llama and Mistral models without biases; choose another base"
        )
    free = {name: getattr(config, name) for name in _FREE}
    wrong = []
    for expert, (own, theirs) in zip(experts, opened, strict=True):
        if own.model_type not in ("llama", "mistral"):
            wrong.append(f"{expert.model} is a {own.model_type} model")
        elif replace(own, **free) != config:
            wrong.append(f"{expert.model} has another configuration")
        for name, tensor in tensors.items():
            if ".mlp." in name and (name not in theirs or theirs[name].shape != tensor.shape):
                got = tuple(theirs[name].shape) if name in theirs else "nothing"
                wrong.append(f"{name} is {got} in {expert.model} and {tuple(tensor.shape)} in base")
    if wrong:
        raise UserError(
            f"the experts do not fit the base: {'; '.join(wrong)}; expected models tuned from one; "
            "leave those out"
        )


def _routers(gate, config, tensors, base, experts, key, encode) -> list[np.ndarray]:
    """Make each layer's router, [E, D] in float32."""
    shape = (len(experts), config.width)
    if gate == "zero":
        return [np.zeros(shape, np.float32)] * config.layers
    if gate == "random":
        key = jax.random.key(0) if key is None else key
        bound = 1 / math.sqrt(config.width)
        drawn = []
        for i in range(config.layers):
            own = path_key(key, f"{lm.layer_prefix(config, i)}.block_sparse_moe.gate.weight")
            drawn.append(np.asarray(jax.random.uniform(own, shape, minval=-bound, maxval=bound)))
        return drawn
    encode = encode or _encoder(base)
    reads = _embedded(tensors, config) if gate == "embed" else _read(tensors, config)
    rows = np.stack([_direction(expert, encode, reads) for expert in experts])  # [E, L, D]
    return [rows[:, i] for i in range(config.layers)]


def _encoder(base: str | Path) -> Callable[[str], Any]:
    from jaxsys.data.tokenizer import load_tokenizer

    return load_tokenizer(base).encode


Reads = Callable[[np.ndarray], Any]  # ids [T] -> what the routers see, [L, D]


def _embedded(tensors: Mapping[str, Any], config: lm.LMConfig) -> Reads:
    table = tensors[next(name for name in tensors if name.endswith("embed_tokens.weight"))]

    def reads(ids: np.ndarray) -> np.ndarray:
        mean = np.mean(np.asarray(table[ids]).astype(np.float32), axis=0)
        return np.tile(mean, (config.layers, 1))

    return reads


def _read(tensors: Mapping[str, Any], config: lm.LMConfig) -> Reads:
    params = unflatten({name: jax.device_put(np.asarray(tensors[name])) for name in tensors})
    points = tuple(f"{lm.layer_prefix(config, i)}.mlp:in" for i in range(config.layers))

    @jax.jit
    def mean(tokens: Array, mask: Array) -> Float[Array, "L D"]:
        taps = lm.apply(params, config, tokens, mask=mask, taps=points).taps
        own = mask[0].astype(jnp.float32)
        rows = [own @ taps[point][0].astype(jnp.float32) for point in points]
        return jnp.stack(rows) / jnp.sum(own)

    def reads(ids: np.ndarray) -> np.ndarray:
        # A few lengths only, so that few programs are compiled.
        length = max(8, 1 << (len(ids) - 1).bit_length())
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(mean(tokens, np.arange(length)[None] < len(ids)))

    return reads


def _direction(expert: Expert, encode: Callable[[str], Any], reads: Reads) -> np.ndarray:
    """Average what the prompts give, less what the negative ones give, at unit length: [L, D]."""

    def mean(prompts: Sequence[str]) -> np.ndarray:
        found = []
        for prompt in prompts:
            ids = np.asarray(encode(prompt), np.int64)
            if not ids.size:
                raise UserError(f"the prompt {prompt!r} of {expert.model} has no token; mend it")
            found.append(reads(ids))
        return np.mean(found, axis=0)

    rows = mean(expert.prompts)
    if expert.negative:
        rows = rows - mean(expert.negative)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-8)


def _alike(router: np.ndarray) -> float:
    unit = router / np.maximum(np.linalg.norm(router, axis=-1, keepdims=True), 1e-30)
    cosines = unit @ unit.T - 2 * np.eye(len(unit))
    return float(cosines.max()) if len(unit) > 1 else 0.0
