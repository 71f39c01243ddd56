"""Transports and pipelined experts on eight virtual devices against arrays in one place."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.moe.contract import Axes, Experts, Gate, Hooks, LayerPlan, MoESpec, Order
from jaxsys.moe.dispatch import TRANSPORTS
from jaxsys.moe.pipelined import pipelined

E, C, D, F = 8, 8, 3, 4
AUTO = jax.sharding.AxisType.Auto
FLAT, NODES = Axes(expert="expert"), Axes(expert=("node", "local"))
CUBE = Axes(data="data", expert="expert", tensor="tensor")
NONE = Hooks()


def mesh_of(**sizes):
    names = tuple(sizes)
    return jax.make_mesh(tuple(sizes.values()), names, axis_types=(AUTO,) * len(names))


MESHES = {
    "8": (mesh_of(expert=8), FLAT),
    "4x2": (mesh_of(node=4, local=2), NODES),
    "2x2x2": (mesh_of(data=2, expert=2, tensor=2), CUBE),
}


def spread(function, mesh, axes, n_in):
    """Run a function of one rank's blocks on blocks stacked over all ranks."""

    def one(*blocks):
        out = function(*(jax.tree.map(lambda x: x[0], b) for b in blocks))
        return jax.tree.map(lambda x: x[None], out)

    spec = P(axes.tokens)
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(spec,) * n_in, out_specs=spec))


def slots(seed=0, dtype=np.float32):
    x = np.random.default_rng(seed).integers(-9, 10, (8, E, C, D)).astype(dtype)
    x[:, ::3, C // 2 :] = 0  # experts that fewer tokens chose
    return x


@pytest.mark.parametrize("name", list(TRANSPORTS))
def test_transports_move_every_slot_and_back(name):
    mesh, axes = MESHES["4x2" if name.endswith("dh") else "8"]
    transport, x = TRANSPORTS[name], slots()
    want = x.transpose(1, 0, 2, 3).reshape(8, 1, 8 * C, D)  # one expert each, from all ranks

    def there_and_back(tree, weight):
        def total(tree):
            moved = transport.dispatch(tree, axes)
            return jnp.sum(moved["x"] * weight), moved

        (_, moved), grads = jax.value_and_grad(total, has_aux=True)({"x": tree})
        few = {"i": tree.astype(jnp.int8), "s": tree[..., 0]}
        return (
            moved["x"],
            transport.combine(moved, axes)["x"],
            grads["x"],
            transport.dispatch(few, axes),
        )

    weight = slots(1).transpose(1, 0, 2, 3).reshape(8, 1, 8 * C, D)
    moved, back, grads, few = spread(there_and_back, mesh, axes, 2)(x, weight)
    np.testing.assert_array_equal(moved, want)
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(grads, slots(1))  # of sum(dispatch(x)·w): combine(w)
    np.testing.assert_array_equal(few["i"], want.astype(np.int8))
    np.testing.assert_array_equal(few["s"], want[..., 0])


def spec_of(transport="flat", hooks=NONE):
    def apply(params, rows):
        hidden = jnp.tanh(jnp.einsum("emd,edf->emf", rows, params["up"]))
        return jnp.einsum("emf,efd->emd", hidden, params["down"]) + params["bias"][:, None]

    experts = Experts(None, apply, None, {"up": -1, "down": -2, "bias": None}, 2)
    moves = TRANSPORTS[transport]
    return MoESpec(
        Gate(None, None, 1), Order(None, None), experts, moves.dispatch, moves.combine, hooks
    )


def weights():
    rng = np.random.default_rng(3)
    shapes = {"up": (E, D, F), "down": (E, F, D), "bias": (E, D)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def sharded(transport, pair, mesh, axes, serial=False, hooks=NONE):
    """Loss, outputs and gradients of a sharded layer; the arguments are global arrays."""
    spec, plan = spec_of(transport, hooks), LayerPlan(*pair)

    def one(params, x, weight):
        def loss(params, x):
            y = pipelined(params, x[0], spec, plan, axes, serial=serial)
            return jnp.sum(y * weight[0]), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y[None], grads

    expert, tokens = axes.expert, P(axes.tokens)
    parts = {
        "up": P(expert, None, axes.tensor),
        "down": P(expert, axes.tensor),
        "bias": P(expert),
    }
    return jax.jit(
        jax.shard_map(
            one, mesh=mesh, in_specs=(parts, tokens, tokens), out_specs=(tokens, (parts, tokens))
        )
    )


def reference(params, x, weight):
    def loss(params, x):
        y = jax.vmap(lambda rows: spec_of().experts.apply(params, rows))(x)
        return jnp.sum(y * weight), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, grads


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(2, 8, E, C, D)).astype(np.float32)
    return (weights(), x, weight), jax.jit(reference)(weights(), x, weight)


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


FAST = [
    ("8", "gather", (1, 1)), ("4x2", "2dh", (2, 2)), ("4x2", "1dh", (1, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("mesh", "transport", "pair"), FAST)
def test_sharded_experts_equal_experts_in_one_place(case, mesh, transport, pair):
    given, want = case
    close(sharded(transport, pair, *MESHES[mesh])(*given), want)


def test_serial_chunks_and_one_device_give_the_same(case):
    given, want = case
    close(sharded("flat", (4, 2), *MESHES["2x2x2"], serial=True)(*given), want)
    alone = jax.vmap(lambda x: pipelined(given[0], x, spec_of(), LayerPlan(2, 4), Axes()))
    close(alone(given[1]), want[0])


def test_straight_through_hooks_change_values_and_leave_gradients(case):
    given, _ = case

    def hook(x):
        return {"half": jnp.round(x).astype(jnp.int8)}

    hooks = Hooks(
        before_dispatch=hook,
        after_dispatch=lambda t: t["half"].astype(jnp.float32),
        straight_through=True,
    )
    rounded = (given[0], np.round(given[1]), given[2])
    y, (dw, dx) = sharded("flat", (2, 4), *MESHES["8"], hooks=hooks)(*given)
    want_y, want_grads = jax.jit(reference)(*rounded)
    close((y, (dw, dx)), (want_y, want_grads))
    # ... and others are differentiated: doubling before the experts doubles the gradient.
    double = Hooks(after_dispatch=lambda x: 2 * x)
    twice = (given[0], 2 * given[1], given[2])
    y, (dw, dx) = sharded("flat", (2, 2), *MESHES["8"], hooks=double)(*given)
    want_y, (want_dw, want_dx) = jax.jit(reference)(*twice)
    close((y, dw, dx), (want_y, want_dw, 2 * np.asarray(want_dx)))
    with pytest.raises(UserError, match="expected equal ones"):
        sharded("flat", (2, 1), *MESHES["8"], hooks=double)(*given)


def count(text, operation):
    return len(re.findall(rf"\s{operation}(?:-start)?\(", text))


@pytest.mark.parametrize("pair", [(1, 1), (2, 4)])
def test_chunks_survive_compilation(case, pair):
    given, _ = case
    mesh, axes = MESHES["2x2x2"]
    text = sharded("flat", pair, mesh, axes).lower(*given).compile().as_text()
    assert count(text, "all-to-all") == 2 * sum(pair)
    assert count(text, "all-gather") == sum(pair)
    assert count(text, "reduce-scatter") == sum(pair)


def test_mistakes_are_one_sentence(case):
    given, _ = case
    for change, says in (
        ({"pair": (3, 1)}, "capacity 8 cannot be cut into 3 and 1 equal chunks"),
        ({"axes": Axes(expert="expert", data="pipe")}, "axis 'pipe' is not in the mesh"),
        ({"axes": Axes(expert="exp")}, "axis 'exp' is not in the mesh"),
        ({"axes": Axes(expert="expert", tensor="rows")}, "axis 'rows' is not in the mesh"),
        ({"transport": "2dh"}, "expected two mesh axes"),
    ):
        options = {"transport": "flat", "pair": (1, 1), "axes": FLAT} | change
        spec, plan = spec_of(options["transport"]), LayerPlan(*options["pair"])

        def one(params, x, spec=spec, plan=plan, axes=options["axes"]):
            return pipelined(params, x[0], spec, plan, axes)[None]

        mapped = jax.shard_map(
            one, mesh=MESHES["8"][0], in_specs=(P("expert"), P("expert")), out_specs=P("expert")
        )
        with pytest.raises(UserError, match=says):
            jax.eval_shape(mapped, given[0], given[1])
    odd = jax.shard_map(
        lambda x: TRANSPORTS["flat"].dispatch(x[0], FLAT)[None],
        mesh=MESHES["8"][0],
        in_specs=P("expert"),
        out_specs=P("expert"),
    )
    with pytest.raises(UserError, match="6 experts cannot be dealt out over 8 ranks"):
        jax.eval_shape(odd, given[1][:, :6])
