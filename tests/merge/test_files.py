"""Merging over files: the same bits as in memory, going on after a kill, budgets and mistakes."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsys.core.checkpoint import read_safetensors, write_safetensors
from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, unflatten
from jaxsys.merge import METHODS, merge_tree
from jaxsys.merge import files as files_module
from jaxsys.merge.budget import Budget, available_memory_bytes, check_budget
from jaxsys.merge.files import merge_files, plan_files
from jaxsys.merge.recipe_parse import parse_recipe
from jaxsys.models import lm

CONFIG = lm.LMConfig("llama", 97, 32, 3, 4, 2, 8, 48, 64)


def perturbed(tree, seed, scale=0.05):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(tree)))
    leaves, structure = jax.tree.flatten(tree)
    moved = [
        (x.astype(jnp.float32) + scale * jax.random.normal(k, x.shape)).astype(x.dtype)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Save a small Llama and three models around it, in bfloat16."""
    root = tmp_path_factory.mktemp("family")
    params = lm.init(jax.random.key(0), CONFIG, dtype=jnp.bfloat16)
    trees = [params, *(perturbed(params, seed) for seed in (1, 2, 3))]
    for name, tree in zip(("base", "a", "b", "c"), trees, strict=True):
        lm.save(root / name, tree, CONFIG)
    return root, trees


def recipe_text(root, method, names=("a", "b", "c"), base="base", parameters="", **extra):
    lines = [f"merge_method: {method}", "models:"]
    lines += [f"  - model: {root / name}" for name in names]
    lines += [f"base_model: {root / base}"] if base else []
    lines += [f"parameters: {{{parameters}}}"] if parameters else []
    return "\n".join(lines + [f"{key}: {value}" for key, value in extra.items()])


def written(folder):
    return read_safetensors(folder)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_streamed_equals_in_memory(method, family, tmp_path):
    root, (base, *models) = family
    kind = METHODS[method]
    n = kind.models[1] or 3
    with_base = kind.base != "unused"
    options = {"density": 0.5} if "density" in vars(kind.config()) else {}
    options |= {"t": 0.3} if "t" in vars(kind.config()) else {}
    parameters = ", ".join(f"{k}: {v}" for k, v in ({"weight": 0.5} | options).items())
    names = ("a", "b", "c")[:n]
    text = recipe_text(root, method, names, "base" if with_base else None, parameters)
    key = jax.random.key(7)
    merge_files(parse_recipe(text), tmp_path, key=key)
    tree = merge_tree(
        method,
        models[:n],
        base=base if with_base else None,
        weights=[0.5] * n,
        config=kind.config(**options),
        key=key,
    )
    found = written(tmp_path)
    for path, leaf in flatten(tree).items():
        np.testing.assert_array_equal(found[path], np.asarray(leaf), err_msg=path)
    loaded, config = lm.load(tmp_path)
    assert config == CONFIG
    assert jax.tree.structure(loaded) == jax.tree.structure(base)


def test_global_ties_streamed_equals_in_memory(family, tmp_path):
    root, (base, *models) = family
    text = recipe_text(
        root, "ties", parameters="weight: 1, density: 0.2, trim: global, zero_sign: majority"
    )
    merge_files(parse_recipe(text), tmp_path)
    config = METHODS["ties"].config(density=0.2, trim="global", zero_sign="majority")
    tree = merge_tree("ties", models, base=base, config=config)
    found = written(tmp_path)
    for path, leaf in flatten(tree).items():
        np.testing.assert_array_equal(found[path], np.asarray(leaf))


def test_shards_and_types(family, tmp_path):
    root, _ = family
    text = recipe_text(root, "linear", base=None, parameters="weight: 1", out_dtype="float32")
    one = merge_files(parse_recipe(text), tmp_path / "one")
    many = merge_files(parse_recipe(text), tmp_path / "many", shard_bytes=8000)
    assert len(many.files) > len(one.files)
    a, b = written(tmp_path / "one"), written(tmp_path / "many")
    assert all((a[k] == b[k]).all() and a[k].dtype == np.float32 for k in a)
    assert "float32" in (tmp_path / "one" / "config.json").read_text()


def test_a_killed_run_goes_on_to_the_same_result(family, tmp_path, monkeypatch):
    root, trees = family
    recipe = parse_recipe(recipe_text(root, "dare_ties", parameters="weight: 1, density: 0.5"))
    whole = merge_files(recipe, tmp_path / "whole")
    assert whole.resumed == 0

    class Stop(Exception):
        pass

    written_so_far = []

    def stop(done, total):
        written_so_far.append(done)
        if done > total / 2:
            raise Stop

    make = files_module.Filling
    monkeypatch.setattr(files_module, "Filling", lambda *a, **k: make(*a, **k, sync_bytes=4000))
    with pytest.raises(Stop):
        merge_files(recipe, tmp_path / "cut", progress=stop)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    rest = merge_files(recipe, tmp_path / "cut")
    assert 0 < rest.resumed < len(flatten(trees[0]))
    a, b = written(tmp_path / "whole"), written(tmp_path / "cut")
    assert all((a[k] == b[k]).all() for k in a)
    assert not list((tmp_path / "cut").glob(".*"))
    # Another recipe does not go on with these files.
    with pytest.raises(Stop):
        merge_files(recipe, tmp_path / "other", progress=stop)
    other = parse_recipe(recipe_text(root, "dare_ties", parameters="weight: 1, density: 0.4"))
    assert merge_files(other, tmp_path / "other").resumed == 0


def test_depth_filters_and_precedence(family, tmp_path):
    root, (base, a, *_) = family
    text = f"""
merge_method: task_arithmetic
base_model: {root / "base"}
slices:
  - sources:
      - model: {root / "a"}
        layer_range: [0, 3]
        parameters: {{weight: [{{filter: mlp, value: 9}}]}}
      - {{model: {root / "base"}, layer_range: [0, 3]}}
    parameters: {{weight: [0, 1]}}
parameters: {{weight: 5, lambda: 1}}
"""
    plan, _ = plan_files(parse_recipe(text))
    weights = {leaf.name: leaf.weights for leaf in plan.leaves}
    assert weights["model.layers.1.self_attn.q_proj.weight"] == (0.5,)
    assert weights["model.layers.2.self_attn.q_proj.weight"] == (1.0,)
    assert weights["model.layers.1.mlp.up_proj.weight"] == (9.0,)
    # Tensors outside the layers take a gradient's first value, as in mergekit.
    assert weights["model.embed_tokens.weight"] == (0.0,)
    merge_files(parse_recipe(text), tmp_path)
    found = written(tmp_path)["model.layers.1.self_attn.q_proj.weight"].astype(np.float32)
    name = ("model", "layers", "1", "self_attn", "q_proj", "weight")
    mine, theirs = base, a
    for part in name:
        mine, theirs = mine[part], theirs[part]
    half = (np.asarray(mine, np.float32) + np.asarray(theirs, np.float32)) / 2
    np.testing.assert_allclose(found, half, rtol=1e-2, atol=1e-3)


def test_layers_are_stacked_and_renumbered(family, tmp_path):
    root, (base, a, *_) = family
    text = f"""
merge_method: passthrough
slices:
  - sources: [{{model: {root / "base"}, layer_range: [0, 2]}}]
  - sources: [{{model: {root / "a"}, layer_range: [1, 3], parameters: {{scale: 2}}}}]
"""
    merge_files(parse_recipe(text), tmp_path)
    loaded, config = lm.load(tmp_path)
    assert config.layers == 4
    layers = loaded["model"]["layers"]
    first = np.asarray(base["model"]["layers"]["1"]["mlp"]["up_proj"]["weight"])
    second = np.asarray(a["model"]["layers"]["1"]["mlp"]["up_proj"]["weight"])
    assert (np.asarray(layers["1"]["mlp"]["up_proj"]["weight"]) == first).all()
    assert (np.asarray(layers["2"]["mlp"]["up_proj"]["weight"]) == 2 * second).all()
    # The first slice's model gives what stands before the layers, the last one's what is behind.
    embed = np.asarray(base["model"]["embed_tokens"]["weight"])
    assert (np.asarray(loaded["model"]["embed_tokens"]["weight"]) == embed).all()
    assert (
        np.asarray(loaded["model"]["norm"]["weight"])
        == 2 * np.asarray(a["model"]["norm"]["weight"])
    ).all()


@pytest.mark.parametrize("family_name", ["gpt2", "opt", "gpt_neox"])
def test_other_families_stack_too(family_name, tmp_path):
    number = {"gpt2": "h.{}.w", "opt": "decoder.layers.{}.w", "gpt_neox": "gpt_neox.layers.{}.w"}
    count = {"gpt2": "n_layer", "opt": "num_hidden_layers", "gpt_neox": "num_hidden_layers"}
    arrays = {number[family_name].format(i): np.full(4, i, np.float32) for i in range(3)}
    arrays |= {"embed_in.weight": np.zeros((2, 4), np.float32)}
    write_safetensors(tmp_path / "m", arrays, arrays.get)
    (tmp_path / "m" / "config.json").write_text(json.dumps({count[family_name]: 3}))
    one = f"sources: [{{model: {tmp_path / 'm'}, layer_range: [1, 3]}}]"
    text = f"merge_method: passthrough\nslices:\n  - {one}\n  - {one}\n"
    merge_files(parse_recipe(text), tmp_path / "out")
    found = written(tmp_path / "out")
    values = [found[number[family_name].format(i)][0] for i in range(4)]
    assert values == [1, 2, 1, 2]
    assert json.loads((tmp_path / "out" / "config.json").read_text())[count[family_name]] == 4


def test_a_lone_file_is_a_model(tmp_path):
    for i in range(2):
        arrays = {"w": np.full(5, i, ml_dtypes.bfloat16), "steps": np.array([3])}
        write_safetensors(tmp_path / str(i), arrays, arrays.get)
    models = ", ".join(f"{{model: {tmp_path / str(i) / 'model.safetensors'}}}" for i in range(2))
    text = f"merge_method: linear\nmodels: [{models}]\nparameters: {{weight: 1}}"
    merge_files(parse_recipe(text), tmp_path / "out")
    found = written(tmp_path / "out")
    assert found["w"].tolist() == [0.5] * 5
    assert found["steps"].tolist() == [3]


def test_different_shapes_are_listed_at_once(family, tmp_path):
    root, (_, a, *_) = family
    arrays = {k: np.asarray(v) for k, v in flatten(a).items()}
    arrays["model.norm.weight"] = arrays["model.norm.weight"][:7]
    del arrays["model.layers.0.mlp.up_proj.weight"]
    write_safetensors(tmp_path / "odd", arrays, arrays.get)
    (tmp_path / "odd" / "config.json").write_text((root / "a" / "config.json").read_text())
    text = recipe_text(root, "ties", (str(tmp_path / "odd"), "b"), parameters="weight: 1")
    with pytest.raises(UserError, match=r"2 tensors do not fit.*norm.*\[7\].*up_proj.*missing in"):
        merge_files(parse_recipe(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": "tiez"}, "'tiez' is no merge method"),
        ({"parameters": "weight: 1, density: 1.5"}, "density is 1.5"),
        ({"parameters": "weight: 1, density: 0"}, "density is 0"),
        ({"parameters": "weight: 1, dencity: 0.5"}, r"parameters\.dencity: ties has no such"),
        ({"parameters": "density: 0.5"}, "ties has no weight"),
        ({"base": None, "parameters": "weight: 1"}, "name a base"),
        ({"names": ("a", "nowhere"), "parameters": "weight: 1"}, "neither a folder nor"),
        ({"method": "slerp", "names": ("a",)}, "slerp has no t"),
        ({"method": "slerp", "parameters": "t: 0.5"}, "slerp got 3 models; it takes 1 beside"),
    ],
)
def test_mistakes_in_recipes(change, told, family, tmp_path):
    root, _ = family
    text = recipe_text(root, **({"method": "ties"} | change))
    with pytest.raises(UserError, match=told):
        merge_files(parse_recipe(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_told(tmp_path):
    small = Budget(1, 1 << 60, 1, "w", 1, 1)
    with pytest.raises(UserError, match=r"takes 1024 PiB and the disk"):
        check_budget(small, tmp_path)
    large = Budget(1, 1, available_memory_bytes() * 4, "wide.weight", 1, 1)
    with pytest.raises(UserError, match=r"memory for wide\.weight"):
        check_budget(large, tmp_path)


def test_the_result_may_not_replace_a_model(family):
    root, _ = family
    text = recipe_text(root, "linear", base=None, parameters="weight: 1")
    with pytest.raises(UserError, match="name another folder"):
        merge_files(parse_recipe(text), root / "a")


def test_nothing_of_the_tree_is_lost(family):
    root, trees = family
    plan, budget = plan_files(parse_recipe(recipe_text(root, "ties", parameters="weight: 1")))
    assert {leaf.name for leaf in plan.leaves} == set(flatten(trees[0]))
    assert budget.read_bytes == 4 * budget.write_bytes
    assert unflatten({leaf.name: leaf.shape for leaf in plan.leaves}).keys() == trees[0].keys()
