"""Gradients reduced between all-to-alls equal `jax.grad` and one all-reduce, to the bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import separate_collectives
from jaxsys.moe.contract import Axes, Experts, Gate, LayerPlan, MoEPlan, MoESpec, Order
from jaxsys.moe.dispatch import TRANSPORTS
from jaxsys.moe.reverse import Parts, Stages, loss_of, value_and_grad

E, C, D, L = 4, 4, 2, 3
AXES = Axes(data="data", expert="expert", tensor="tensor")
AUTO = jax.sharding.AxisType.Auto


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"), axis_types=(AUTO,) * 3)


def spec():
    def apply(params, rows):
        hidden = jnp.maximum(jnp.einsum("emd,edf->emf", rows, params["up"]), 0)
        return jnp.einsum("emf,efd->emd", hidden, params["down"])

    moves = TRANSPORTS["flat"]
    experts = Experts(None, apply, None, {"up": -1, "down": -2}, 2)
    return MoESpec(Gate(None, None, 1), Order(None, None), experts, *moves)


STAGES = Stages(
    first=lambda p, batch: p["table"][batch],
    before=lambda i, p, x: (x @ p["in"], x),
    after=lambda i, p, y, kept: (kept + y * p["scale"][None, None], jnp.sum(p["scale"]), i),
    last=lambda p, first, x, batch: jnp.sum(x @ p["out"]) + jnp.sum(first["table"]),
)


def small(rng, *shape):
    return jnp.asarray(rng.integers(-1, 2, shape), jnp.float32)


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    dense = tuple({"in": small(rng, D, D), "scale": small(rng, D)} for _ in range(L))
    experts = tuple({"up": small(rng, E, D, 4), "down": small(rng, E, 4, D)} for _ in range(L))
    parts = Parts({"table": small(rng, 5, D)}, dense, experts, {"out": small(rng, D, 1)})
    return parts, rng.integers(0, 5, (8, E, C))


def step(mesh, plan, by_loop):
    expert = {"up": P("expert", None, "tensor"), "down": P("expert", "tensor")}
    specs = Parts(P(), P(), (expert,) * L, P())

    def one(parts, batch):
        rest = (STAGES, batch[0], spec(), plan, AXES)
        if by_loop:
            loss, grads, told = value_and_grad(STAGES, parts, *rest[1:])
        else:

            def total(parts):
                loss, told = loss_of(STAGES, parts, *rest[1:])
                return jax.lax.psum(loss, AXES.tokens), told

            (loss, told), grads = jax.value_and_grad(total, has_aux=True)(parts)
        assert told == tuple(range(L))
        return loss, grads

    mapped = jax.shard_map(one, mesh=mesh, in_specs=(specs, P(AXES.tokens)), out_specs=(P(), specs))
    return jax.jit(mapped, compiler_options=separate_collectives(mesh))


def reductions(function, given):
    text = function.lower(*given).compile().as_text()
    return len(re.findall(r"\sall-reduce(?:-start)?\(", text))


def test_slices_between_all_to_alls_change_no_bit(mesh, given):
    plain = MoEPlan((LayerPlan(1, 2),))
    loss, grads = step(mesh, plain, by_loop=False)(*given)
    counts = []
    for cuts in ((0, 0, 0), (10**9, 3 * 4, 10**9)):
        plan = MoEPlan(tuple(LayerPlan(1, 2, gradient_bytes=n) for n in cuts))
        function = step(mesh, plan, by_loop=True)
        got_loss, got = function(*given)
        assert float(got_loss) == float(loss) != 0
        jax.tree.map(np.testing.assert_array_equal, got, grads)
        counts.append(reductions(function, given))
    # The last layer's gap has nothing to reduce yet, so its bytes make no slice.
    assert [n - counts[0] for n in counts] == [0, 2]


def test_a_plan_of_another_model_and_sharded_dense_parameters_are_refused(mesh, given):
    with pytest.raises(UserError, match="the plan has 2 layers and the model 3"):
        step(mesh, MoEPlan((LayerPlan(),) * 2), by_loop=True)(*given)
    parts, batch = given

    def one(parts, batch):
        return value_and_grad(STAGES, parts, batch[0], spec(), MoEPlan(), AXES)[0]

    mapped = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(Parts(P(), P("expert"), P("expert"), P()), P(AXES.tokens)),
        out_specs=P(),
    )
    with pytest.raises(UserError, match="dense parameters differ between ranks"):
        jax.eval_shape(mapped, parts, batch)
