"""GPT-2 against an oracle in NumPy, and the laws that any causal language model keeps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxsys.core.errors import UserError
from jaxsys.models import gpt2

CONFIG = gpt2.GPT2Config(vocab_size=11, n_positions=7, n_embd=12, n_layer=2, n_head=3)
UNTIED = gpt2.GPT2Config(
    vocab_size=11,
    n_positions=7,
    n_embd=12,
    n_layer=1,
    n_head=2,
    n_inner=20,
    tie_word_embeddings=False,
)


def flat(tree, prefix=""):
    """Dotted path to float64 array."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: np.asarray(tree, np.float64)}
    return {k: v for name, sub in tree.items() for k, v in flat(sub, f"{prefix}{name}.").items()}


def noisy(config, seed=0):
    """Parameters away from zero biases and unit gains, so that each one matters."""
    params = gpt2.init(jax.random.key(seed), config)
    values, rebuild = ravel_pytree(params)
    return rebuild(values + 0.3 * jax.random.normal(jax.random.key(seed + 1), values.shape))


def oracle_logits(w, config, tokens):
    """One sequence, one position, one head at a time, in float64."""

    def norm(v, name):
        mean = sum(v) / len(v)
        var = sum((v - mean) ** 2) / len(v)
        return (v - mean) / math.sqrt(var + config.layer_norm_epsilon) * w[f"{name}.weight"] + w[
            f"{name}.bias"
        ]

    def linear(v, name):
        return v @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu_new(v):
        return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    width, head = config.n_embd, config.n_embd // config.n_head
    xs = [w["wte.weight"][t] + w["wpe.weight"][p] for p, t in enumerate(tokens)]
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        qkv = [linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn") for x in xs]
        after = []
        for p, x in enumerate(xs):
            heads = []
            for h in range(config.n_head):
                cut = slice(h * head, (h + 1) * head)
                query = qkv[p][:width][cut]
                scores = [
                    query @ qkv[s][width : 2 * width][cut] / math.sqrt(head) for s in range(p + 1)
                ]
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                heads.append(sum(weights[s] * qkv[s][2 * width :][cut] for s in range(p + 1)))
            after.append(x + linear(np.concatenate(heads), f"{name}.attn.c_proj"))
        xs = [
            x
            + linear(
                gelu_new(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj"
            )
            for x in after
        ]
    head_weight = w["wte.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
    return np.stack([head_weight @ norm(x, "ln_f") for x in xs])


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_logits_and_loss_match_the_oracle(config):
    params = noisy(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, config.n_positions))
    want = np.stack([oracle_logits(flat(params), config, row) for row in tokens])
    got = gpt2.apply(params, config, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)

    probability = np.exp(want[:, :-1]) / np.exp(want[:, :-1]).sum(-1, keepdims=True)
    picked = [
        math.log(probability[b, t, tokens[b, t + 1]])
        for b in range(2)
        for t in range(config.n_positions - 1)
    ]
    got_loss = gpt2.loss(params, config, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(got_loss, -np.mean(picked), rtol=2e-4)


def test_a_position_sees_nothing_that_comes_later():
    params = noisy(CONFIG)
    tokens = jnp.arange(7, dtype=jnp.int32)[None]
    before = gpt2.apply(params, CONFIG, tokens)
    after = gpt2.apply(params, CONFIG, tokens.at[0, 4].set(10))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.abs(before[:, 4:] - after[:, 4:]).max(-1) > 1e-3)


def test_names_and_shapes_are_those_of_the_checkpoint():
    leaves = flat(gpt2.init(jax.random.key(0), UNTIED))
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "wte.weight": (11, 12),
        "wpe.weight": (7, 12),
        "h.0.ln_1.weight": (12,),
        "h.0.ln_1.bias": (12,),
        "h.0.attn.c_attn.weight": (12, 36),
        "h.0.attn.c_attn.bias": (36,),
        "h.0.attn.c_proj.weight": (12, 12),
        "h.0.attn.c_proj.bias": (12,),
        "h.0.ln_2.weight": (12,),
        "h.0.ln_2.bias": (12,),
        "h.0.mlp.c_fc.weight": (12, 20),
        "h.0.mlp.c_fc.bias": (20,),
        "h.0.mlp.c_proj.weight": (20, 12),
        "h.0.mlp.c_proj.bias": (12,),
        "ln_f.weight": (12,),
        "ln_f.bias": (12,),
        "lm_head.weight": (11, 12),
    }


def test_parameter_counts():
    def count(config):
        return sum(math.prod(shape) for shape in gpt2.parameter_shapes(config).values())

    assert count(gpt2.GPT2Config()) == 124_439_808  # the published smallest model
    assert count(gpt2.small_bytes()) == 3_257_856
    params = gpt2.init(jax.random.key(0), gpt2.tiny())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count(gpt2.tiny())


def test_initial_spread():
    config = gpt2.from_depth(2)
    leaves = flat(gpt2.init(jax.random.key(0), config))
    assert np.std(leaves["wte.weight"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(leaves["h.1.mlp.c_fc.weight"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(leaves["h.0.mlp.c_proj.weight"]) == pytest.approx(0.02 / 2, rel=0.05)
    assert not np.array_equal(leaves["h.0.mlp.c_fc.weight"], leaves["h.1.mlp.c_fc.weight"])


def test_a_tensor_does_not_depend_on_the_depth_of_the_model():
    shallow = gpt2.init(jax.random.key(3), CONFIG)
    deep = gpt2.init(jax.random.key(3), gpt2.GPT2Config(11, 7, 12, n_layer=4, n_head=3))
    np.testing.assert_array_equal(shallow["wte"]["weight"], deep["wte"]["weight"])
    np.testing.assert_array_equal(
        shallow["h"]["1"]["mlp"]["c_fc"]["weight"], deep["h"]["1"]["mlp"]["c_fc"]["weight"]
    )


def test_gradient_is_finite_and_learning_lowers_the_loss():
    config = gpt2.tiny()
    params = gpt2.init(jax.random.key(0), config)
    tokens = jnp.asarray(np.arange(4 * 17).reshape(4, 17) % 13, jnp.int32)
    step = jax.jit(jax.value_and_grad(lambda p: gpt2.loss(p, config, tokens)))
    first, grads = step(params)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(grads))
    for _ in range(20):
        _, grads = step(params)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    assert float(step(params)[0]) < 0.7 * float(first)


def test_layers_appear_in_order_in_the_jaxpr():
    """Each block's matrices are inputs of the program and are first read in depth order."""
    params = gpt2.init(jax.random.key(0), CONFIG)
    jaxpr = jax.make_jaxpr(lambda p, t: gpt2.apply(p, CONFIG, t))(
        params, jnp.zeros((1, 3), jnp.int32)
    ).jaxpr
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    name_of = dict(zip(jaxpr.invars, paths, strict=False))
    used = [
        name_of[v]
        for eqn in jaxpr.eqns
        for v in eqn.invars
        if type(v).__name__ == "Var" and v in name_of
    ]
    blocks = [path.split("']['")[1] for path in used if path.startswith("['h']")]
    assert blocks == sorted(blocks)
    assert set(blocks) == {"0", "1"}


def test_mistakes_are_said_in_one_sentence():
    with pytest.raises(UserError, match="multiple of n_head"):
        gpt2.GPT2Config(n_embd=10, n_head=3)
    with pytest.raises(UserError, match="n_layer is 0"):
        gpt2.GPT2Config(n_layer=0)
    params = gpt2.init(jax.random.key(0), CONFIG)
    with pytest.raises(UserError, match="7 positions"):
        gpt2.apply(params, CONFIG, jnp.zeros((1, 8), jnp.int32))
