"""CLIP without torch: adapters, layouts, files and pictures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxsys.core.checkpoint import write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.models import clip, lora

CONFIG = clip.ClipConfig(
    vision=clip.Tower(24, 2, 2, 40),
    text=clip.Tower(16, 1, 2, 24),
    projection_width=12,
    image_size=16,
    patch_size=8,
    vocab_size=30,
    max_positions=10,
    eos_id=29,
)
IDS = jnp.array([[28, 3, 4, 29, 0, 0], [28, 5, 29, 29, 7, 1]])


@pytest.fixture(scope="module")
def params():
    # Larger than at the start of training, so that attention is not flat.
    @jax.jit
    def draw(key):
        return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, clip.init(key, CONFIG))

    return draw(jax.random.key(0))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


def _features(params, images):
    return clip.encode_image(params, CONFIG, images).features


image_features = jax.jit(_features)
text_encoded = jax.jit(lambda params, ids: clip.encode_text(params, CONFIG, ids))


def test_a_fresh_adapter_is_exactly_the_frozen_encoder_and_learns(params, images):
    adapters = lora.init(jax.random.key(2), params, clip.VISION_LORA, rank=3)
    assert len(adapters) == 2 * CONFIG.vision.layers
    before = image_features(params, images)
    assert jnp.array_equal(image_features(lora.apply(params, adapters), images), before)

    @jax.jit
    def slope(adapters):
        return jax.grad(lambda a: jnp.sum(_features(lora.apply(params, a), images) ** 2))(adapters)

    slopes = slope(adapters)
    assert all(float(jnp.abs(s.b).max()) > 0 for s in slopes.values())
    moved = jax.tree.map(lambda a, s: a - 0.05 * s, adapters, slopes)
    applied = image_features(lora.apply(params, moved), images)
    assert float(jnp.abs(applied - before).max()) > 1e-2
    merged = image_features(lora.merge(params, moved), images)
    np.testing.assert_allclose(merged, applied, atol=1e-4)


def test_text_is_causal_and_read_off_at_its_end(params):
    encoded = text_encoded(params, IDS)
    other = text_encoded(params, IDS.at[:, 4:].set(jnp.array([[6, 2], [0, 0]])))
    np.testing.assert_array_equal(other.features, encoded.features)
    np.testing.assert_array_equal(other.tokens[:, :4], encoded.tokens[:, :4])
    changed = text_encoded(params, IDS.at[0, 1].set(9))
    assert float(jnp.abs(changed.features[0] - encoded.features[0]).max()) > 1e-3
    np.testing.assert_array_equal(changed.features[1], encoded.features[1])


def _openai(params):
    """Write OpenAI's names from memory of their model, the other way round than `load` does."""
    flat = {name: np.asarray(x) for name, x in flatten(params).items()}
    out = {
        "logit_scale": flat["logit_scale"],
        "positional_embedding": flat["text_model.embeddings.position_embedding.weight"],
        "text_projection": flat["text_projection.weight"].T,
        "token_embedding.weight": flat["text_model.embeddings.token_embedding.weight"],
        "visual.class_embedding": flat["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": flat["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": flat["visual_projection.weight"].T,
        "visual.conv1.weight": flat["vision_model.embeddings.patch_embedding.weight"],
        "input_resolution": np.array(16),
        "context_length": np.array(10),
        "vocab_size": np.array(30),
    }
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = flat[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = flat[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = flat[f"text_model.final_layer_norm.{kind}"]
        for mine, theirs, depth in (("vision", "visual.", 2), ("text", "", 1)):
            for i in range(depth):
                a = f"{mine}_model.encoder.layers.{i}"
                b = f"{theirs}transformer.resblocks.{i}"
                qkv = [flat[f"{a}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{b}.attn.in_proj_{kind}"] = np.concatenate(qkv)
                out[f"{b}.attn.out_proj.{kind}"] = flat[f"{a}.self_attn.out_proj.{kind}"]
                out[f"{b}.ln_1.{kind}"] = flat[f"{a}.layer_norm1.{kind}"]
                out[f"{b}.ln_2.{kind}"] = flat[f"{a}.layer_norm2.{kind}"]
                out[f"{b}.mlp.c_fc.{kind}"] = flat[f"{a}.mlp.fc1.{kind}"]
                out[f"{b}.mlp.c_proj.{kind}"] = flat[f"{a}.mlp.fc2.{kind}"]
    return {name: np.array(x, order="C") for name, x in out.items()}


DESCRIBED = '{"model_cfg": {"vision_cfg": {"head_width": 12}, "text_cfg": {"heads": 2}}}'


def test_openais_form_gives_the_same_tree(params, tmp_path):
    tensors = _openai(params)
    write_safetensors(tmp_path, tensors, tensors.get)
    alone, config = clip.load(tmp_path)
    # Heads of 64 are OpenAI's; open_clip says its own, and that its activation is the exact one.
    assert (config.vision.heads, config.text.heads, config.eos_id) == (1, 1, 29)
    assert config.vision.activation == "quick_gelu"
    (tmp_path / "open_clip_config.json").write_text(DESCRIBED)
    _, described = clip.load(tmp_path / "model.safetensors")
    assert described.text.activation == "gelu"
    loaded, same = clip.load(tmp_path, activation="quick_gelu", dtype=jnp.float32)
    assert same == CONFIG
    for tree in (alone, loaded):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, tree, params))

    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"text_cfg": 3}}')
    with pytest.raises(UserError, match="text_cfg"):
        clip.load(tmp_path)
    tensors["visual.layer1.0.conv1.weight"] = np.ones(3)
    write_safetensors(tmp_path, tensors, tensors.get)
    with pytest.raises(UserError, match="vision transformer"):
        clip.load(tmp_path)


def test_saved_is_loaded_and_mistakes_are_named(params, images, tmp_path):
    clip.save(tmp_path, params, CONFIG)
    loaded, config = clip.load(tmp_path)
    assert config == CONFIG
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded, params))
    with pytest.raises(UserError, match="names its own"):
        clip.load(tmp_path, activation="gelu")
    adapters = lora.init(jax.random.key(2), params, clip.TEXT_LORA, rank=1)
    with pytest.raises(UserError, match="superfluous"):
        clip.save(tmp_path, lora.apply(params, adapters), CONFIG)
    with pytest.raises(UserError, match="8 x 8 pixels"):
        clip.encode_image(params, CONFIG, images[:, :8, :8])
    with pytest.raises(UserError, match="11 tokens"):
        clip.encode_text(params, CONFIG, jnp.zeros((1, 11), int))
    for broken, match in (
        ({"model_type": "siglip"}, "siglip"),
        ({"model_type": "clip", "text_config": {"use_rope": True}}, "use_rope"),
        ({"model_type": "clip", "vision_config": {"num_channels": 1}}, "num_channels"),
        ({"model_type": "clip", "vision_config": {"hidden_act": "relu6"}}, "relu6"),
        ({"model_type": "clip", "text_config": {"num_attention_heads": 7}}, "7 heads"),
        ({"model_type": "clip", "vision_config": {"patch_size": 30}}, "divides"),
    ):
        with pytest.raises(UserError, match=match):
            clip.config_from_hf(broken)


def test_an_old_second_dict_replaces_the_first():
    fields = {
        "model_type": "clip",
        "text_config": {"hidden_size": 640, "model_type": "clip_text_model"},
        "text_config_dict": {"num_hidden_layers": 3},
        "vision_config_dict": None,
    }
    config = clip.config_from_hf(fields)
    assert (config.text.width, config.text.layers) == (512, 3)


def test_pictures_of_any_kind_become_squares(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, (40, 33, 3), dtype=np.uint8)
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    out = clip.preprocess([array, picture, tmp_path / "a.png"], CONFIG)
    assert out.shape == (3, 16, 16, 3)
    assert np.array_equal(out[0], out[1])
    assert np.array_equal(out[0], out[2])
    flat = np.full((20, 20), 128, np.uint8)
    got = clip.preprocess([flat], CONFIG)[0, 0, 0]
    wanted = (128 / 255 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array(
        [0.26862954, 0.26130258, 0.27577711]
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert clip.preprocess([], CONFIG).shape == (0, 16, 16, 3)
    (tmp_path / "b.png").write_text("no picture")
    for bad, match in (
        ([tmp_path / "b.png"], "no readable picture"),
        ([tmp_path / "c.png"], "No such file"),
        ([np.zeros((4, 4, 4), np.uint8)], "uint8"),
        ([np.zeros((4, 4, 3))], "float64"),
        ([np.zeros((0, 4, 3), np.uint8)], "pixels"),
        ([np.zeros((1, 4000, 3), np.uint8)], "cut it"),
        ("a.png", "a list"),
    ):
        with pytest.raises(UserError, match=match):
            clip.preprocess(bad, CONFIG)


def test_logits_are_scaled_cosines():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    got = jax.jit(partial(clip.logits, logit_scale=jnp.log(20.0)))(a, b)
    np.testing.assert_allclose(got, 20 * a @ b.T / norms, rtol=1e-4, atol=1e-5)
