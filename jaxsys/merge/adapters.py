"""LoRA folders in PEFT's layout: added to a model tensor by tensor, and extracted from a tuned one.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with A as
``base_model.model.<module>.lora_A.weight`` [r, in] and B as ``lora_B.weight`` [out, r] (of an
embedding: ``lora_embedding_A`` [r, V] and ``lora_embedding_B`` [D, r]); names without ``lora_`` are
tensors that take the place of the model's (``modules_to_save``, trained biases, embeddings with new
rows).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsys.core import report
from jaxsys.core.checkpoint import read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import match
from jaxsys.merge.vocabulary import has_token_rows
from jaxsys.models.lm.load import read_config
from jaxsys.models.lora import Adapter
from jaxsys.models.quantise import BLOCK_WEIGHTS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
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
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")


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


class Extracted(NamedTuple):
    """Say what `extract_adapter` kept.

    Attributes:
      ranks: by tensor.
      kept: share of the squared difference that the adapter holds, by tensor.
      left_out: tensors that changed and are not in the adapter: ‖difference‖ / ‖base‖.
      files: what was written.

    >>> Extracted({"w": 4}, {"w": 0.99}, {}, []).ranks
    {'w': 4}
    """

    ranks: dict[str, int]
    kept: dict[str, float]
    left_out: dict[str, float]
    files: list[Path]


def extract_adapter(
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    folder: str | Path,
    *,
    rank: int | None = 16,
    energy: float | None = None,
    patterns: Sequence[str] = BLOCK_WEIGHTS,
    whole: Sequence[str] = (),
    in_out: bool = False,
    base_name: str | None = None,
) -> Extracted:
    """Write the difference of two models as a LoRA adapter, by truncated SVD of every matrix.

    θ − θ_0 = U S Vᵀ, B = U_r √S_r, A = √S_r V_rᵀ: of all matrices of rank r the nearest (Eckart and
    Young). One pair of matrices is in memory at a time, and the thin factors of all.

    Args:
      base: the model that was tuned, by name.
      tuned: the result.
      folder: made if need be.
      rank: r, or its bound if ``energy`` is given too; None for no bound.
      energy: smallest rank that holds this share of the squared difference, matrix by matrix.
      patterns: globs over names; matrices that match are decomposed.
      whole: globs over names of tensors to store as they are (``modules_to_save``).
      in_out: matrices are [in, out] (GPT-2's Conv1D).
      base_name: what the config names as the base.

    Returns:
      Ranks, shares, and what is in neither (norms, biases, embeddings, unless ``whole`` has them).

    Raises:
      UserError: for names or shapes that differ between the two, all listed, for a rank below 1 or
        an energy outside (0, 1], or if nothing matches.

    >>> import tempfile
    >>> a = {"h.0.weight": np.zeros((4, 3), np.float32)}
    >>> b = {"h.0.weight": np.ones((4, 3), np.float32)}
    >>> extract_adapter(a, b, tempfile.mkdtemp(), energy=0.99).ranks
    {'h.0.weight': 1}
    """
    _check_pair(base, tuned, rank, energy)
    names = list(base)
    chosen = {names[i] for pattern in patterns for i in match(names, pattern)}
    entire = {names[i] for pattern in whole for i in match(names, pattern)}
    out: dict[str, np.ndarray] = {}
    ranks, kept, left_out = {}, {}, {}
    for name in names:
        if name in entire:
            out[_PREFIX + name] = np.asarray(tuned[name])
            continue
        before = np.asarray(base[name]).astype(np.float32)
        delta = np.asarray(tuned[name]).astype(np.float32) - before
        if not np.any(delta):
            continue
        if name not in chosen or delta.ndim != 2 or not name.endswith(".weight"):
            left_out[name] = float(np.linalg.norm(delta) / max(np.linalg.norm(before), 1e-30))
            continue
        a, b, kept[name] = _factors(delta.T if in_out else delta, rank, energy)
        ranks[name] = len(a)
        module = _PREFIX + name.removesuffix(".weight")
        out |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    if not out:
        raise UserError(
            "the two models do not differ in any matrix that the patterns match; expected a base "
            "and what was tuned from it; check the two paths and the patterns"
        )
    config = _config(names, ranks, entire, in_out, base_name)
    return Extracted(ranks, kept, left_out, _write(Path(folder), out, config))


def _check_pair(base, tuned, rank: int | None, energy: float | None) -> None:
    if (rank is None and energy is None) or (rank is not None and rank < 1):
        raise UserError(f"rank is {rank} and energy {energy}; give a rank from 1 up or an energy")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is {energy}; expected a share in (0, 1], such as 0.95; correct it")
    wrong = [f"{n} is in one only" for n in sorted(set(base) ^ set(tuned))]
    for name in base:
        if name in tuned and base[name].shape != tuned[name].shape:
            wrong.append(f"{name} {base[name].shape} and {tuned[name].shape}")
    if wrong:
        raise UserError(
            f"base and tuned model do not fit: {'; '.join(wrong)}; expected the model that the "
            "other was tuned from; correct the paths"
        )


def _factors(delta: np.ndarray, rank: int | None, energy: float | None):
    """Split [out, in] into A [r, in] and B [out, r], with the share of squares that they hold."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    share = np.cumsum(np.square(s, dtype=np.float64))
    share /= share[-1]
    r = len(s) if energy is None else min(int(np.searchsorted(share, energy - 1e-12)) + 1, len(s))
    r = r if rank is None else min(r, rank)
    root = np.sqrt(s[:r])
    b = np.ascontiguousarray(u[:, :r] * root[None])
    return np.ascontiguousarray(root[:, None] * vt[:r]), b, float(share[r - 1])


def _config(
    names: Sequence[str],
    ranks: Mapping[str, int],
    entire: set[str],
    in_out: bool,
    base_name: str | None,
) -> dict[str, Any]:
    modules = {name.removesuffix(".weight"): r for name, r in ranks.items()}
    last = {module.rsplit(".", 1)[-1] for module in modules}
    weights = {n.removesuffix(".weight") for n in names if n.endswith(".weight")}
    by_last = {module for module in weights if module.rsplit(".", 1)[-1] in last}
    usual = max(modules.values(), default=1)
    odd = {module: r for module, r in modules.items() if r != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": usual,
        "lora_alpha": usual,  # scale 1: the singular values are in A and B
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(last if by_last == set(modules) else modules),
        "modules_to_save": sorted({n.rsplit(".", 1)[0] for n in entire}) or None,
        "fan_in_fan_out": in_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
    }


def _write(folder: Path, out: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> list[Path]:
    [written] = write_safetensors(folder / ".adapter", out, out.__getitem__, shard_bytes=1 << 62)
    written.replace(folder / WEIGHTS)
    written.parent.rmdir()
    report.atomic_write(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return [folder / CONFIG, folder / WEIGHTS]
