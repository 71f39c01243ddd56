"""The decoder against itself taken apart: layer by layer, through caches, padded, tapped."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.models import lm
from jaxsys.models.lm.linear import rows_of
from jaxsys.models.lm.moe import row_counts
from jaxsys.models.lm.taps import Probe, local

BASE = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8}
BASE |= {"ffn_width": 40, "max_positions": 64, "init_std": 0.2}
LLAMA = lm.LMConfig("llama", **BASE)
MIXTRAL = lm.LMConfig("mixtral", experts=3, experts_per_token=2, expert_width=24, **BASE)
apply = jax.jit(lm.apply, static_argnums=1, static_argnames=("taps", "last"))
draw = cache(lambda seed, config: lm.init(jax.random.key(seed), config))
TOKENS = jnp.array(np.random.default_rng(0).integers(0, 61, (2, 10)))


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def model(request):
    config = LLAMA if request.param == "llama" else MIXTRAL
    return draw(0, config), config


def test_layer_by_layer_equals_whole(model):
    params, config = model
    x = lm.embed(params, config, TOKENS)
    for i in range(config.layers):
        x, _, _ = lm.block(lm.layer(params, config, i), config, i, x)
    np.testing.assert_allclose(
        lm.head(params, config, x), apply(params, config, TOKENS).logits, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("cuts", "window", "batch"), [((1, 4, 7), 3, 2), ((5,), 0, 1), ((5,), 2, 2)]
)
def test_any_division_through_a_cache_equals_whole(cuts, window, batch):
    config = replace(LLAMA, model_type="mistral", windows=(0, window))
    params, tokens = draw(0, config), TOKENS[:batch]
    store, parts = lm.init_cache(config, batch, 12), []
    for start, stop in zip([0, *cuts], [*cuts, 10], strict=True):
        out = apply(params, config, tokens[:, start:stop], cache=store)
        store = out.cache
        parts.append(out.logits)
    whole = apply(params, config, tokens).logits
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=0, atol=2e-5)
    assert store.length.tolist() == [10] * batch


@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side_changes_nothing(left):
    params = draw(0, LLAMA)
    alone = apply(params, LLAMA, TOKENS[1:, :6])
    inside = slice(4, 10) if left else slice(0, 6)
    padded = TOKENS.at[1].set(7).at[1, inside].set(TOKENS[1, :6])
    mask = jnp.ones((2, 10), bool).at[1].set(False).at[1, inside].set(True)
    logits = apply(params, LLAMA, padded, mask=mask).logits
    np.testing.assert_allclose(logits[1, inside], alone.logits[0], rtol=0, atol=1e-5)
    last = apply(params, LLAMA, padded, mask=mask, last=True).logits
    np.testing.assert_allclose(last[1, 0], alone.logits[0, -1], rtol=0, atol=1e-5)


def test_donated_cache_is_updated_in_place():
    params = draw(0, LLAMA)
    store = lm.init_cache(LLAMA, 1, 16)
    step = jax.jit(lambda p, t, c: lm.apply(p, LLAMA, t, cache=c).cache, donate_argnums=2)
    address = store.keys[0].unsafe_buffer_pointer()
    assert step(params, TOKENS[:1, :1], store).keys[0].unsafe_buffer_pointer() == address


def test_taps_give_what_modules_read_and_write(model):
    params, config = model
    name = "model.layers.1.self_attn.o_proj"
    points = [f"{name}:in", f"{name}:out", "model.layers.0:out", "model.layers.1:in"]
    points += ["model.norm:out", "lm_head:in", "model.layers.0.self_attn:out"]
    out = apply(params, config, TOKENS, taps=tuple(points))
    assert set(out.taps) == set(points)
    weight = params["model"]["layers"]["1"]["self_attn"]["o_proj"]["weight"]
    product = np.asarray(out.taps[f"{name}:in"]) @ np.asarray(weight).T
    np.testing.assert_allclose(out.taps[f"{name}:out"], product, rtol=0, atol=1e-4)
    assert (out.taps["model.layers.0:out"] == out.taps["model.layers.1:in"]).all()
    np.testing.assert_array_equal(out.taps["model.norm:out"], out.taps["lm_head:in"])
    head = np.asarray(params["lm_head"]["weight"])
    np.testing.assert_allclose(
        np.asarray(out.taps["lm_head:in"]) @ head.T, out.logits, rtol=0, atol=1e-4
    )


def test_every_listed_module_can_be_tapped(model):
    params, config = model
    points = [f"{name}:{side}" for name in lm.modules(config) for side in ("in", "out")]
    points.remove("model.embed_tokens:in")
    out = apply(params, config, TOKENS, taps=tuple(points))
    assert set(out.taps) == set(points)
    np.testing.assert_allclose(out.logits, apply(params, config, TOKENS).logits, rtol=0, atol=1e-4)


def test_interventions_add_at_one_token_and_do_not_trace_again(model):
    params, config = model
    traced = []

    @jax.jit
    def run(changes):
        traced.append(1)
        return apply(params, config, TOKENS, interventions=changes, taps=("model.layers.1:out",))

    value = jnp.arange(32.0)
    plain = apply(params, config, TOKENS, taps=("model.layers.1:out",))
    for position in (jnp.array(4), jnp.array(7)):
        out = run([lm.Intervention("model.layers.1:out", position, value)])
        gap = np.array(out.taps["model.layers.1:out"] - plain.taps["model.layers.1:out"])
        np.testing.assert_allclose(gap[:, int(position)], np.tile(value, (2, 1)), atol=1e-4)
        gap[:, int(position)] = 0
        assert np.abs(gap).max() < 1e-4
        before = np.abs(np.asarray(out.logits - plain.logits))[:, : int(position)]
        assert before.max() < 1e-4
    assert len(traced) == 1


def test_intervention_of_each_row_at_its_own_token_equals_the_sum_by_hand():
    params = draw(0, LLAMA)
    values = jax.random.normal(jax.random.key(2), (2, 32))
    change = lm.Intervention("model.layers.0.mlp", jnp.array([3, -1]), values)
    out = apply(params, LLAMA, TOKENS, interventions=[change]).logits
    x, _, _ = lm.block(lm.layer(params, LLAMA, 0), LLAMA, 0, lm.embed(params, LLAMA, TOKENS))
    x = x.at[0, 3].add(values[0])  # the block's last addition is the MLP's output
    x, _, _ = lm.block(lm.layer(params, LLAMA, 1), LLAMA, 1, x)
    np.testing.assert_allclose(out, lm.head(params, LLAMA, x), rtol=0, atol=2e-5)
    grad = jax.grad(
        lambda v: (
            apply(params, LLAMA, TOKENS, interventions=[replace(change, value=v)])
            .logits[0, 5]
            .sum()
        )
    )(values)
    assert np.abs(grad[0]).max() > 0
    assert np.abs(grad[1]).max() == 0


@pytest.mark.parametrize("point", ["model.layers.9:out", "model.layers.1.mlp", "lm_head:side"])
def test_unknown_points_are_refused(point):
    params = draw(0, LLAMA)
    with pytest.raises(UserError, match="is not in this llama model"):
        apply(params, LLAMA, TOKENS, taps=(point,))


def test_local_points_do_not_mix_up_layers():
    assert local(["h.1.x:in", "h.10.x:in", "h.1:out", "h:in"], "h.1") == ("x:in", ":out")


@pytest.mark.parametrize("n_tokens", [1, 3, 40])
@pytest.mark.parametrize("favourite", [False, True])
def test_experts_on_their_own_rows_equal_all_experts_on_all_rows(n_tokens, favourite):
    from jaxsys.models.lm.families import layout_of
    from jaxsys.models.lm.moe import mixture

    params = lm.layer(lm.init(jax.random.key(3), MIXTRAL), MIXTRAL, 0)
    if favourite:  # every token chooses experts 0 and 1
        router = params["block_sparse_moe"]["gate"]["weight"]
        big = router.at[0].set(5.0).at[1].set(4.0)
        params["block_sparse_moe"]["gate"]["weight"] = big
    x = jnp.abs(jax.random.normal(jax.random.key(4), (2, n_tokens, 32)))
    tapped = "block_sparse_moe.experts.2.w1:in"

    @partial(jax.jit, static_argnums=2)
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x, taps):
        probe = Probe(taps, ())
        y = mixture(params, MIXTRAL, layout_of(MIXTRAL), x, probe)
        return jnp.sum(jnp.sin(y)), (y, probe.found)

    (_, (own, _)), own_grads = run(params, x, ())
    (_, (every, found)), grads = run(params, x, (tapped,))
    np.testing.assert_allclose(own, every, rtol=0, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), own_grads, grads
    )
    rows_seen = np.abs(np.asarray(found[tapped])).sum(-1) > 0
    assert rows_seen.sum() < 2 * n_tokens or n_tokens < 40
    if favourite:
        assert rows_seen.sum() == 0


@given(st.integers(1, 5000), st.sampled_from([(8, 2), (128, 8), (16, 2), (4, 4)]))
def test_row_counts_rise_to_all_rows(n_rows, experts):
    config = replace(MIXTRAL, experts=experts[0], experts_per_token=experts[1])
    sizes = row_counts(n_rows, config)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == n_rows
    assert len(sizes) <= 3


def test_too_many_tokens_are_refused():
    params = draw(0, LLAMA)
    with pytest.raises(UserError, match="the cache has room for 4"):
        apply(params, LLAMA, TOKENS, cache=lm.init_cache(LLAMA, 2, 4))


def test_bfloat16_rows_are_taken_as_they_are_and_have_gradients():
    table = jax.random.normal(jax.random.key(5), (7, 4)).astype(jnp.bfloat16)
    indices = jnp.array([[3, 0, 3]])
    np.testing.assert_array_equal(rows_of(table, indices), table[indices])
    sharp = jax.grad(lambda t: jnp.sin(rows_of(t, indices)).sum().astype(jnp.float32))
    plain = jax.grad(lambda t: jnp.sin(t[indices]).sum().astype(jnp.float32))
    np.testing.assert_array_equal(sharp(table), plain(table))
    # The tied table is not widened as a whole for the lookup.
    text = jax.jit(rows_of).lower(table, indices).compile().as_text()
    assert "f32[7,4]" not in text


def test_loss_is_the_mean_over_counted_predictions():
    params = draw(0, LLAMA)
    logits = np.asarray(apply(params, LLAMA, TOKENS).logits, np.float64)[:, :-1]
    nats = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    )
    np.testing.assert_allclose(lm.loss(params, LLAMA, TOKENS), nats.mean(), rtol=1e-5)
    mask = jnp.ones((2, 10), bool).at[1, 4:].set(False)
    expected = (nats[0].sum() + nats[1, :3].sum()) / 12
    np.testing.assert_allclose(lm.loss(params, LLAMA, TOKENS, mask), expected, rtol=1e-5)
