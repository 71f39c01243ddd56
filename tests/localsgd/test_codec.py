"""The averaging codecs: one function under three drivers, its laws, and the bytes it sends."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core import compress
from jaxsys.core.errors import UserError
from jaxsys.core.mesh import over_replicas, replica_mesh
from jaxsys.localsgd.codec import CODECS, codec_bytes, mean_over

TOP = {"int8": 127, "int4": 7}
DRIVERS = ("vmap", "pmap", "shard_map")


def data(n_replicas, shape, seed=0):
    return jax.random.normal(jax.random.key(seed), (n_replicas, *shape))


def run(driver, x, codec, key):
    """Average with every replica holding the same key; x is [R, ...]."""
    n_replicas = x.shape[0]
    mesh = replica_mesh(jax.devices()[:n_replicas]) if driver == "shard_map" else None
    stacked = jnp.broadcast_to(key[None], (n_replicas, *key.shape))
    fn = over_replicas(lambda x, k: mean_over("replica", x, codec, k), driver, mesh=mesh)
    return jax.tree.map(np.asarray, fn(x, stacked))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("n_replicas", "shape"), [(8, (5, 101)), (4, (3,)), (3, (700,)), (1, (9,))]
)
def test_drivers_agree_and_the_laws_hold(codec, n_replicas, shape):
    x = data(n_replicas, shape)
    results = {d: run(d, x, codec, jax.random.key(5)) for d in DRIVERS}
    for driver, (mean, sent) in results.items():
        for r in range(1, n_replicas):
            np.testing.assert_array_equal(mean[r], mean[0], err_msg=driver)
        # What arrived is the average of what was sent.
        tolerance = {"f32": 1e-6, "f16": 4e-3}.get(codec, 1e-5)
        np.testing.assert_allclose(mean[0], sent.mean(0), atol=tolerance)
        np.testing.assert_allclose(mean, results["vmap"][0], rtol=0, atol=tolerance)
        np.testing.assert_allclose(sent, results["vmap"][1], rtol=0, atol=n_replicas * tolerance)
        assert mean.dtype == np.float32
        assert mean.shape == sent.shape == x.shape


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_error_is_bounded_by_the_scales(codec):
    x = data(4, (1000,))
    mean, _ = run("vmap", x, codec, jax.random.key(0))
    largest = float(jnp.max(jnp.abs(x)))
    # One scale from the first shot and one from the second, of blocks no larger than the largest.
    assert np.max(np.abs(mean[0] - np.mean(x, 0))) <= 2.5 * largest / TOP[codec]
    assert np.max(np.abs(mean[0] - np.mean(x, 0))) > 0


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_mean_is_unbiased(codec):
    x = data(4, (40,))
    n_draws = 3000
    keys = jax.random.split(jax.random.key(3), n_draws)

    def draw(key):
        return jax.vmap(lambda x: mean_over("r", x, codec, key)[0], axis_name="r")(x)[0]

    draws = np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)
    deviation = draws.std(0)
    assert np.max(deviation) > 0
    assert np.all(np.abs(draws.mean(0) - np.mean(x, 0)) <= 5 * deviation / np.sqrt(n_draws) + 1e-5)


def test_replicas_round_independently():
    """Equal inputs: with one shared draw the errors would add up instead of averaging out."""
    x = jnp.broadcast_to(data(1, (4096,)), (8, 4096))
    _, sent = run("vmap", x, "int4", jax.random.key(0))
    errors = sent - np.asarray(x)
    correlation = np.corrcoef(errors)
    assert np.max(np.abs(correlation - np.eye(8))) < 0.2


def test_f32_is_the_mean_and_f16_survives_large_values():
    x = data(8, (33,))
    mean, sent = run("vmap", x, "f32", jax.random.key(0))
    np.testing.assert_allclose(mean[0], np.mean(np.asarray(x, np.float64), 0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(sent, x)
    big, _ = run("vmap", jnp.full((8, 2), 6e4), "f16", jax.random.key(0))
    np.testing.assert_allclose(big, 6e4, rtol=2e-3)


def test_without_a_key_rounding_is_to_nearest():
    x = data(4, (64,))
    fn = jax.vmap(lambda x: mean_over("r", x, "int8"), axis_name="r")
    mean, _ = fn(x)
    assert np.max(np.abs(mean[0] - np.mean(x, 0))) <= float(jnp.max(jnp.abs(x))) / 127 * 1.01
    np.testing.assert_array_equal(mean, fn(x)[0])


def test_dtype_is_kept():
    x = data(4, (10,)).astype(jnp.bfloat16)
    for codec in CODECS:
        mean, sent = jax.vmap(lambda x, c=codec: mean_over("r", x, c), axis_name="r")(x)
        assert mean.dtype == sent.dtype == jnp.bfloat16


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_error_feedback_carries_both_shots(codec):
    """Sum of the means received = mean of all that was to be sent, less the mean residual."""
    n_rounds, x = 30, data(4, (50,))

    def round_(residual, key):
        def replica(x, e):
            mean, sent = mean_over("r", x + e, codec, key)
            return mean, x + e - sent

        mean, residual = jax.vmap(replica, axis_name="r")(x, residual)
        return residual, mean[0]

    residual, means = jax.lax.scan(
        round_, jnp.zeros_like(x), jax.random.split(jax.random.key(0), n_rounds)
    )
    want = n_rounds * np.mean(x, 0)
    np.testing.assert_allclose(np.sum(means, 0) + np.mean(residual, 0), want, atol=1e-3)
    # And the residual stays bounded: the average of the rounds is far better than one round.
    one_round = np.max(np.abs(np.asarray(means[0]) - np.mean(x, 0)))
    assert np.max(np.abs(np.mean(means, 0) - np.mean(x, 0))) < 0.25 * one_round


def test_a_replica_that_diverges_is_seen_by_all():
    x = data(4, (40,)).at[2, 7].set(jnp.nan)
    for codec in CODECS:
        mean, _ = run("vmap", x, codec, jax.random.key(0))
        assert not np.any(np.isfinite(mean[:, 7])), codec


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 100_000), st.integers(1, 64))
def test_codec_bytes_never_grow_with_fewer_bits(n, workers):
    f32, f16, int8, int4 = (codec_bytes(n, codec, workers) for codec in CODECS)
    assert f16 == f32 / 2
    assert int4 <= int8
    if n >= 256 * workers and workers > 1:
        assert int8 < 0.6 * f32 + 1
        assert int4 < 0.6 * f16 + 1
    if workers == 1:
        assert f32 == f16 == int8 == int4 == 0


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("n", [3, 1000, 4096])
def test_codec_bytes_are_those_of_the_compiled_collectives(codec, n):
    """Count the bytes of the operands in the lowered program: two collectives, both of uint8."""
    n_replicas = 4
    mesh = replica_mesh(jax.devices()[:n_replicas])
    fn = over_replicas(lambda x: mean_over("replica", x, codec), "shard_map", mesh=mesh)
    text = fn.lower(jnp.zeros((n_replicas, n))).as_text()
    calls = re.findall(
        r"stablehlo\.(all_to_all|all_gather)\"?.*?\(tensor<([0-9x]+)xui8>", text, re.S
    )
    assert [name for name, _ in calls] == ["all_to_all", "all_gather"]
    sizes = [int(np.prod([int(d) for d in dims.split("x")])) for _, dims in calls]
    # all-to-all keeps one part in R at home; all-gather sends the whole operand to R - 1 others.
    sent = sizes[0] * (n_replicas - 1) / n_replicas + sizes[1] * (n_replicas - 1)
    assert sent == codec_bytes(n, codec, n_replicas)


def test_unknown_codec():
    with pytest.raises(UserError, match="expected one of f32, f16, int8, int4"):
        codec_bytes(10, "int2", 4)
    with pytest.raises(UserError, match="int2"):
        jax.vmap(lambda x: mean_over("r", x, "int2"), axis_name="r")(jnp.ones((2, 2)))


def test_block_scales_follow_small_arrays():
    """A bias of 100 numbers over 4 workers must not be padded to 4 whole blocks."""
    assert codec_bytes(100, "int8", 4) < codec_bytes(100, "f32", 4) / 2
    assert compress.BLOCK == 256
