"""Recipes over models of several vocabularies, with adapters and ties; their numbers searched."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.checkpoint import read_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.data import load_tokenizer, train_bpe
from jaxsys.merge.adapters import open_reference
from jaxsys.merge.extract import extract_adapter
from jaxsys.merge.files import merge_files
from jaxsys.merge.recipe_parse import parse_recipe, recipe_of
from jaxsys.merge.space import Range
from jaxsys.merge.tokenizers import read_tokenizer
from jaxsys.merge.tune import TuneConfig
from jaxsys.merge.tune_recipe import read_document, text_rows, tune_recipe
from jaxsys.models import lm

pytest.importorskip("tokenizers", reason="the extra lm is not installed")
pytest.importorskip("yaml", reason="the extra merge is not installed")

TEXTS = ("the cat sat on the mat and the rat sat on the hat " * 5, "lazy dogs jump over foxes " * 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save a base, two models tuned from it, and one of another vocabulary, padded and tied."""
    root = tmp_path_factory.mktemp("models")
    config = lm.LMConfig("llama", 280, 16, 2, 2, 2, 8, 24, 64)
    base = lm.init(jax.random.key(0), config)
    for i, name in enumerate(("base", "one", "two", "other")):
        own, params = config, base
        if i in (1, 2):
            noise = lm.init(jax.random.key(i), config)
            params = jax.tree.map(lambda a, b: a + 0.5 * b, base, noise)
        if name == "other":
            own = lm.LMConfig("llama", 300, 16, 2, 2, 2, 8, 24, 64, tied=True)
            params = lm.init(jax.random.key(9), own)
        lm.save(root / name, params, own)
        tokenizer = train_bpe(TEXTS[name == "other"], 270).tokenizer
        tokenizer.add_special_tokens(["<|b|>" if name == "other" else "<|a|>"])
        tokenizer.save(str(root / name / "tokenizer.json"))
    extract_adapter(
        read_safetensors(root / "base"), read_safetensors(root / "one"), root / "lora", rank=16
    )
    return root


def test_union_of_vocabularies_over_files(folders, tmp_path):
    text = f"""
    merge_method: linear
    models:
      - {{model: {folders / "base"}, parameters: {{weight: 3}}}}
      - {{model: {folders / "other"}, parameters: {{weight: 1}}}}
    tokenizer: {{source: union, pad_to_multiple_of: 16}}
    """
    merge_files(parse_recipe(text), tmp_path / "out")
    params, config = lm.load(tmp_path / "out")
    vocabs = [read_tokenizer(folders / name).vocab for name in ("base", "other")]
    joined = read_tokenizer(tmp_path / "out").vocab
    assert set(joined) == set(vocabs[0]) | set(vocabs[1])
    assert config.vocab_size == -(-len(joined) // 16) * 16
    assert not config.tied
    tensors = [read_safetensors(folders / name) for name in ("base", "other")]
    embed = "model.embed_tokens.weight"
    # The output matrix of the tied model is its embedding.
    for name, theirs in ((embed, embed), ("lm_head.weight", embed)):
        merged = np.asarray(flatten(params)[name])
        for token, place in joined.items():
            rows = [
                t[n][v[token]]
                for t, n, v in zip(tensors, (name, theirs), vocabs, strict=True)
                if token in v
            ]
            # A missing row is the only owner's, so the merged one is that owner's too.
            want = (3 * rows[0] + rows[1]) / 4 if len(rows) == 2 else rows[0]
            np.testing.assert_allclose(merged[place], want, atol=1e-6)
    opened = load_tokenizer(tmp_path / "out")
    ids = opened.encode("the cat<|b|>")
    assert opened.decode(ids) == "the cat"
    assert lm.apply(params, config, jnp.asarray(ids)[None]).logits.shape[-1] == config.vocab_size


def test_without_a_rule_other_vocabularies_are_refused(folders, tmp_path):
    text = f"""
    merge_method: linear
    parameters: {{weight: 1}}
    models: [{{model: {folders / "base"}}}, {{model: {folders / "other"}}}]
    """
    with pytest.raises(UserError, match="tokenizer_source: union, base or a model"):
        merge_files(parse_recipe(text), tmp_path / "out")
    rule = "tokenizer: {source: base, tokens: {zebra: {source: {kind: zero}}}}"
    with pytest.raises(UserError, match="rule for 'zebra'"):
        merge_files(parse_recipe(f"{text}\n    {rule}"), tmp_path / "out")


def test_an_adapter_is_an_input(folders, tmp_path):
    reference = f"{folders / 'base'}+{folders / 'lora'}"
    text = f"""
    merge_method: task_arithmetic
    base_model: {folders / "base"}
    models: [{{model: {reference}, parameters: {{weight: 0.5}}}}]
    """
    merge_files(parse_recipe(text), tmp_path / "out")
    merged, base = read_safetensors(tmp_path / "out"), read_safetensors(folders / "base")
    one = open_reference(reference)
    for name in base:
        np.testing.assert_allclose(merged[name], (base[name] + one[name]) / 2, atol=1e-6)
    # Rank 16 of 16 columns is all of the difference.
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_allclose(one[name], read_safetensors(folders / "one")[name], atol=1e-5)


def test_the_recipe_found_merges_to_the_loss_found(folders, tmp_path):
    document = {
        "merge_method": "dare_linear",
        "base_model": str(folders / "base"),
        "models": [{"model": str(folders / "one")}, {"model": str(folders / "two")}],
        "parameters": {"weight": 0.5},
    }
    (tmp_path / "text.txt").write_text(TEXTS[0])
    tokens = text_rows(document, [tmp_path / "text.txt"], 4, 16)
    assert tokens.shape == (4, 16)
    ranges = {"weight": Range(0.0, 1.5, 0.5), "density": Range(0.1, 1.0, 0.9)}
    found = tune_recipe(
        document,
        tokens,
        ranges | {"lambda": Range(0.0, 1.0, 1.0)},
        layer_groups=2,
        config=TuneConfig(generations=3, population=4),
        out=tmp_path / "search",
    )
    assert found.tuned.value < found.tuned.start_value
    assert len(found.tuned.named) == 5 * 3  # two models twice, λ once, for three groups of tensors
    assert document["parameters"] == {"weight": 0.5}
    assert read_document(found.file) == found.document
    merge_files(recipe_of(read_document(found.file)), tmp_path / "out")
    loss = lm.loss(*lm.load(tmp_path / "out"), jnp.asarray(tokens))
    assert float(loss) == pytest.approx(found.tuned.value, rel=2e-5)


def test_mistakes_of_the_search(folders):
    tokens = np.zeros((1, 4), np.int32)
    source = {"model": "a", "layer_range": [0, 1]}
    sliced = {"merge_method": "linear", "slices": [{"sources": [source]}]}
    with pytest.raises(UserError, match="slices or modules"):
        tune_recipe(sliced, tokens, {"weight": Range(0.0, 1.0, 0.5)})
    document = {"merge_method": "linear", "models": [{"model": str(folders / "one")}] * 2}
    with pytest.raises(UserError, match="density"):
        tune_recipe(document, tokens, {"density": Range(0.1, 1.0, 0.5)})
    with pytest.raises(UserError, match="no text to predict"):
        text_rows(document, [], 4, 8)
    with pytest.raises(UserError, match="0 rows"):
        text_rows(document, ["a.txt"], 0, 8)


def test_commands(folders, tmp_path, capfd):
    from jaxsys.cli import main

    def run(*argv):
        capfd.readouterr()
        assert main(["merge", *map(str, argv), "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    models = ["--base", folders / "base", "--tuned", folders / "two"]
    found = run("extract", *models, "--energy", "0.5", "--out", tmp_path / "lora")
    assert all(row["kept"] >= 0.5 for row in found["tensors"])
    assert "lm_head.weight" in found["left_out"]
    recipe = tmp_path / "moe.yaml"
    experts = ", ".join(
        f"{{source_model: {folders / name}, positive_prompts: [the {word}]}}"
        for name, word in (("one", "cat"), ("two", "rat"))
    )
    recipe.write_text(f"base_model: {folders / 'base'}\nexperts: [{experts}]\n")
    run("upcycle", "--recipe", recipe, "--out", tmp_path / "moe")
    assert lm.load_config(tmp_path / "moe").experts == 2
    assert load_tokenizer(tmp_path / "moe").encode("the cat").size
    models = ", ".join(f"{{model: {folders / name}}}" for name in ("one", "two"))
    recipe.write_text(f"merge_method: linear\nmodels: [{models}]\n")
    (tmp_path / "text.txt").write_text(TEXTS[0])
    sizes = ["--generations", "2", "--population", "4", "--rows", "4", "--length", "16"]
    text = ["--text", tmp_path / "text.txt", "--out", tmp_path / "search"]
    found = run("tune", "--recipe", recipe, *text, *sizes)
    assert found["evaluations"] == 9
    assert found["best"] <= found["start"]
    named = ["--base", str(folders / "base"), "--tuned", str(folders / "two")]
    assert main(["merge", "extract", *named]) == 2
    assert "--out" in capfd.readouterr().err
