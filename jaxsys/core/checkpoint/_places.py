"""How the tensors of a checkpoint lie in safetensors files: names, places, headers, index.

The header is made from shapes alone and padded so that the data starts on a multiple of 64.
Tensors whose size is a multiple of 64 come first in a file, and so all of these are aligned for
`jax.device_put`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsys.core import report
from jaxsys.core.checkpoint._mapping import short
from jaxsys.core.checkpoint.safetensors import DTYPES, INDEX, SINGLE
from jaxsys.core.errors import UserError
from jaxsys.core.tree import size_bytes

_ALIGNMENT = 64
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
UNFINISHED = ".unfinished"


def plan_files(
    folder: Path, shapes: Mapping[str, Any], shard_bytes: int, metadata: Mapping[str, Any] | None
) -> tuple[dict[str, dict[str, jax.ShapeDtypeStruct]], dict[str, str]]:
    """Deal tensors to files, check what the format cannot hold, and make the folder."""
    specs = {name: _spec(name, leaf) for name, leaf in shapes.items()}
    if shard_bytes < 1:
        raise UserError(f"shard_bytes is {shard_bytes}; at least 1 is needed; raise it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder to write into; name another")
    fields = {"format": "pt"} | dict(metadata or {})
    if not all(isinstance(value, str) for value in fields.values()):
        raise UserError("metadata holds more than text; safetensors files keep text only; use str")
    plan = _split(specs, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    return plan, fields


def write_index(folder: Path, plan: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]) -> None:
    """Write the index of a checkpoint of several files."""
    if len(plan) > 1:
        total = sum(size_bytes(spec) for inside in plan.values() for spec in inside.values())
        where = {tensor: name for name, inside in plan.items() for tensor in inside}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        report.atomic_write(folder / INDEX, json.dumps(index, indent=1))


def header_of(
    inside: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Make the bytes before the data, and say where in the file each tensor starts."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    here = 0
    for name, spec in inside.items():
        places[name] = here
        end = here + size_bytes(spec)
        kind = _KINDS[spec.dtype]
        document[name] = {"dtype": kind, "shape": spec.shape, "data_offsets": [here, end]}
        here = end
    header = json.dumps(document, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    head = len(header).to_bytes(8, "little") + header
    return head, {name: len(head) + place for name, place in places.items()}


def take_names(folder: Path, unfinished: list[Path], names: list[str]) -> None:
    """Put complete files in the place of the checkpoint that stood in the folder."""
    # The old index first: from here to the new one the folder reads as no checkpoint.
    stale = [folder / INDEX, folder / SINGLE, *folder.glob("model-?????-of-?????.safetensors")]
    for old in stale:
        if len(names) > 1 or old.name != SINGLE:
            old.unlink(missing_ok=True)
    for temporary, name in zip(unfinished, names, strict=True):
        temporary.replace(folder / name)


def _spec(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = np.dtype(leaf.dtype)
    if dtype not in _KINDS:
        raise UserError(
            f"tensor {short(name)} is {dtype}, which safetensors files cannot hold; convert it to "
            f"one of {', '.join(map(str, _KINDS))}"
        )
    if name == "__metadata__":
        raise UserError("a tensor is named __metadata__, which the format keeps; rename it")
    return jax.ShapeDtypeStruct(tuple(leaf.shape), dtype)


def _split(
    specs: Mapping[str, jax.ShapeDtypeStruct], shard_bytes: int
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Deal tensors to files in their order; within a file those that keep alignment go first."""
    shards: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + size_bytes(spec) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += size_bytes(spec)

    def rank(item: tuple[str, jax.ShapeDtypeStruct]) -> tuple[bool, int]:
        return size_bytes(item[1]) % _ALIGNMENT != 0, -item[1].dtype.itemsize

    ordered = [dict(sorted(shard.items(), key=rank)) for shard in shards]
    if len(ordered) == 1:
        return {SINGLE: ordered[0]}
    return {
        f"model-{i + 1:05d}-of-{len(ordered):05d}.safetensors": shard
        for i, shard in enumerate(ordered)
    }
