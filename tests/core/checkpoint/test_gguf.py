"""GGUF: held against the gguf package, and fed hostile files."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsys.core.checkpoint import GgufFile, read_gguf
from jaxsys.core.errors import UserError

gguf = pytest.importorskip("gguf", reason="the extra lm is not installed")
KINDS = gguf.GGMLQuantizationType
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FEW = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _write(path: Path, arrays, values=()) -> Path:
    """Write a file with the gguf package; arrays are (name, array, kind or None)."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values:
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)
    for name, array, kind in arrays:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(2, 64)).astype(np.float32)
    arrays = [
        ("f32", plain, None),
        ("f16", plain.astype(np.float16), None),
        ("q8", gguf.quants.quantize(plain, KINDS.Q8_0), KINDS.Q8_0),
    ]
    values = [("t.name", "ä name"), ("t.list", ["a", "bc"]), ("t.ints", [1, 2]), ("t.n", 7)]
    return _write(tmp_path_factory.mktemp("gguf") / "small.gguf", arrays, values)


def test_metadata_comes_as_written(small):
    metadata = read_gguf(small).metadata
    assert metadata["general.architecture"] == "llama"
    assert (metadata["t.name"], metadata["t.list"], metadata["t.n"]) == ("ä name", ["a", "bc"], 7)
    assert metadata["t.ints"].tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTISED, *K_QUANTS])
def test_every_kind_dequantises_as_the_library_does(kind, tmp_path):
    rng = np.random.default_rng(1)
    enum = KINDS[kind]
    if kind in ("F32", "F16"):
        stored, raw = rng.normal(size=(3, 512)).astype(kind.replace("F", "float")), None
    elif kind in K_QUANTS:
        # The package cannot make these; any bytes are valid blocks, with small scales as f16.
        block, size = gguf.GGML_QUANT_SIZES[enum]
        stored, raw = rng.integers(0, 60, (3, 512 // block * size), np.uint8), enum
    else:
        plain = rng.normal(size=(3, 512)).astype(np.float32)
        stored, raw = gguf.quants.quantize(plain, enum), enum
    path = _write(
        tmp_path / "x.gguf", [("first", np.ones(3, np.float32), None), ("w", stored, raw)]
    )
    file = read_gguf(path)
    assert file.tensors.info["w"].kind == kind
    assert file.tensors.info["w"].shape == (3, 512)
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}["w"]
    wanted = gguf.quants.dequantize(np.asarray(theirs.data), theirs.tensor_type)
    np.testing.assert_array_equal(file.tensors["w"].astype(np.float32), wanted)
    assert list(file.tensors) == ["first", "w"]


def test_plain_tensors_are_views_of_the_file(small):
    tensors = read_gguf(small).tensors
    for name in ("f32", "f16"):
        assert not tensors[name].flags.writeable
        assert np.shares_memory(tensors[name], tensors[name])
    assert not np.shares_memory(tensors["q8"], tensors["q8"])


def _bounded(path: Path, content: bytes) -> GgufFile | None:
    path.write_bytes(content)
    found, sentence = None, ""
    tracemalloc.start()
    try:
        found = read_gguf(path)
        for name in found.tensors:
            found.tensors[name]
    except UserError as error:
        found, sentence = None, str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000 + 50 * len(content)
    assert len(sentence) < 1000
    return found


@given(st.data())
@FEW
def test_damaged_files_never_crash(small, tmp_path, data):
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly within the header, which is what can mislead.
        here = data.draw(st.integers(0, min(len(content), 420) - 1))
        match data.draw(st.sampled_from(["change", "cut", "number", "insert"])):
            case "change":
                content[here] = data.draw(st.integers(0, 255))
            case "cut":
                del content[max(here, 1) :]
            case "number":
                value = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1]))
                content[here : here + 8] = struct.pack("<Q", value)
            case "insert":
                content[here:here] = data.draw(st.binary(min_size=1, max_size=3))
    _bounded(tmp_path / "x.gguf", bytes(content))


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _tensor(name="w", shape=(8,), kind=0, offset=0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(name) + sizes + struct.pack("<IQ", kind, offset)


def _file(tensors=(), values=(), data=b"", *, version=3, counts=None) -> bytes:
    counted = counts or (len(tensors), len(values))
    head = b"GGUF" + struct.pack("<IQQ", version, *counted) + b"".join(values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


HOSTILE = {
    "other magic": (b"GGML" + bytes(40), "does not start with GGUF"),
    "big-endian": (_file(version=3 << 24), "version reads"),
    "endless values": (_file(counts=(0, 2**64 - 1)), "ends within"),
    "endless tensors": (_file(counts=(2**64 - 1, 0)), "ends within"),
    "endless text": (_file(values=[struct.pack("<Q", 2**63)]), "name of"),
    "endless string value": (
        _file(values=[_text("k") + struct.pack("<IQ", 8, 2**63)]),
        "ends within",
    ),
    "endless numbers": (
        _file(values=[_text("k") + struct.pack("<IIQ", 9, 4, 2**62)]),
        "ends within",
    ),
    "endless strings": (
        _file(values=[_text("k") + struct.pack("<IIQ", 9, 8, 2**62)]),
        "more than fit",
    ),
    "arrays of arrays": (
        _file(values=[_text("k") + struct.pack("<IIQ", 9, 9, 1)]),
        "unknown type 9",
    ),
    "unknown type": (_file(values=[_text("k") + struct.pack("<I", 99)]), "unknown type 99"),
    "key twice": (_file(values=[_text("k") + struct.pack("<IB", 0, 1)] * 2), "appears twice"),
    "not UTF-8": (_file(values=[struct.pack("<Q", 1) + b"\xff" + bytes(12)]), "not UTF-8"),
    "tensor twice": (_file([_tensor(), _tensor(offset=32)], data=bytes(64)), "appears twice"),
    "overlap": (_file([_tensor(), _tensor("v")], data=bytes(64)), "overlaps"),
    "beyond the end": (_file([_tensor(offset=64)], data=bytes(64)), "beyond the end"),
    "offset that wraps": (_file([_tensor(offset=2**64 - 32)], data=bytes(64)), "beyond the end"),
    "not aligned": (_file([_tensor(offset=4)], data=bytes(64)), "not on a multiple"),
    "absurd shape": (_file([_tensor(shape=(2**40, 2**40))], data=bytes(64)), "beyond the end"),
    "no elements": (_file([_tensor(shape=(0, 2**62))], data=bytes(64)), "has the shape"),
    "no dimensions": (_file([_tensor(shape=())], data=bytes(64)), "has the shape"),
    "many dimensions": (_file([_tensor(shape=(1,) * 9)], data=bytes(64)), "dimensions"),
    "broken blocks": (_file([_tensor(shape=(33,), kind=8)], data=bytes(64)), "blocks of 32"),
    "unknown kind": (_file([_tensor(kind=77)], data=bytes(64)), "unknown kind 77"),
    "alignment of three": (
        _file(values=[_text("general.alignment") + struct.pack("<II", 4, 3)]),
        "general.alignment",
    ),
    "alignment no number": (
        _file(values=[_text("general.alignment") + struct.pack("<I", 8) + _text("x")]),
        "general.alignment",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_get_one_sentence(case, tmp_path):
    content, message = HOSTILE[case]
    assert _bounded(tmp_path / "x.gguf", content) is None
    with pytest.raises(UserError, match=message):
        read_gguf(tmp_path / "x.gguf")


def test_a_sound_file_made_by_hand_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(_file([_tensor()], data=np.arange(8, dtype=np.float32).tobytes()))
    assert read_gguf(path).tensors["w"].tolist() == list(range(8))
