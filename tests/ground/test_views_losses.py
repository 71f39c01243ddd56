"""Pooling and weighting of views, and the losses, against plain NumPy and by their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsys.core.errors import UserError
from jaxsys.ground import losses, robust, views

B, K, V, D = 3, 2, 5, 4


@pytest.fixture(scope="module")
def seen():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, K, V, D)).astype(np.float32)
    mask = rng.random((B, K, V)) < 0.6
    mask[..., 1] = True
    return jnp.asarray(x), jnp.asarray(mask), jnp.asarray(rng.normal(size=(B, D)), jnp.float32)


def by_rows(x, mask, reduce):
    flat = [reduce(a[m]) for a, m in zip(x.reshape(-1, V, D), mask.reshape(-1, V), strict=True)]
    return np.array(flat).reshape(B, K, -1)


def test_max_and_mean_are_over_the_views_that_are_there(seen):
    x, mask, _ = (np.asarray(a) for a in seen)
    for kind, reduce in {"max": lambda a: a.max(0), "mean": lambda a: a.mean(0)}.items():
        got = views.pool(*seen[:2], kind)
        np.testing.assert_allclose(got, by_rows(x, mask, reduce), rtol=1e-6)
    nothing = jnp.zeros_like(seen[1])
    assert not np.asarray(views.pool(seen[0], nothing)).any()
    assert not np.asarray(views.pool(seen[0], nothing, "mean")).any()


def test_random_views_are_drawn_evenly_among_those_present():
    x = jnp.arange(4.0).reshape(1, 1, 4, 1)
    x, mask = (
        jnp.tile(x, (4000, 1, 1, 1)),
        jnp.tile(jnp.array([True, False, True, True]), (4000, 1, 1)),
    )
    one = np.asarray(views.pool(x, mask, "one", jax.random.key(0))).ravel()
    share = np.bincount(one.astype(int), minlength=4) / 4000
    np.testing.assert_allclose(share, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.04)
    two = np.asarray(views.pool(x, mask, "two", jax.random.key(0))).ravel()
    share = np.bincount(two.astype(int), minlength=4) / 4000
    # The maximum of two even draws of three, with replacement: 1/9, 3/9, 5/9.
    np.testing.assert_allclose(share, [1 / 9, 0, 3 / 9, 5 / 9], atol=0.04)


def test_weights_follow_the_formula(seen):
    x, mask, text = (np.asarray(a, np.float64) for a in seen)
    mask = mask.astype(bool)
    cosine = np.einsum("bkvd,bd->bkv", x, text) / np.linalg.norm(x, axis=-1)
    cosine /= np.linalg.norm(text, axis=-1)[:, None, None]
    power = np.where(mask, np.exp(cosine / 0.3), 0)
    want = mask.sum(-1, keepdims=True) * power / power.sum(-1, keepdims=True)
    got = views.weights(*(seen[0], seen[2], seen[1]), "softmax", 0.3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    gate = views.weights(seen[0], seen[2], seen[1], "sigmoid", 0.3)
    np.testing.assert_allclose(gate, np.where(mask, 1 / (1 + np.exp(-cosine / 0.3)), 0), rtol=1e-4)
    np.testing.assert_array_equal(views.weights(seen[0], seen[2], seen[1], "none"), mask)
    alone = views.weights(seen[0][:, :, :1], seen[2], jnp.ones((B, K, 1), bool))
    np.testing.assert_array_equal(alone, np.ones((B, K, 1)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, m, t: views.pool(x, m, "one"), "1 random views .* key is None"),
        (lambda x, m, t: views.weights(x, t, m, "none", 0.0), "temperature 0.0"),
        (lambda x, m, t: robust.drop_views(jax.random.key(0), m, 0), "keep is 0"),
        (lambda x, m, t: robust.occlude(jax.random.key(0), x, 1.5), "share is 1.5"),
    ],
)
def test_mistakes_are_one_sentence(seen, call, words):
    with pytest.raises(UserError, match=words):
        call(*seen)


def test_dropped_views_are_a_subset_of_those_present(seen):
    mask = np.asarray(seen[1])
    for keep in (1, 2, 9):
        left = np.asarray(robust.drop_views(jax.random.key(keep), seen[1], keep))
        assert not (left & ~mask).any()
        np.testing.assert_array_equal(left.sum(-1), np.minimum(mask.sum(-1), keep))


def test_an_occlusion_is_one_square():
    pictures = robust.occlude(jax.random.key(1), jnp.ones((4, 2, 10, 10, 3)), 0.09, 0.2)
    covered = np.asarray(pictures[..., 0] == jnp.float32(0.2))
    np.testing.assert_array_equal(covered.sum((-2, -1)), 9)
    assert ((covered.any(-1).sum(-1) == 3) & (covered.any(-2).sum(-1) == 3)).all()
    assert len({c.tobytes() for c in covered.reshape(8, -1)}) > 1


def test_grounding_losses_follow_the_formulas():
    rng = np.random.default_rng(0)
    s, answer = rng.normal(size=(4, 3)), rng.integers(3, size=4)
    y, p = np.eye(3)[answer], 1 / (1 + np.exp(-s))
    want = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    got = losses.lgr_bce(jnp.asarray(s, jnp.float32), jnp.asarray(answer))
    assert float(got) == pytest.approx(want, rel=1e-5)
    q = 0.9 * y + 0.1 / 3
    logs = s - np.log(np.exp(s).sum(1, keepdims=True))
    got = losses.lgr_ce(jnp.asarray(s, jnp.float32), jnp.asarray(answer))
    assert float(got) == pytest.approx(-(q * logs).sum(1).mean(), rel=1e-5)


def test_the_captioners_loss_is_over_tokens_that_are_there():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(3, 4, 7)), rng.integers(7, size=(3, 4))
    mask = np.arange(4)[None] < np.array([[4], [2], [0]])
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = [-np.mean([logs[i, t, tokens[i, t]] for t in range(n)]) for i, n in ((0, 4), (1, 2))]
    got = losses.vgc(jnp.asarray(logits, jnp.float32), jnp.asarray(tokens), jnp.asarray(mask))
    assert float(got) == pytest.approx(np.mean(rows), rel=1e-5)


@pytest.fixture(scope="module")
def contrasted():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    objects, texts = jnp.array([0, 1, 0, 2]), jnp.array([0, 1, 2, 1])
    return draw(4, 5), draw(4, 5), jnp.float32(1.0), objects, texts, draw(4, 2, 5)


def vlc_by_hand(z, t, log_scale, objects, texts, hard):
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    z, t, hard = (unit(np.asarray(x, np.float64)) for x in (z, t, hard))
    scale, forward, back = min(np.exp(float(log_scale)), 100), [], []
    for i in range(len(z)):
        columns = [
            m
            for m in range(len(z))
            if m == i or (objects[m] != objects[i] and texts[m] != texts[i])
        ]
        up = scale * z[i] @ t[i]
        forward.append(np.log(sum(np.exp(scale * z[i] @ t[m]) for m in columns)) - up)
        below = [z[m] for m in columns] + list(hard[i])
        back.append(np.log(sum(np.exp(scale * t[i] @ v) for v in below)) - up)
    return (np.mean(forward) + np.mean(back)) / 2


def test_contrast_leaves_false_negatives_out_and_hard_ones_in(contrasted):
    loss, parts = losses.vlc(*contrasted)
    assert float(loss) == pytest.approx(vlc_by_hand(*contrasted), rel=1e-5)
    # Rows 0 and 2 share an object, rows 1 and 3 a text: four of the twelve pairs.
    assert float(parts.masked) == pytest.approx(4 / 12)
    bounded = losses.vlc(*contrasted[:2], jnp.float32(99.0), *contrasted[3:])[0]
    at_bound = losses.vlc(*contrasted[:2], jnp.log(100.0), *contrasted[3:])[0]
    assert float(bounded) == pytest.approx(float(at_bound), rel=1e-5)


def test_with_one_object_nothing_is_left_to_contrast(contrasted):
    z, t, scale, *_ = contrasted
    same = jnp.zeros(4, jnp.int32)
    run = jax.jit(jax.value_and_grad(losses.vlc, (0, 1), has_aux=True))
    (loss, parts), slopes = run(z, t, scale, same, jnp.arange(4))
    assert (float(loss), float(parts.masked)) == (pytest.approx(0, abs=1e-6), 1.0)
    np.testing.assert_allclose(np.asarray(slopes), 0, atol=1e-6)


def test_negatives_gathered_across_devices_equal_one_batch(contrasted):
    z, t, scale, objects, texts, hard = contrasted

    def whole(z, t):
        return losses.vlc(z, t, scale, objects, texts, hard)[0]

    def shared(z, t, objects, texts, hard):
        loss = lambda z, t: losses.vlc(  # noqa: E731
            z, t, scale, objects, texts, hard, axis_name="r"
        )[0]
        value, slopes = jax.value_and_grad(loss, (0, 1))(z, t)
        return jax.lax.pmean(value, "r"), slopes

    want, slopes = jax.jit(jax.value_and_grad(whole, (0, 1)))(z, t)
    halves = [x.reshape(2, 2, *x.shape[1:]) for x in (z, t, objects, texts, hard)]
    got, parts = jax.jit(jax.vmap(shared, axis_name="r"))(*halves)
    assert float(got[0]) == pytest.approx(float(want), rel=1e-5)
    for a, b in zip(parts, slopes, strict=True):
        # Each device's loss is a mean over its own rows: their mean is half of their sum.
        np.testing.assert_allclose(a.reshape(4, -1) / 2, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_negatives_gathered_by_shard_map_equal_one_batch(contrasted):
    z, t, scale, objects, texts, hard = contrasted
    want = losses.vlc(*contrasted)[0]
    mesh = jax.make_mesh((2,), ("r",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        lambda *x: jax.lax.pmean(losses.vlc(x[0], x[1], scale, *x[2:], axis_name="r")[0], "r"),
        mesh=mesh,
        in_specs=(P("r"),) * 5,
        out_specs=P(),
    )
    assert float(jax.jit(spread)(z, t, objects, texts, hard)) == pytest.approx(
        float(want), rel=1e-5
    )


def test_the_total_is_the_weighted_sum():
    loss, parts = losses.total(
        jnp.float32(1), jnp.float32(2), jnp.float32(3), contrast_weight=0.5, caption_weight=0.25
    )
    assert float(loss) == 2.75
    assert {name: float(x) for name, x in parts.items()} == {
        "grounding": 1,
        "contrast": 2,
        "caption": 3,
    }
