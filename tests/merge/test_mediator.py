"""Conflict by brute force, and the laws that Mediator must keep whatever its choices are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.merge import conflict
from jaxsys.merge.mediator import (
    LayerChoice,
    MediatorConfig,
    choose_layers,
    mediate,
)
from jaxsys.merge.routed import Server, cost, materialise, round_weights
from jaxsys.merge.sparse import predicted_bytes

ALL, NONE = LayerChoice("absolute", -1.0), LayerChoice("absolute", 1.0)
SIZES = {"embed.weight": (5, 4), "h.0.w": (4, 6), "h.1.w": (4, 6), "norm.weight": (4,)}


def tree(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: scale * rng.normal(size=s).astype(np.float32) for path, s in SIZES.items()}


@pytest.fixture(scope="module")
def family():
    base = tree(0)
    moves = [tree(i + 1, 0.3) for i in range(3)]
    return base, [{p: base[p] + move[p] for p in base} for move in moves]


def close(found, expected) -> None:
    flat = flatten(found)
    for path, leaf in expected.items():
        np.testing.assert_allclose(flat[path], leaf, atol=2e-6)


def brute_force(tau: np.ndarray, quantile: float) -> dict[str, float]:
    n = len(tau)
    rows = tau.reshape(n, -1)
    kept = np.zeros_like(rows)
    for i, row in enumerate(rows):
        bound = np.quantile(np.abs(row), quantile)
        kept[i] = [v if abs(v) >= np.float32(bound) else 0.0 for v in row]
    ratios = []
    for i, j in itertools.combinations(range(n), 2):
        products = [a * b for a, b in zip(kept[i], kept[j], strict=True)]
        both = sum(p != 0 for p in products)
        ratios.append(sum(p < 0 for p in products) / both if both else 0.0)
    columns = [[v for v in column if v != 0] for column in kept.T]
    touched = [c for c in columns if c]
    split = sum(min(c) < 0 < max(c) for c in touched)
    size = np.abs(rows).sum()
    return {
        "pairwise_sign": float(np.mean(ratios)),
        "any_sign": split / len(touched),
        "magnitude": float(1 - np.abs(rows.sum(0)).sum() / size),
    }


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_conflict_is_what_counting_gives(family, quantile):
    base, models = family
    found = conflict.conflicts(base, models, quantile=quantile)
    for path in base:
        tau = np.stack([m[path] - base[path] for m in models])
        assert found.tensors[path] == pytest.approx(brute_force(tau, quantile), abs=1e-6)
    assert list(found.layers) == ["embed", "h.0", "h.1", "norm"]
    assert found.sizes == {"embed": 20, "h.0": 24, "h.1": 24, "norm": 4}


def test_a_layer_is_the_ratio_of_its_tensors_sums():
    base = {"h.0.a": np.zeros(1), "h.0.b": np.zeros(3)}
    models = [
        {"h.0.a": np.ones(1), "h.0.b": np.ones(3)},
        {"h.0.a": -np.ones(1), "h.0.b": np.ones(3)},
    ]
    found = conflict.conflicts(base, models, quantile=0)
    assert found.layers["h.0"] == {"pairwise_sign": 0.25, "any_sign": 0.25, "magnitude": 0.25}


def test_opposite_experts_conflict_wholly_and_equal_ones_not_at_all(family):
    base, models = family
    move = {p: models[0][p] - base[p] for p in base}
    mirrored = {p: base[p] - move[p] for p in base}
    same = conflict.conflicts(base, [models[0]] * 3)
    for layer, d in same.layers.items():
        assert d == {"pairwise_sign": 0.0, "any_sign": 0.0, "magnitude": 0.0}, layer
    opposite = conflict.conflicts(base, [models[0], mirrored])
    for d in opposite.layers.values():
        assert d == pytest.approx(
            {"pairwise_sign": 1.0, "any_sign": 1.0, "magnitude": 1.0}, abs=1e-5
        )


def test_denoising_keeps_the_largest_entries():
    stack = np.random.default_rng(0).normal(size=(2, 10))
    kept = conflict.denoise(stack, 0.7)
    assert ((kept != 0).sum(1) == 3).all()
    np.testing.assert_array_equal(kept[kept != 0], stack[kept != 0])
    with pytest.raises(UserError, match="quantile is 1"):
        conflict.denoise(stack, 1)


def test_equal_experts_give_the_expert_for_any_weights(family):
    base, models = family
    built = mediate(base, [models[0]] * 3, MediatorConfig(choice=ALL, density=0.2))
    for w in np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]):
        close(materialise(built.routed, w), models[0])


@pytest.mark.parametrize("dense", ["mean", "base"])
def test_full_density_and_one_expert_give_that_expert(family, dense):
    base, models = family
    config = MediatorConfig(choice=ALL, density=1.0, bits=32, dense=dense)
    built = mediate(base, models, config)
    for n, model in enumerate(models):
        close(materialise(built.routed, np.eye(3)[n]), model)


def test_without_routed_layers_the_mean_is_served(family):
    base, models = family
    built = mediate(base, models, MediatorConfig(choice=NONE))
    assert not built.layers
    assert not built.routed.parts
    assert built.cost.ratio == 1.0
    mean = {p: np.mean([m[p] for m in models], axis=0) for p in base}
    close(materialise(built.routed, np.ones(1)), mean)


def test_a_blend_is_the_weighted_sum_of_sparse_rests(family):
    base, models = family
    config = MediatorConfig(choice=LayerChoice("topk", 2), density=0.25, bits=32)
    built = mediate(base, models, config)
    w = np.array([0.5, 0.125, 0.375], np.float32)
    found = flatten(materialise(built.routed, w))
    for path in base:
        mean = np.mean([m[path] for m in models], axis=0)
        expected = mean.copy()
        if conflict.layer_name(path) in built.layers:
            k = round(0.25 * mean.size)
            for share, model in zip(w, models, strict=True):
                rest = model[path] - mean
                bound = np.sort(np.abs(rest).ravel())[-k]
                expected += share * np.where(np.abs(rest) >= bound, rest, 0)
        np.testing.assert_allclose(found[path], expected, atol=2e-6)


def test_vmap_over_requests_equals_one_at_a_time(family):
    base, models = family
    routed = mediate(base, models, MediatorConfig(choice=ALL)).routed
    w = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(3), 4), jnp.float32)
    many = jax.jit(jax.vmap(materialise, (None, 0)))(routed, w)
    for i in range(4):
        one = flatten(materialise(routed, w[i]))
        for path, leaf in flatten(many).items():
            np.testing.assert_allclose(leaf[i], one[path], atol=1e-6)


def test_bytes_follow_the_formula(family):
    base, models = family
    built = mediate(
        base, models, MediatorConfig(choice=LayerChoice("topk", 1), density=0.25, bits=16)
    )
    routed = [p for p in base if conflict.layer_name(p) in built.layers]
    dense = sum(x.nbytes for x in base.values())
    assert built.cost.stored_bytes == dense + sum(
        predicted_bytes(base[p].size, 3, 0.25, 16) for p in routed
    )
    assert built.cost == cost(built.routed)
    share = sum(base[p].size for p in routed) / sum(x.size for x in base.values())
    assert built.cost.routed_fraction == pytest.approx(share)


def test_permuting_experts_permutes_their_parts(family):
    base, models = family
    config = MediatorConfig(choice=ALL, density=0.3, bits=32)
    one, other = mediate(base, models, config), mediate(base, models[::-1], config)
    close(
        materialise(one.routed, np.array([0.7, 0.2, 0.1])),
        flatten(materialise(other.routed, np.array([0.1, 0.2, 0.7]))),
    )


def test_dare_parts_keep_the_expected_rest_and_need_a_key(family):
    base, models = family
    config = MediatorConfig(choice=ALL, density=0.5, sparsify="dare", bits=32)
    with pytest.raises(UserError, match="there is no key"):
        mediate(base, models, config)
    drawn = [mediate(base, models, config, key=jax.random.key(s)).routed for s in range(12)]
    found = [flatten(materialise(r, np.eye(3)[0]))["h.0.w"] for r in drawn]
    rest = np.abs(models[0]["h.0.w"] - np.mean([m["h.0.w"] for m in models], axis=0)).max()
    assert np.abs(np.mean(found, axis=0) - models[0]["h.0.w"]).max() < 5 * rest / np.sqrt(12)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (LayerChoice("gaussian", 1.0), ("d",)),
        (LayerChoice("quantile", 0.5), ("b", "d")),
        (LayerChoice("topk", 3), ("b", "c", "d")),
        (LayerChoice("absolute", 0.2), ("b", "d")),
        (LayerChoice("topk", 0), ()),
    ],
)
def test_layers_are_chosen_by_each_rule(choice, expected):
    assert choose_layers({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.9}, choice) == expected


def test_a_server_keeps_what_it_made_and_forgets_the_oldest(family):
    base, models = family
    server = Server(mediate(base, models, MediatorConfig(choice=ALL)).routed, capacity=2, levels=4)
    first = server.serve(weights=[1.0, 0.0, 0.0])
    near = server.serve(weights=[0.96, 0.02, 0.02])
    assert near.cached
    assert near.params is first.params
    server.serve(weights=[0.0, 1.0, 0.0])
    server.serve(weights=[0.0, 0.0, 1.0])
    assert not server.serve(weights=[1.0, 0.0, 0.0]).cached
    with pytest.raises(UserError, match="got 2 weights"):
        server.serve(weights=[0.5, 0.5])
    with pytest.raises(UserError, match="no router"):
        server.serve(np.zeros(3, int))


def test_rounded_weights_keep_their_sum():
    rng = np.random.default_rng(0)
    for levels in (1, 5, 16):
        for w in rng.dirichlet(np.ones(5), 20):
            codes = round_weights(w, levels)
            assert codes.sum() == levels
            assert np.abs(codes / levels - w).max() < 1 / levels + 1e-9


def test_all_mismatches_are_told_at_once(family):
    base, models = family
    broken = {p: x for p, x in models[0].items() if p != "norm.weight"}
    broken |= {"h.0.w": np.zeros((2, 2)), "extra": np.zeros(1)}
    with pytest.raises(UserError) as told:
        mediate(base, [models[1], broken])
    told_of = ("3 tensors", "norm.weight is [4] in base", "missing in model 1", "[2, 2] in model 1")
    for part in told_of:
        assert part in str(told.value)
    with pytest.raises(UserError, match="no models"):
        mediate(base, [])


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_densities_outside_their_range_are_refused(density):
    with pytest.raises(UserError, match="density is"):
        MediatorConfig(density=density)
