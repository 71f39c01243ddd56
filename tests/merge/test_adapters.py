"""LoRA folders: against models.lora, an SVD of our own making, and PEFT where it is installed."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxsys.core.checkpoint import read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, unflatten
from jaxsys.merge.adapters import (
    AdaptedTensors,
    open_reference,
    read_adapter,
    split_reference,
)
from jaxsys.merge.extract import extract_adapter
from jaxsys.models import lm, lora

CONFIG = lm.LMConfig("llama", 61, 24, 2, 4, 2, 6, 40, 64, tied=True)
RANDOM = np.random.default_rng(0)


def _model(config=CONFIG, seed=0):
    params = flatten(lm.init(jax.random.key(seed), config))
    return {name: np.asarray(x) for name, x in params.items()}


def _folder(path, tensors, **fields):
    path.mkdir(exist_ok=True)
    [file] = write_safetensors(path / "x", tensors, tensors.get)
    file.replace(path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6} | fields
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _pair(module, out, inside, r=2, embedding=False):
    a, b = RANDOM.normal(size=(r, inside)), RANDOM.normal(size=(out, r))
    names = (
        (".lora_embedding_A", ".lora_embedding_B")
        if embedding
        else (
            ".lora_A.weight",
            ".lora_B.weight",
        )
    )
    return {
        f"base_model.model.{module}{name}": m.astype(np.float32)
        for name, m in zip(names, (a, b), strict=True)
    }


def test_added_tensors_are_those_of_the_formula(tmp_path):
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    norm = {"base_model.model.model.norm.weight": np.full(24, 2, np.float32)}
    embed = _pair("model.embed_tokens", 24, 61, embedding=True)
    tensors = _pair(q, 24, 24) | _pair(down, 24, 40, r=4) | norm | embed
    patterns = {"rank_pattern": {"mlp.down_proj": 4}, "alpha_pattern": {f"^{down}": 5}}
    model = _model()
    model[f"{q}.weight"] = model[f"{q}.weight"].astype(ml_dtypes.bfloat16)
    for rslora in (False, True):
        folder = _folder(tmp_path / "lora", tensors, use_rslora=rslora, **patterns)
        found = AdaptedTensors(model, read_adapter(folder))
        root = (lambda r: r**0.5) if rslora else (lambda r: r)
        for name, scale in ((q, 6 / root(2)), (down, 5 / root(4))):
            a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            before = model[f"{name}.weight"]
            want = before.astype(np.float64) + scale * (b.astype(np.float64) @ a)
            got = found[f"{name}.weight"]
            assert got.dtype == before.dtype
            tolerance = 8e-3 if before.dtype == ml_dtypes.bfloat16 else 1e-5
            np.testing.assert_allclose(got.astype(np.float64), want, rtol=tolerance, atol=1e-5)
        a, b = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{x}"] for x in "AB")
        want = model["model.embed_tokens.weight"] + 6 / root(2) * (b @ a).T
        np.testing.assert_allclose(found["model.embed_tokens.weight"], want, atol=1e-5)
        np.testing.assert_array_equal(found["model.norm.weight"], np.full(24, 2))
        assert list(found) == list(model)
        kept = "model.layers.0.self_attn.k_proj.weight"
        assert found[kept] is model[kept]
        assert found.shapes[f"{q}.weight"].dtype == ml_dtypes.bfloat16


def test_conv1d_matrices_are_transposed(tmp_path):
    tensors = _pair("h.0.mlp", 5, 3)
    folder = _folder(tmp_path / "lora", tensors, fan_in_fan_out=True)
    found = AdaptedTensors({"h.0.mlp.weight": np.zeros((3, 5), np.float32)}, read_adapter(folder))
    a, b = tensors.values()
    np.testing.assert_allclose(found["h.0.mlp.weight"], 3 * (b @ a).T, rtol=1e-5)


def test_extraction_returns_what_was_added(tmp_path):
    base = _model()
    tree = unflatten({k: jax.numpy.asarray(v) for k, v in base.items()})
    key = jax.random.key(1)
    adapters = {
        path: lora.Adapter(x.a, 0.1 * jax.random.normal(key, x.b.shape), x.scale)
        for path, x in lora.init(key, tree, ("*_proj.weight",), rank=3).items()
    }
    tuned = {k: np.asarray(v) for k, v in flatten(lora.merge(tree, adapters)).items()}
    tuned["model.norm.weight"] = 2 * tuned["model.norm.weight"]
    found = extract_adapter(base, tuned, tmp_path, rank=None, energy=0.99999)
    assert set(found.ranks) == set(adapters)
    assert set(found.ranks.values()) == {3}
    assert found.left_out == {"model.norm.weight": pytest.approx(1.0)}
    again = AdaptedTensors(base, read_adapter(tmp_path))
    for name in adapters:
        np.testing.assert_allclose(again[name], tuned[name], atol=2e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    kept = extract_adapter(base, tuned, tmp_path, rank=3, whole=("*norm.weight",))
    assert not kept.left_out
    again = AdaptedTensors(base, read_adapter(tmp_path))
    np.testing.assert_array_equal(again["model.norm.weight"], tuned["model.norm.weight"])


@pytest.mark.parametrize(("rank", "energy"), [(4, None), (None, 0.6), (2, 0.9)])
@pytest.mark.parametrize("in_out", [False, True])
def test_truncation_is_the_nearest_of_its_rank(tmp_path, rank, energy, in_out):
    base = {"h.0.w.weight": RANDOM.normal(size=(9, 7)).astype(np.float32)}
    tuned = {"h.0.w.weight": RANDOM.normal(size=(9, 7)).astype(np.float32)}
    found = extract_adapter(base, tuned, tmp_path, rank=rank, energy=energy, in_out=in_out)
    delta = (tuned["h.0.w.weight"] - base["h.0.w.weight"]).astype(np.float64)
    # Singular values by another road: the eigenvalues of the product with the transpose.
    squares = np.sort(np.linalg.eigvalsh(delta.T @ delta))[::-1]
    share = np.cumsum(squares) / squares.sum()
    want = 7 if energy is None else int(np.argmax(share >= energy)) + 1
    want = min(want, rank or 7)
    assert found.ranks == {"h.0.w.weight": want}
    assert found.kept["h.0.w.weight"] == pytest.approx(share[want - 1], rel=1e-5)
    again = AdaptedTensors(base, read_adapter(tmp_path))["h.0.w.weight"]
    error = np.sum(np.square(again.astype(np.float64) - tuned["h.0.w.weight"]))
    assert error == pytest.approx(squares[want:].sum(), rel=1e-4)


def test_ranks_by_matrix_are_written_as_patterns(tmp_path):
    thin, wide = np.zeros((6, 6), np.float32), RANDOM.normal(size=(6, 6)).astype(np.float32)
    thin[0, 0] = 1
    base = {f"h.{i}.w.weight": np.zeros((6, 6), np.float32) for i in range(3)}
    tuned = {"h.0.w.weight": thin, "h.1.w.weight": wide, "h.2.w.weight": base["h.2.w.weight"]}
    extract_adapter(base, tuned, tmp_path, rank=None, energy=1.0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (6, {"h.0.w": 1})
    assert config["target_modules"] == ["h.0.w", "h.1.w"]  # not "w", which h.2 has too
    again = AdaptedTensors(base, read_adapter(tmp_path))
    for name, tensor in tuned.items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-5)


def test_references(tmp_path):
    model = _model()
    lm.save(tmp_path / "base", unflatten(model), CONFIG)
    _folder(tmp_path / "lora", _pair("model.layers.0.mlp.up_proj", 40, 24))
    added = open_reference(f"{tmp_path / 'base'}+{tmp_path / 'lora'}")
    changed = [name for name in added if not np.array_equal(added[name], model[name])]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]
    (tmp_path / "a+b").mkdir()
    assert split_reference(str(tmp_path / "a+b")) == (str(tmp_path / "a+b"), None)
    assert split_reference("x/y+z") == ("x/y", "z")


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "IA3"}, "kind 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"r": 3}, "has rank 2 and its config says 3"),
        ({"lora_alpha": "six"}, "'six'"),
        ({"alpha_pattern": {"(a+)+": 3}}, "names of modules"),
    ],
)
def test_unsupported_adapters(tmp_path, fields, says):
    folder = _folder(tmp_path / "lora", _pair(Q, 24, 24), **fields)
    with pytest.raises(UserError, match=says):
        read_adapter(folder)


def test_adapters_of_another_model_are_all_named(tmp_path):
    tensors = _pair(Q, 20, 24) | _pair("model.layers.7.x", 3, 3)
    tensors |= {"base_model.model.model.norm.weight": np.ones(3, np.float32)}
    with pytest.raises(UserError, match=r"norm.*q_proj.*layers\.7\.x"):
        AdaptedTensors(_model(), read_adapter(_folder(tmp_path / "lora", tensors)))
    lonely = dict([next(iter(_pair(Q, 24, 24).items()))])
    with pytest.raises(UserError, match="B None"):
        read_adapter(_folder(tmp_path / "one", lonely))
    odd = {f"base_model.model.{Q}.lora_C.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(UserError, match="no pair"):
        read_adapter(_folder(tmp_path / "odd", odd))


ONE = {"a.0.weight": np.ones((2, 2)), "b": np.ones(2)}


@pytest.mark.parametrize(
    ("tuned", "options", "says"),
    [
        ({"a.0.weight": np.ones((2, 3)), "c": np.ones(2)}, {}, "b is in one only; c is in one.*a"),
        (ONE, {"rank": 0}, "rank is 0"),
        (ONE, {"rank": None}, "give a rank"),
        (ONE, {"energy": 1.5}, "energy is 1.5"),
        (ONE, {}, "do not differ"),
    ],
)
def test_mistakes_of_extraction(tmp_path, tuned, options, says):
    with pytest.raises(UserError, match=says):
        extract_adapter(ONE, tuned, tmp_path, **options)


def _with_peft(tmp_path, model, **options):
    peft = pytest.importorskip("peft", reason="the extra parity is not installed")
    import torch

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "lora")
    merged = wrapped.merge_and_unload()
    return {k: v.numpy() for k, v in merged.state_dict().items()}


@pytest.mark.filterwarnings("ignore")  # of torch and PEFT
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"target_modules": ["up_proj", "embed_tokens"], "modules_to_save": ["norm"]},
    ],
)
def test_equal_to_peft(tmp_path, options):
    pytest.importorskip("peft", reason="the extra parity is not installed")
    from transformers import AutoModelForCausalLM

    model = _model()
    lm.save(tmp_path / "base", unflatten(model), CONFIG)
    theirs = _with_peft(
        tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **options
    )
    ours = AdaptedTensors(read_safetensors(tmp_path / "base"), read_adapter(tmp_path / "lora"))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-6, err_msg=name)
    changed = [name for name in ours if not np.array_equal(ours[name], model[name])]
    assert len(changed) == (4 if "use_rslora" in options else 8)


@pytest.mark.filterwarnings("ignore")  # of torch and PEFT
def test_peft_opens_what_we_extract(tmp_path):
    peft = pytest.importorskip("peft", reason="the extra parity is not installed")
    from transformers import AutoModelForCausalLM

    base, tuned = _model(), _model(seed=1)
    lm.save(tmp_path / "base", unflatten(base), CONFIG)
    whole = ("model.embed_tokens.weight", "model.norm.weight")
    extract_adapter(base, tuned, tmp_path / "lora", rank=24, energy=0.95, whole=whole)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
    ours = AdaptedTensors(base, read_adapter(tmp_path / "lora"))
    theirs = merged.state_dict()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name].numpy(), atol=2e-6, err_msg=name)
