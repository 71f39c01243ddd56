"""Cells, genotypes and transformers as text and numbers, against published figures."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.nas import darts, nb101, tables, vit
from jaxsys.nas.spaces import choose_archs, open_space

DATA = Path(os.environ.get("JAXSYS_DATA", "")) / "nas"
FIRST = (
    "0100110001000000010010000010000001000000010000000|input,conv3x3-bn-relu,maxpool3x3,"
    "conv3x3-bn-relu,conv3x3-bn-relu,conv1x1-bn-relu,output"
)

# Found by search; the published sizes are those of the networks without auxiliary heads,
# 36 channels and 20 cells.
DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), "
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), "
    "('dil_conv_3x3', 2)], normal_concat=range(2, 6), reduce=[('max_pool_3x3', 0), "
    "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))"
)
P_DARTS = (
    "Genotype(normal=[('skip_connect', 0), ('dil_conv_3x3', 1), ('skip_connect', 0),"
    "('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3',0), "
    "('dil_conv_5x5', 4)], normal_concat=[2, 3, 4, 5], reduce=[('avg_pool_3x3', 0), "
    "('sep_conv_5x5', 1), ('sep_conv_3x3', 0), ('dil_conv_5x5', 2), ('max_pool_3x3', 0), "
    "('dil_conv_3x3', 1), ('dil_conv_3x3', 1), ('dil_conv_5x5', 3)], reduce_concat=[2, 3, 4, 5])"
)


def test_hash_and_size_of_the_benchmark_s_first_cell():
    cell = nb101.from_string(FIRST)
    assert nb101.to_string(cell) == FIRST
    assert nb101.module_hash(cell) == "00005c142e6f48ac74fdcf73e3439874"
    assert float(nb101.params_m(cell)) == 8.55553


@pytest.mark.skipif(
    not (DATA / "zc_nasbench101.json").exists(),
    reason="JAXSYS_DATA does not name a folder with nas/zc_nasbench101.json",
)
def test_counts_equal_naslib_s_table():
    table = tables.load(DATA / "zc_nasbench101.json", dataset="cifar10", cells=False)
    archs = np.stack([nb101.from_string(str(text)) for text in table.columns["arch"]])
    np.testing.assert_allclose(nb101.params_m(archs), table.column("params"), atol=1e-9)
    np.testing.assert_allclose(nb101.mflops(archs), table.column("flops"), atol=1e-6)


@st.composite
def cells(draw):
    size = draw(st.integers(2, 7))
    m, pairs = np.zeros((size, size), int), size * (size - 1) // 2
    edges = draw(st.lists(st.integers(0, 1), min_size=pairs, max_size=pairs))
    m[np.triu_indices(size, 1)] = edges
    kinds = st.sampled_from(nb101.OPERATIONS[2:])
    return m, ["input", *draw(st.lists(kinds, min_size=size - 2, max_size=size - 2)), "output"]


def used(m):
    """Enumerate all paths from input to output."""
    last, found = len(m) - 1, set()
    for size in range(last):
        for middle in itertools.combinations(range(1, last), size):
            path = (0, *middle, last)
            if all(m[a, b] for a, b in itertools.pairwise(path)):
                found |= set(path)
    return sorted(found)


@settings(deadline=None)
@given(cells(), st.randoms())
def test_pruning_and_isomorphic_cells(cell, random):
    m, ops = cell
    keep = used(m)
    if not keep or m[np.ix_(keep, keep)].sum() > 9:
        with pytest.raises(UserError):
            nb101.encode(m, ops)
        return
    arch = nb101.encode(m, ops)
    matrix, names = nb101.decode(arch)
    assert (matrix == m[np.ix_(keep, keep)]).all()
    assert names == [ops[v] for v in keep]
    assert (nb101.from_string(nb101.to_string(arch)) == arch).all()
    assert (nb101.from_string(str(tuple(pad_like_naslib(m, ops)))) == arch).all()
    middle = list(range(1, len(names) - 1))
    random.shuffle(middle)
    order = [0, *middle, len(names) - 1]
    other = matrix[np.ix_(order, order)]
    if not np.tril(other).any():  # still in topological order
        same = nb101.encode(other, [names[v] for v in order])
        assert nb101.module_hash(same) == nb101.module_hash(arch)
    channels = nb101.vertex_channels(arch[:49].reshape(7, 7), 17)
    feeds = arch[:49].reshape(7, 7)[1:6, 6]
    if feeds.any():
        assert (channels[1:6] * feeds).sum() == 17
        assert ((channels[1:6] > 0) == (arch[50:55] != nb101.ABSENT)).all()


def pad_like_naslib(m, ops):
    """Write 49 + 7 numbers, with vertices that lead nowhere before the output."""
    size = len(ops)
    place = [*range(size - 1), 6]
    full, numbers = np.zeros((7, 7), int), [nb101.POOL] * 7
    full[np.ix_(place, place)] = m
    for v, op in zip(place, ops, strict=True):
        numbers[v] = nb101.OPERATIONS.index(op)
    return [*full.reshape(-1).tolist(), *numbers]


def test_different_operations_hash_differently():
    drawn = nb101.sample(30, seed=1)
    assert len({nb101.module_hash(a) for a in drawn}) == 30
    assert len({nb101.to_string(a) for a in drawn}) == 30


@pytest.mark.parametrize(("text", "size"), [(DARTS_V2, 3_349_342), (P_DARTS, 3_433_798)])
def test_published_sizes_of_genotypes(text, size):
    arch = darts.from_string(text)
    assert round(float(darts.params_m(arch, channels=36, cells=20)) * 1e6) == size
    assert (darts.from_string(darts.to_string(arch)) == arch).all()


def test_darts_v2_is_written_as_it_is_published():
    assert darts.to_string(darts.from_string(DARTS_V2)) == DARTS_V2


def test_counts_are_those_of_every_architecture_alone():
    many = darts.sample(5)
    np.testing.assert_allclose(darts.params_m(many), [darts.params_m(a) for a in many])
    np.testing.assert_allclose(darts.mflops(many), [darts.mflops(a) for a in many])
    drawn = vit.sample(5)
    np.testing.assert_allclose(vit.params_m(drawn), [vit.params_m(a) for a in drawn])
    for arch in drawn:
        assert (vit.from_string(vit.to_string(arch)) == arch).all()
    # AutoFormer's smallest space reaches from about 4 to 9 million parameters.
    assert 3.5 < vit.params_m(drawn).min() < vit.params_m(drawn).max() < 10


EDGES = "[('skip_connect', 0), ('skip_connect', 1)]"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: nb101.encode([[0, 1], [1, 0]], ["input", "output"]), "above the diagonal"),
        (lambda: nb101.encode([[0, 2], [0, 0]], ["input", "output"]), "0 and 1"),
        (lambda: nb101.encode([[0, 0], [0, 0]], ["input", "output"]), "does not reach"),
        (lambda: nb101.encode([[0, 1], [0, 0]], ["output", "input"]), "ends of a cell"),
        (lambda: nb101.encode(np.zeros((2, 3)), ["input", "output"]), "matrix (2, 3)"),
        (lambda: nb101.from_string("010001000|input,conv9x9,output"), "'conv9x9'"),
        (lambda: nb101.from_string("0100|input"), "matrix"),
        (lambda: nb101.from_string("(1, 2"), "is no NAS-Bench-101 cell"),
        (lambda: nb101.encode(np.triu(np.ones((7, 7), int), 1), [0, 2, 2, 2, 2, 2, 1]), "21 edges"),
        (lambda: darts.from_string("Genotype(normal=1)"), "holds no list of 8 edges"),
        (lambda: darts.from_string("__import__('os')"), "is no genotype"),
        (lambda: darts.from_string(f"Genotype(normal={EDGES}, reduce={EDGES})"), "8 edges"),
        (lambda: darts.from_string(DARTS_V2.replace("dil_conv_3x3", "conv")), "'conv'"),
        (
            lambda: darts.from_string(DARTS_V2.replace("('dil_conv_3x3', 2)", "('none', 5)")),
            "state 5",
        ),
        (lambda: darts.from_string(DARTS_V2.replace("range(2, 6)", "[4, 5]")), "joins states"),
        (lambda: darts.check(np.full((2, 8, 2), 9)), "operation 9"),
        (lambda: vit.from_string("192"), "is no vision transformer"),
        (lambda: vit.from_string("191:" + ",".join(["3x672"] * 12)), "width of 191"),
        (lambda: vit.from_string("192:3x672"), "depth of 1"),
        (lambda: vit.from_string("192:" + ",".join(["3x600"] * 12)), "hidden of 600"),
        (lambda: vit.VitConfig(heads=()), "nothing to choose"),
        (lambda: open_space("nb301"), "'nb301' does not exist"),
        (lambda: open_space("darts", depth=2), "fewer than 3 cells"),
        (lambda: open_space("darts", channels=3), "cannot be halved"),
        (lambda: open_space("nb101", depth=0), "size below 1"),
        (lambda: open_space("vit", channels=4), "at least 8"),
        (
            lambda: choose_archs(open_space("nb101"), [FIRST], None, 2, space="nb101"),
            "expected 1 to 1 cells",
        ),
    ],
)
def test_mistakes_are_told(call, says):
    with pytest.raises(UserError) as told:
        call()
    assert says in str(told.value)
