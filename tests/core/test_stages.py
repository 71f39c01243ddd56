"""Cutting a loss into stages must not change its value or its gradients, wherever it is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core import graph, stages, traced, tree
from jaxsys.core.errors import UserError
from jaxsys.core.residuals import value_bytes
from jaxsys.models import gpt2, lm, resnet


def _params(key, n=3, width=8):
    keys = jax.random.split(key, n + 1)
    blocks = [{"w": jax.random.normal(k, (width, width)) / 3} for k in keys[:n]]
    return {"blocks": blocks, "embed": jax.random.normal(keys[-1], (5, width))}


def _body(x, w):
    return x + jax.nn.silu(x @ w)


def plain(params, tokens):
    x = params["embed"][tokens[:, :-1]]
    for block in params["blocks"]:
        x = _body(x, block["w"])
    logits = x @ params["embed"].T  # the embedding is tied: used first and last
    labels = jax.nn.one_hot(tokens[:, 1:], 5)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, -1))


def cast_first(params, tokens):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return plain(half, tokens) + 1e-3 * penalty


def rematerialised(params, tokens):
    x = params["embed"][tokens[:, :-1]]
    mask = jnp.tril(jnp.ones((3, 3)))
    for block in params["blocks"]:
        x = jax.checkpoint(jax.jit(_body))(x, block["w"])
        x = jnp.einsum("ts,bsd->btd", mask, x)
    return jnp.mean((x @ params["embed"].T) ** 2)


@pytest.mark.parametrize("loss_fn", [plain, cast_first, rematerialised])
def test_cut_equals_grad(loss_fn):
    params = _params(jax.random.key(0))
    tokens = jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]])
    order = traced.first_use(loss_fn, params, tokens)
    names = tree.paths(params)
    by_use = [names[i] for i in np.argsort(order, kind="stable")]
    assert by_use == ["embed", "blocks.0.w", "blocks.1.w", "blocks.2.w"]

    groups = [(names.index(n),) for n in by_use]
    staged = stages.cut(loss_fn, params, (tokens,), groups)
    tape = staged.forward(params, tokens)
    want_loss, want = jax.value_and_grad(loss_fn)(params, tokens)
    np.testing.assert_allclose(tape.loss, want_loss, rtol=1e-6)
    got = {}
    finished_at = {}
    for i, grads in staged.backward(tape):
        got.update(grads)
        finished_at.update(dict.fromkeys(grads, i))
    for j, leaf in enumerate(jax.tree.leaves(want)):
        np.testing.assert_allclose(got[j], leaf, rtol=2e-5, atol=2e-6 * np.abs(leaf).max())
    assert finished_at[names.index("embed")] == 0  # tied: complete only at the very end


def test_equal_blocks_share_programs():
    params = _params(jax.random.key(0), n=4)
    tokens = jnp.array([[0, 1, 2, 3]])
    names = tree.paths(params)
    groups = [(names.index(n),) for n in ("embed", *(f"blocks.{i}.w" for i in range(4)))]
    staged = stages.cut(plain, params, (tokens,), groups)
    middle = {id(stage.forward) for stage in staged.stages[1:4]}
    assert len(middle) == 1
    assert len({id(stage.forward) for stage in staged.stages}) == 3
    tape = staged.forward(params, tokens)
    list(staged.backward(tape))
    assert staged.stages[1].backward._cache_size() == 1


def test_two_leaves_of_one_group_and_integers_between_stages():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 2))}

    def loss_fn(p, x):
        y = x @ p["a"] + p["b"][None]
        top = jnp.argmax(y, -1)  # an integer that crosses the cut
        return jnp.sum((y @ p["c"]) ** 2 * (1 + top[:, None]))

    x = jnp.arange(6.0).reshape(2, 3)
    staged = stages.cut(loss_fn, params, (x,), [(0, 1), (2,)])
    got = {}
    for _, grads in staged.backward(staged.forward(params, x)):
        got.update(grads)
    want = jax.tree.leaves(jax.grad(loss_fn)(params, x))
    for j, leaf in enumerate(want):
        np.testing.assert_allclose(got[j], leaf, rtol=1e-6)


def test_refusals():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    x = jnp.ones((1, 2))

    def loss_fn(p, x):
        return jnp.sum(x @ p["a"] @ p["b"])

    with pytest.raises(UserError, match="order of first use"):
        stages.cut(loss_fn, params, (x,), [(1,), (0,)])
    with pytest.raises(UserError, match="one scalar"):
        stages.cut(lambda p, x: x @ p["a"], params, (x,), [(0,), (1,)])
    with pytest.raises(UserError, match="does not use"):
        stages.cut(lambda p, x: jnp.sum(x @ p["a"]), params, (x,), [(0,), (1,)])


# Any function, any cut.

WIDTH, LEAVES = 4, 3
FROZEN = np.linspace(-1, 1, WIDTH * WIDTH, dtype=np.float32).reshape(WIDTH, WIDTH)


def _random_loss(steps):
    """A function over four leaves whose values come from any earlier ones."""

    def loss_fn(params, x, y):
        small = [0.5 * p for p in params]  # parameters alone, read by several stages
        table = jnp.sin(jnp.arange(float(WIDTH)))[None]  # constants
        seen = (x > 0).astype(x.dtype)  # data alone
        frozen = x @ FROZEN  # heavy work on data alone
        values = [x]
        for kind, a, b, leaf in steps:
            u, v, p = values[a % len(values)], values[b % len(values)], params[leaf]
            if kind == "dot":
                new = u @ p
            elif kind == "small":
                new = u @ small[leaf] + v
            elif kind == "mul":
                new = jnp.tanh(u * v + p[:1])
            elif kind == "integer":
                new = u * jnp.argmax(v @ p, -1)[:, None] / WIDTH
            elif kind == "stop":
                new = jax.lax.stop_gradient(u) * v
            elif kind == "masks":
                new = u * table + v * seen + frozen * p[0, 0]
            elif kind == "sum":
                new = u * jnp.mean(p**2) * jnp.mean(small[leaf])
            elif kind == "scan":
                new = jax.lax.scan(lambda c, w, p=p: (jnp.tanh(c @ p + w[None]), None), u, p)[0]
            elif kind == "remat":
                new = jax.checkpoint(lambda c, w: jnp.tanh(c @ w) + c)(u, p)
            else:
                new = jax.jit(jax.nn.silu)(u - v)
            values.append(new)
        last = values[-1]
        for p in params:  # every leaf reaches the loss, the last ones as tied parameters
            last = last + jnp.tanh(last @ p)
        penalty = sum(jnp.sum(p**2) for p in params)
        return jnp.mean((last - y) ** 2) + 1e-3 * penalty

    return loss_fn


KINDS = ("dot", "small", "mul", "integer", "stop", "masks", "sum", "scan", "remat", "silu")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9), st.integers(0, LEAVES - 1)
    ),
    min_size=1,
    max_size=7,
)


def _random_inputs(seed):
    numbers = np.random.default_rng(seed)
    shape = (WIDTH, WIDTH)
    params = [jnp.asarray(numbers.normal(size=shape) / 3, jnp.float32) for _ in range(LEAVES)]
    return params, tuple(jnp.asarray(numbers.normal(size=shape), jnp.float32) for _ in range(2))


def _gradients(staged, params, data):
    tape = staged.forward(params, *data)
    found = {}
    for _, grads in staged.backward(tape):
        assert not found.keys() & grads.keys()
        found.update(grads)
    assert sorted(found) == list(range(len(jax.tree.leaves(params))))
    return tape.loss, found


def _assert_same(got, want, rtol):
    (loss, grads), (want_loss, want_grads) = got, want
    np.testing.assert_allclose(loss, want_loss, rtol=rtol)
    for j, leaf in enumerate(jax.tree.leaves(want_grads)):
        np.testing.assert_allclose(grads[j], leaf, rtol=0, atol=rtol * np.abs(leaf).max())


@settings(max_examples=12, deadline=None)
@given(
    STEPS,
    st.sampled_from(["layer", "primitive"]),
    st.sets(st.integers(1, 40), max_size=4),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_cut_of_any_function_equals_grad(steps, granularity, at, remat, seed):
    loss_fn, (params, data) = _random_loss(steps), _random_inputs(seed)
    dag = graph.dag(loss_fn, params, *data, granularity=granularity)
    boundaries = sorted({1 + b % (len(dag.nodes) - 1) for b in at})
    staged = stages.cut_at(loss_fn, params, data, boundaries, granularity=granularity, remat=remat)
    _assert_edges_are_messages(dag, staged, boundaries)
    with jax.disable_jit():  # operation by operation, so that nothing is compiled for one example
        want = jax.value_and_grad(loss_fn)(params, *data)
        _assert_same(_gradients(staged, params, data), want, 1e-6)


def _assert_edges_are_messages(dag, staged, boundaries):
    """What the graph says crosses a cut is what stages hand over, and leaves are where it says."""
    n = len(dag.nodes)
    stage_of = np.searchsorted(boundaries, np.arange(n), side="right")
    expected = {(e.value, int(stage_of[e.source]), int(stage_of[e.target])): e for e in dag.edges}
    expected = {key: e for key, e in expected.items() if key[1] != key[2]}
    sent = {
        (v, k, target)
        for k, stage in enumerate(staged.stages)
        for v, targets in stage.writes.items()
        for target in targets
    }
    received = {
        (v, source, k) for k, stage in enumerate(staged.stages) for v, source in stage.reads
    }
    assert sent == received == set(expected)
    for k, stage in enumerate(staged.stages):
        for v, source in stage.reads:
            assert value_bytes(stage.shapes[v]) == expected[v, source, k].n_bytes
            assert (v in stage.upstream) == expected[v, source, k].differentiable
        inside = [node for i, node in enumerate(dag.nodes) if stage_of[i] == k]
        assert sorted(stage.leaves) == sorted({j for node in inside for j in node.leaves})
        assert sorted(stage.owns + stage.borrows) == sorted(stage.leaves)
    owned = [j for stage in staged.stages for j in stage.owns]
    assert sorted(owned) == list(range(len(dag.leaf_bytes)))


def test_what_is_made_of_parameters_or_constants_alone_is_not_sent():
    def loss_fn(params, x):
        half = [p.astype(jnp.bfloat16) for p in params]  # the usual head of mixed precision
        mask = jnp.tril(jnp.ones((4, 4), jnp.bfloat16))
        y = mask @ (x.astype(jnp.bfloat16) @ half[0])
        y = mask @ jnp.tanh(y @ half[1])
        y = y @ half[0]
        return jnp.sum(y.astype(jnp.float32)) + sum(jnp.sum(p**2) for p in params)

    params, (x, _) = _random_inputs(0)
    params = params[:2]
    dag = graph.dag(loss_fn, params, x)
    staged = stages.cut_at(loss_fn, params, (x,), (1,))
    sizes = sorted(value_bytes(staged.stages[1].shapes[v]) for v, _ in staged.stages[1].reads)
    assert sizes == [4, 2 * WIDTH * WIDTH]  # the first leaf's penalty, and one activation
    assert staged.stages[1].owns == (1,)
    assert staged.stages[1].borrows == (0,)
    assert [node.leaves for node in dag.nodes] == [(0,), (0, 1)]
    _assert_same(_gradients(staged, params, (x,)), jax.value_and_grad(loss_fn)(params, x), 2e-2)


# Models.


def _gpt2_case():
    config = gpt2.GPT2Config(vocab_size=31, n_positions=8, n_embd=16, n_layer=3, n_head=2)
    params = gpt2.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 31)
    return lambda p, t: gpt2.loss(p, config, t), params, (tokens,), "h.{}.", 3


def _llama_case():
    config = lm.LMConfig("llama", 31, 16, 3, 4, 2, 4, 24, 64)
    params = lm.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)
    return lambda p, t: lm.loss(p, config, t), params, (tokens,), "model.layers.{}.", 3


def _resnet_case():
    config = resnet.DeepConfig((1, 1, 1, 1), n_classes=5, width=4, groups=2, small_images=True)
    graphdef, init = resnet.built(config)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    labels = jnp.array([3, 1])
    params = jax.jit(init)(jax.random.key(0))
    return lambda p, *d: resnet.loss(graphdef, p, d), params, (images, labels), "blocks.{}.", 4


CASES = {"gpt2": _gpt2_case, "llama": _llama_case, "resnet": _resnet_case}


def _starts(dag, blocks, n_blocks):
    names = [node.name for node in dag.nodes]
    return [
        min(i for i, name in enumerate(names) if name.startswith(blocks.format(k)))
        for k in range(n_blocks)
    ]


@pytest.fixture(scope="module")
def cut_gpt2():
    """A model of three equal blocks, one stage for each beside the ends, run twice."""
    loss_fn, params, data, blocks, n_blocks = _gpt2_case()
    dag = graph.dag(loss_fn, params, *data)
    boundaries = [*_starts(dag, blocks, n_blocks), len(dag.nodes) - 1]
    staged = stages.cut_at(loss_fn, params, data, boundaries)
    for _ in range(2):
        got = _gradients(staged, params, data)
    return staged, params, data, got, jax.jit(jax.value_and_grad(loss_fn))(params, *data)


def test_a_model_in_compiled_stages_equals_compiled_grad(cut_gpt2):
    _, _, _, got, want = cut_gpt2
    _assert_same(got, want, 1e-6)


def test_equal_stages_share_programs_which_compile_once(cut_gpt2):
    staged, params, data, _, _ = cut_gpt2
    forwards = {id(s.forward): s.forward for s in staged.stages}
    backwards = {id(s.backward): s.backward for s in staged.stages}
    assert len(staged.stages) == 5
    assert len(forwards) == len(backwards) == 3  # the embedding, a block, the head
    assert {f.compiled._cache_size() for f in forwards.values()} == {1}
    assert {b._cache_size() for b in backwards.values()} == {1}
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    other = (jnp.flip(data[0], 0),)
    _gradients(staged, jax.tree.map(lambda x: x + 1e-3, params), other)
    compiled.clear()  # what adding 1e-3 compiled
    _gradients(staged, jax.tree.map(lambda x: x + 1e-3, params), data)
    assert not compiled


def test_tied_parameters_have_one_owner(cut_gpt2):
    staged, params, _, _, _ = cut_gpt2
    (tied,) = (i for i, path in enumerate(tree.paths(params)) if path == "wte.weight")
    assert tied in staged.stages[0].owns
    assert [k for k, s in enumerate(staged.stages) if tied in s.borrows] == [4]
    assert tied in staged.stages[0].completes


def test_a_pullback_copies_neither_parameters_nor_inputs(cut_gpt2):
    staged, params, _, _, _ = cut_gpt2
    stage = staged.stages[1]
    leaves = dict(enumerate(jax.tree.leaves(params)))
    values = {v: jnp.ones(stage.shapes[v].shape, stage.shapes[v].dtype) for v, _ in stage.reads}
    _, pullback = stage.run(leaves, values)
    given = {id(x) for x in (*leaves.values(), *values.values())}
    matrices = {leaves[j].shape for j in stage.leaves if leaves[j].ndim == 2}
    kept = [x for x in pullback.values if x.shape in matrices]
    assert len(kept) >= 4
    assert all(id(x) in given for x in kept)


def test_a_process_alone_compiles_its_own_stage_only():
    """One stage, run on messages as another process would send them."""
    loss_fn = _random_loss([("dot", 0, 0, 0), ("mul", 1, 0, 1), ("masks", 2, 2, 2)])
    params, data = _random_inputs(0)
    shapes = jax.eval_shape(lambda *x: x, params, *data)
    staged = stages.cut_at(loss_fn, shapes[0], shapes[1:], (1, 2), remat=[False, True, False])
    again = stages.cut_at(loss_fn, params, data, (1, 2))
    stage, other = staged.stages[1], again.stages[1]
    assert (stage.reads, stage.writes, stage.data) == (other.reads, other.writes, other.data)
    leaves = {j: params[j] for j in stage.leaves}
    values = dict(zip(staged.data_names, data, strict=True))
    values = {v: values[v] for v in stage.data}
    values.update((v, jnp.ones(stage.shapes[v].shape)) for v, _ in stage.reads)
    outs, pullback = stage.run(leaves, values)
    assert set(outs) == set(stage.writes)
    given = {id(x) for x in (*leaves.values(), *values.values())}
    assert all(id(x) in given for x in pullback.values)  # under remat nothing else is kept
    seeds = {v: jnp.ones_like(x) for v, x in outs.items()}
    got = stage.pull(pullback, seeds)
    assert [s.forward.compiled._cache_size() for s in staged.stages] == [0, 1, 0]
    _, plain = other.run(leaves, values)
    want = other.pull(plain, seeds)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)
    some = dict(list(seeds.items())[:1])  # missing cotangents are zero
    zeros = {v: jnp.zeros_like(x) for v, x in seeds.items()}
    jax.tree.map(
        np.testing.assert_array_equal, other.pull(plain, some), other.pull(plain, zeros | some)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_more_models_in_compiled_stages_equal_compiled_grad(name):
    loss_fn, params, data, blocks, n_blocks = CASES[name]()
    want = jax.jit(jax.value_and_grad(loss_fn))(params, *data)
    starts = _starts(graph.dag(loss_fn, params, *data), blocks, n_blocks)
    staged = stages.cut_at(
        loss_fn, params, data, [starts[1] + 1, starts[-1]], remat=[True, False, True]
    )
    _assert_same(_gradients(staged, params, data), want, 1e-6)


# Refusals.


@pytest.mark.parametrize(
    ("boundaries", "options", "message"),
    [
        ((0,), {}, "between 1 and 2"),
        ((3,), {}, "between 1 and 2"),
        ((2, 1), {}, "ascending"),
        ((1, 1), {}, "ascending"),
        ((1, 2, 2), {}, "4 stages for 3 nodes"),
        ((1,), {"remat": (True,)}, "1 entries for 2 stages"),
        ((1,), {"granularity": "block"}, "layer, scope, primitive"),
        ((1,), {"granularity": "scope"}, "no jax.named_scope"),
    ],
)
def test_impossible_cuts_are_refused(boundaries, options, message):
    params, (x, _) = _random_inputs(0)

    def loss_fn(p, x):
        return jnp.sum(x @ p[0] @ p[1] @ p[2])

    with pytest.raises(UserError, match=message):
        stages.cut_at(loss_fn, params, (x,), boundaries, **options)
