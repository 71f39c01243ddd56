"""LoRA folders in PEFT's layout, added to a model tensor by tensor.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with A as
``base_model.model.<module>.lora_A.weight`` [r, in] and B as ``lora_B.weight`` [out, r] (of an
embedding: ``lora_embedding_A`` [r, V] and ``lora_embedding_B`` [D, r]); names without ``lora_`` are
tensors that take the place of the model's (``modules_to_save``, trained biases, embeddings with new
rows).
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.core.checkpoint import read_safetensors
from jaxsys.core.errors import UserError
from jaxsys.merge.vocabulary import has_token_rows
from jaxsys.models.lm.load import read_config
from jaxsys.models.lm.names import find_model
from jaxsys.models.lora import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)
# Fields that change what the matrices mean, and the only value of each that is supported.
_PLAIN = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
)
_PLAIN_INIT = (None, True, False, "gaussian", "orthogonal", "eva")


class LoraFolder(NamedTuple):
    """Hold what a LoRA folder adds to a model.

    Attributes:
      adapters: by the name of the tensor that each changes.
      in_out: names of those whose tensor is [in, out] (GPT-2's Conv1D, embeddings).
      whole: tensors that take the place of the model's.
      path: the folder.

    >>> LoraFolder({}, frozenset(), {}, Path("lora")).path.name
    'lora'
    """

    adapters: dict[str, Adapter]
    in_out: frozenset[str]
    whole: dict[str, np.ndarray]
    path: Path


def split_reference(reference: str) -> tuple[str, str | None]:
    """Split ``model+lora`` into the two folders; a folder with a plus in its name stays whole.

    >>> split_reference("base+tuned/lora"), split_reference("base")
    (('base', 'tuned/lora'), ('base', None))
    """
    if "+" not in reference or Path(reference).exists():
        return reference, None
    model, _, lora = reference.rpartition("+")
    return model, lora


def read_adapter(folder: str | Path) -> LoraFolder:
    """Open a LoRA folder; its tensors stay memory maps until they are used.

    The scale is α / r, or α / √r with ``use_rslora`` (arXiv 2312.03732); ``alpha_pattern`` may
    name modules by their full name or its last parts.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
      UserError: for files that are absent or unsound, and for kinds of adapter that need another
        formula, naming the field.

    >>> read_adapter("nowhere")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere/adapter_config.json is no readable JSON object ...
    """
    folder = Path(folder)
    fields = read_config(folder / CONFIG)
    _check_kind(folder, fields)
    tensors = read_safetensors(folder / WEIGHTS)
    named = {_strip(name): tensor for name, tensor in tensors.items()}
    adapters, in_out, used = {}, set(), set()
    for first, second in _PAIRS:
        embedding = first == _PAIRS[1][0]
        for key in [name for name in named if name.endswith(first)]:
            module = key.removesuffix(first)
            a, b = named[key], named.get(module + second)
            if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                got = None if b is None else b.shape
                raise UserError(
                    f"{folder}: module {module} has A {a.shape} and B {got}; expected [r, in] and "
                    "[out, r]; only matrices are supported; save the adapter anew"
                )
            adapters[f"{module}.weight"] = Adapter(a, b, _scale(folder, fields, module, len(a)))
            used |= {key, module + second}
            if embedding or fields.get("fan_in_fan_out"):
                in_out.add(f"{module}.weight")
    whole = {name: tensor for name, tensor in named.items() if name not in used}
    odd = [name for name in whole if ".lora_" in name]
    if odd:
        raise UserError(
            f"{folder} holds {', '.join(odd[:3])}, which belong to no pair of A and B; expected "
            "a LoRA adapter as PEFT saves it; save it anew"
        )
    return LoraFolder(adapters, frozenset(in_out), whole, folder)


def _strip(name: str) -> str:
    # PEFT stores the embedding below an adapter too, as the adapter's base layer.
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _check_kind(folder: Path, fields: Mapping[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{folder} holds an adapter of kind {kind!r}; only LORA is supported; merge it into "
            "its model with PEFT and give the merged model"
        )
    for name in _PLAIN:
        if fields.get(name):
            raise UserError(
                f"{folder}: {name} is {fields[name]!r}, which changes the formula and is not "
                "supported; merge the adapter into its model with PEFT and give the merged model"
            )
    start = fields.get("init_lora_weights")
    if start not in _PLAIN_INIT:
        raise UserError(
            f"{folder}: init_lora_weights is {start!r}, which changes the model's own weights too; "
            "save the adapter with path_initial_model_for_weight_conversion and give that"
        )


def _scale(folder: Path, fields: Mapping[str, Any], module: str, rank: int) -> float:
    wanted = _pattern(folder, fields, "rank_pattern", module, fields.get("r"))
    alpha = _pattern(folder, fields, "alpha_pattern", module, fields.get("lora_alpha"))
    if wanted != rank:
        raise UserError(
            f"{folder}: module {module} has rank {rank} and its config says {wanted}; use the "
            f"{CONFIG} that belongs to the weights"
        )
    return float(alpha) / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _pattern(folder: Path, fields: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    value = default
    for pattern, own in (fields.get(key) or {}).items():
        name = pattern.removeprefix("^")
        # PEFT's are regular expressions; from a foreign file only plain names are taken.
        if not all(c.isalnum() or c in "._-" for c in name):
            raise UserError(
                f"{folder}: {key} holds {pattern!r}; only names of modules, or their last parts, "
                "are supported; write the modules out"
            )
        if module == name or (module.endswith(f".{name}") and name == pattern):
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise UserError(f"{folder}: {key} or its default is {value!r} for {module}; mend {CONFIG}")
    return value


class AdaptedTensors(Mapping[str, np.ndarray]):
    """Read a model with an adapter added, each tensor when it is asked for.

    W' = W + (α / r) · B A, computed in float32 and returned in the dtype of W.

    Args:
      tensors: the model's, by name.
      adapter: from `read_adapter`.

    Raises:
      UserError: naming every tensor of the adapter that the model lacks or has in another shape.

    >>> lora = LoraFolder({"w": Adapter(np.ones((1, 2)), np.ones((2, 1)), 3.0)}, frozenset(), {},
    ...                   Path("lora"))
    >>> AdaptedTensors({"w": np.zeros((2, 2), np.float32)}, lora)["w"].tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """

    def __init__(self, tensors: Mapping[str, Any], adapter: LoraFolder):
        self._tensors = tensors
        self._adapter = adapter
        self._check()

    def _check(self) -> None:
        lora, wrong = self._adapter, []
        shapes = {name: t.shape for name, t in self._tensors.items()}
        for name, tensor in lora.whole.items():
            mine = shapes.get(name)
            skip = 1 if has_token_rows(name) else 0
            if mine is None or mine[skip:] != tensor.shape[skip:]:
                wrong.append(f"{name} {tensor.shape} for {mine or 'nothing'}")
            shapes[name] = tensor.shape
        for name, adapter in lora.adapters.items():
            shape = (adapter.b.shape[0], adapter.a.shape[1])
            shape = shape[::-1] if name in lora.in_out else shape
            if shapes.get(name) != shape:
                wrong.append(f"{name} {shape} for {shapes.get(name, 'nothing')}")
        if wrong:
            raise UserError(
                f"the adapter {lora.path} does not fit the model: {'; '.join(wrong)}; expected "
                "the shapes of the model that it was made for; name that model before the plus"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        whole = self._adapter.whole
        tensor = whole[name] if name in whole else self._tensors[name]
        adapter = self._adapter.adapters.get(name)
        if adapter is None:
            return tensor
        a, b = np.asarray(adapter.a, np.float32), np.asarray(adapter.b, np.float32)
        delta = np.asarray(Adapter(a, b, adapter.scale).delta())
        delta = delta.T if name in self._adapter.in_out else delta
        return (np.asarray(tensor).astype(np.float32) + delta).astype(tensor.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Give shape and dtype by name, computing nothing."""
        named = dict(self._tensors) | self._adapter.whole
        return {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in named.items()}


def open_reference(reference: str) -> Mapping[str, np.ndarray]:
    """Open ``model`` or ``model+lora`` by the names of its tensors; nothing is read yet.

    Args:
      reference: a safetensors file or a folder of such, or a name that
        `jaxsys.models.lm.find_model` knows; after a plus, a LoRA folder.

    Raises:
      UserError: for files that are absent, unsound or do not fit one another.

    >>> len(open_reference("tiny"))
    38
    """
    model, lora = split_reference(reference)
    tensors = read_safetensors(find_model(model))
    return tensors if lora is None else AdaptedTensors(tensors, read_adapter(lora))
