"""Second moments over devices, and causal tracing against plain forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.mesh import replica_mesh
from jaxsys.edit import stats
from jaxsys.edit.contract import Request
from jaxsys.edit.defaults import settings
from jaxsys.edit.trace import choose_layers, subject_sigma, trace
from jaxsys.models import lm


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(0, 256, 331)


def test_moments_over_eight_devices_equal_one_and_numpy(llama, text):
    model, params = llama
    rows = 8
    one, all_ = (
        stats.collect(model, params, stats.windows(text, rows, 16), (0, 2), mesh=replica_mesh(d))
        for d in (jax.devices()[:1], jax.devices())
    )
    point = "model.layers.2.mlp.down_proj:in"
    tokens = jnp.asarray(text[: len(text) // 16 * 16].reshape(-1, 16))
    k = np.asarray(lm.apply(params, model.config, tokens, taps=(point,)).taps[point], np.float64)
    k = k.reshape(-1, k.shape[-1])
    assert one.tokens == all_.tokens == len(k) == 320
    np.testing.assert_allclose(all_.moment(2), k.T @ k / len(k), rtol=1e-4, atol=1e-6)
    for layer in (0, 2):
        np.testing.assert_allclose(one.moment(layer), all_.moment(layer), rtol=1e-4, atol=1e-6)
    assert (one.model, one.data) == (all_.model, all_.data)
    assert one.model == stats.model_fingerprint(params)


def test_statistics_are_kept_in_a_file_and_tied_to_their_model(llama, tmp_path):
    _, params = llama
    c = np.eye(3, dtype=np.float32)
    stats.save(tmp_path, stats.Statistics({1: c, 12: 2 * c}, 7, stats.model_fingerprint(params)))
    loaded = stats.load(tmp_path)
    assert (sorted(loaded.moments), loaded.tokens) == ([1, 12], 7)
    np.testing.assert_array_equal(loaded.moment(12), 2 * c)
    stats.check_model(loaded, params)
    with pytest.raises(UserError, match="fingerprint"):
        stats.check_model(loaded, jax.tree.map(lambda x: x + 1, dict(params)))
    lm.save(tmp_path / "model", params, llama[0].config)
    with pytest.raises(UserError, match="holds no statistics"):
        stats.load(tmp_path / "model")


def test_restoring_brings_the_clean_answer_back(llama):
    model, params = llama
    request = Request("In Rome it", "Rome", "x")
    found = trace(model, params, request, samples=3, noise=20.0, window=1)
    layers, tokens = model.config.layers, 10
    assert found.subject == (3, 7)
    restored = found.restored["layer"]
    assert restored.shape == (layers, tokens)
    np.testing.assert_allclose(restored[-1, -1], found.clean, rtol=1e-4)
    # What stands before the subject was never corrupted.
    np.testing.assert_allclose(restored[:, :3], found.corrupted, rtol=1e-4)
    assert abs(found.corrupted - found.clean) > 1e-3 * found.clean
    # Restoring what one feed-forward part adds equals adding what the noise took from it.
    ids = jnp.asarray([model.tokenizer.encode(request.prompt)])
    x = lm.embed(params, model.config, ids)
    draws = jax.random.normal(jax.random.key(0), (3, *x.shape[1:]))
    draws = draws * (20.0 * subject_sigma(model, params, [request]))
    noise = draws * ((np.arange(tokens) >= 3) & (np.arange(tokens) < 7))[None, :, None]
    for kind, point in (("mlp", "mlp.down_proj:out"), ("attention", "self_attn.o_proj:out")):
        name = f"model.layers.1.{point}"
        rows = jnp.tile(ids, (3, 1))
        start = [
            lm.Intervention("model.embed_tokens:out", jnp.full(3, t), noise[:, t])
            for t in range(3, 7)
        ]
        clean = lm.apply(params, model.config, ids, taps=(name,)).taps[name][0, 6]
        run = lm.apply(params, model.config, rows, taps=(name,), interventions=start)
        lacking = clean[None] - run.taps[name][:, 6]
        mended = lm.Intervention(name, jnp.full(3, 6), lacking)
        logits = lm.apply(params, model.config, rows, interventions=[*start, mended]).logits
        chance = jax.nn.softmax(logits[:, -1]).mean(axis=0)
        answer = model.tokenizer.encode(found.answer)[0]
        np.testing.assert_allclose(found.restored[kind][1, 6], chance[answer], rtol=1e-3)


def test_without_noise_nothing_changes_and_layers_are_chosen_at_the_peak(llama):
    model, params = llama
    request = Request("In Rome it", "Rome", "x")
    found = trace(model, params, request, kinds=("layer",), samples=3, noise=0.0)
    np.testing.assert_allclose(found.restored["layer"], found.clean, rtol=1e-5)
    with pytest.raises(UserError, match="expected kinds of"):
        trace(model, params, Request("In Rome", "Rome", "x"), kinds=("head",))
    curve = np.zeros((6, 10))
    curve[4, 6] = 1.0
    assert choose_layers([found._replace(restored={"mlp": curve})], 3) == (2, 3, 4)


def test_settings_follow_the_model():
    xl = lm.LMConfig("gpt2", 50257, 1600, 48, 25, 25, 64, 6400, 1024, rope=None)
    assert settings(xl, "rome")["layer"] == 17
    assert settings(xl, "memit")["weight"] == 20000.0
    llama3 = lm.LMConfig("llama", 128256, 4096, 32, 32, 8, 128, 14336, 8192)
    assert settings(llama3, "memit")["target"]["lr"] == 0.1
    assert settings(llama3, "memit")["target"]["kl"] == 0.0625
    with pytest.raises(UserError, match="no settings"):
        settings(xl, "grace")
