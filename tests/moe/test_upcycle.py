"""Dense models as mixtures: the same logits, Mixtral's form, and what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.models import lm
from jaxsys.moe import Axes, Capacity, Dims, MoEPlan, MoESpec, model
from jaxsys.moe.experts import gpt_ffn, swiglu
from jaxsys.moe.gates import noisy_top_k, sigmoid
from jaxsys.moe.gates_balanced import bias_balanced
from jaxsys.moe.gates_dense import expert_choice
from jaxsys.moe.order import sparse_order
from jaxsys.moe.upcycle import to_mixtral, upcycle

LLAMA = lm.LMConfig("llama", 31, 12, 2, 2, 1, 6, 16, 32)
GPT2 = lm.config_from_hf(
    {"model_type": "gpt2", "vocab_size": 31, "n_embd": 12, "n_layer": 2, "n_head": 2}
    | {"n_positions": 32, "n_inner": 16, "activation_function": "gelu_new"}
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 9)))
KEY = jax.random.key(1)
SPEC = MoESpec(noisy_top_k(2), sparse_order(), swiglu(), capacity=Capacity(1, "dropless"))
FORMS = {"llama": (LLAMA, SPEC), "gpt2": (GPT2, replace(SPEC, experts=gpt_ffn()))}


def _dense(config):
    params = lm.init(jax.random.key(0), config)
    # Biases that are zero would hide a mistake in them.
    keys = iter(jax.random.split(jax.random.key(2), 200))
    return jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape) if a.ndim == 1 else 5 * a, params
    )


@pytest.mark.parametrize("form", FORMS)
def test_copies_without_noise_are_the_dense_model(form):
    config, spec = FORMS[form]
    dense = _dense(config)
    wanted = lm.apply(dense, config, TOKENS).logits
    some = upcycle(dense, config, spec, 3, KEY, layers=[1])
    assert model.mixtures(some) == (1,)
    for params, own in [
        (upcycle(dense, config, spec, 4, KEY), spec),
        (some, spec),
        (
            upcycle(dense, config, replace(spec, gate=bias_balanced(3)), 4, KEY),
            replace(spec, gate=bias_balanced(3)),
        ),
    ]:
        out = model.apply(params, config, own, TOKENS)
        np.testing.assert_allclose(out.logits, wanted, atol=2e-5)
        assert all(float(info.dropped) == 0 for info in out.infos)
    noisy = upcycle(dense, config, spec, 4, KEY, noise=0.1)
    assert not np.allclose(model.apply(noisy, config, spec, TOKENS).logits, wanted, atol=1e-3)


def test_a_scale_makes_up_for_weights_that_do_not_add_up_to_one():
    dense = _dense(LLAMA)
    wanted = lm.apply(dense, LLAMA, TOKENS).logits
    for gate, scale in ((sigmoid(4), 0.5), (expert_choice(4), 1.0)):
        spec = replace(SPEC, gate=gate)
        params = upcycle(dense, LLAMA, spec, 4, KEY, gate_scale=0.0, scale=scale)
        out = model.apply(params, LLAMA, spec, TOKENS).logits
        np.testing.assert_allclose(out, wanted, atol=2e-5)


def test_mixtrals_form_gives_the_same_logits():
    params = upcycle(_dense(LLAMA), LLAMA, SPEC, 4, KEY, noise=0.5)
    wanted = model.apply(params, LLAMA, SPEC, TOKENS).logits
    named, config = to_mixtral(params, LLAMA, 2)
    assert (config.model_type, config.experts, config.expert_width) == ("mixtral", 4, 16)
    np.testing.assert_allclose(lm.apply(named, config, TOKENS).logits, wanted, atol=2e-5)


def test_the_loss_adds_the_mixtures_own_and_routes_agree_with_the_load():
    spec = replace(SPEC, capacity=Capacity(1.0))
    params = model.init(KEY, LLAMA, spec, Dims(12, 8, 4), layers=[0])
    total, (nats, infos) = model.loss(params, LLAMA, spec, TOKENS)
    np.testing.assert_allclose(total, nats + infos[0].loss, rtol=1e-6)
    logits = model.apply(params, LLAMA, spec, TOKENS[:, :-1]).logits
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1)
    np.testing.assert_allclose(nats, -jnp.mean(picked), rtol=1e-5)
    (routed,) = model.routes(params, LLAMA, spec, TOKENS[:, :-1])
    load = np.bincount(np.ravel(routed.experts), minlength=4) / routed.experts.size
    np.testing.assert_allclose(infos[0].load, load, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda d: upcycle(d, LLAMA, SPEC, 1, KEY), "chooses 2 of 1"),
        (lambda d: upcycle(d, LLAMA, SPEC, 0, KEY), "experts is 0"),
        (lambda d: upcycle(d, LLAMA, SPEC, 4, KEY, layers=[2]), "from 0 to 1"),
        (lambda d: upcycle(d, LLAMA, SPEC, 4, KEY, layers=[]), r"blocks \[\]"),
        (
            lambda d: upcycle(d, LLAMA, replace(SPEC, experts=gpt_ffn()), 4, KEY),
            "choose swiglu",
        ),
        (lambda d: model.init(KEY, LLAMA, SPEC, Dims(8, 8, 4)), "8 wide and the model 12"),
        (
            lambda d: model.init(
                KEY, replace(LLAMA, experts=2, experts_per_token=1), SPEC, Dims(12, 8, 4)
            ),
            "experts of its own",
        ),
        (
            lambda d: model.apply(upcycle(d, LLAMA, SPEC, 4, KEY), LLAMA, SPEC, TOKENS, MoEPlan()),
            "plan has 1 layers",
        ),
        (
            lambda d: model.apply(
                upcycle(d, LLAMA, SPEC, 4, KEY), LLAMA, SPEC, TOKENS, axes=Axes(tensor="t")
            ),
            "tensor axis",
        ),
        (
            lambda d: to_mixtral(upcycle(d, LLAMA, SPEC, 4, KEY, layers=[0]), LLAMA, 2),
            "1 of 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, word):
    with pytest.raises(UserError, match=word):
        make(_dense(LLAMA))
