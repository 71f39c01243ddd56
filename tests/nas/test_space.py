"""Cells of NAS-Bench-201: every form of writing one leads back, and counts equal the network's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.nas import network, slots, space

CELLS = st.tuples(*[st.integers(0, 4)] * 6)


@given(CELLS)
def test_forms_lead_back(ops):
    assert tuple(space.from_string(space.to_string(ops))) == ops
    assert tuple(space.from_index(space.to_index(ops))) == ops


def test_all_cells_are_distinct():
    cells = space.all_cells()
    assert len(np.unique(cells, axis=0)) == 15_625
    assert (space.to_index(cells) == np.arange(15_625)).all()


@given(CELLS)
def test_edges_that_carry_something_by_enumerating_paths(ops):
    paths = [(2,), (0, 4), (1, 5), (0, 3, 5)]  # edges of every path from node 1 to node 4
    used = {e for path in paths if all(ops[e] != space.NONE for e in path) for e in path}
    assert set(np.flatnonzero(space.reaches(ops))) == used


@pytest.mark.parametrize("ops", [(2, 0, 1, 3, 4, 2), (3, 3, 2, 2, 3, 2)])
def test_the_formula_counts_the_parameters_of_the_network(ops):
    config = network.NetworkConfig()
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), config))
    total = sum(v.size for v in jax.tree.leaves(params))
    for stage in params["stages"].values():  # both convolutions of every edge are held
        per_edge = {k: v.size / 6 / config.cells for k, v in stage.items()}
        norm = per_edge["scale"] + per_edge["bias"]
        kept = sum(
            {space.CONV3: per_edge["w3"] + norm, space.CONV1: per_edge["w1"] + norm}.get(op, 0)
            for op in ops
        )
        total += config.cells * (kept - 6 * sum(per_edge.values()))
    assert total == round(float(space.params_m(ops)) * 1e6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: space.check_ops([0, 1, 2, 3, 4, 5]), "operation 5 does not exist"),
        (lambda: space.check_ops([0, 1, 2]), "six whole numbers"),
        (lambda: space.check_ops(np.full(6, 0.5)), "six whole numbers"),
        (lambda: space.from_index(15_625), "0 to 15624"),
        (lambda: space.from_string("|conv_5x5~0|+|none~0|none~1|"), "'conv_5x5'"),
        (lambda: space.from_string("|none~0|"), "is no arch string"),
        (lambda: space.from_string(space.to_string([0] * 6) + " "), "is no arch string"),
    ],
)
def test_mistakes_are_told(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_packed_order_lists_edges_by_target():
    order = slots.packed_order(network.NetworkConfig())
    assert sorted(order) == list(range(98))
    targets = [space.EDGES[(slot - 1) % 6][1] for slot in order[1:7]]
    assert targets == sorted(targets)


def test_slots_hold_the_table_s_weights():
    ops = jnp.array([2, 0, 1, 3, 4, 2])
    sizes = slots.sizes(ops, network.NetworkConfig())
    convs = 5 * 5376 * (2 * 9 + 1)
    fixed = 27 * 16 + 9 * 16 * 32 + 9 * 32 * 32 + 512 + 9 * 32 * 64 + 9 * 64 * 64 + 2048 + 640
    assert int(sizes.sum()) == convs + fixed
    assert (sizes > 0).tolist() == slots.presence(ops, network.NetworkConfig()).tolist()
