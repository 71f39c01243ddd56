"""Whole models: protocols against each other and against plain loops, ratios, recovery."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten, unflatten
from jaxsys.models import lm
from jaxsys.prune import (
    METHODS,
    Method,
    Pattern,
    Stats,
    block_gradients,
    collect,
    dense_stats,
    gradients,
    layers_matching,
    lm_blocks,
    memory_bytes,
    prune_dense,
    recover,
    sequential,
)
from jaxsys.prune.protocol import owl_shares
from jaxsys.prune.ratios import allocate
from jaxsys.train.finetune import Recipe

CONFIG = lm.LMConfig("llama", 31, 16, 3, 2, 1, 8, 24, 32, tied=True)
BLOCKS = lm_blocks(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 31, (3, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return lm.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def flat(params):
    return flatten(params)


def linears() -> list[str]:
    return [f"{BLOCKS.prefix(i)}.{n}" for i in range(BLOCKS.count) for n in BLOCKS.linears(i)]


def test_gradients_block_by_block_are_those_of_the_whole_model(params, flat):
    paths = [f"{name}.weight" for name in linears()]
    expected = gradients(
        lambda p, row: lm.loss(p, CONFIG, row[None]), params, jnp.asarray(TOKENS), paths
    )
    found = block_gradients(BLOCKS, flat, TOKENS)
    for name in linears():
        for one, other in zip(found[name], expected[f"{name}.weight"], strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-5)
    one = jax.grad(lambda p: lm.loss(p, CONFIG, TOKENS[:1]))(params)
    two = jax.grad(lambda p: lm.loss(p, CONFIG, TOKENS[1:2]))(params)
    pair = [np.asarray(flatten(g)[paths[0]]) for g in (one, two)]
    both = gradients(
        lambda p, row: lm.loss(p, CONFIG, row[None]), params, jnp.asarray(TOKENS[:2]), paths[:1]
    )[paths[0]]
    np.testing.assert_allclose(both[0], 100 * np.hypot(*pair), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(both[1], 100 * (abs(pair[0]) + abs(pair[1])), rtol=1e-4, atol=1e-6)


def test_dense_statistics_do_not_depend_on_how_they_are_gathered(params, flat):
    points = [f"{name}:in" for name in linears()]

    def taps(p, tokens):
        found = lm.apply(p, CONFIG, tokens, taps=points).taps
        return {point[:-3]: x for point, x in found.items()}

    whole = collect(taps, params, [TOKENS[:1], TOKENS[1:2], TOKENS[2:]], outer=True)
    streamed = {}
    for found in dense_stats(BLOCKS, flat, TOKENS, outer=True, batch=3):
        streamed |= found
    for name in linears():
        for field in ("X", "H", "mean", "var"):
            one, other = getattr(whole[name], field), getattr(streamed[name], field)
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_the_first_block_is_the_same_under_both_protocols_and_later_ones_are_not(flat):
    dense: dict[str, Stats] = {}
    for found in dense_stats(BLOCKS, flat, TOKENS):
        dense |= found
    at_once = prune_dense(flat, dense, Method(), Pattern(0.5))
    one_by_one = {}
    for found in sequential(BLOCKS, flat, TOKENS, Method(), Pattern(0.5), batch=2):
        one_by_one |= found.masks
    assert at_once.masks.keys() == one_by_one.keys()
    same = {name: bool((at_once.masks[name] == mask).all()) for name, mask in one_by_one.items()}
    assert all(same[name] for name in same if ".layers.0." in name)
    assert not all(same.values())


def test_later_blocks_see_what_pruned_blocks_put_out(flat):
    run = sequential(BLOCKS, flat, TOKENS, Method("sparsegpt"), Pattern(nm=(2, 4)))
    tree = dict(flat)
    for found in run:
        if found.index == 2:
            break
        tree |= found.tensors
    x = lm.apply(unflatten(tree), CONFIG, TOKENS, taps=("model.layers.2.mlp:in",)).taps
    stats = list(dense_stats(BLOCKS, tree, TOKENS))[2]["model.layers.2.mlp.up_proj"]
    inputs = np.asarray(x["model.layers.2.mlp:in"], np.float64)
    np.testing.assert_allclose(stats.X, (inputs**2).sum(1).mean(0), rtol=1e-3)


@pytest.mark.parametrize("name", ["owl", "besa", "gblm"])
def test_ratios_and_gradients_through_the_protocol(name, flat):
    kept = total = 0
    shares = set()
    for found in sequential(BLOCKS, flat, TOKENS, METHODS[name], Pattern(0.5)):
        for mask in found.masks.values():
            kept, total = kept + int(mask.sum()), total + mask.size
            shares.add(round(float(mask.mean()), 3))
    assert total - kept == total // 2
    assert (len(shares) > 1) == (name != "gblm")


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_solvers_and_blocks_remove_what_owl_allots(name, scope, flat):
    for method, pattern, unit in (
        (Method(name, ratios="owl"), Pattern(0.53, scope), 1),
        (Method("magnitude", ratios="owl"), Pattern(0.53, block=(2, 4)), 8),
    ):
        gone = total = 0
        for found in sequential(BLOCKS, flat, TOKENS, method, pattern):
            for mask in found.masks.values():
                gone, total = gone + mask.size - int(mask.sum()), total + mask.size
                if unit == 1 and scope == "row":
                    assert np.ptp(np.asarray(mask).sum(1)) <= 1
        assert gone == int(0.53 * (total // unit)) * unit


def test_parts_are_allotted_whole_numbers():
    for shares, sizes, total in (
        ([0.1, 0.2, 0.9], [7, 7, 7], 10),
        ([0.5, 0.5], [3, 4], 0),
        ([0.0, 1.0, 0.95], [100, 50, 1000], 1149),
        ([0.3] * 9, [11] * 9, 41),
    ):
        counts = allocate(shares, sizes, total)
        assert sum(counts) == total
        assert all(0 <= n <= size for n, size in zip(counts, sizes, strict=True))
    assert allocate([0.25, 0.75], [400, 400], 400) == [100, 300]


def test_owl_gives_outliers_room(flat):
    shares = owl_shares(BLOCKS, flat, TOKENS, 0.6)
    assert abs(np.mean(shares) - 0.6) < 1e-9
    assert max(shares) - min(shares) == pytest.approx(0.16)


def test_a_global_threshold_spans_layers(flat):
    stats = {name: Stats() for name in linears()}
    found = prune_dense(flat, stats, Method("magnitude"), Pattern(0.5, "global"))
    everything = np.concatenate([np.abs(np.asarray(flat[n])).ravel() for n in found.masks])
    cut = np.sort(everything)[everything.size // 2 - 1]
    for name, mask in found.masks.items():
        np.testing.assert_array_equal(mask, np.abs(np.asarray(flat[name])) > cut)


def test_gpt2_matrices_are_pruned_along_their_inputs():
    biases = {"qkv_bias": True, "out_bias": True, "ffn_bias": True}
    shape = {"rope": None, "norm": "layer", "tied": True, "activation": "gelu_new"}
    config = lm.LMConfig("gpt2", 31, 16, 1, 2, 2, 8, 24, 32, **shape, **biases)
    flat = flatten(lm.init(jax.random.key(1), config))
    blocks = lm_blocks(config)
    for method in (Method(), Method("sparsegpt"), Method("gblm")):
        [found] = sequential(blocks, flat, TOKENS, method, Pattern(nm=(2, 4)))
        for name, mask in found.masks.items():
            assert mask.shape == flat[name].shape
            assert (np.asarray(mask).T.reshape(mask.shape[1], -1, 4).sum(2) == 2).all()


def test_what_does_not_fit_is_told_before_work_starts(flat):
    with pytest.raises(UserError, match=r"divide the 24 inputs of model\.layers\.0\.mlp\.down"):
        next(sequential(BLOCKS, flat, TOKENS, Method(), Pattern(nm=(8, 16))))
    with pytest.raises(UserError, match="use the dense protocol"):
        next(sequential(BLOCKS, flat, TOKENS, Method(), Pattern(0.5, "global")))
    with pytest.raises(UserError, match="use an unstructured pattern"):
        next(sequential(BLOCKS, flat, TOKENS, METHODS["owl"], Pattern(nm=(2, 4))))
    with pytest.raises(UserError, match="matches no layer"):
        layers_matching(BLOCKS, ("*.nothing",))
    assert memory_bytes(BLOCKS, lm.shapes(CONFIG), Method("alps"), 3, 12)["device"] > 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recovery_keeps_the_mask_and_lowers_the_loss(method, params, flat):
    tree, masks = dict(flat), {}
    for found in sequential(BLOCKS, flat, TOKENS, Method(), Pattern(0.6)):
        tree, masks = tree | found.tensors, masks | found.masks
    loss = lambda p, batch: lm.loss(p, CONFIG, batch)  # noqa: E731
    recipe = Recipe(8, method=method, rank=2)
    optimizer = optax.adamw(2e-2, weight_decay=0.1)
    found = recover(unflatten(tree), masks, loss, lambda i: TOKENS, optimizer, recipe)
    after = flatten(found.params)
    for name, mask in masks.items():
        assert (np.asarray(after[name])[~np.asarray(mask)] == 0).all()
    assert any((after[name] != tree[name]).any() for name in masks)
    assert float(loss(found.params, TOKENS)) < found.losses[0] - 0.05
