"""The difference of two models as a LoRA adapter in PEFT's layout."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsys.core import report
from jaxsys.core.checkpoint import write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import match
from jaxsys.merge.adapters import CONFIG, PREFIX, WEIGHTS
from jaxsys.models.quantise import BLOCK_WEIGHTS


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
            out[PREFIX + name] = np.asarray(tuned[name])
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
        module = PREFIX + name.removesuffix(".weight")
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
