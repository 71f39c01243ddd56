"""Parameters and batches spread over eight devices against one device."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.models import lm
from jaxsys.models.lm.sharding import specs

SMALL = {"vocab_size": 64, "width": 32, "layers": 2, "heads": 4, "head_width": 8}
SMALL |= {"ffn_width": 48, "max_positions": 64, "init_std": 0.2}
MODELS = {
    "llama": lm.LMConfig("llama", kv_heads=2, **SMALL),
    "gpt2": lm.LMConfig(
        "gpt2",
        kv_heads=4,
        norm="layer",
        activation="gelu_new",
        rope=None,
        tied=True,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        prefix="transformer",
        **SMALL,
    ),
    "mixtral": lm.LMConfig(
        "mixtral", kv_heads=1, experts=4, experts_per_token=2, expert_width=24, **SMALL
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(2, 4), pytest.param((4, 2), marks=pytest.mark.slow)])
def test_forward_and_gradients_equal_one_device(name, sizes):
    config = MODELS[name]
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = lm.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, config.vocab_size)
    step = jax.jit(jax.value_and_grad(lambda p, t: lm.loss(p, config, t)))
    loss, grads = step(params, tokens)

    placed, batch = lm.shard(params, config, mesh), lm.shard_batch(tokens, mesh)
    split = [leaf for leaf in jax.tree.leaves(placed) if "model" in leaf.sharding.spec]
    assert len(split) > len(jax.tree.leaves(placed)) // 3
    loss_split, grads_split = step(placed, batch)
    np.testing.assert_allclose(loss_split, loss, rtol=1e-5)
    expected = flatten(grads)
    for path, grad in flatten(grads_split).items():
        np.testing.assert_allclose(grad, expected[path], rtol=0, atol=2e-5, err_msg=path)


def test_a_split_tensor_lies_in_parts():
    config = MODELS["llama"]
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    placed = lm.shard(lm.init(jax.random.key(0), config), config, mesh)
    mlp = placed["model"]["layers"]["0"]["mlp"]
    assert mlp["up_proj"]["weight"].sharding.shard_shape((48, 32)) == (12, 32)
    assert mlp["down_proj"]["weight"].sharding.shard_shape((32, 48)) == (32, 12)
    # Two key heads over four devices would cut heads in half: they are kept whole.
    assert placed["model"]["layers"]["0"]["self_attn"]["k_proj"]["weight"].sharding.spec == P(
        None, None
    )


def test_specs_leave_out_what_does_not_divide_and_refuse_what_does_not_fit():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    rules = (("*.a", P("model", None)), ("b", P("model", None)))
    assert specs({"x.a": (6, 2), "y.a": (8, 2)}, rules, mesh) == {
        "x.a": P(None, None),
        "y.a": P("model", None),
    }
    with pytest.raises(UserError, match="'c' of shape"):
        specs({"c": (8,)}, rules, mesh)
    with pytest.raises(UserError, match="'b' of shape"):
        specs({"b": (8,)}, rules, mesh)
