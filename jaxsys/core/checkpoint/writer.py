"""Safetensors files written one tensor at a time, laid out so that reading copies nothing.

The safetensors package writes from a dict that holds every tensor, and pads its header to 8 bytes,
so that no tensor lies on a multiple of 64 but by chance. Here the header is written first
(`_places`), and then one tensor after another.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxsys.core.checkpoint._mapping import short
from jaxsys.core.checkpoint._places import (
    UNFINISHED,
    header_of,
    plan_files,
    take_names,
    write_index,
)
from jaxsys.core.errors import UserError


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
