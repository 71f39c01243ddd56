"""Old torch files: strided views against torch itself, and pickles that want to do harm."""

import contextlib
import itertools
import os
import pickle
import struct
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsys.core.checkpoint import read_torch
from jaxsys.core.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: Any
    arguments: tuple


class Persistent(NamedTuple):
    content: tuple


def _code(value) -> bytes:
    """Write the few things that such a file holds as instructions of protocol 2."""
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return _code(value.function) + _code(value.arguments) + b"R"
        case Persistent():
            return _code(value.content) + b"Q"
        case tuple():
            return b"(" + b"".join(map(_code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(map(_code, itertools.chain(*value.items()))) + b"u"
    raise AssertionError(value)


def _pickled(value) -> bytes:
    return b"\x80\x02" + _code(value) + b"."


def _tensor(key="7", kind="FloatStorage", count=6, offset=0, shape=(2, 3), strides=(3, 1)):
    storage = Persistent(("storage", Global("torch", kind), key, "cpu", count, None))
    hooks = Call(Global("collections", "OrderedDict"), ())
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, (storage, offset, shape, strides, False, hooks))


ROWS = (("7", np.arange(6, dtype=np.float32)),)


def _file(found, rows=ROWS, magic=MAGIC) -> bytes:
    keys = [key for key, _ in rows]
    head = b"".join(map(_pickled, (magic, 1001, MACHINE, found, keys)))
    return head + b"".join(struct.pack("<q", row.size) + row.tobytes() for _, row in rows)


def _read(tmp_path, content: bytes):
    path = tmp_path / "m.pth"
    path.write_bytes(content)
    return read_torch(path)


def test_a_tensor_is_the_view_of_its_storage_that_the_file_says(tmp_path):
    found = {
        "plain": _tensor(),
        "turned": _tensor(shape=(3, 2), strides=(1, 3)),
        "column": _tensor(offset=1, shape=(2,), strides=(3,)),
        "counter": _tensor("8", "LongStorage", 1, 0, (), ()),
        "parameter": Call(
            Global("torch._utils", "_rebuild_parameter"),
            (_tensor(), True, Call(Global("collections", "OrderedDict"), ())),
        ),
    }
    rows = (("7", np.arange(6, dtype=np.float32)), ("8", np.array([2**40])))
    got = _read(tmp_path, _file(found, rows))
    assert got["plain"].tolist() == got["parameter"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert got["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert got["column"].tolist() == [1, 4]
    assert int(got["counter"]) == 2**40
    assert not got["plain"].flags.writeable


def test_nothing_in_a_pickle_is_run(tmp_path):
    harm = Call(Global("os", "mkdir"), (str(tmp_path / "harm"),))
    with pytest.raises(UserError, match=r"os\.mkdir"):
        _read(tmp_path, _file({"w": harm}))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    for protocol in (2, 4):
        with pytest.raises(UserError, match="pickle"):
            _read(tmp_path, pickle.dumps(Evil(), protocol))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (_file({"w": _tensor(offset=1)}), "reaches out"),
        (_file({"w": _tensor(shape=(2, 2**40), strides=(0, 0))}), "shows"),
        (_file({"w": _tensor(shape=(2,))}), "reaches out"),
        (_file({"w": _tensor(shape=(-1, 3))}), "arguments"),
        (_file({"w": _tensor(count=5)}), "5 elements"),
        (_file({"w": _tensor(kind="UntypedStorage")}), "UntypedStorage"),
        (_file({"w": 3}), "'w' is no tensor"),
        (_file([_tensor()]), "a list"),
        (_file({"w": _tensor(), "v": _tensor("9")}), "not those"),
        (_file({"w": _tensor(), "v": _tensor(kind="IntStorage")}), "in two ways"),
        (_file({"w": _tensor()}) + b"\0", "end at byte"),
        (_file({"w": _tensor()}, magic=3), "magic"),
        (_file({("w",): _tensor()}), "no text"),
        (b"PK", "magic|broken"),
    ],
)
def test_figures_that_the_file_does_not_bear_out_are_named(tmp_path, content, match):
    with pytest.raises(UserError, match=match):
        _read(tmp_path, content)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damage_is_one_sentence(tmp_path, at, byte, cut):
    content = bytearray(_file({"w": _tensor(), "b": _tensor(shape=(3,), strides=(1,))}))
    at %= len(content)
    content[at] = byte
    with contextlib.suppress(UserError):
        _read(tmp_path, bytes(content[:at] if cut else content))


def test_torch_reads_and_writes_the_same(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install 'jaxsys[parity]'")
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    state = {
        "w": base.permute(2, 0, 1),
        "part": base[1, :, ::2],
        "half": base.half(),
        "brain": base.bfloat16(),
        "flags": base > 3,
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    path = tmp_path / "m.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    got = read_torch(path)
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert got[name].astype(np.float32).tolist() == tensor.float().tolist(), name
    torch.save(torch.nn.BatchNorm1d(3).state_dict(), path, _use_new_zipfile_serialization=False)
    assert read_torch(path)["running_var"].tolist() == [1, 1, 1]
    torch.save(state, path)
    with pytest.raises(UserError, match="zip format"):
        read_torch(path)
