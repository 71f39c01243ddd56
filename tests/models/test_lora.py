"""LoRA: starts at the frozen model, merged equals applied, on any base and orientation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.models import lm, lora
from jaxsys.models.quantise import quantise, weights

CONFIG = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 64, rope=lm.Rope(width=8), tied=True)
TOKENS = jnp.arange(8).reshape(2, 4)


def _random(adapters):
    """Adapters as they might be after training: B is no longer zero."""
    keys = jax.random.split(jax.random.key(7), len(adapters))
    return {
        path: lora.Adapter(x.a, 0.3 * jax.random.normal(key, x.b.shape), x.scale)
        for (path, x), key in zip(adapters.items(), keys, strict=True)
    }


@pytest.mark.parametrize(
    ("patterns", "bits"),
    [(("*q_proj*", "*.mlp.*"), None), (("*.layers.1.*", "*embed*"), 8), (("*",), 4)],
)
def test_merged_equals_applied_and_fresh_adapters_change_nothing(patterns, bits):
    params = lm.init(jax.random.key(0), CONFIG)
    base = params if bits is None else quantise(params, ("*",), bits=bits)
    adapters = lora.init(jax.random.key(1), base, patterns, rank=3, alpha=6.0)
    before = lm.apply(base, CONFIG, TOKENS).logits
    fresh = lm.apply(lora.apply(base, adapters), CONFIG, TOKENS).logits
    np.testing.assert_array_equal(fresh, before)

    trained = _random(adapters)
    applied = lm.apply(lora.apply(base, trained), CONFIG, TOKENS).logits
    merged = lora.merge(base, trained)
    assert weights(merged).keys() == weights(base).keys()
    np.testing.assert_allclose(lm.apply(merged, CONFIG, TOKENS).logits, applied, atol=2e-4)
    assert np.abs(applied - before).max() > 1e-2


@pytest.mark.parametrize("bits", [None, 8])
def test_gpt2_matrices_are_in_out(bits):
    config = lm.config_from_hf(
        {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 2}
    )
    base = lm.init(jax.random.key(0), config)
    if bits:
        base = quantise(base, bits=bits, in_out=True)
    trained = _random(lora.init(jax.random.key(1), base, rank=2, in_out=True))
    applied = lm.apply(lora.apply(base, trained, in_out=True), config, TOKENS).logits
    merged = lora.merge(base, trained, in_out=True)
    np.testing.assert_allclose(lm.apply(merged, config, TOKENS).logits, applied, atol=2e-4)


def test_the_merged_matrix_is_the_papers_formula():
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 7), (2, 7), (5, 2)))
    adapter = lora.Adapter(jnp.asarray(a), jnp.asarray(b), 16.0 / 2)
    merged = lora.merge({"h": {"weight": jnp.asarray(w)}}, {"h.weight": adapter})
    np.testing.assert_allclose(merged["h"]["weight"], w + 8.0 * b @ a, rtol=1e-4, atol=1e-4)


def test_a_matrix_gets_the_same_start_whatever_else_is_matched():
    params = lm.init(jax.random.key(0), CONFIG)
    few = lora.init(jax.random.key(1), params, ("*.1.self_attn.q_proj*",))
    many = lora.init(jax.random.key(1), params)
    for path, adapter in few.items():
        np.testing.assert_array_equal(adapter.a, many[path].a)
    assert len(many) == 2 * 7
    bound = 1 / np.sqrt(32)
    assert np.abs(many["model.layers.0.self_attn.q_proj.weight"].a).max() <= bound


def test_mistakes_are_named():
    params = lm.init(jax.random.key(0), CONFIG)
    with pytest.raises(UserError, match="rank is 33"):
        lora.init(jax.random.key(1), params, rank=33)
    adapters = lora.init(jax.random.key(1), params, ("*q_proj*",))
    with pytest.raises(UserError, match="no weight of that path"):
        lora.apply({"other": jnp.ones((2, 2))}, adapters)
    wrong = {path: lora.Adapter(x.a[:, 1:], x.b, x.scale) for path, x in adapters.items()}
    with pytest.raises(UserError, match="is for a matrix of"):
        lora.merge(params, wrong)
