"""Whole layers over a mesh and over processes equal a dense layer on one device."""

import math
import sys
from pathlib import Path

import pytest

from jaxsys.cluster import launch
from jaxsys.core.errors import UserError
from jaxsys.moe.contract import Axes
from jaxsys.moe.sharding import check_mesh

sys.path.insert(0, str(Path(__file__).parent))
import parallel_cases as cases

# All the rest, by pairs: experiments/moe/parity.py.
FAST = ("gshard", "sparse", "flat", (2, 8), "2x2x2")


def test_a_sharded_layer_equals_a_dense_one():
    gate, order, transport, pair, mesh = FAST
    spec = cases.make_spec(gate, order, transport)
    given = cases.make_case(spec)
    got = cases.sharded(spec, pair, *cases.make_mesh(mesh))(*given)
    want = cases.reference(spec, cases.ROWS, math.lcm(*pair))(*given)
    cases.check(got, want, FAST)


@pytest.mark.slow
def test_four_processes_equal_a_dense_layer(tmp_path):
    worker, lines = Path(__file__).with_name("parallel_worker.py"), []
    report = launch(
        [sys.executable, str(worker)], 4, on_line=lambda i, line: lines.append(f"[{i}] {line}")
    )
    assert report.exit_code == 0, "\n".join(lines[-20:])
    assert [line for line in lines if "equal" in line] == ["[0] 2dh is equal"]


def test_a_mesh_that_does_not_fit_is_refused_in_one_sentence():
    mesh, axes = cases.make_mesh("2x2x2")
    check_mesh(mesh, axes, 8, 6)
    for change, says in (
        ((axes, 7, 6), "7 experts cannot be dealt out over 2 ranks"),
        ((axes, 8, 5), "5 hidden units cannot be dealt out over 2 ranks"),
        ((Axes(expert="pipe"), 8, 6), "axis 'pipe' is not in the mesh, which has data, expert"),
    ):
        with pytest.raises(UserError, match=says):
            check_mesh(mesh, *change)
