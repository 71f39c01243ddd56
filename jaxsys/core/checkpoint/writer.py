"""Safetensors files written one tensor at a time, laid out so that reading copies nothing.

The safetensors package writes from a dict that holds every tensor, and pads its header to 8 bytes,
so that no tensor lies on a multiple of 64 but by chance. Here the header is written first, from
shapes alone, and padded so that the data starts on a multiple of 64. Tensors whose size is a
multiple of 64 come first in a file, and so all of these are aligned for `jax.device_put`.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxsys.core import report
from jaxsys.core.checkpoint._mapping import short
from jaxsys.core.checkpoint.safetensors import DTYPES, INDEX, SINGLE
from jaxsys.core.errors import UserError

_ALIGNMENT = 64
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
UNFINISHED = ".unfinished"


def write_safetensors(
    path: str | Path,
    shapes: Mapping[str, Any],
    produce: Callable[[str], Any],
    *,
    shard_bytes: int = 5 << 30,
    metadata: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a checkpoint of any size with one tensor in memory.

    Files get their names when all are complete, so a kill leaves no half of one, and tensors may be
    views of the very files that are replaced. A checkpoint that stood in the folder is replaced.

    Args:
      path: folder, made if need be: ``model.safetensors``, or several ``model-0000k-of-0000n`` and
        an index.
      shapes: by tensor name, what has a shape and a dtype, such as `jax.ShapeDtypeStruct`.
      produce: gives the array of a name; called once for each, in the order of the files.
      shard_bytes: most data in one file; a larger tensor has a file of its own.
      metadata: text fields for the headers beside ``format: pt``, which readers ask for.

    Returns:
      The paths of the safetensors files.

    Raises:
      UserError: before anything is written for names or dtypes that the format cannot hold; later
        if an array is not as its shape said.

    >>> import tempfile
    >>> from jaxsys.core.checkpoint import read_safetensors
    >>> arrays = {"w": np.arange(3.0), "b": np.zeros((2, 2), np.int8)}
    >>> [file] = write_safetensors(tempfile.mkdtemp(), arrays, arrays.get)
    >>> read_safetensors(file)["w"].tolist()
    [0.0, 1.0, 2.0]
    """
    folder = Path(path)
    plan, fields = plan_files(folder, shapes, shard_bytes, metadata)
    with _all_or_nothing(folder, list(plan)) as unfinished:
        for (name, inside), temporary in zip(plan.items(), unfinished, strict=True):
            with temporary.open("wb") as file:
                _write_file(file, name, inside, produce, fields)
    write_index(folder, plan)
    return [folder / name for name in plan]


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
        total = sum(size_of(spec) for inside in plan.values() for spec in inside.values())
        where = {tensor: name for name, inside in plan.items() for tensor in inside}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        report.atomic_write(folder / INDEX, json.dumps(index, indent=1))


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


def size_of(spec: jax.ShapeDtypeStruct) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _split(
    specs: Mapping[str, jax.ShapeDtypeStruct], shard_bytes: int
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Deal tensors to files in their order; within a file those that keep alignment go first."""
    shards: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + size_of(spec) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += size_of(spec)

    def rank(item: tuple[str, jax.ShapeDtypeStruct]) -> tuple[bool, int]:
        return size_of(item[1]) % _ALIGNMENT != 0, -item[1].dtype.itemsize

    ordered = [dict(sorted(shard.items(), key=rank)) for shard in shards]
    if len(ordered) == 1:
        return {SINGLE: ordered[0]}
    return {
        f"model-{i + 1:05d}-of-{len(ordered):05d}.safetensors": shard
        for i, shard in enumerate(ordered)
    }


def header_of(
    inside: Mapping[str, jax.ShapeDtypeStruct], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Make the bytes before the data, and say where in the file each tensor starts."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    here = 0
    for name, spec in inside.items():
        places[name] = here
        end = here + size_of(spec)
        kind = _KINDS[spec.dtype]
        document[name] = {"dtype": kind, "shape": spec.shape, "data_offsets": [here, end]}
        here = end
    header = json.dumps(document, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    head = len(header).to_bytes(8, "little") + header
    return head, {name: len(head) + place for name, place in places.items()}


def _write_file(
    file: BinaryIO,
    file_name: str,
    inside: Mapping[str, jax.ShapeDtypeStruct],
    produce: Callable[[str], Any],
    metadata: Mapping[str, str],
) -> None:
    header, _ = header_of(inside, metadata)
    file.write(header)
    for name, spec in inside.items():
        array = np.asarray(produce(name))
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise UserError(
                f"tensor {short(name)} came as {array.dtype}{list(array.shape)} for {file_name} "
                f"and {spec.dtype}{list(spec.shape)} was announced; make them agree"
            )
        # Through bytes: the buffer protocol knows no bfloat16.
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _all_or_nothing(folder: Path, names: list[str]) -> Iterator[list[Path]]:
    """Give temporary paths; on success they take their names and the old checkpoint goes."""
    unfinished = [folder / f".{name}{UNFINISHED}" for name in names]
    try:
        yield unfinished
        take_names(folder, unfinished, names)
    finally:
        for temporary in unfinished:
            temporary.unlink(missing_ok=True)


def take_names(folder: Path, unfinished: list[Path], names: list[str]) -> None:
    """Put complete files in the place of the checkpoint that stood in the folder."""
    # The old index first: from here to the new one the folder reads as no checkpoint.
    stale = [folder / INDEX, folder / SINGLE, *folder.glob("model-?????-of-?????.safetensors")]
    for old in stale:
        if len(names) > 1 or old.name != SINGLE:
            old.unlink(missing_ok=True)
    for temporary, name in zip(unfinished, names, strict=True):
        temporary.replace(folder / name)
