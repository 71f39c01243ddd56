"""The operation graph: blocks, costs, owners, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core import graph, stages, traced
from jaxsys.core.errors import UserError
from jaxsys.core.flops import Count, count

F32 = jnp.float32


def _shape(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _flops(function, *args):
    program = traced.trace(function, *args)
    return sum((count(e, program.avals) for e in program.equations), start=Count(0.0, False))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b: a @ b, [(5, 7), (7, 3)]),
        (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), [(2, 5, 7), (2, 3, 7)]),
        (
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (2, 1), ((1, 2), (0, 1)), rhs_dilation=(1, 2),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ),
            [(2, 9, 8, 3), (3, 2, 3, 5)],
        ),
        (
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (1, 1), ((2, 2), (1, 1)), lhs_dilation=(2, 1), feature_group_count=2
            ),
            [(2, 4, 5, 6), (6, 2, 3, 3)],
        ),
        (lambda a: a * a + 1.0, [(6, 5)]),
    ],
)  # fmt: skip
def test_products_and_convolutions_count_as_the_compiler_counts(function, shapes):
    args = [_shape(*s) for s in shapes]
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    assert _flops(function, *args).flops == analysis["flops"]


def test_loops_count_as_often_as_they_run():
    def body(c, w):
        return jnp.tanh(c @ w), None

    def looped(x, ws):
        return jax.lax.scan(body, x, ws)[0]

    def unrolled(x, ws):
        for i in range(6):
            x, _ = body(x, ws[i])
        return x

    args = _shape(3, 4), _shape(6, 4, 4)
    once = 2 * 3 * 4 * 4 + 3 * 4
    assert _flops(looped, *args) == _flops(unrolled, *args) == Count(6.0 * once, False)
    nested = _flops(lambda x, ws: jax.lax.fori_loop(0, 5, lambda _, y: looped(y, ws), x), *args)
    # The counters of the loop add a few operations of their own.
    assert 5 * 6 * once <= nested.flops <= 5 * (6 * once + 3)
    flag = _shape(dtype=bool)
    either = _flops(lambda c, x, w: jax.lax.cond(c, lambda: looped(x, w), lambda: x), flag, *args)
    assert 6 * once <= either.flops <= 6 * once + 2
    while_loop = _flops(
        lambda x: jax.lax.while_loop(lambda y: y[0] < 9, lambda y: 2 * y, x), _shape(4)
    )
    assert while_loop == Count(5.0, True)  # 4 products, one comparison


def _mlp(params, x, y):
    for layer in params["layers"]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    return jnp.mean((x @ params["head"] - y) ** 2)


def _mlp_shapes(n=2, width=8):
    layer = {"w": _shape(width, width), "b": _shape(width)}
    return {"layers": [layer] * n, "head": _shape(width, 1)}, (_shape(4, width), _shape(4, 1))


def test_layers_come_in_the_order_of_use_and_meet_where_the_least_crosses():
    params, data = _mlp_shapes()
    dag = graph.dag(_mlp, params, *data)
    assert [node.name for node in dag.nodes] == ["layers.0", "layers.1", "head"]
    assert dag.leaf_paths == ("head", "layers.0.b", "layers.0.w", "layers.1.b", "layers.1.w")
    assert dag.leaf_bytes == (32, 32, 256, 32, 256)
    assert [node.leaves for node in dag.nodes] == [(1, 2), (3, 4), (0,)]
    assert [(e.source, e.target, e.n_bytes) for e in dag.edges] == [(0, 1, 128), (1, 2, 128)]
    assert [node.inputs for node in dag.nodes] == [(), (0,), (1,)]
    assert [node.output_bytes for node in dag.nodes] == [128, 128, 0]
    # A product, a bias, a relu (which counts one); the activation stays with its layer.
    assert dag.nodes[0].flops == 2 * 4 * 8 * 8 + 32 + 32


def test_statistics_belong_to_the_layer_that_normalises_with_them():
    def loss_fn(params, x):
        x = x + x @ params["a"]
        centred = x - jnp.mean(x, -1, keepdims=True)
        x = x + (centred * params["norm"][None]) @ params["b"]
        return jnp.sum(x)

    params = {"a": _shape(8, 8), "norm": _shape(8), "b": _shape(8, 8)}
    dag = graph.dag(loss_fn, params, _shape(4, 8))
    assert [node.name for node in dag.nodes] == ["a", "norm", "b"]
    assert [e.n_bytes for e in dag.edges if e.target == 1] == [128]  # the sum alone crosses


def test_skip_connections_are_edges_to_every_reader():
    def loss_fn(params, x):
        first = x @ params[0]
        second = jnp.tanh(first) @ params[1]
        third = second @ params[2] + first
        return jnp.sum(third @ params[3] + first)

    dag = graph.dag(loss_fn, [_shape(4, 4)] * 4, _shape(4, 4))
    (value,) = {e.value for e in dag.edges if (e.source, e.target) == (0, 2)}
    readers = [e.target for e in dag.edges if e.value == value]
    assert set(readers) >= {2, 3}
    assert dag.nodes[0].output_bytes == sum(
        {e.value: 64 for e in dag.edges if e.source == 0}.values()
    )


def test_scopes_are_blocks():
    def loss_fn(params, x):
        x = x + 1.0
        for i in range(2):
            with jax.named_scope(f"block{i}"):
                x = jax.jit(jnp.tanh)(x @ params[i])
                with jax.named_scope("inner"):
                    x = x * 2
            x = x * 3
        with jax.named_scope("block0"):
            x = x @ params[0]
        return jnp.sum(x)

    dag = graph.dag(loss_fn, [_shape(4, 4)] * 2, _shape(4, 4), granularity="scope")
    assert [node.name for node in dag.nodes] == ["block0", "block1", "block0#2"]
    assert [node.leaves for node in dag.nodes] == [(0,), (1,), (0,)]


def test_primitives_are_nodes_and_costs_do_not_depend_on_the_grain():
    params, data = _mlp_shapes()
    fine = graph.dag(_mlp, params, *data, granularity="primitive")
    coarse = graph.dag(_mlp, params, *data)
    assert [n.name for n in fine.nodes][:3] == ["dot_general", "add", "custom_jvp_call"]
    assert len({n.name for n in fine.nodes}) == len(fine.nodes)
    for total in ("flops", "saved_bytes"):
        assert sum(getattr(n, total) for n in fine.nodes) == sum(
            getattr(n, total) for n in coarse.nodes
        )


def test_saved_bytes_are_those_of_the_real_backward_pass():
    def loss_fn(params, x):
        h = jnp.tanh(x @ params["a"])
        h = jax.nn.softmax(h @ params["b"], -1) * h
        return jnp.sum(jnp.sin(h) * h)

    keys = jax.random.split(jax.random.key(0), 3)
    params = {n: jax.random.normal(k, (6, 6)) for n, k in zip("ab", keys[:2], strict=True)}
    x = jax.random.normal(keys[2], (5, 6))
    dag = graph.dag(loss_fn, params, x)
    tape = stages.cut_at(loss_fn, params, (x,), ()).forward(params, x)
    leaves = {id(p) for p in jax.tree.leaves(params)}
    kept = sum(v.nbytes for v in tape.pullbacks[0].values if id(v) not in leaves)
    assert sum(node.saved_bytes for node in dag.nodes) == kept


def test_what_no_gradient_passes_needs_no_way_back():
    def loss_fn(params, x):
        y = x @ params[0]
        z = jnp.tanh(y) @ params[1]
        return jnp.sum((z - jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True))) @ params[2])

    params = [_shape(4, 4)] * 3
    dag = graph.dag(loss_fn, params, _shape(4, 4), granularity="primitive")
    ways = {dag.nodes[e.source].name: e.differentiable for e in dag.edges}
    assert not ways["reduce_max"]
    assert all(ways[name] for name in ("dot_general", "tanh", "sub"))


def test_a_loop_of_unknown_length_on_data_is_counted_once_and_named():
    def loss_fn(params, x):
        x = jax.lax.while_loop(lambda y: jnp.max(y) < 9, lambda y: y * 2, x)
        return jnp.sum(x @ params["w"])

    assert graph.dag(loss_fn, {"w": _shape(4, 4)}, _shape(4, 4)).uncounted == ("w",)


def test_graphs_and_names_are_the_same_in_every_process():
    params, data = _mlp_shapes()
    assert graph.dag(_mlp, params, *data) == graph.dag(lambda *a: _mlp(*a), params, *data)


def _shape_from_data(p, x):
    return jnp.sum(x[x > 0] * p)


def _branch_on_data(p, x):
    return jnp.sum(x * p) if x[0] > 0 else jnp.sum(x)


def _size_from_data(p, x):
    return jnp.sum(jnp.arange(int(x[0])) * p)


def _prints(p, x):
    jax.debug.print("x {}", x)
    return jnp.sum(x * p)


def _calls_back(p, x):
    def step(c, v):
        return c + jax.experimental.io_callback(np.sin, jax.ShapeDtypeStruct((), F32), v), None

    return jax.lax.scan(step, jnp.sum(x * p), x)[0]


def _while_on_parameters(p, x):
    return jax.lax.while_loop(lambda y: y < 9, lambda y: y * 2, jnp.sum(x * p))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (_shape_from_data, r"value of an array at test_graph.py:\d+ \(NonConcreteBoolean"),
        (_branch_on_data, r"value of an array at test_graph.py:\d+"),
        (_size_from_data, r"value of an array at test_graph.py:\d+"),
        (_prints, "side effects: debug_"),
        (_calls_back, "side effects: io_callback"),
        (_while_on_parameters, "while loop, whose length is unknown"),
        (lambda p, x: x * p, r"returns \['float32\[4\]'\]; expected one scalar"),
        (lambda p, x: (jnp.sum(x * p), x), "expected one scalar"),
        (lambda p, x: jnp.sum(x), "both its parameters and its data"),
        (lambda p, x: jnp.sum(p), "both its parameters and its data"),
        (lambda p, x: 0.0, "both its parameters and its data"),
    ],
)
def test_functions_that_cannot_be_cut_are_refused(loss_fn, message):
    args = _shape(), _shape(4)
    with pytest.raises(UserError, match=message):
        graph.dag(loss_fn, *args)
    with pytest.raises(UserError, match=message):
        stages.cut_at(loss_fn, args[0], args[1:], ())


def test_a_leaf_that_is_not_used_is_named():
    with pytest.raises(UserError, match="does not use 1 of its parameters, such as 'idle'"):
        graph.dag(lambda p, x: jnp.sum(p["w"] * x), {"w": _shape(4), "idle": _shape(4)}, _shape(4))
