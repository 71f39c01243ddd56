"""A sharded language model whose gradients are summed in the gaps equals a whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsys.core.tree import flatten
from jaxsys.models import lm
from jaxsys.moe import model
from jaxsys.moe.contract import Axes, Capacity, Dims, LayerPlan, MoEPlan, MoESpec
from jaxsys.moe.dispatch import TRANSPORTS
from jaxsys.moe.experts import gpt_ffn
from jaxsys.moe.gates import noisy_top_k
from jaxsys.moe.order import sparse_order
from jaxsys.moe.reverse import value_and_grad
from jaxsys.moe.sharding import layer_specs
from jaxsys.moe.stages import cut, lm_stages, paste

AXES = Axes(data="data", expert="expert", tensor="tensor")
CONFIG = lm.config_from_hf(
    {"model_type": "gpt2", "vocab_size": 19, "n_positions": 8, "n_embd": 8, "n_layer": 3,
     "n_head": 2, "n_inner": 8}
)  # fmt: skip
NUMBERS = (0, 1)


@pytest.mark.slow
def test_a_sharded_model_with_gradients_in_the_gaps_equals_a_whole_one():
    spec = MoESpec(
        noisy_top_k(2), sparse_order(), gpt_ffn(), *TRANSPORTS["flat"], capacity=Capacity(4.0)
    )
    params = model.init(jax.random.key(0), CONFIG, spec, Dims(8, 8, 4), NUMBERS)
    tokens = np.random.default_rng(0).integers(0, 19, (8, 9))
    whole = jax.jit(jax.value_and_grad(lambda p, t: model.loss(p, CONFIG, spec, t), has_aux=True))
    (loss, _), grads = whole(params, jnp.asarray(tokens))

    plan = MoEPlan((LayerPlan(1, 2, 500), LayerPlan(2, 1, 900)))
    specs = jax.tree.map(lambda _: P(), params)
    specs["moe"] = {i: layer_specs(p, spec, AXES) for i, p in params["moe"].items()}
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"), axis_types=(auto,) * 3)

    def one(params, tokens):
        parts = cut(params, CONFIG)
        stages = lm_stages(CONFIG, spec, NUMBERS, plan, AXES)
        loss, grads, infos = value_and_grad(stages, parts, tokens, spec, plan, AXES)
        return loss, paste(grads, NUMBERS), infos[0].dropped

    mapped = jax.shard_map(
        one, mesh=mesh, in_specs=(specs, P(AXES.tokens)), out_specs=(P(), specs, P())
    )
    got_loss, got, dropped = jax.jit(mapped)(params, tokens)
    assert float(dropped) == 0
    assert float(got_loss) == pytest.approx(float(loss), rel=1e-6)
    want, got = flatten(grads), flatten(got)
    assert want.keys() == got.keys()
    for name, b in want.items():
        a, b = np.asarray(got[name]), np.asarray(b)
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-4), name
