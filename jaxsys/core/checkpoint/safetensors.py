"""Safetensors files read as memory maps.

A file is 8 bytes of header length, a JSON header with dtype, shape and byte range of every tensor,
and the data. The safetensors package reads such files too, but copies every tensor and keeps the
last of duplicate names; here a tensor is a read-only view of the mapped file, which
`jax.device_put` takes over without a copy on CPU where it is aligned to 64 bytes, as in files that
`write_safetensors` wrote. The tests hold both readers against each other.

Every figure of a header is checked against the size of the file before anything is made of it. What
no reader can prevent: a file that is cut while it is mapped ends the process.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import ml_dtypes
import numpy as np

from jaxsys.core.checkpoint._mapping import map_file, short
from jaxsys.core.errors import UserError

# The bound of the format's own library; 400,000 tensors fit into it.
_MOST_HEADER_BYTES = 100_000_000
_MOST_DIMS = 32
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class _Span(NamedTuple):
    """Where a tensor lies in its file, checked."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsHeader(NamedTuple):
    """Say what a checkpoint holds, without its data.

    Attributes:
      shapes: shape and dtype by tensor name.
      metadata: the free text fields of the first file.
      files: the files, in the order of the index.

    >>> SafetensorsHeader({}, {"format": "pt"}, ()).metadata
    {'format': 'pt'}
    """

    shapes: dict[str, jax.ShapeDtypeStruct]
    metadata: dict[str, str]
    files: tuple[Path, ...]


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Map the tensors of a checkpoint by name; nothing but headers is read.

    Args:
      path: a safetensors file, an index (``*.index.json``) or a folder holding either.

    Returns:
      Read-only views of the mapped files; bfloat16 as `ml_dtypes.bfloat16`.

    Raises:
      UserError: in one sentence, for whatever is wrong with the path, the index or a file.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> head = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    >>> _ = file.write_bytes(len(head).to_bytes(8, "little") + head + np.float32(2).tobytes())
    >>> read_safetensors(file)["w"].tolist()
    [2.0]
    """
    files, weight_map = _locate(Path(path))
    mapped: dict[str, np.ndarray] = {}
    for file in files:
        data, spans, _ = _open(file)
        wanted = spans if weight_map is None else _in_shard(file, spans, weight_map)
        for name in wanted:
            span = spans[name]
            mapped[name] = data[span.start : span.stop].view(span.dtype).reshape(span.shape)
    return mapped if weight_map is None else {name: mapped[name] for name in weight_map}


def read_header(path: str | Path) -> SafetensorsHeader:
    """Read names, shapes and dtypes of a checkpoint.

    Args:
      path: as for `read_safetensors`.

    Raises:
      UserError: as for `read_safetensors`.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> head = b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    >>> _ = file.write_bytes(len(head).to_bytes(8, "little") + head)
    >>> read_header(file).shapes["w"].shape
    (0,)
    """
    files, weight_map = _locate(Path(path))
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    metadata: dict[str, str] = {}
    for file in files:
        _, spans, own = _open(file)
        metadata = metadata or own
        wanted = spans if weight_map is None else _in_shard(file, spans, weight_map)
        for name in wanted:
            shapes[name] = jax.ShapeDtypeStruct(spans[name].shape, spans[name].dtype)
    return SafetensorsHeader(shapes, metadata, files)


def _refuse(path: Path, what: str) -> NoReturn:
    raise UserError(f"{path} is no sound safetensors checkpoint: {what}; download or write it anew")


def _locate(path: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Find the files of a checkpoint, and which tensor is in which where an index says so."""
    if path.is_dir():
        index, single = path / INDEX, path / SINGLE
        found = sorted(path.glob("*.safetensors"))
        if index.is_file() and not single.is_file():
            path = index
        elif single.is_file():
            path = single
        elif len(found) == 1:
            path = found[0]
        else:
            raise UserError(
                f"{path} holds {len(found)} safetensors files and neither {SINGLE} nor {INDEX}; "
                "expected one of these; name the file wanted"
            )
    if path.suffix != ".json":
        return (path,), None
    weight_map = _read_index(path)
    return tuple(path.parent / name for name in dict.fromkeys(weight_map.values())), weight_map


def _read_index(path: Path) -> dict[str, str]:
    data = map_file(path, least_bytes=2)
    if data.size > _MOST_HEADER_BYTES:
        _refuse(path, f"its index has {data.size} bytes, more than {_MOST_HEADER_BYTES}")
    document = _parse(path, data.tobytes())
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict):
        _refuse(path, "its index has no object weight_map")
    for name, file in weight_map.items():
        # A plain name only: an index must not lead out of its folder.
        plain = isinstance(file, str) and file.isprintable() and Path(file).name == file
        if not plain or len(file.encode()) > 255:
            _refuse(path, f"its index puts {short(name)} into {short(str(file))}, no file name")
    return weight_map


def _in_shard(file: Path, spans: Mapping[str, _Span], weight_map: Mapping[str, str]) -> list[str]:
    wanted = [name for name, shard in weight_map.items() if shard == file.name]
    for name in wanted:
        if name not in spans:
            _refuse(file, f"it lacks {short(name)}, which the index puts there")
    return wanted


def _open(path: Path) -> tuple[np.ndarray, dict[str, _Span], dict[str, str]]:
    """Map a file and check its header against its size."""
    data = map_file(path, least_bytes=10)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(_MOST_HEADER_BYTES, data.size - 8):
        _refuse(
            path,
            f"it claims a header of {length} bytes in a file of {data.size}, or over the limit",
        )
    document = _parse(path, data[8 : 8 + length].tobytes())
    metadata = document.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        _refuse(path, "its __metadata__ is no object of strings")
    origin = 8 + length
    spans = {name: _check(path, name, info, origin) for name, info in document.items()}
    _check_tiling(path, spans, origin, data.size)
    return data, spans, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {short(twice)} appears twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not start with a brace")
        document = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        for name in document:
            # Lone surrogates pass JSON but are no text.
            name.encode("utf-8")
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its JSON cannot be read ({str(error)[:160]})")
    return document


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check(path: Path, name: str, info: Any, origin: int) -> _Span:
    """Turn one entry of a header into a span, or refuse it."""
    if not isinstance(info, dict):
        _refuse(path, f"the entry of {short(name)} is no object")
    kind, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        known = ", ".join(DTYPES)
        _refuse(path, f"{short(name)} has dtype {short(str(kind))}, not one of {known}")
    if not (isinstance(shape, list) and len(shape) <= _MOST_DIMS and all(map(_is_size, shape))):
        _refuse(path, f"{short(name)} has the shape {short(str(shape))}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
        _refuse(path, f"{short(name)} has the data_offsets {short(str(offsets))}")
    # Zeros do not excuse the other sizes: NumPy cannot hold such a shape either.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63:
        _refuse(path, f"{short(name)} has the absurd shape {short(str(shape))}")
    start, stop = offsets
    size = math.prod(shape) * dtype.itemsize
    if stop - start != size:
        _refuse(
            path,
            f"{short(name)} has {stop - start} bytes where {kind}{short(str(shape))} takes {size}",
        )
    return _Span(dtype, tuple(shape), origin + start, origin + stop)


def _check_tiling(path: Path, spans: Mapping[str, _Span], origin: int, end: int) -> None:
    """Insist that the tensors fill the data without overlap or hole, as the format demands."""
    here = origin
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop)):
        if span.start != here:
            how = (
                "overlaps the tensor before it" if span.start < here else "leaves a hole before it"
            )
            _refuse(path, f"{short(name)} {how}")
        here = span.stop
    if here != end:
        how = "is truncated" if here > end else "has data of no tensor at its end"
        _refuse(path, f"it {how}: its tensors end at byte {here} and the file at {end}")
