"""Laws of compression: bounded and unbiased rounding, exact packing, telescoping feedback."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxsys.core import compress
from jaxsys.core.errors import UserError

VECTORS = hnp.arrays(
    np.float32,
    st.sampled_from([1, 7, 64, 130]),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)
BITS = st.sampled_from([8, 4])


def step_sizes(x, bits, block):
    """Each element's scale, computed by hand."""
    padded = np.pad(x, (0, -len(x) % block)).reshape(-1, block)
    scale = np.abs(padded).max(1) / {8: 127, 4: 7}[bits]
    return np.repeat(scale, block)[: len(x)]


@settings(deadline=None, max_examples=60)
@given(VECTORS, BITS, st.sampled_from([8, 64]), st.none() | st.integers(0, 2**31 - 1))
def test_error_is_bounded_by_the_scale(x, bits, block, seed):
    key = None if seed is None else jax.random.key(seed)
    quantized = compress.quantize(jnp.asarray(x), bits, key, block)
    error = np.abs(np.asarray(compress.dequantize(quantized, x.shape)) - x)
    allowed = step_sizes(x, bits, block) * (0.5 if key is None else 1.0)
    assert np.all(error <= allowed * (1 + 1e-4) + 1e-30)


@settings(deadline=None, max_examples=30)
@given(VECTORS, BITS)
def test_quantising_twice_changes_nothing(x, bits):
    once = compress.dequantize(compress.quantize(jnp.asarray(x), bits, block=8), x.shape)
    twice = compress.dequantize(compress.quantize(once, bits, block=8), x.shape)
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("bits", [8, 4])
def test_stochastic_rounding_is_unbiased(bits):
    x = jax.random.normal(jax.random.key(1), (64,))
    n_draws = 4000

    def draw(key):
        return compress.dequantize(compress.quantize(x, bits, key, 64), x.shape)

    draws = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), n_draws)), np.float64)
    step = float(jnp.max(jnp.abs(x))) / {8: 127, 4: 7}[bits]
    # A draw's standard deviation is at most half a step; five of the mean's standard deviations.
    assert np.max(np.abs(draws.mean(0) - np.asarray(x))) < 5 * 0.5 * step / np.sqrt(n_draws)
    assert np.max(draws.std(0)) > 0.4 * step
    nearest = compress.dequantize(compress.quantize(x, bits, None, 64), x.shape)
    assert np.max(np.abs(nearest - x)) > 0.3 * step  # so that the bound above means something


def test_extreme_blocks():
    zeros = compress.quantize(jnp.zeros(4), block=4)
    assert compress.dequantize(zeros, (4,)).tolist() == [0.0] * 4
    tiny = compress.dequantize(compress.quantize(jnp.full(4, 1e-38), block=4), (4,))
    assert np.all(np.isfinite(tiny))
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        x = jnp.array([1.0, bad, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0])
        back = compress.dequantize(compress.quantize(x, block=4), (8,))
        assert not np.any(np.isfinite(back[:4]))
        assert np.all(np.isfinite(back[4:]))


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.int8, st.sampled_from([(2,), (3, 4), (2, 3, 8)]), elements=st.integers(-8, 7)))
def test_int4_packing_is_exact_and_halves_the_bytes(codes):
    packed = compress.pack_int4(jnp.asarray(codes))
    assert packed.nbytes * 2 == codes.nbytes
    by_hand = (codes[..., 0::2].astype(int) % 16) + 16 * (codes[..., 1::2].astype(int) % 16)
    np.testing.assert_array_equal(packed, by_hand)
    np.testing.assert_array_equal(compress.unpack_int4(packed), codes)


@settings(deadline=None, max_examples=30)
@given(VECTORS, BITS)
def test_bytes_carry_codes_and_scales_exactly(x, bits):
    quantized = compress.quantize(jnp.asarray(x), bits, block=8)
    rows = compress.to_bytes(quantized)
    assert rows.size == compress.wire_bytes(quantized)
    back = compress.from_bytes(rows, bits)
    np.testing.assert_array_equal(back.codes, quantized.codes)
    np.testing.assert_array_equal(back.scale, quantized.scale)


@pytest.mark.parametrize(("bits", "want"), [(8, 1000 + 24 + 4 * 4), (4, (1000 + 24) / 2 + 4 * 4)])
def test_wire_bytes(bits, want):
    assert compress.wire_bytes(compress.quantize(jnp.ones(1000), bits)) == want


def test_quantize_jits_and_maps_with_the_same_result():
    x = jax.random.normal(jax.random.key(0), (3, 40))
    keys = jax.random.split(jax.random.key(1), 3)
    mapped = jax.jit(jax.vmap(lambda x, k: compress.quantize(x, 4, k, 8)))(x, keys)
    for i in range(3):
        single = compress.quantize(x[i], 4, keys[i], 8)
        np.testing.assert_array_equal(mapped.codes[i], single.codes)
        np.testing.assert_array_equal(mapped.scale[i], single.scale)


@settings(deadline=None, max_examples=40)
@given(VECTORS, st.integers(1, 130))
def test_top_k_keeps_what_sorting_keeps(x, k):
    k = min(k, x.size)
    sparse = compress.top_k(jnp.asarray(x), k)
    dense = np.asarray(compress.densify(sparse, x.shape))
    kept = np.sort(np.abs(dense[np.asarray(sparse.indices)]))
    np.testing.assert_array_equal(kept, np.sort(np.sort(np.abs(x))[::-1][:k]))
    assert len(set(sparse.indices.tolist())) == k
    changed = dense != x
    assert np.all(dense[changed] == 0)


@settings(deadline=None, max_examples=20)
@given(hnp.arrays(np.float32, (5, 12), elements=st.floats(-8, 8, width=16)))
def test_feedback_loses_nothing_in_the_long_run(xs):
    """Sum of what was decoded + residual = sum of what was sent."""
    residual, received = jnp.zeros(12), np.zeros(12)
    for x in xs:
        sparse, residual = compress.with_feedback(
            jnp.asarray(x),
            residual,
            lambda p: compress.top_k(p, 3),
            lambda s: compress.densify(s, (12,)),
        )
        received += np.asarray(compress.densify(sparse, (12,)))
    np.testing.assert_allclose(received + np.asarray(residual), xs.sum(0), atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "uint"), [("bfloat16", "uint16"), ("float16", "uint16"), ("float32", "uint32")]
)
def test_wire_integers_round_trip_bit_for_bit(dtype, uint):
    x = jnp.array([0.0, -0.0, 1.5, jnp.inf, jnp.nan, -3e-5], dtype)
    sent = compress.to_wire_uint(x)
    assert sent.dtype == uint
    back = compress.from_wire_uint(sent, dtype)
    np.testing.assert_array_equal(np.asarray(back).view(uint), np.asarray(x).view(uint))


def test_mistakes_are_said_in_one_sentence():
    with pytest.raises(UserError, match="even"):
        compress.quantize(jnp.ones(4), 4, block=3)
    with pytest.raises(UserError, match="k is 5 for 4 elements"):
        compress.top_k(jnp.ones(4), 5)
