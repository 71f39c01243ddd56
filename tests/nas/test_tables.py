"""Tables: the anchors of the real ones, every form of file, and files that are wrong."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.nas import space, tables
from jaxsys.nas.rank import kendall_tau

DATA = Path(os.environ.get("JAXSYS_DATA", "")) / "nas"
real = pytest.mark.skipif(
    not (os.environ.get("JAXSYS_DATA") and (DATA / "nb201_tss_all.csv").exists()),
    reason="JAXSYS_DATA does not name a folder with nas/nb201_tss_all.csv",
)

# Kendall's τ against test accuracy, computed once with SciPy from the published tables.
NAMES = "params flops l2_norm grad_norm snip grasp fisher plain synflow jacov nwot epe_nas"
ANCHORS = {
    "cifar10": "577 537 528 463 470 400 391 -147 579 562 610 474",
    "cifar100": "549 510 533 469 477 372 402 -183 567 564 624 291",
    "ImageNet16-120": "529 491 523 442 444 364 376 -157 571 557 609 70",
}


@pytest.fixture(scope="module")
def whole():
    return tables.nas_bench_201()


@real
@pytest.mark.parametrize("dataset", ANCHORS)
def test_anchors_of_the_1104_cells(dataset):
    table = tables.load(DATA / "nb201_zc_1104.csv", dataset=dataset)
    assert len(table.cells) in (1103, 1104)
    for name, anchor in zip(NAMES.split(), ANCHORS[dataset].split(), strict=True):
        kept = table.select(np.isfinite(table.columns[name]))
        assert len(kept.cells) in ((723, 724) if name == "nwot" else (1103, 1104))
        tau = kendall_tau(kept.column(name), kept.column("test_accuracy"))
        assert tau == pytest.approx(int(anchor) / 1000, abs=6e-4), name


@real
def test_anchors_of_all_cells(whole):
    for name, zen in {"c10": 0.296, "c100": 0.283, "in16": 0.294}.items():
        test = whole.column(f"test_{name}")
        assert kendall_tau(whole.column(f"zen_{name}"), test) == pytest.approx(zen, abs=6e-4)
    assert whole.column("test_c10").max() == pytest.approx(94.373, abs=6e-4)


@real
def test_formulas_are_exact_for_every_cell(whole):
    np.testing.assert_allclose(space.params_m(whole.cells), whole.column("params_m"), atol=5e-7)
    np.testing.assert_allclose(space.mflops(whole.cells), whole.column("mflops"), atol=5e-6)


@real
def test_arch_strings_name_the_cells(whole):
    for row in range(0, 15_625, 997):
        text = str(whole.columns["arch_str"][row])
        np.testing.assert_array_equal(space.from_string(text), whole.cells[row])


@real
def test_cells_of_another_space():
    table = tables.load(DATA / "zc_nasbench101.json", dataset="cifar10", cells=False)
    assert table.cells is None
    assert len(table.column("snip")) == len(table.column("val_accuracy")) == 500


def test_one_table_in_every_form(tmp_path):
    cells = space.from_index(np.array([7, 3000, 15_624]))
    acc, nodes = np.array([90.5, 10.0, 55.25]), np.arange(6.0).reshape(3, 2)
    header = ",".join(tables.EDGE_COLUMNS)
    lines = [f"{','.join(map(str, c))},{a}" for c, a in zip(cells, acc, strict=True)]
    (tmp_path / "edges.csv").write_text("\n".join([header + ",acc", *lines]))
    named = [f"{space.to_string(c)},{a}" for c, a in zip(cells, acc, strict=True)]
    (tmp_path / "named.csv").write_text("\n".join(["arch_str,acc", *named]))
    objects = [{"arch_str": space.to_string(c), "acc": a} for c, a in zip(cells, acc, strict=True)]
    (tmp_path / "list.json").write_text(json.dumps(objects))
    naslib = {
        str(tuple(c.tolist())): {"acc": {"score": a}} for c, a in zip(cells, acc, strict=True)
    }
    (tmp_path / "naslib.json").write_text(json.dumps({"own": naslib}))
    np.savez(tmp_path / "arrays.npz", cells=cells, acc=acc, nodes=nodes)
    for name in ("edges.csv", "named.csv", "list.json", "naslib.json", "arrays.npz"):
        dataset = "own" if name == "naslib.json" else None
        table = tables.load(tmp_path / name, dataset=dataset)
        np.testing.assert_array_equal(table.cells, cells)
        np.testing.assert_array_equal(table.column("acc"), acc)
    joined = tables.join(
        tables.load(tmp_path / "edges.csv").select([2, 0]), tables.load(tmp_path / "arrays.npz")
    )
    np.testing.assert_array_equal(joined.column("acc"), acc[[2, 0]])
    np.testing.assert_array_equal(joined.column("nodes"), nodes[[2, 0]])


HEADER = "e12,e13,e14,e23,e24,e34,acc\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", HEADER + "0,0,0,0,0,9,1.0", "operation 9 does not exist"),
        ("t.csv", HEADER + "0,0,0,0,0,1.5,1.0", "no whole number"),
        ("t.csv", HEADER + "0,0,0,0,0,1,1\n0,0,0,0,0,1,2", "1 cells in several rows"),
        ("t.csv", HEADER + "0,0,0,0,0,1", "row 0 has 6 values"),
        ("t.csv", HEADER, "has no rows"),
        ("t.csv", "x,acc\n1,2", "names no cells"),
        ("t.csv", "acc,acc\n1,2", "a name is doubled"),
        ("t.csv", "arch_str,acc\n|conv_9x9~0|+|none~0|none~1|,2", "'conv_9x9'"),
        ("t.json", "{", "is no JSON"),
        ("t.json", "[1]", "no list of objects"),
        ("t.json", '{"a": {}}', "holds the data sets a"),
        ("t.npz", "PK", "no NPZ of plain arrays"),
        ("t.pickle", "", "ends in '.pickle'"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        tables.load(tmp_path / name)


def test_wrong_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", cells=np.zeros((2, 6), int), acc=np.ones(3))
    with pytest.raises(UserError, match="different lengths"):
        tables.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", cells=np.array([{"a": 1}]), acc=np.ones(1))
    with pytest.raises(UserError, match="no NPZ of plain arrays"):
        tables.load(tmp_path / "b.npz")
    with pytest.raises(UserError, match="cannot be read"):
        tables.load(tmp_path / "missing.csv")


def test_missing_values_and_rows_are_told(tmp_path):
    (tmp_path / "nb201_tss_all.csv").write_text(HEADER + "0,0,0,0,0,1,\n0,0,0,0,0,2,90")
    table = tables.load(tmp_path / "nb201_tss_all.csv")
    with pytest.raises(UserError, match="no number in row 0"):
        table.column("acc")
    assert table.select([1]).column("acc").tolist() == [90]
    with pytest.raises(UserError, match="no column 'val'"):
        table.column("val")
    with pytest.raises(UserError, match="lacks 15623 of 15,625"):
        tables.nas_bench_201(tmp_path)
    with pytest.raises(UserError, match="no cell in common"):
        tables.join(table.select([0]), table.select([1]))
