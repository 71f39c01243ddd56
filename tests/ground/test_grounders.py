"""Laws that every grounder keeps, and each one's own; formulas, adapters, one batch learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.errors import UserError
from jaxsys.ground import contract
from jaxsys.ground.caption import gpt2_captioner
from jaxsys.ground.contract import Batch
from jaxsys.ground.da4lg import Da4lgConfig, da4lg
from jaxsys.ground.lagor import LagorConfig, lagor
from jaxsys.ground.magic import MagicConfig, magic
from jaxsys.ground.match import MatchConfig, match, zero_shot
from jaxsys.models import gpt2
from jaxsys.models.lm.linear import linear

B, K, V, D, L, T, PIXELS = 4, 3, 4, 8, 6, 5, 10
KEY = jax.random.key(0)


def encode(params, pixels):
    return jnp.tanh(linear(params["q_proj"], pixels))


FROZEN = {
    "vision": {"q_proj": {"weight": jax.random.normal(jax.random.key(9), (D, PIXELS)) / 3}},
    "captioner": jax.jit(lambda: gpt2.init(jax.random.key(8), gpt2.tiny()))(),
}


def captioner():
    return gpt2_captioner(gpt2.tiny(), length=2)


def config(domain="lora", **options):
    return Da4lgConfig(D, L, domain, rank=2, patterns=("q_proj.weight",), hidden=(16,), **options)


GROUNDERS = {
    "match": lambda: match(MatchConfig(D, L, hidden=(16,))),
    "match mean": lambda: match(MatchConfig(D, L, "mean", hidden=(16,))),
    "magic": lambda: magic(
        MagicConfig(D, L, model_width=16, depth=1, heads=2, inner=16, head=(8,), dropout=0.0)
    ),
    "da4lg": lambda: da4lg(config(shared=8), encode, captioner()),
    "da4lg residual": lambda: da4lg(config("residual", contrast=0.0)),
    "da4lg none": lambda: da4lg(config("none", contrast=0.0)),
}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    mask = np.ones((B, K, V), bool)
    mask[0, 1, 2:] = mask[2, 0, 0] = False
    return Batch(
        text=draw(B, L),
        mask=jnp.asarray(mask),
        views=draw(B, K, V, D),
        pixels=draw(B, K, V, PIXELS),
        answer=jnp.array([0, 2, 1, 1]),
        objects=jnp.arange(B * K).reshape(B, K),
        texts=jnp.array([0, 1, 2, 2]),
        words=draw(B, T, L),
        word_mask=jnp.asarray(np.arange(T)[None] < np.array([[5], [3], [1], [2]])),
        tokens=jnp.asarray(rng.integers(256, size=(B, T)), jnp.int32),
        token_mask=jnp.ones((B, T), bool),
    )


@pytest.fixture(scope="module", params=list(GROUNDERS))
def made(request):
    model = GROUNDERS[request.param]()
    params = jax.jit(model.init)(KEY, FROZEN)
    run = jax.jit(lambda batch: model.scores(params, FROZEN, batch))
    return request.param, model, params, run


def reorder(batch, places, axis):
    parts = {}
    for name in ("mask", "views", "pixels") + (("objects",) if axis == 1 else ()):
        parts[name] = jnp.take(getattr(batch, name), jnp.array(places), axis)
    return batch._replace(**parts)


def test_candidates_in_another_order_have_the_same_scores(made, batch):
    _, _, _, run = made
    scores = np.asarray(run(batch))
    assert scores.shape == (B, K)
    assert scores.std() > 1e-3
    swapped = np.asarray(run(reorder(batch, [2, 0, 1], 1)))
    np.testing.assert_allclose(swapped, scores[:, [2, 0, 1]], atol=2e-5)


def test_the_order_of_views_says_nothing(made, batch):
    run = made[3]
    np.testing.assert_allclose(run(reorder(batch, [3, 1, 0, 2], 2)), run(batch), atol=2e-5)


def test_what_a_missing_view_holds_says_nothing(made, batch):
    run = made[3]
    noise = {
        name: jnp.where(batch.mask[..., None], getattr(batch, name), 77.0)
        for name in ("views", "pixels")
    }
    np.testing.assert_allclose(run(batch._replace(**noise)), run(batch), atol=2e-5)


def test_a_masked_view_is_an_absent_view(made, batch):
    run = made[3]
    masked = batch._replace(mask=batch.mask.at[:, :, 3].set(False))
    np.testing.assert_allclose(run(masked), run(reorder(batch, [0, 1, 2], 2)), atol=2e-5)


def test_every_parameter_learns_and_the_loss_is_finite(made, batch):
    name, model, params, _ = made
    (value, parts), slopes = jax.jit(
        jax.value_and_grad(lambda p: model.loss(p, FROZEN, batch, key=KEY), has_aux=True)
    )(params)
    assert np.isfinite(float(value))
    assert all(np.isfinite(float(part)) for part in parts.values())
    flat = jax.tree_util.tree_flatten_with_path(slopes)[0]
    still = [jax.tree_util.keystr(path) for path, x in flat if not np.asarray(x).any()]
    # B of an adapter is zero at first, so A waits; so does what feeds a last layer of zeros.
    waiting = ("'q_proj.weight'].a", "['narrow']")
    assert [path for path in still if not any(w in path for w in waiting)] == []
    if name == "da4lg":
        assert {"grounding", "contrast", "caption"} == set(parts)
        assert all(float(part) > 0 for part in parts.values())


def test_training_needs_a_key(made, batch):
    _, model, params, _ = made
    with pytest.raises(UserError, match="key is None"):
        model.scores(params, FROZEN, batch, train=True)


@pytest.mark.parametrize("name", ["match", pytest.param("magic", marks=pytest.mark.slow), "da4lg"])
def test_one_batch_is_learnt_by_heart(name, batch):
    model = GROUNDERS[name]()
    params, optimiser = jax.jit(model.init)(KEY, FROZEN), optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        slopes, _ = jax.grad(model.loss, has_aux=True)(params, FROZEN, batch, key=key)
        updates, state = optimiser.update(slopes, state)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimiser.init)(params)
    for i in range(60):
        params, state = step(params, state, jax.random.key(i))
    scores = np.asarray(jax.jit(model.scores)(params, FROZEN, batch))
    assert scores.argmax(1).tolist() == batch.answer.tolist()


def numpy_mlp(params, x):
    layers = params["layers"]
    for i in range(len(layers)):
        x = x @ np.asarray(layers[i]["kernel"]) + np.asarray(layers[i]["bias"])
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x[..., 0]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_match_is_its_formula(batch):
    model = GROUNDERS["match"]()
    params = jax.jit(model.init)(KEY, {})
    seen = np.where(batch.mask[..., None], batch.views, -np.inf).max(2)
    text = np.repeat(unit(np.asarray(batch.text))[:, None], K, 1)
    want = numpy_mlp(params["head"], np.concatenate([unit(seen), text], -1))
    np.testing.assert_allclose(model.scores(params, {}, batch), want, atol=1e-5)


def test_zero_shot_is_its_formula(batch):
    alike = batch._replace(text=batch.views[:, 0, 0])
    seen = np.where(batch.mask[..., None], unit(np.asarray(batch.views)), -np.inf).max(2)
    want = 5 * np.einsum("bkd,bd->bk", seen, unit(np.asarray(alike.text)))
    np.testing.assert_allclose(zero_shot(scale=5.0).scores({}, {}, alike), want, atol=1e-5)
    with pytest.raises(UserError, match="images have 8 numbers and texts 6"):
        zero_shot().scores({}, {}, batch)
    with pytest.raises(UserError, match="the batch has no views"):
        zero_shot().scores({}, {}, batch._replace(views=None))


def test_lagor_scores_two_views_as_match_does(batch):
    model = lagor(LagorConfig(D, L, V, hidden=(16,), view_hidden=(8,), dropout=0.0))
    params = jax.jit(model.init)(KEY, {})
    run = jax.jit(lambda batch: model.scores(params, {}, batch, key=KEY))
    chosen = np.array([[1, 2, 0], [3, 3, 3], [0, 1, 2], [2, 0, 1]])
    only = jnp.asarray(np.arange(V)[None, None] == chosen[..., None])
    single = batch._replace(mask=only)  # one view: both draws are this one
    view = np.take_along_axis(np.asarray(batch.views), chosen[..., None, None], 2)[:, :, 0]
    text = np.repeat(unit(np.asarray(batch.text))[:, None], K, 1)
    want = numpy_mlp(params["head"], np.concatenate([unit(view), text], -1))
    np.testing.assert_allclose(run(single), want, atol=1e-5)
    loss, parts = jax.jit(lambda: model.loss(params, {}, single, key=KEY))()
    logits = unit(view)
    layers = jax.tree.map(np.asarray, params["view"]["layers"])
    logits = np.maximum(logits @ layers[0]["kernel"] + layers[0]["bias"], 0)
    logits = logits @ layers[1]["kernel"] + layers[1]["bias"]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = 0.9 * np.eye(V)[chosen] + 0.1 / V
    assert float(parts["view"]) == pytest.approx(-2 * (target * logs).sum(-1).mean(), rel=1e-4)
    assert float(loss) == pytest.approx(
        float(parts["view"]) + 0.2 * float(parts["grounding"]), rel=1e-5
    )
    pinned = batch._replace(
        mask=jnp.ones((B, K, V), bool), first_view=jnp.full((B, K), 2), answer=batch.answer
    )
    two = np.asarray(run(pinned))
    by_view = [unit(np.asarray(batch.views)[:, :, v]) for v in range(V)]
    ways = [np.maximum(by_view[2], by_view[v]) for v in range(V)]
    possible = [numpy_mlp(params["head"], np.concatenate([way, text], -1)) for way in ways]
    assert np.isclose(two[None], possible, atol=1e-5).any(0).all()
    with pytest.raises(UserError, match="random views"):
        model.scores(params, {}, batch)


def test_adapters_start_as_the_frozen_encoder(batch):
    pixels_only = batch._replace(views=None)
    adapted = da4lg(config("lora", shared=8), encode)
    params = jax.jit(adapted.init)(KEY, FROZEN)
    got = adapted.scores(params, FROZEN, pixels_only)
    for domain in ("frozen", "full"):
        other = da4lg(config(domain, shared=8), encode)
        trainable = {"heads": params["heads"], "domain": FROZEN["vision"]}
        np.testing.assert_array_equal(other.scores(trainable, FROZEN, pixels_only), got)
    moved = jax.tree.map(lambda x: x + 0.1, params["domain"])
    changed = adapted.scores({**params, "domain": moved}, FROZEN, pixels_only)
    assert np.abs(np.asarray(changed - got)).max() > 1e-4


def test_a_residual_starts_as_the_fixed_features(batch):
    model = da4lg(config("residual", shared=8))
    params = jax.jit(model.init)(KEY, {})
    still = da4lg(config("frozen", shared=8))
    heads = {k: v for k, v in params["heads"].items() if k not in ("narrow", "widen")}
    np.testing.assert_array_equal(
        model.scores(params, {}, batch), still.scores({"heads": heads}, {}, batch)
    )


def test_a_single_view_is_drawn_before_the_encoder(batch):
    calls = []

    def counted(params, pixels):
        calls.append(pixels.shape[0])
        return encode(params, pixels)

    model = da4lg(config("lora", shared=8, pooling="one", weighting="sigmoid"), counted)
    params = model.init(KEY, FROZEN)
    first = model.scores(params, FROZEN, batch._replace(views=None), key=KEY)
    assert calls == [B * K, B * K]  # one view each, for the frozen and the adapted encoder
    other = model.scores(params, FROZEN, batch._replace(views=None), key=jax.random.key(5))
    assert not np.allclose(first, other)
    with pytest.raises(UserError, match="random views"):
        model.scores(params, FROZEN, batch)


def test_the_captioner_reads_the_prefix_as_it_reads_words():
    params, lm = FROZEN["captioner"], gpt2.tiny()
    tokens = jax.random.randint(KEY, (2, 6), 0, 256)
    prefix = params["wte"]["weight"][tokens[:, :2]]
    got = captioner().logits(params, prefix, tokens[:, 2:])
    np.testing.assert_allclose(got, gpt2.apply(params, lm, tokens)[:, 1:-1], atol=1e-5)
    with pytest.raises(UserError, match="positions"):
        captioner().logits(params, prefix, jnp.zeros((2, lm.n_positions), int))
    with pytest.raises(UserError, match="prefix has 0"):
        gpt2_captioner(lm, length=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": np.zeros((B, K, V), bool)}, "candidate 0 of row 0 has zero views"),
        ({"views": np.zeros((B, K, V + 1, D))}, r"views has shape \(4, 3, 5, 8\)"),
        ({"answer": np.array([0, 1, 3, 0])}, "answer of row 2 is none of 3"),
        ({"objects": np.array([[0, 1, 2]] * 3 + [[4, 5, 4]])}, "row 3 has one object twice"),
        ({"mask": np.ones((B, K, V))}, "expected .B, K, V. bool"),
        ({"text": np.zeros((B + 1, L))}, r"text has shape \(5, 6\)"),
    ],
)
def test_a_batch_is_checked_before_work_starts(batch, change, words):
    contract.check_batch(batch)
    with pytest.raises(UserError, match=words):
        contract.check_batch(batch._replace(**change))


def test_configurations_that_cannot_be():
    with pytest.raises(UserError, match="no encoder to adapt"):
        da4lg(config("lora"))
    with pytest.raises(UserError, match=r"temperature is 0\.0"):
        Da4lgConfig(temperature=0.0)
    with pytest.raises(UserError, match="model_width is 10 and heads 4"):
        MagicConfig(model_width=10, heads=4)
    with pytest.raises(UserError, match=r"drop_words 1\.0"):
        MagicConfig(drop_words=1.0)
