"""Tensors of an old torch checkpoint, read without running its pickle.

Before version 1.6 `torch.save` wrote five pickles (a magic number, a version, the machine, the
object, the keys of its storages) and then each storage as a count and raw numbers. A pickle is a
program that may call any function of Python. Here its instructions are read as data by a machine
of our own, which knows the few of them that a dict of tensors takes, calls nothing, and refuses
the rest by name. A tensor may be any strided view of its storage, and is given as one.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from jaxsys.core.checkpoint._mapping import map_file, short
from jaxsys.core.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
# The pickles come first; the names and shapes of 100,000 tensors fit into this.
_MOST_PICKLED_BYTES = 1 << 26
_MOST_DIMS = 32
_STORAGES: dict[tuple[str, str], np.dtype] = {
    ("torch", "DoubleStorage"): np.dtype("<f8"),
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "HalfStorage"): np.dtype("<f2"),
    ("torch", "BFloat16Storage"): np.dtype(ml_dtypes.bfloat16),
    ("torch", "LongStorage"): np.dtype("<i8"),
    ("torch", "IntStorage"): np.dtype("<i4"),
    ("torch", "ShortStorage"): np.dtype("<i2"),
    ("torch", "CharStorage"): np.dtype("i1"),
    ("torch", "ByteStorage"): np.dtype("u1"),
    ("torch", "BoolStorage"): np.dtype(np.bool_),
}
_DICT = ("collections", "OrderedDict")
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")


class _Unsound(Exception):
    """What is wrong with the file, as the middle of a sentence."""


class _Name(NamedTuple):
    """A function or class that the pickle names; it is never looked up."""

    module: str
    name: str


class _Storage(NamedTuple):
    """A row of numbers that follows the pickles."""

    key: str
    dtype: np.dtype
    n_elements: int


class _View(NamedTuple):
    """A tensor: which elements of a storage it shows, counted in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(path: str | Path) -> dict[str, np.ndarray]:
    """Map the tensors of a state dict that an old `torch.save` wrote, running nothing of it.

    Args:
      path: of a file in the format before torch 1.6 that holds one dict from name to tensor.

    Returns:
      Read-only arrays by name. They may be strided, and are not aligned: copy what is used often.

    Raises:
      UserError: for the newer zip format, for anything but a dict of tensors, for instructions or
        names that such a dict does not need, and for figures that the file does not bear out.

    >>> read_torch("nowhere.pth")
    Traceback (most recent call last):
    ...
    jaxsys.core.errors.UserError: nowhere.pth is not there; expected a file; check the path
    """
    path = Path(path)
    data = map_file(path, least_bytes=2)
    if zipfile.is_zipfile(path):
        _refuse(path, "it is of the zip format that torch writes since 1.6")
    stream = io.BytesIO(data[:_MOST_PICKLED_BYTES].tobytes())
    try:
        found, keys = _read_pickles(stream)
        rows = _place_storages(data, stream.tell(), found, keys)
        return {name: _show(name, view, rows[view.storage.key]) for name, view in found.items()}
    except _Unsound as error:
        _refuse(path, str(error))


def _refuse(path: Path, what: str) -> NoReturn:
    raise UserError(
        f"{path} is no old torch file of one dict of tensors: {what}; load it where it was made "
        "and save it as safetensors"
    )


def _read_pickles(stream: io.BytesIO) -> tuple[dict[str, _View], list[str]]:
    """Read the five pickles: the views by name, and the keys in the order of the storages."""
    if _run(stream) != _MAGIC or _run(stream) != _VERSION:
        raise _Unsound("it does not begin with torch's magic number and version")
    machine = _run(stream)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _Unsound("it was not written on a little-endian machine")
    found, keys = _run(stream), _run(stream)
    if not isinstance(found, dict):
        raise _Unsound(f"it holds a {type(found).__name__} instead of a dict")
    for name, view in found.items():
        if not isinstance(view, _View):
            raise _Unsound(f"{short(name)} is no tensor")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _Unsound("its list of storages is no list of names")
    if len(set(keys)) != len(keys):
        raise _Unsound("it lists a storage twice")
    return found, keys


def _run(stream: io.BytesIO) -> Any:
    """Read one pickle as data."""
    machine = _Machine()
    try:
        for operation, argument, _ in pickletools.genops(stream):
            machine.step(operation.name, argument)
    except (ValueError, IndexError, KeyError) as error:
        raise _Unsound(f"its pickle is broken ({str(error)[:120]})") from None
    if len(machine.stack) != 1:
        raise _Unsound("its pickle leaves other than one object")
    return machine.stack[0]


class _Machine:
    """A stack, its marks and a memo: what a pickle of a dict of tensors is written for."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        match name:
            case "PROTO" | "STOP" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                self.stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT":
                self.stack.append({})
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self._take(int(name[-1]))))
            case "TUPLE":
                self.stack.append(tuple(self._since_mark()))
            case "APPEND" | "APPENDS":
                items = self._take(1) if name == "APPEND" else self._since_mark()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._take(2) if name == "SETITEM" else self._since_mark()
                self._set(items)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(_known(*argument.split(" ", 1)))
            case "BINPERSID":
                self.stack.append(_storage(*self._take(1)))
            case "REDUCE":
                self.stack.append(_build(*self._take(2)))
            case "BUILD":
                # The versions of modules, which state dicts carry as an attribute of the dict.
                self._take(1)
            case _:
                raise _Unsound(f"its pickle has the instruction {name}, which tensors do not need")

    def _take(self, count: int) -> list[Any]:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - count < floor:
            raise ValueError("an instruction finds too little on the stack")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _since_mark(self) -> list[Any]:
        taken = self._take(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return taken

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"an instruction finds no {kind.__name__}")
        return self.stack[-1]

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise ValueError("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Text only: to hash a tuple of tuples of … may take for ever.
            if not isinstance(key, str):
                raise _Unsound("a dict in it has a key that is no text")
            if key in target:
                raise _Unsound(f"the name {short(key)} appears twice")
            target[key] = value


def _known(module: str, name: str) -> _Name:
    if (module, name) not in (_DICT, _TENSOR, _PARAMETER, *_STORAGES):
        raise _Unsound(f"its pickle names {short(f'{module}.{name}')}, which tensors do not need")
    return _Name(module, name)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _storage(described: Any) -> _Storage:
    match described:
        case ("storage", _Name() as kind, str(key), str(), count, None) if kind in _STORAGES:
            if _is_size(count):
                return _Storage(key, _STORAGES[kind], count)
    raise _Unsound("it describes a storage in a way that is not known")


def _build(function: Any, arguments: Any) -> Any:
    """Do what the three functions that are known would do."""
    match function, arguments:
        case (("collections", "OrderedDict"), ()):
            return {}
        case ((_, "_rebuild_parameter"), (_View() as view, *_)):
            return view
        case (
            (_, "_rebuild_tensor_v2"),
            (_Storage() as storage, offset, tuple(shape), tuple(strides), *_),
        ):
            if all(map(_is_size, (offset, *shape, *strides))):
                return _View(storage, offset, shape, strides)
    raise _Unsound("its pickle calls a function with arguments that are not known")


def _place_storages(
    data: np.ndarray, here: int, found: Mapping[str, _View], keys: list[str]
) -> dict[str, np.ndarray]:
    """Find the numbers of every storage, in the order of the keys."""
    storages: dict[str, _Storage] = {}
    for view in found.values():
        storage = view.storage
        if storages.setdefault(storage.key, storage) != storage:
            raise _Unsound(f"it describes the storage {short(storage.key)} in two ways")
    if storages.keys() != set(keys):
        raise _Unsound("the storages that it lists are not those that its tensors use")
    rows = {}
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(data[here : here + 8].tobytes(), "little")
        here += 8
        size = storage.n_elements * storage.dtype.itemsize
        if count != storage.n_elements or here + size > data.size:
            raise _Unsound(
                f"the storage {short(key)} should have {storage.n_elements} elements at byte "
                f"{here} and the file says {count} and ends at {data.size}"
            )
        rows[key] = data[here : here + size].view(storage.dtype)
        here += size
    if here != data.size:
        raise _Unsound(f"its storages end at byte {here} and the file at {data.size}")
    return rows


def _show(name: str, view: _View, row: np.ndarray) -> np.ndarray:
    """Lay a strided view over a storage."""
    size = math.prod(view.shape)
    reach = sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=False))
    fits = size == 0 or view.offset + reach < row.size
    # No more elements than the storage has: a stride of zero could show one of them for ever.
    if len(view.strides) != len(view.shape) or len(view.shape) > _MOST_DIMS or not fits:
        raise _Unsound(f"{short(name)} reaches out of its storage")
    if size > row.size:
        raise _Unsound(f"{short(name)} shows {size} elements of a storage of {row.size}")
    steps = tuple(stride * row.dtype.itemsize for stride in view.strides)
    start = row[view.offset :] if size else row[:0]
    return np.lib.stride_tricks.as_strided(start, view.shape, steps, writeable=False)
