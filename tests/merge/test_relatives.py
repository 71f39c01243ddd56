"""Routed relatives and data-driven merges against plain transcriptions in NumPy, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.merge.adamerging import AdaConfig, adamerge, mean_entropy
from jaxsys.merge.emr import emr
from jaxsys.merge.fisher import diagonal_fisher, fisher_merge
from jaxsys.merge.pcb import pcb
from jaxsys.merge.regmean import Grams, collect_grams, lm_inputs, regmean_merge
from jaxsys.merge.routed import cost, materialise
from jaxsys.merge.tall import consensus, tall
from jaxsys.merge.twin import twin
from jaxsys.merge.wemoe import (
    GateConfig,
    even_weights,
    gate_weights,
    init_gates,
    train_gates,
    wemoe,
)

SIZES = {"h.0.mlp.w": (4, 6), "h.0.norm": (4,), "h.1.mlp.w": (4, 6)}
N = 3


def tree(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: scale * rng.normal(size=s).astype(np.float32) for path, s in SIZES.items()}


@pytest.fixture(scope="module")
def family():
    base = tree(0)
    return base, [{p: base[p] + m[p] for p in base} for m in (tree(i + 1, 0.3) for i in range(N))]


def close(found, expected, atol=1e-5) -> None:
    flat = flatten(found)
    assert set(flat) == set(expected)
    for path, leaf in expected.items():
        np.testing.assert_allclose(flat[path], leaf, atol=atol)


def test_emr_is_its_transcription_and_restores_signs(family):
    base, models = family
    taus = [{p: m[p] - base[p] for p in base} for m in models]
    united, masks = {}, [{} for _ in models]
    for p in base:
        total = sum(t[p] for t in taus)
        gamma = np.where(total > 0, 1.0, -1.0)
        agreeing = [np.where(t[p] * gamma > 0, np.abs(t[p]), 0) for t in taus]
        united[p] = gamma * np.max(agreeing, axis=0)
        for n, t in enumerate(taus):
            masks[n][p] = t[p] * gamma > 0
    routed = emr(base, models)
    for n, t in enumerate(taus):
        own = sum(np.abs(t[p]).mean() for p in base)
        scale = own / sum(np.abs(masks[n][p] * united[p]).mean() for p in base)
        served = materialise(routed, np.eye(N)[n])
        close(served, {p: base[p] + scale * masks[n][p] * united[p] for p in base})
        for p, leaf in flatten(served).items():
            moved = np.asarray(leaf) - base[p]
            assert (moved * t[p] > -1e-6).all(), "an entry moved against its task"
    model_bytes = sum(x.nbytes for x in base.values())
    mask_bytes = N * sum(-(-x.size // 8) for x in base.values())
    assert cost(routed).stored_bytes == 2 * model_bytes + mask_bytes + len(base) * N * 4


def test_tall_masks_are_their_transcription(family):
    base, models = family
    routed = tall(base, models, strictness=0.6, scale=0.5)
    for n, model in enumerate(models):
        expected = {}
        for p in base:
            merged = 0.5 * sum(m[p] - base[p] for m in models)
            own = model[p] - base[p]
            expected[p] = base[p] + merged * (np.abs(own) > 0.6 * np.abs(merged - own))
        close(materialise(routed, np.eye(N)[n]), expected)


def test_consensus_with_one_task_needed_and_all_masks_open_is_task_arithmetic(family):
    base, models = family
    found = consensus(base, models, strictness=0.0, tasks=1, scale=0.4)
    close(found, {p: base[p] + 0.4 * sum(m[p] - base[p] for m in models) for p in base})
    strict = consensus(base, models, strictness=0.6, tasks=N + 1)
    close(strict, base)
    with pytest.raises(UserError, match="strictness"):
        tall(base, models, strictness=-1)


def transcribed_pcb(stack: np.ndarray, ratio: float) -> np.ndarray:
    n, d = stack.shape

    def cut(row, low, high):
        ranked = np.sort(row)
        return np.clip(row, ranked[int(d * low)], ranked[int(d * (1 - high) - 1)])

    def unit(row):
        return (row - row.min()) / (row.max() - row.min())

    own = np.array([np.exp(n * unit(cut(np.abs(row), 1e-4, 1e-4)) ** 2) for row in stack])
    cross = np.tanh(stack * stack.sum(0)[None])
    beta = np.array([unit(cut(row, 1 - ratio, 0)) for row in own * cross])
    return (beta * stack).sum(0) / np.maximum(beta.sum(0), 1e-12)


@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_pcb_is_its_transcription(family, ratio):
    base, models = family
    stack = np.array([np.concatenate([(m[p] - base[p]).ravel() for p in base]) for m in models])
    merged, start, expected = transcribed_pcb(stack, ratio), 0, {}
    for p, leaf in base.items():
        part = merged[start : start + leaf.size].reshape(leaf.shape)
        expected[p], start = leaf + 1.2 * part, start + leaf.size
    close(pcb(base, models, ratio=ratio, scale=1.2), expected)
    with pytest.raises(UserError, match="ratio is 0"):
        pcb(base, models, ratio=0)


def test_twin_with_all_entries_gives_each_expert_and_one_shared_model(family):
    base, models = family
    mean = {p: np.mean([m[p] for m in models], axis=0) for p in base}
    routed = twin(mean, models, density=1.0, bits=32)
    for n, model in enumerate(models):
        close(materialise(routed, np.eye(N)[n]), model)
    close(materialise(routed, np.full(N, 1 / N)), mean)


def test_wemoe_blends_feed_forward_weights_only(family):
    base, models = family
    routed = wemoe(base, models, patterns=["*.mlp.*"], scale=0.2)
    w = {"h.0.mlp.w": np.array([1.0, 0.0, 0.5]), "h.1.mlp.w": np.array([0.0, 0.3, 0.0])}
    taus = {p: np.stack([m[p] - base[p] for m in models]) for p in base}
    expected = {p: base[p] + np.tensordot(w[p], taus[p], 1) for p in w}
    expected["h.0.norm"] = base["h.0.norm"] + 0.2 * taus["h.0.norm"].sum(0)
    close(materialise(routed, w), expected)
    with pytest.raises(UserError, match="no tensor matches"):
        wemoe(base, models, patterns=["*.ffn.*"])


def test_gates_average_over_tokens_and_training_lowers_the_entropy(family):
    base, models = family
    routed = wemoe(base, models)
    gates = init_gates(jax.random.key(0), ["h.0", "h.1"], 6, N)
    hidden = {f"h.{i}": jax.random.normal(jax.random.key(i), (2, 3, 6)) for i in range(2)}
    mask = jnp.array([[True, True, False], [True, False, False]])
    found = gate_weights(gates, hidden, mask, tuple(routed.parts))
    gate, rows = gates["h.0"], np.asarray(hidden["h.0"])[np.asarray(mask)]
    inner = np.maximum(rows @ np.asarray(gate.weight_in).T + np.asarray(gate.bias_in), 0)
    expected = (inner @ np.asarray(gate.weight_out).T + np.asarray(gate.bias_out)).mean(0)
    np.testing.assert_allclose(found["h.0.mlp.w"], expected, rtol=1e-5)
    assert even_weights(routed, 0.3)["h.0.mlp.w"].shape == (N,)

    def entropy_fn(params, batch):
        logits = batch @ params["h"]["0"]["mlp"]["w"].T @ params["h"]["1"]["mlp"]["w"]
        return mean_entropy(logits, jnp.ones(logits.shape[:-1], bool))

    batch = jax.random.normal(jax.random.key(5), (4, 6))
    _, losses = train_gates(
        gates,
        routed,
        lambda p, b: (hidden, mask),
        entropy_fn,
        lambda i: batch,
        GateConfig(30, 0.02),
    )
    assert losses[-1] < losses[0]


def test_fisher_is_its_formula_and_with_equal_fishers_the_mean(family):
    _, models = family
    fishers = [{p: np.abs(x) for p, x in tree(i + 9).items()} for i in range(N)]
    shares = np.array([1.0, 2.0, 0.5])
    found = fisher_merge(models, fishers, shares.tolist(), normalise=False)
    f = {p: np.stack([s * x[p] for s, x in zip(shares, fishers, strict=True)]) for p in SIZES}
    stack = {p: np.stack([m[p] for m in models]) for p in SIZES}
    close(found, {p: (f[p] * stack[p]).sum(0) / f[p].sum(0) for p in SIZES})
    mean = {p: stack[p].mean(0) for p in SIZES}
    close(fisher_merge(models, fishers[:1] * N), mean)
    nothing = [{p: np.zeros(s) for p, s in SIZES.items()}] * N
    close(fisher_merge(models, nothing), mean)
    with pytest.raises(UserError, match="2 Fishers for 3"):
        fisher_merge(models, fishers[:2])


def test_the_fisher_of_a_gaussian_is_known():
    # log N(x; w, 1): the square of its gradient (x − w)² has the mean 1, the Fisher information.
    x = jax.random.normal(jax.random.key(0), (40, 500)) + 2.0
    found = diagonal_fisher(lambda p, x: 0.5 * (x - p["w"]) ** 2, {"w": jnp.float32(2.0)}, list(x))
    assert float(found["w"]) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("in_out", [False, True])
def test_regmean_solves_its_least_squares(in_out):
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(50, 4)) * rng.uniform(0.5, 2, 4) for _ in range(2)]
    weights = [rng.normal(size=(4, 3)) for _ in range(2)]
    # min over W of Σ ‖X_n W − X_n W_n‖² by stacking; each expert has as many tokens.
    expected = np.linalg.lstsq(
        np.concatenate(inputs),
        np.concatenate([x @ w for x, w in zip(inputs, weights, strict=True)]),
        rcond=None,
    )[0]
    models = [{"w": (w if in_out else w.T).astype(np.float32), "b": np.ones(2)} for w in weights]
    grams = [Grams({"w": x.T @ x}, float(len(x))) for x in inputs]
    found = regmean_merge(models, grams, alpha=1.0, ridge=0.0, in_out=in_out)
    np.testing.assert_allclose(
        found["w"] if in_out else np.asarray(found["w"]).T, expected, rtol=1e-4
    )


def test_regmean_with_equal_grams_is_the_mean_even_where_inputs_are_dead():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6))
    x[:, 2] = 0
    models = [{"w": rng.normal(size=(4, 6)).astype(np.float32)} for _ in range(N)]
    grams = [Grams({"w": x.T @ x}, 50.0)] * N
    mean = np.mean([m["w"] for m in models], axis=0)
    for alpha in (0.5, 1.0):
        np.testing.assert_allclose(regmean_merge(models, grams, alpha=alpha)["w"], mean, rtol=1e-4)
    with pytest.raises(UserError, match="statistics are of v"):
        regmean_merge(models, [Grams({"v": x.T @ x}, 50.0)] * N)


def test_statistics_stream_over_batches_of_a_language_model():
    from jaxsys.models import lm

    config = lm.LMConfig("llama", 31, 8, 1, 2, 1, 4, 12, 16)
    params = lm.init(jax.random.key(0), config)
    paths = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    tokens = np.random.default_rng(0).integers(0, 31, (4, 6))
    mask = np.arange(6)[None] < np.array([[6], [3], [5], [2]])
    halves = [(tokens[:2], mask[:2]), (tokens[2:], mask[2:])]
    found = collect_grams(lm_inputs(config, paths), params, halves)
    taps = [p.removesuffix(".weight") + ":in" for p in paths]
    seen = lm.apply(params, config, tokens, taps=taps).taps
    for path, tap in zip(paths, taps, strict=True):
        rows = np.asarray(seen[tap])[mask]
        np.testing.assert_allclose(found.mean()[path], rows.T @ rows / mask.sum(), atol=1e-5)


def test_adamerging_starts_as_task_arithmetic_and_lowers_the_entropy(family):
    base, models = family

    def entropy_fn(params, batch):
        logits = batch @ params["h"]["0"]["mlp"]["w"].T
        return mean_entropy(logits, jnp.ones(logits.shape[:-1], bool))

    batch = jax.random.normal(jax.random.key(0), (8, 6))
    start = adamerge(entropy_fn, base, models, lambda i: batch, AdaConfig("task", 0.25, steps=0))
    close(start.params, {p: base[p] + 0.25 * sum(m[p] - base[p] for m in models) for p in base})
    found = adamerge(entropy_fn, base, models, lambda i: batch, AdaConfig(steps=25, lr=0.05))
    assert found.losses[-1] < found.losses[0]
    assert sorted(found.coefficients) == ["h.0", "h.1"]
    np.testing.assert_allclose(found.coefficients["h.1"], 0.3)  # nothing there is read


def test_equal_experts_come_back_from_every_merge(family):
    base, models = family
    same = [models[0]] * N
    one_hot = np.eye(N)[1]
    fisher = [{p: np.abs(x) for p, x in tree(i).items()} for i in range(N)]
    close(fisher_merge(same, fisher), models[0])
    close(materialise(emr(base, same), one_hot), models[0])
    close(materialise(tall(base, same, strictness=0.0, scale=1 / N), one_hot), models[0])
    close(materialise(twin(models[0], same, density=0.1), one_hot), models[0])
    ramp = np.random.default_rng(0).normal(size=(40, 6))
    grams = [Grams({"h.0.mlp.w": ramp.T @ ramp}, 40.0)] * N
    close(regmean_merge(same, grams), models[0], atol=1e-4)


def test_merges_do_not_depend_on_the_order_of_experts(family):
    base, models = family
    fisher = [{p: np.abs(x) for p, x in tree(i).items()} for i in range(N)]
    turned = models[::-1]
    close(fisher_merge(turned, fisher[::-1]), flatten(fisher_merge(models, fisher)))
    close(pcb(base, turned), flatten(pcb(base, models)))
    close(consensus(base, turned), flatten(consensus(base, models)))
    close(
        materialise(emr(base, turned), np.eye(N)[0]),
        flatten(materialise(emr(base, models), np.eye(N)[2])),
    )
