"""Dense models as a mixture: copies give the model, prompts reach theirs, transformers agrees."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.merge.upcycle import Expert, upcycle
from jaxsys.merge.upcycle_recipe import parse_mixture
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 61, 24, 2, 4, 2, 6, 40, 64, eos_ids=(2,))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 11)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = []
    for seed in range(3):
        folder = tmp_path_factory.mktemp("model") / str(seed)
        lm.save(folder, lm.init(jax.random.key(seed), CONFIG), CONFIG)
        found.append(folder)
    return found


def _encode(text):
    return [ord(c) % 61 for c in text]


def test_copies_give_the_dense_model(folders, tmp_path):
    found = upcycle(folders[0], [Expert(folders[0])] * 4, tmp_path, gate="random")
    params, config = lm.load(tmp_path)
    assert (config, config.experts_per_token) == (found.config, 2)
    dense = lm.apply(*lm.load(folders[0]), TOKENS).logits
    np.testing.assert_allclose(lm.apply(params, config, TOKENS).logits, dense, atol=2e-5)
    gates = [params["model"]["layers"][i]["block_sparse_moe"]["gate"]["weight"] for i in "01"]
    assert float(jnp.abs(jnp.stack(gates)).max()) <= 24**-0.5
    assert not np.array_equal(*gates)


@pytest.mark.parametrize("gate", ["hidden", "embed"])
def test_prompts_reach_their_expert(folders, tmp_path, gate):
    prompts = ("aaaa!", "zz zz", "0123")
    experts = [Expert(f, (p,)) for f, p in zip(folders, prompts, strict=True)]
    found = upcycle(
        folders[0],
        experts,
        tmp_path,
        gate=gate,
        experts_per_token=1,
        encode=_encode,
        dtype="float32",
    )
    params, _ = lm.load(tmp_path)
    base = lm.load(folders[0])
    assert max(found.alike) < 0.999
    for e, prompt in enumerate(prompts):
        ids = jnp.asarray(_encode(prompt))[None]
        point = "model.layers.0.mlp:in"
        seen = lm.apply(*base, ids, taps=(point,)).taps[point][0].mean(0)
        router = params["model"]["layers"]["0"]["block_sparse_moe"]["gate"]["weight"]
        if gate == "embed":
            seen = base[0]["model"]["embed_tokens"]["weight"][ids[0]].mean(0)
        np.testing.assert_allclose(np.linalg.norm(router, axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(router[e], seen / jnp.linalg.norm(seen), atol=1e-5)
        assert int(jnp.argmax(router @ seen)) == e
        own = lm.load(folders[e])[0]["model"]["layers"]["1"]["mlp"]["down_proj"]["weight"]
        moe = params["model"]["layers"]["1"]["block_sparse_moe"]["experts"][str(e)]
        np.testing.assert_array_equal(moe["w2"]["weight"], own)


def test_negative_prompts_turn_the_row_away(folders, tmp_path):
    plain = [Expert(folders[0], ("abc",)), Expert(folders[1], ("xyz",))]
    turned = [replace(plain[0], negative=("xyz",)), plain[1]]
    rows = []
    for i, experts in enumerate((plain, turned)):
        upcycle(folders[0], experts, tmp_path / str(i), gate="embed", encode=_encode)
        layers = lm.load(tmp_path / str(i))[0]["model"]["layers"]
        rows.append(layers["0"]["block_sparse_moe"]["gate"]["weight"])
    assert float(rows[1][0] @ rows[1][1]) < float(rows[0][0] @ rows[0][1])


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_transformers_opens_the_mixture(folders, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra parity is not installed")
    torch = pytest.importorskip("torch", reason="the extra parity is not installed")

    experts = [Expert(folder) for folder in folders]
    upcycle(folders[0], experts, tmp_path, gate="random", key=jax.random.key(3))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        want = theirs(torch.from_numpy(np.array(TOKENS))).logits.numpy()
    np.testing.assert_allclose(lm.apply(*lm.load(tmp_path), TOKENS).logits, want, atol=2e-5)


def test_mistakes(folders, tmp_path):
    three = [Expert(f) for f in folders]

    def refused(says, base=folders[0], experts=three, **options):
        with pytest.raises(UserError, match=says):
            upcycle(base, experts, tmp_path / "out", **{"gate": "zero"} | options)
        assert not (tmp_path / "out").exists()

    refused("gate is 'sum'", gate="sum")
    refused("visits 4 of 3", experts_per_token=4)
    refused("have no prompts", gate="hidden")
    empty = [replace(e, prompts=("",)) for e in three]
    refused("has no token", experts=empty, gate="embed", encode=_encode)
    other = replace(CONFIG, ffn_width=48)
    lm.save(tmp_path / "wide", lm.init(jax.random.key(0), other), other)
    names = r"layers\.0\.mlp\.gate_proj.*layers\.1\.mlp\.down_proj.*\(24, 48\)"
    refused(names, experts=[three[0], Expert(tmp_path / "wide")])
    biased = lm.LMConfig("qwen2", 61, 24, 1, 4, 2, 6, 40, 64, qkv_bias=True)
    lm.save(tmp_path / "qwen", lm.init(jax.random.key(0), biased), biased)
    refused("qwen2 model", base=tmp_path / "qwen")
    refused("qwen2 model", experts=[three[0], Expert(tmp_path / "qwen")])


def test_recipes_are_mergekits():
    text = """
    base_model: one
    gate_mode: cheap_embed
    dtype: bfloat16
    experts:
      - source_model: two
        positive_prompts: ["a b", "c"]
        negative_prompts: ["d"]
      - {source_model: three, positive_prompts: ["e"]}
    """
    found = parse_mixture(text)
    assert found.experts == (Expert("two", ("a b", "c"), ("d",)), Expert("three", ("e",)))
    assert (found.base, found.gate, found.dtype) == ("one", "embed", "bfloat16")
    for change, says in (
        ("shared_experts: []", "shared_experts is not supported"),
        ("gate_mode: sum", "gate_mode is 'sum'"),
        ("dtype: int8", "dtype is 'int8'"),
        ("experts_per_token: two", "'two'"),
        ("base_model: 3", "base_model is 3"),
        ("experts: [{source_model: two, noise_scale: 1}]", "noise_scale is not supported"),
        ("experts: [{source_model: two, positive_prompts: a}]", "no list of texts"),
        ("experts: [two]", "'two'"),
        ("experts: two", "lacks experts"),
        ("x: [", "no YAML"),
    ):
        key = change.split(":", maxsplit=1)[0]
        rest = {"base_model": "one", "experts": "[{source_model: two}]"}
        rest.pop(key, None)
        lines = "\n".join(f"{k}: {v}" for k, v in rest.items())
        with pytest.raises(UserError, match=says):
            parse_mixture(f"{lines}\n{change}")
