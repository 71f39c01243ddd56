"""Safetensors: held against the safetensors package, and fed hostile files."""

import json
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxsys.core.checkpoint import read_header, read_safetensors, write_safetensors
from jaxsys.core.checkpoint.safetensors import DTYPES
from jaxsys.core.errors import UserError

FEW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def _read_bounded(path: Path, content: bytes) -> dict[str, np.ndarray] | None:
    """Read what may be hostile: arrays, or None after one sentence; never much memory."""
    path.write_bytes(content)
    arrays, sentence = None, ""
    tracemalloc.start()
    try:
        arrays = read_safetensors(path)
    except UserError as error:
        sentence = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000 + 50 * len(content)
    assert len(sentence) < 1000
    assert "\n" not in sentence
    return arrays


def _matches_library(arrays: dict[str, np.ndarray], content: bytes) -> None:
    theirs = dict(safetensors.deserialize(content))
    assert set(arrays) == set(theirs)
    for name, array in arrays.items():
        assert list(array.shape) == theirs[name]["shape"]
        assert array.tobytes() == bytes(theirs[name]["data"])


@pytest.mark.parametrize("kind", DTYPES)
def test_every_dtype_is_read_and_written_as_the_library_does(kind, tmp_path):
    raw = np.random.default_rng(0).integers(0, 2, 6 * DTYPES[kind].itemsize, np.uint8)
    array = raw.view(DTYPES[kind]).reshape(2, 3)
    [file] = write_safetensors(tmp_path, {"a.w": array}, lambda _: array)
    content = file.read_bytes()
    [(name, theirs)] = safetensors.deserialize(content)
    assert (name, theirs["dtype"], theirs["shape"]) == ("a.w", kind, [2, 3])
    assert bytes(theirs["data"]) == array.tobytes()
    ours = read_safetensors(file)["a.w"]
    assert ours.dtype == array.dtype
    assert ours.tobytes() == array.tobytes()
    assert not ours.flags.writeable


def test_a_file_of_the_library_is_read(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {
        "model.norm.weight": rng.normal(size=5).astype(np.float32),
        "scale": np.array(3.0, np.float16),
        "empty": np.zeros((0, 7), np.int8),
        "bf": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"who": "the library"})
    read = read_safetensors(tmp_path)
    assert {n: (a.dtype, a.shape) for n, a in read.items()} == {
        n: (a.dtype, a.shape) for n, a in arrays.items()
    }
    assert all(read[n].tobytes() == a.tobytes() for n, a in arrays.items())
    header = read_header(tmp_path)
    assert header.metadata == {"who": "the library"}
    assert {n: s.shape for n, s in header.shapes.items()} == {n: a.shape for n, a in arrays.items()}


def test_device_put_of_what_we_wrote_copies_nothing(tmp_path):
    rng = np.random.default_rng(2)
    arrays = {
        "odd": rng.normal(size=3).astype(np.float32),
        "w": rng.normal(size=(16, 8)).astype(np.float32),
        "bf": rng.normal(size=(64, 3)).astype(ml_dtypes.bfloat16),
    }
    write_safetensors(tmp_path, arrays, arrays.get)
    read = read_safetensors(tmp_path)
    for name in ("w", "bf"):
        on_device = jax.device_put(read[name])
        assert on_device.unsafe_buffer_pointer() == read[name].ctypes.data
        np.testing.assert_array_equal(np.asarray(on_device), arrays[name])


def test_shards_index_and_order(tmp_path):
    arrays = {f"layers.{i}.w": np.full((4, 8), i, np.float32) for i in range(7)}
    calls: list[str] = []

    def produce(name):
        calls.append(name)
        return arrays[name]

    files = write_safetensors(tmp_path, arrays, produce, shard_bytes=300)
    assert [f.name for f in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert calls == list(arrays)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 128
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / file, "np") as theirs:
            assert theirs.metadata() == {"format": "pt"}
            np.testing.assert_array_equal(theirs.get_tensor(name), arrays[name])
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        read = read_safetensors(path)
        assert list(read) == list(arrays)
        assert all((read[n] == arrays[n]).all() for n in arrays)
    assert read_header(tmp_path).files == tuple(files)
    assert list(read_safetensors(files[1])) == ["layers.2.w", "layers.3.w"]


def test_a_checkpoint_can_replace_itself_from_its_own_maps(tmp_path):
    arrays = {f"w{i}": np.full(16, i, np.float32) for i in range(4)}
    write_safetensors(tmp_path, arrays, arrays.get, shard_bytes=64)
    old = read_safetensors(tmp_path)
    write_safetensors(tmp_path, old, lambda name: old[name] + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert [int(a[0]) for a in read_safetensors(tmp_path).values()] == [1, 2, 3, 4]
    assert [int(a[0]) for a in old.values()] == [0, 1, 2, 3]
    new = read_safetensors(tmp_path)
    write_safetensors(tmp_path, new, lambda name: new[name] * 2, shard_bytes=64)
    assert [int(a[0]) for a in read_safetensors(tmp_path).values()] == [2, 4, 6, 8]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    old = {"w": np.arange(4.0)}
    write_safetensors(tmp_path, old, old.get)
    shapes = {"w": jax.ShapeDtypeStruct((4,), np.float32), "v": old["w"]}
    with pytest.raises(UserError, match=r"'w' came as float64\[4\].*float32\[4\] was announced"):
        write_safetensors(tmp_path, shapes, lambda _: old["w"], shard_bytes=8)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert read_safetensors(tmp_path)["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"w": np.zeros(2, np.complex64)}, {}, "'w' is complex64"),
        ({"__metadata__": np.zeros(2)}, {}, "named __metadata__"),
        ({"w": np.zeros(2)}, {"shard_bytes": 0}, "shard_bytes is 0"),
        ({"w": np.zeros(2)}, {"metadata": {"step": 3}}, "more than text"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(shapes, options, message, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        write_safetensors(folder, shapes, shapes.get, **options)
    assert not folder.exists()


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda s: s != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.integers(1, 200),
)
@settings(FEW, max_examples=40)
def test_write_then_read_gives_the_same(tmp_path, specs, shard_bytes):
    arrays = {
        name: np.random.default_rng(i)
        .integers(0, 2, (*shape, dtype.itemsize), np.uint8)
        .view(dtype)
        .reshape(shape)
        for i, (name, (dtype, shape)) in enumerate(specs.items())
    }
    files = write_safetensors(tmp_path, arrays, arrays.get, shard_bytes=shard_bytes)
    read = read_safetensors(tmp_path)
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()
    for file in files:
        _matches_library(read_safetensors(file), file.read_bytes())


HOSTILE = {
    "header longer than the file": _file({}, length=2**63),
    "header just too long": _file({"a": _entry(offsets=(0, 8))}, length=200),
    "overlap": _file({"a": _entry(), "b": _entry(offsets=(4, 12))}, bytes(12)),
    "hole": _file({"a": _entry(), "b": _entry(offsets=(9, 17))}, bytes(17)),
    "truncated data": _file({"a": _entry()}, bytes(7)),
    "data of no tensor": _file({"a": _entry()}, bytes(9)),
    "absurd shape": _file({"a": _entry(shape=(2**40, 2**40), offsets=(0, 8))}, bytes(8)),
    "absurd shape behind a zero": _file({"a": _entry(shape=(0, 2**62), offsets=(0, 0))}),
    "many dimensions": _file({"a": _entry(shape=(1,) * 1000, offsets=(0, 4))}, bytes(4)),
    "negative shape": _file({"a": _entry(shape=(-1, -2))}, bytes(8)),
    "float shape": _file({"a": _entry(shape=(2.0,))}, bytes(8)),
    "bool shape": _file({"a": _entry("F64", shape=(True,))}, bytes(8)),
    "offsets backwards": _file({"a": _entry(offsets=(8, 0))}, bytes(8)),
    "offset beyond": _file({"a": _entry(offsets=(2**62, 2**62 + 8))}, bytes(8)),
    "three offsets": _file({"a": _entry(offsets=(0, 8, 8))}, bytes(8)),
    "unknown dtype": _file({"a": _entry("Q4")}, bytes(8)),
    "dtype no text": _file({"a": _entry([])}, bytes(8)),
    "entry no object": _file({"a": 3}),
    "metadata no text": _file({"__metadata__": {"a": 1}}),
    "metadata a list": _file({"__metadata__": []}),
    "duplicate names": _file(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "lone surrogate": _file(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "not UTF-8": _file(b'{"\xff":1}'),
    "deep nesting": _file(b'{"a":' + b"[" * 100_000),
    "endless number": _file(b'{"a":' + b"9" * 100_000 + b"}"),
    "not a number": _file({"a": _entry(shape=(float("nan"),))}, bytes(8)),
    "a list": _file([]),
    "a leading space": _file(b" {}"),
    "long name": _file({"n" * 100_000: _entry("Q4")}, bytes(8)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_get_one_sentence(case, tmp_path):
    assert _read_bounded(tmp_path / "x.safetensors", HOSTILE[case]) is None
    with pytest.raises(UserError):
        read_header(tmp_path / "x.safetensors")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
_SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, 2**31, 2**62, 2**63, 2**64, -1, True, 1.0])
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", 3]),
        "shape": st.lists(_SIZES, max_size=3) | _JSON,
        "data_offsets": st.lists(_SIZES, min_size=2, max_size=2) | _JSON,
    }
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "a.b", "__metadata__"]), _ENTRIES | _JSON),
    st.binary(max_size=32),
    st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]) | st.integers(0, 300),
)
@FEW
def test_made_up_headers_never_crash(tmp_path, header, data, length):
    content = _file(header, data, length=length)
    arrays = _read_bounded(tmp_path / "x.safetensors", content)
    if arrays is not None:
        _matches_library(arrays, content)


@given(st.data())
@FEW
def test_damaged_files_never_crash(tmp_path, data):
    arrays = {"a.w": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.int8)}
    [file] = write_safetensors(tmp_path, arrays, arrays.get)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        here = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["change", "cut", "drop", "insert"])):
            case "change":
                content[here] = data.draw(st.integers(0, 255))
            case "cut":
                del content[max(here, 1) :]
            case "drop" if len(content) > 1:
                del content[here]
            case "insert":
                content[here:here] = data.draw(st.binary(min_size=1, max_size=3))
    arrays = _read_bounded(tmp_path / "x.safetensors", bytes(content))
    if arrays is not None:
        _matches_library(arrays, bytes(content))


@given(_JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(), _JSON)}))
@example({"weight_map": {"w": "../model.safetensors"}})
@example({"weight_map": {"w": "/etc/passwd"}})
@example({"weight_map": {"w": ".."}})
@example({"weight_map": {"w": ""}})
@example({"weight_map": {"w": "missing.safetensors"}})
@example({"weight_map": {"not there": "model.safetensors"}})
@example({"weight_map": {"w": "a\0b"}})
@example({"weight_map": {"w": "n" * 5000}})
@FEW
def test_hostile_indexes_get_one_sentence(tmp_path, document):
    folder = tmp_path / "inner"
    if not folder.exists():
        arrays = {"w": np.zeros(2)}
        write_safetensors(tmp_path, arrays, arrays.get)
        write_safetensors(folder, arrays, arrays.get)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(document))
    if document == {"weight_map": {}}:
        assert read_safetensors(index) == {}
        return
    with pytest.raises(UserError):
        read_safetensors(index)


def test_paths_that_hold_no_checkpoint_get_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        read_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds 0 safetensors files"):
        read_safetensors(tmp_path)
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(UserError, match="has 0 bytes"):
        read_safetensors(tmp_path)
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(UserError, match="holds 2 safetensors files"):
        read_safetensors(tmp_path)
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(UserError, match="holds 0 safetensors files"):
        read_safetensors(tmp_path / "dir.safetensors")
    with pytest.raises(UserError, match="is a file"):
        write_safetensors(tmp_path / "other.safetensors", {}, {}.get)
