"""GGUF files read as memory maps, tensors dequantised when they are asked for.

The gguf package knows the block formats and their dequantisation, and is used for both. Its file
reader is not: it makes several NumPy objects for every string of a vocabulary (seconds for a small
model) and follows an array length that lies for as long as it says. The header is parsed here, in
one pass whose every step is bounded by the size of the file.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxsys.core.checkpoint._mapping import map_file, short
from jaxsys.core.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
# Kinds whose bytes are the numbers.
_PLAIN = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_PART = 1 << 20
_MOST_DIMS = 4
_MOST_NAME_BYTES = 65_535


class GgufTensor(NamedTuple):
    """Say what one tensor is and where it lies.

    Attributes:
      kind: block format by GGUF's name, such as ``Q4_1`` or ``F32``.
      shape: rows first, as NumPy has it (GGUF lists sizes the other way round).
      start: of its bytes in the file.
      size_bytes: in the file.

    >>> GgufTensor("F32", (2, 3), 4096, 24).kind
    'F32'
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    @property
    def dtype(self) -> np.dtype:
        """Give the dtype of the array that it becomes: float32 for every block format."""
        return _PLAIN.get(self.kind, np.dtype(np.float32))


class GgufTensors(Mapping[str, np.ndarray]):
    """Map names to arrays that are made when asked for, and not kept.

    F32, F16, BF16 and integers are read-only views of the mapped file; block formats are
    dequantised to a new float32 array each time.

    Attributes:
      info: kind, shape and place by name, without data.

    >>> data = np.arange(4, dtype=np.float32).view(np.uint8)
    >>> tensors = GgufTensors(data, {"w": GgufTensor("F32", (2, 2), 0, 16)})
    >>> tensors["w"].tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """

    def __init__(self, data: np.ndarray, info: Mapping[str, GgufTensor]) -> None:
        self._data = data
        self.info = dict(info)

    def __getitem__(self, name: str) -> np.ndarray:
        kind, shape, start, size_bytes = self.info[name]
        data = self._data[start : start + size_bytes]
        if kind in _PLAIN:
            return data.view(_PLAIN[kind]).reshape(shape)
        constants, quants = _gguf()
        number = constants.GGMLQuantizationType[kind]
        rows = data.reshape(math.prod(shape[:-1]), -1)
        result = np.empty((len(rows), shape[-1]), np.float32)
        # In parts: the package holds what it makes twice.
        step = max(1, _PART // shape[-1])
        try:
            # A hostile scale may be infinite or no number; that is for the reader of the result.
            with np.errstate(all="ignore"):
                for i in range(0, len(rows), step):
                    result[i : i + step] = quants.dequantize(rows[i : i + step], number)
        except NotImplementedError:
            raise UserError(
                f"tensor {short(name)} is stored as {kind}, which the gguf package cannot "
                "dequantise; convert the file to another format, such as Q8_0"
            ) from None
        return result.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)


class GgufFile(NamedTuple):
    """Hold what a GGUF file holds.

    Attributes:
      metadata: strings, numbers, lists of strings and NumPy arrays of numbers, by key.
      tensors: lazily dequantised arrays by GGUF's own names.

    >>> GgufFile({"general.architecture": "llama"}, GgufTensors(np.zeros(0, np.uint8), {})).metadata
    {'general.architecture': 'llama'}
    """

    metadata: dict[str, Any]
    tensors: GgufTensors


def read_gguf(path: str | Path) -> GgufFile:
    """Map a GGUF file of version 2 or 3; only its header is read.

    Args:
      path: of the file, little-endian.

    Raises:
      UserError: in one sentence, for whatever is wrong with the file, or if the gguf package is
        missing.

    Reference: github.com/ggml-org/ggml, docs/gguf.md.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "empty.gguf"
    >>> _ = file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    >>> read_gguf(file).metadata
    {}
    """
    path = Path(path)
    data = map_file(path, least_bytes=24)
    try:
        return _read(data)
    except _Unsound as error:
        raise UserError(
            f"{path} is no sound GGUF file: {error}; download or convert it again"
        ) from None


class _Unsound(Exception):
    """Say what is wrong with the bytes."""


def _gguf() -> tuple[Any, Any]:
    try:
        from gguf import constants, quants
    except ImportError:
        raise UserError(
            "GGUF files need the package gguf, which is missing; run pip install 'jaxsys[lm]'"
        ) from None
    return constants, quants


class _Cursor:
    """Walk over the header; every step is checked against the end of the file."""

    def __init__(self, data: np.ndarray) -> None:
        self.bytes = memoryview(data)
        self.here = 0

    def left(self) -> int:
        return len(self.bytes) - self.here

    def take(self, size: int) -> memoryview:
        if size > self.left():
            raise _Unsound(f"it ends within a value of {size} bytes at byte {self.here}")
        self.here += size
        return self.bytes[self.here - size : self.here]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self, most: int | None = None) -> str:
        size = self.uint(8)
        if most is not None and size > most:
            raise _Unsound(f"it has a name of {size} bytes at byte {self.here}")
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError:
            raise _Unsound(f"the text at byte {self.here - size} is not UTF-8") from None


def _read(data: np.ndarray) -> GgufFile:
    cursor = _Cursor(data)
    if cursor.take(4) != _MAGIC:
        raise _Unsound("it does not start with GGUF")
    version = cursor.uint(4)
    if version not in _VERSIONS:
        raise _Unsound(f"its version reads {version}, where little-endian 2 or 3 is expected")
    tensor_count, value_count = cursor.uint(8), cursor.uint(8)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text(_MOST_NAME_BYTES)
        if key in metadata:
            raise _Unsound(f"the key {short(key)} appears twice")
        metadata[key] = _value(cursor)
    infos = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    usable = isinstance(alignment, int) and 0 < alignment <= 1 << 20
    if not (usable and alignment & (alignment - 1) == 0):
        raise _Unsound(f"general.alignment is {short(str(alignment))}, no usable power of two")
    origin = -(-cursor.here // alignment) * alignment
    return GgufFile(metadata, GgufTensors(data, _place(infos, origin, alignment, data.size)))


def _value(cursor: _Cursor) -> Any:
    kind = cursor.uint(4)
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        return np.frombuffer(cursor.take(_SCALARS[kind].itemsize), _SCALARS[kind])[0].item()
    if kind != _ARRAY:
        raise _Unsound(f"the value at byte {cursor.here} has the unknown type {kind}")
    kind, count = cursor.uint(4), cursor.uint(8)
    if kind in _SCALARS:
        return np.frombuffer(cursor.take(count * _SCALARS[kind].itemsize), _SCALARS[kind]).copy()
    if kind != _STRING:
        raise _Unsound(f"the array at byte {cursor.here} has elements of the unknown type {kind}")
    if count * 8 > cursor.left():
        raise _Unsound(f"the array at byte {cursor.here} claims {count} texts, more than fit")
    return [cursor.text() for _ in range(count)]


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text(_MOST_NAME_BYTES)
    dims = cursor.uint(4)
    if dims > _MOST_DIMS:
        raise _Unsound(f"tensor {short(name)} has {dims} dimensions, more than {_MOST_DIMS}")
    shape = struct.unpack(f"<{dims}Q", cursor.take(8 * dims))[::-1]
    return name, shape, cursor.uint(4), cursor.uint(8)


def _place(
    infos: list[tuple[str, tuple[int, ...], int, int]], origin: int, alignment: int, end: int
) -> dict[str, GgufTensor]:
    """Check kinds, shapes and places of all tensors."""
    constants, _ = _gguf()
    kinds = {int(kind): kind for kind in constants.GGMLQuantizationType}
    placed: dict[str, GgufTensor] = {}
    for name, shape, number, offset in infos:
        if name in placed:
            raise _Unsound(f"tensor {short(name)} appears twice")
        if number not in kinds:
            raise _Unsound(f"tensor {short(name)} has the unknown kind {number}")
        block, block_bytes = constants.GGML_QUANT_SIZES[kinds[number]]
        size = math.prod(shape)
        if not shape or size == 0 or shape[-1] % block:
            raise _Unsound(
                f"tensor {short(name)} has the shape {shape}, of which {kinds[number].name} cannot "
                f"be made in blocks of {block}"
            )
        start, size_bytes = origin + offset, size // block * block_bytes
        if offset % alignment or start + size_bytes > end:
            raise _Unsound(
                f"tensor {short(name)} lies at bytes {start} to {start + size_bytes} of {end}, "
                f"beyond the end or not on a multiple of {alignment}"
            )
        placed[name] = GgufTensor(kinds[number].name, shape, start, size_bytes)
    here = 0
    for name, tensor in sorted(placed.items(), key=lambda item: item[1].start):
        if tensor.start < here:
            raise _Unsound(f"tensor {short(name)} overlaps the tensor before it")
        here = tensor.start + tensor.size_bytes
    return placed
