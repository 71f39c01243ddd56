"""Layers for the tests on many devices and processes, and the dense layer that they must equal."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxsys.core.tree import flatten
from jaxsys.moe.capacity import fill_slots, seats, slots_per_expert
from jaxsys.moe.contract import (
    Axes,
    Capacity,
    Dims,
    LayerPlan,
    Losses,
    Mixing,
    MoESpec,
    TokenChoice,
)
from jaxsys.moe.dispatch import TRANSPORTS
from jaxsys.moe.experts import gpt_ffn, swiglu
from jaxsys.moe.gates import cosine, noisy_top_k, sigmoid
from jaxsys.moe.gates_balanced import bias_balanced, group_limited, sinkhorn
from jaxsys.moe.gates_dense import expert_choice, soft_moe
from jaxsys.moe.layer import apply, init
from jaxsys.moe.order import einsum_order, sparse_order
from jaxsys.moe.sharding import layer_specs

DIMS = Dims(width=4, hidden=6, experts=8)
ROWS, T = 8, 20  # one sequence a rank
GATES = {
    "gshard": noisy_top_k(2),
    "sigmoid": sigmoid(1),
    "cosine": cosine(2, projected=3),
    "sinkhorn": sinkhorn(1),
    "groups": group_limited(2, 4, 2),
    "bias": bias_balanced(2),
    "choice": expert_choice(2),
    "choice tokens": expert_choice(1.5, "tokens"),
    "soft": soft_moe(2),
}
ORDERS = {"einsum": einsum_order(), "sparse": sparse_order()}
PAIRS = ((1, 1), (2, 2), (4, 1), (1, 4), (2, 8))
EXPERTS = {"gpt": gpt_ffn(), "swiglu": swiglu()}
AUTO = jax.sharding.AxisType.Auto


def make_mesh(name):
    shapes = {
        "8x1": {"expert": 8},
        "4x2": {"node": 4, "local": 2},
        "2x2x2": {"data": 2, "expert": 2, "tensor": 2},
        "4": {"expert": 4},
        "2x2": {"node": 2, "local": 2},
    }[name]
    mesh = jax.make_mesh(tuple(shapes.values()), tuple(shapes), axis_types=(AUTO,) * len(shapes))
    expert = ("node", "local") if "node" in shapes else "expert"
    data, tensor = ("data", "tensor") if "data" in shapes else (None, None)
    return mesh, Axes(data, expert, tensor)


def make_spec(gate, order, transport, factor=1.0):
    moves = TRANSPORTS[transport]
    kind = "gpt" if order == "einsum" else "swiglu"
    return MoESpec(
        GATES[gate],
        ORDERS[order],
        EXPERTS[kind],
        moves.dispatch,
        moves.combine,
        capacity=Capacity(factor),
        losses=Losses(balance=0.1, z=0.01),
        shared=EXPERTS["swiglu"] if gate == "sigmoid" else None,
        shared_hidden=3,
    )


def make_case(spec):
    """Parameters, x and the weights of the loss."""
    params = init(jax.random.key(0), spec, DIMS)
    x, weight = np.random.default_rng(1).normal(size=(2, ROWS, T, DIMS.width)).astype(np.float32)
    return params, x, weight


def sharded(spec, pair, mesh, axes):
    """A compiled function of global arrays: loss, y, gradients and Info's arrays."""

    def one(params, x, weight):
        def total(params, x):
            y, info = apply(params, x, spec, LayerPlan(*pair), axes=axes)
            return jax.lax.psum(jnp.sum(y * weight), axes.tokens) + info.loss, (y, info)

        (loss, (y, info)), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
            params, x
        )
        return loss, y, grads, (info.loss, info.load, info.dropped, info.entropy)

    parts, tokens = partitions(spec, axes)
    return jax.jit(
        jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(parts, tokens, tokens),
            out_specs=(P(), tokens, (parts, tokens), P()),
        )
    )


def partitions(spec, axes):
    like = jax.eval_shape(lambda: init(jax.random.key(0), spec, DIMS))
    return layer_specs(like, spec, axes), P(axes.tokens)


def dense_weights(routed, spec, n_rows, multiple):
    """[N, E]: the weight of each expert's output for each token, zero where it was dropped."""
    n_experts = DIMS.experts
    zeros = jnp.zeros((n_rows, n_experts))
    if isinstance(routed, TokenChoice):
        k = routed.experts.shape[-1]
        size = slots_per_expert(spec.capacity, n_rows, k, n_experts, multiple)
        places = fill_slots(routed, size, spec.capacity.policy).places
        row = jnp.broadcast_to(jnp.arange(n_rows)[:, None], places.shape)
        kept = routed.weights * (places < n_experts * size)
        return zeros.at[row, routed.experts].add(kept)
    slots = seats(routed, n_rows)
    column = jnp.broadcast_to(jnp.arange(n_experts)[:, None], slots.tokens.shape)
    return zeros.at[slots.tokens, column].add(slots.weights, mode="drop")


def reference(spec, blocks, multiple):
    """The same on one device, every expert on every token; each block of tokens drops by itself."""
    ranks = ("rank",)

    def one(params, x, weight):
        routed = spec.gate.route(params["gate"], x, None, ranks)
        rows = x.reshape(-1, x.shape[-1])
        everything = jnp.broadcast_to(rows[None], (DIMS.experts, *rows.shape))
        run = spec.experts.apply
        if isinstance(routed, Mixing):
            slots = jnp.einsum("btec,btd->ebcd", routed.dispatch, x)
            out = run(params["experts"], slots.reshape(DIMS.experts, -1, x.shape[-1]))
            y = jnp.einsum("btec,ebcd->btd", routed.combine, out.reshape(slots.shape))
        else:
            share = dense_weights(routed, spec, rows.shape[0], multiple)
            y = jnp.einsum("ne,end->nd", share, run(params["experts"], everything)).reshape(x.shape)
        if spec.shared is not None:
            y = y + spec.shared.apply(params["shared"], rows[None]).reshape(x.shape)
        return jnp.sum(y * weight), y

    def total(params, x, weight):
        x_blocks, w_blocks = (a.reshape(blocks, -1, *a.shape[1:]) for a in (x, weight))
        sums, y = jax.vmap(one, (None, 0, 0), axis_name="rank")(params, x_blocks, w_blocks)
        info = apply(params, x, spec)[1]
        return jnp.sum(sums) + info.loss, (y.reshape(x.shape), info)

    def run(params, x, weight):
        (loss, (y, info)), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
            params, x, weight
        )
        return loss, y, grads, (info.loss, info.load, info.entropy)

    return jax.jit(run)


def errors(got, want):
    """The largest error of each array, relative to its largest entry."""
    loss, y, grads, (aux, load, _, entropy) = got
    got = {"loss": loss, "y": y, "params": grads[0], "x": grads[1], "info": (aux, load, entropy)}
    loss, y, grads, info = want
    want = {"loss": loss, "y": y, "params": grads[0], "x": grads[1], "info": info}
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    found = {}
    for key, b in want.items():
        a, b = np.asarray(got[key]), np.asarray(b)
        found[key] = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))
    return found


def check(got, want, name):
    for key, error in errors(got, want).items():
        assert error < 1e-5, f"{name}: {key} is off by {error:.1e}"
