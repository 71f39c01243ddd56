"""Routers, blends and the folder that keeps them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.merge import router
from jaxsys.merge.artefact import FILE, Artefact, load_artefact, save_artefact
from jaxsys.merge.emr import emr
from jaxsys.merge.mediator import LayerChoice, MediatorConfig, mediate
from jaxsys.merge.routed import materialise
from jaxsys.merge.router import BlendConfig, HeadConfig, blend

CENTRES = np.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])


def prompts(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    return CENTRES[labels] + rng.normal(size=(count, 3)), labels


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_head_learns_clusters_and_is_calibrated(hidden):
    x, y = prompts(0, 200)
    head = router.train_head(x, y, 3, HeadConfig(hidden, steps=100), key=jax.random.key(0))
    fresh, labels = prompts(1, 2000)
    p = np.asarray(router.posterior(head, jnp.asarray(fresh, jnp.float32)))
    right = p.argmax(1) == labels
    assert right.mean() > 0.93
    # Said and found shares agree where the head says that it is fairly sure.
    assert abs(p.max(1).mean() - right.mean()) < 0.04


def test_calibration_finds_the_temperature_that_logits_were_made_with():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(20_000, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (p.cumsum(1) < rng.random((len(p), 1))).sum(1)
    assert router.calibrate(3.0 * logits, labels) == pytest.approx(3.0, rel=0.05)


def transcribed_blend(p: np.ndarray, threshold: float, k: int, temperature: float) -> np.ndarray:
    entropy = -sum(v * np.log(v) for v in p if v > 0) / np.log(len(p))
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    w = np.zeros(len(p))
    if entropy < threshold:
        w[order[0]] = 1.0
        return w
    for i in order[:k]:
        w[i] = p[i] ** (1 / temperature)
    return w / w.sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 1.1]), st.integers(1, 5))
def test_a_blend_is_as_its_formula(seed, threshold, k):
    p = np.random.default_rng(seed).dirichlet(np.full(5, 0.5)).astype(np.float32)
    found, _ = blend(jnp.asarray(p)[None], BlendConfig(threshold, k, 0.7))
    np.testing.assert_allclose(found[0], transcribed_blend(p, threshold, k, 0.7), atol=2e-5)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_expert_that_is_surest_of_a_prompt_is_chosen():
    def apply_fn(params, tokens, mask):
        del mask
        return params * jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), 7)

    tokens = jnp.arange(6)[None]
    mask = jnp.ones((1, 6), bool)
    for kind in ("entropy", "nll"):
        logits = router.uncertainty_logits(
            apply_fn, [0.5, 8.0, 2.0].__getitem__, 3, tokens, mask, kind
        )
        assert np.asarray(logits).argsort(1).tolist() == [[0, 2, 1]]


def test_padding_does_not_count():
    logits = jax.random.normal(jax.random.key(0), (1, 5, 7))
    tokens, mask = jnp.arange(5)[None], jnp.array([[True, True, True, False, False]])
    for kind in ("entropy", "nll"):
        whole = router.prompt_uncertainty(logits, tokens, mask, kind)
        cut = router.prompt_uncertainty(logits[:, :3], tokens[:, :3], mask[:, :3], kind)
        np.testing.assert_allclose(whole, cut, rtol=1e-6)
    pooled = router.pool(logits, mask)
    np.testing.assert_allclose(pooled, router.pool(logits[:, :3], mask[:, :3]), rtol=1e-6)


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="temperature 0"):
        BlendConfig(temperature=0.0)
    with pytest.raises(UserError, match="labels"):
        router.train_head(np.ones((8, 2)), np.arange(8), 3, key=jax.random.key(0))


@pytest.fixture(scope="module")
def artefact():
    rng = np.random.default_rng(0)
    base = {p: rng.normal(size=(4, 6)).astype(np.float32) for p in ("h.0.w", "h.1.w")}
    models = [{p: x + 0.1 * rng.normal(size=x.shape) for p, x in base.items()} for _ in range(3)]
    models = [{p: x.astype(np.float32) for p, x in m.items()} for m in models]
    config = MediatorConfig(choice=LayerChoice("topk", 1), density=0.5, bits=4)
    built = mediate(base, models, config)
    x, y = prompts(0, 40)
    head = router.train_head(x, y, 3, HeadConfig(4, steps=5), key=jax.random.key(0))
    names = ("a", "b", "c")
    made = Artefact(built.routed, names, "mediator", head, BlendConfig(0.2), 2.5, {"f": 0.5})
    return made, emr(base, models)


def test_a_folder_comes_back_bit_for_bit(artefact, tmp_path):
    made, united = artefact
    found = load_artefact(save_artefact(tmp_path, made))
    assert jax.tree.structure(found.routed) == jax.tree.structure(made.routed)
    for a, b in zip(
        jax.tree.leaves((found.routed, found.router)),
        jax.tree.leaves((made.routed, made.router)),
        strict=True,
    ):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert found._replace(routed=None, router=None) == made._replace(routed=None, router=None)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.safetensors", FILE]
    other = Artefact(united, ("a", "b", "c"), "emr")
    again = load_artefact(save_artefact(tmp_path / "emr", other))
    w = np.eye(3)[1]
    for path, leaf in flatten(materialise(again.routed, w)).items():
        np.testing.assert_array_equal(leaf, flatten(materialise(united, w))[path])


def test_damaged_folders_are_refused(artefact, tmp_path):
    made, _ = artefact
    save_artefact(tmp_path, made)
    document = json.loads((tmp_path / FILE).read_text())
    routed = next(iter(document["parts"]))
    for change in (
        {"format": "other"},
        {"version": 99},
        {"experts": ["a", "b"]},
        {"parts": {routed: {"kind": "unified"}}},
        {"parts": {"h.9.w": document["parts"][routed]}},
        {"router": {"layers": 7}},
        {"blend": {"threshold": 0.1, "exec": 1}},
    ):
        (tmp_path / FILE).write_text(json.dumps(document | change))
        with pytest.raises(UserError, match="holds no"):
            load_artefact(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match="holds no routed merge"):
        load_artefact(tmp_path)
    with pytest.raises(UserError, match="2 names for 3 experts"):
        save_artefact(tmp_path, made._replace(names=("a", "b")))
