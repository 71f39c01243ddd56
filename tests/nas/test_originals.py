"""Published files: every form, and files that are wrong."""

import base64
import json
import struct

import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.nas import darts, nb101
from jaxsys.nas.originals import archs_in, nas_bench_101, nds

CELL = nb101.from_string("010001000|input,maxpool3x3,output")
KEY = nb101.module_hash(CELL)
GENOTYPE = {
    cell: [[darts.OPERATIONS[op], int(source)] for op, source in edges]
    for cell, edges in zip(("normal", "reduce"), darts.sample(1)[0], strict=True)
}


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def message(*evaluations, parameters=300):
    """Write ModelMetrics: field numbers and wire types as in the benchmark's definition."""
    data = b""
    for train, valid, test in evaluations:
        fields = {1: 108.0, 2: 1000.0, 3: train, 4: valid, 5: test}
        inner = b"".join(varint(n << 3 | 1) + struct.pack("<d", v) for n, v in fields.items())
        inner += varint(6 << 3 | 2) + varint(5) + b"model"
        data += varint(1 << 3 | 2) + varint(len(inner)) + inner
    data += varint(2 << 3) + varint(parameters) + varint(3 << 3 | 1) + struct.pack("<d", 5.0)
    return base64.b64encode(data).decode()


def row(valid, epochs=108, key=KEY):
    metrics = message((0.1, 0.1, 0.1), (0.5, 0.5, 0.5), (0.99, valid, valid - 0.01))
    return [key, epochs, "010001000", "input,maxpool3x3,output", metrics]


def tfrecord(rows):
    parts = []
    for r in rows:
        body = json.dumps(r).encode()
        parts.append(struct.pack("<Q", len(body)) + b"crc4" + body + b"crc4")
    return b"".join(parts)


@pytest.mark.parametrize("form", ["tfrecord", "json", "jsonl"])
def test_rows_of_nas_bench_101_are_averaged(tmp_path, form):
    rows = [row(0.90), row(0.94), row(0.5, epochs=4)]
    content = {
        "tfrecord": tfrecord(rows),
        "json": json.dumps(rows).encode(),
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
    }[form]
    file = tmp_path / f"nasbench.{form}"
    file.write_bytes(content)
    table = nas_bench_101(file)
    assert table.columns["hash"].tolist() == [KEY]
    np.testing.assert_allclose(table.column("validation_accuracy_108"), [0.92])
    np.testing.assert_allclose(table.column("test_accuracy_108"), [0.91])
    np.testing.assert_allclose(table.column("validation_accuracy_4"), [0.5])
    assert table.column("trainable_parameters").tolist() == [300]
    assert archs_in(file, "nb101") == [nb101.to_string(CELL)]


def test_objects_of_nas_bench_101(tmp_path):
    matrix = [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    ops = ["input", "maxpool3x3", "output"]
    entry = {"module_adjacency": matrix, "module_operations": ops, "trainable_parameters": 7}
    (tmp_path / "a.json").write_text(json.dumps({KEY: entry}))
    assert nas_bench_101(tmp_path / "a.json").column("trainable_parameters").tolist() == [7]
    other = {"matrix": matrix, "ops": ops, "hash_": KEY, "test_accuracy": 0.9}
    (tmp_path / "b.json").write_text(json.dumps([other]))
    assert nas_bench_101(tmp_path / "b.json").column("test_accuracy").tolist() == [0.9]


def sweep(genotype):
    return {
        "net": {"genotype": genotype, "width": 16, "depth": 20, "aux": False},
        "params": 1000,
        "flops": 2000,
        "test_ep_top1": [50.0, 8.0, 9.5],
    }


def test_sweeps_of_nds(tmp_path):
    one = sweep(GENOTYPE | {"normal_concat": [2, 3, 4, 5], "reduce_concat": [2, 3, 4, 5]})
    (tmp_path / "list.json").write_text(json.dumps([one]))
    (tmp_path / "two.json").write_text(json.dumps({"top": [one], "mid": [one]}))
    table = nds(tmp_path / "list.json")
    assert darts.from_string(str(table.columns["arch"][0])).tolist() == darts.sample(1)[0].tolist()
    assert table.column("test_accuracy").tolist() == [90.5]
    assert table.column("best_test_accuracy").tolist() == [92.0]
    assert table.column("depth").tolist() == [20]
    assert len(archs_in(tmp_path / "two.json", "darts")) == 2
    named = sweep({"normal": [["conv_7x1_1x7", 0]] * 10})
    (tmp_path / "nasnet.json").write_text(json.dumps([named]))
    assert "conv_7x1" in str(nds(tmp_path / "nasnet.json", space="any").columns["arch"][0])


@pytest.mark.parametrize(
    ("read", "name", "content", "says"),
    [
        (nas_bench_101, "t.tfrecord", tfrecord([row(0.9)])[:-5], "breaks off"),
        (nas_bench_101, "t.tfrecord", b"\xff" * 40, "breaks off"),
        (nas_bench_101, "t.json", b"{", "is no JSON"),
        (nas_bench_101, "t.json", b"[" * 100_000, "is no JSON"),
        (nas_bench_101, "t.json", b"[]", "no list of architectures"),
        (nas_bench_101, "t.json", b"[1]", "row 0 is '1'"),
        (nas_bench_101, "t.json", json.dumps([row(0.9, key="0")]).encode(), "has the hash '0'"),
        (nas_bench_101, "t.json", json.dumps([[KEY, 1, "01", "a", ""]]).encode(), "cannot be dec"),
        (
            nas_bench_101,
            "t.json",
            json.dumps([[KEY, 1, "01", "a", message((1, 1, 1))]]).encode(),
            "has the matrix '01'",
        ),
        (nas_bench_101, "t.json", b'[{"matrix": [[0]], "ops": ["input"]}]', "row 0"),
        (nas_bench_101, "t.json", b'[{"matrix": [[0], 1], "ops": ["input", "output"]}]', "row 0"),
        (nas_bench_101, "t.json", b'[{"ops": 3}]', "has operations 3"),
        (nds, "t.json", b'[{"net": 3}]', "has no 'net'"),
        (nds, "t.json", b'[{"net": {}}]', "has no 'genotype'"),
        (nds, "t.json", json.dumps([sweep({"normal": 3})]).encode(), "'normal' holds no list"),
        (
            nds,
            "t.json",
            json.dumps([sweep(GENOTYPE) | {"test_ep_top1": []}]).encode(),
            "no test errors",
        ),
        (lambda path: archs_in(path, "vit"), "t.csv", b"acc\n1", "names no architectures"),
    ],
)
def test_wrong_files_are_refused(tmp_path, read, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "missing.json")
