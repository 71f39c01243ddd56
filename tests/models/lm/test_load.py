"""Files: what is written is read again, what does not fit is refused in one sentence."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.checkpoint import read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 61, 32, 2, 4, 2, 8, 48, 64, bos_id=1, eos_ids=(2, 3))
HF = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def same(a, b) -> bool:
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and (np.asarray(a[k]) == np.asarray(b[k])).all() for k in a
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_saved_models_load_again(tmp_path, dtype):
    params = lm.init(jax.random.key(0), CONFIG, dtype)
    files = lm.save(tmp_path, params, CONFIG, shard_bytes=20_000)
    assert len(files) > 3
    loaded, config = lm.load(tmp_path)
    assert config == CONFIG
    assert same(loaded, params)
    assert lm.load(tmp_path, dtype=jnp.float32)[0]["lm_head"]["weight"].dtype == jnp.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name


def test_loading_copies_nothing_on_a_cpu(tmp_path):
    lm.save(tmp_path, lm.init(jax.random.key(0), CONFIG), CONFIG)
    views = read_safetensors(tmp_path)
    mapped = Path(f"/proc/{os.getpid()}/maps")
    if not mapped.exists():
        pytest.skip("needs /proc")
    params = flatten(lm.load(tmp_path)[0])
    spans = [
        tuple(int(n, 16) for n in line.split()[0].split("-"))
        for line in mapped.read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    inside = {
        name
        for name, leaf in params.items()
        if any(a <= leaf.unsafe_buffer_pointer() < b for a, b in spans)
    }
    # All tensors here are whole multiples of 64 bytes long, so all lie on a boundary.
    assert all(view.nbytes % 64 == 0 for name, view in views.items())
    assert inside == set(params)


def test_bare_base_models_buffers_and_tied_copies(tmp_path):
    config = replace(CONFIG, tied=True)
    flat = flatten(lm.init(jax.random.key(0), config))
    extra = {
        "lm_head.weight": flat["model.embed_tokens.weight"] + 1,
        "model.layers.0.self_attn.rotary_emb.inv_freq": jnp.ones(4),
    }
    flat |= extra
    bare = {name.removeprefix("model."): leaf for name, leaf in flat.items()}
    (tmp_path / "config.json").write_text(json.dumps(HF | {"tie_word_embeddings": True}))
    write_safetensors(
        tmp_path,
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in bare.items()},
        bare.__getitem__,
    )
    params, loaded = lm.load(tmp_path)
    assert loaded.prefix == ""
    assert "lm_head" not in params
    tokens = jnp.ones((1, 4), jnp.int32)
    expected = lm.apply(lm.init(jax.random.key(0), config), config, tokens).logits
    np.testing.assert_array_equal(lm.apply(params, loaded, tokens).logits, expected)
    files = lm.save(tmp_path / "again", params, loaded)
    assert "layers.0.mlp.up_proj.weight" in read_safetensors(files[-1])


def test_tensors_that_do_not_fit_are_named(tmp_path):
    params = lm.init(jax.random.key(0), CONFIG)
    lm.save(tmp_path, params, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(HF | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"superfluous: model\.layers\.1\..* and 6 more"):
        lm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF | {"intermediate_size": 44}))
    with pytest.raises(UserError, match=r"of another shape: model\.layers\.0\.mlp"):
        lm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF | {"attention_bias": True}))
    with pytest.raises(UserError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.bias"):
        lm.load(tmp_path)
    del params["model"]["norm"]
    with pytest.raises(UserError, match=r"this tree of parameters .* missing: model\.norm"):
        lm.save(tmp_path, params, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; supported are gpt2"),
        ({"logit_scale": 0.5}, "field 'logit_scale' of this llama config is 0.5"),
        ({"quantization_config": {"bits": 4}}, "field 'quantization_config'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope scaling .* 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling .* 'dynamic'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}},
            "field 'mscale'",
        ),
        ({"hidden_act": "xielu"}, "activation is 'xielu'"),
        ({"hidden_size": None}, "field 'hidden_size' .* absent"),
        ({"num_attention_heads": 0}, "field 'num_attention_heads'"),
        ({"hidden_size": "32"}, "field 'hidden_size' .* '32'; expected a value of kind int"),
        ({"vocab_size": 10**12}, "field 'vocab_size' .* is 1000000000000"),
        ({"num_hidden_layers": 10**6}, "field 'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, "4 query heads and 3 key/value heads"),
        ({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1}, "field 'hidden_size'"),
        (
            {"model_type": "mistral", "layer_types": ["chunked_attention"] * 2},
            "layer_types .*chunked",
        ),
    ],
)
def test_configs_that_cannot_be_honoured_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        lm.config_from_hf(HF | change)


HOSTILE = (
    *HF,
    *("rope_scaling", "rope_parameters", "layer_types", "eos_token_id", "hidden_act"),
    *("sliding_window", "n_embd", "n_head", "rotary_dim", "num_experts", "head_dim"),
    *("mlp_only_layers", "decoder_sparse_step", "rms_norm_eps", "use_sliding_window"),
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(lm.FAMILIES)),
    st.dictionaries(
        st.sampled_from(HOSTILE),
        ANY,
        max_size=3,
    ),
)
def test_hostile_configs_are_read_or_refused(kind, change):
    base = HF | {"n_embd": 32, "n_head": 4, "n_layer": 2, "ffn_dim": 48}
    try:
        config = lm.config_from_hf(base | {"model_type": kind} | change)
    except UserError:
        return
    assert isinstance(hash(config), int)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' * 5000, "\x00"])
def test_damaged_config_files_are_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="no readable JSON object"):
        lm.load(tmp_path)


def test_paths_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is no readable JSON object"):
        lm.load(tmp_path)
    with pytest.raises(UserError, match="is no model; expected a folder"):
        lm.load(tmp_path / "model.onnx")


def write_gguf(path, params, config, **changes):
    gguf = pytest.importorskip("gguf", reason="pip install 'jaxsys[lm]'")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in changes.items():
        writer.add_string(f"llama.{key.replace('__', '.')}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)
    for name, leaf in flatten(params).items():
        array = np.asarray(leaf)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # The permutation of llama.cpp's own converter.
            heads = config.heads if "q_proj" in name else config.kv_heads
            rows = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2)
            array = rows.reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_gives_the_tensors_of_the_hugging_face_form(tmp_path):
    config = replace(CONFIG, eos_ids=(2,))
    params = lm.init(jax.random.key(0), config)
    loaded, read = lm.load(write_gguf(tmp_path / "m.gguf", params, config))
    assert replace(read, norm_eps=config.norm_eps) == config
    assert same(loaded, params)
    scaled = write_gguf(tmp_path / "s.gguf", params, config, rope__scaling__type="yarn")
    with pytest.raises(UserError, match=r"rope\.scaling\.type = 'yarn'"):
        lm.load(scaled)


def test_llama2c_gives_the_tensors_of_the_hugging_face_form(tmp_path):
    config = replace(CONFIG, tied=True, eos_ids=(2,))
    params = lm.init(jax.random.key(0), config)
    flat = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
    inside = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    inside += ["self_attn.o_proj", "post_attention_layernorm"]
    inside += ["mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]
    pieces = [flat["model.embed_tokens.weight"]]
    for name in inside:
        for i in range(2):
            array = flat[f"model.layers.{i}.{name}.weight"]
            if name.endswith(("q_proj", "k_proj")):
                array = array.reshape(-1, 2, 4, 32).swapaxes(1, 2)
            pieces.append(array)
    pieces += [flat["model.norm.weight"], np.zeros((2, 64, 4), np.float32)]
    header = np.array([32, 48, 2, 4, 2, 61, 64], "<i4").tobytes()
    file = tmp_path / "model.bin"
    file.write_bytes(header + b"".join(p.tobytes() for p in pieces))
    loaded, read = lm.load(file)
    assert read == config
    assert same(loaded, params)


@pytest.mark.skipif(not os.environ.get("JAXSYS_DATA"), reason="set JAXSYS_DATA for stories260K")
def test_stories260k_continues_a_story():
    path = Path(os.environ["JAXSYS_DATA"]) / "lm"
    params, config = lm.load(path / "stories260K.bin")
    pieces, data = [], (path / "tok512.bin").read_bytes()
    at = 4
    while at < len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        pieces.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    step = jax.jit(lambda p, t, c: lm.apply(p, config, t, cache=c, last=True)[:2], donate_argnums=2)
    cache, tokens, text = lm.init_cache(config, 1, 64), jnp.array([[1]]), b""
    for _ in range(48):
        logits, cache = step(params, tokens, cache)
        tokens = jnp.argmax(logits, -1)
        text += pieces[int(tokens[0, 0])]
    assert text.startswith(b" Once upon a time, there was a little girl named Lily. She loved")
