"""Forms on the wire against NumPy: what arrives, exact bytes, hard inputs, gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.compress import wire_bytes
from jaxsys.core.errors import UserError
from jaxsys.pipeline import codec

SHAPES = [(1,), (7,), (256,), (3, 5, 11), (1030,)]
LOSSY = [("topk", 1.5), ("topk", 3.0), ("topk", 50.0), ("int8", 2.0), ("int4", 2.0)]


def _sent(x, ratio, name):
    parts = codec.encode(x, ratio, name)
    expected = codec.part_specs(x.shape, x.dtype, ratio, name)
    assert [(p.shape, p.dtype) for p in parts] == [(s.shape, s.dtype) for s in expected]
    assert wire_bytes(parts) == codec.encoded_bytes(x.shape, x.dtype, ratio, name)
    return np.asarray(codec.decode(parts, x.shape, x.dtype, ratio, name))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "ratio"), LOSSY)
def test_what_arrives_is_what_numpy_says(shape, name, ratio):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = _sent(jnp.asarray(x), ratio, name)
    how = codec.form(shape, x.dtype, ratio, name)
    if how.kind == "dense":
        np.testing.assert_array_equal(got, x)
    elif name == "topk":
        kept = np.sort(np.argsort(-np.abs(x).reshape(-1), kind="stable")[: how.kept])
        expected = np.zeros(x.size, np.float32)
        expected[kept] = x.reshape(-1)[kept]
        np.testing.assert_array_equal(got.reshape(-1), expected)
        assert how.kept == math.ceil(x.size / ratio)
    else:
        step = np.abs(x).max() / (127 if name == "int8" else 7)
        assert np.abs(got - x).max() <= step / 2 * 1.001


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 5000),
    st.sampled_from(["float32", "bfloat16", "float16", "int32", "bool"]),
    st.floats(1.0, 1e6),
    st.sampled_from(codec.CODECS),
)
def test_no_form_is_larger_than_dense_and_its_bytes_are_those_of_its_parts(n, dtype, ratio, name):
    dense = n * jnp.dtype(dtype).itemsize
    size = codec.encoded_bytes((n,), dtype, ratio, name)
    assert 0 <= size <= dense
    assert size == wire_bytes(codec.part_specs((n,), dtype, ratio, name))
    if ratio == 1.0 or name == "dense" or not jnp.issubdtype(dtype, jnp.floating):
        assert size == dense


@pytest.mark.parametrize("name", codec.CODECS)
def test_a_ratio_of_one_is_the_array_itself_bit_for_bit(name):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 9)), jnp.float32)
    assert codec.encode(x, 1.0, name)[0] is x or np.array_equal(_sent(x, 1.0, name), x)
    assert _sent(x, 1.0, name).tobytes() == np.asarray(x).tobytes()
    plain = jax.value_and_grad(lambda v: jnp.sum(v**3))
    through = jax.value_and_grad(lambda v: jnp.sum(codec.lossy(v, 1.0, 1.0, name) ** 3))
    for a, b in zip(plain(x), through(x), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(("name", "ratio"), LOSSY)
@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, 1e-42, 1e38])
def test_zeros_and_constants_stay_finite(name, ratio, value):
    x = jnp.full((300,), value, jnp.float32)
    got = _sent(x, ratio, name)
    assert np.isfinite(got).all()
    assert np.abs(got).max() <= abs(value) * 1.001
    grad = jax.grad(lambda v: jnp.sum(codec.lossy(v, ratio, ratio, name)))(x)
    assert np.isfinite(np.asarray(grad)).all()


def test_a_value_that_is_not_a_number_stays_visible():
    x = jnp.zeros(300).at[7].set(jnp.nan)
    for name, ratio in LOSSY:
        assert np.isnan(_sent(x, ratio, name)).any()


def test_integers_and_booleans_travel_whole():
    for x in (jnp.arange(40), jnp.arange(40) % 3 == 0):
        np.testing.assert_array_equal(_sent(x, 8.0, "topk"), x)


@pytest.mark.parametrize("bits", [1, 7, 13, 32])
def test_packed_indices_come_back(bits):
    indices = np.random.default_rng(0).integers(0, 2**bits, 13, dtype=np.uint32)
    number = sum(int(v) << (bits * i) for i, v in enumerate(indices))
    packed = np.asarray(codec.pack_indices(jnp.asarray(indices), bits))
    assert packed.tobytes() == number.to_bytes(-(-13 * bits // 8), "little")
    np.testing.assert_array_equal(codec.unpack_indices(jnp.asarray(packed), 13, bits), indices)


def test_each_direction_chooses_its_own_elements():
    x = jnp.arange(64.0)
    weights = jnp.flip(jnp.arange(64.0))  # the cotangent is largest where x is smallest
    y, pull = jax.vjp(lambda v: codec.lossy(v, 32.0, 16.0, "topk"), x)
    assert np.flatnonzero(y).tolist() == [62, 63]
    assert np.flatnonzero(pull(weights)[0]).tolist() == [0, 1, 2, 3]


def test_feedback_sends_in_the_end_what_it_held_back():
    rng = np.random.default_rng(2)
    residual, sent, total = jnp.zeros(96), np.zeros(96), np.zeros(96)
    for _ in range(5):
        x = jnp.asarray(rng.normal(size=96), jnp.float32)
        parts, residual = codec.feedback(x, residual, 12.0, "topk")
        sent += np.asarray(codec.decode(parts, x.shape, x.dtype, 12.0, "topk"))
        total += np.asarray(x)
    np.testing.assert_allclose(sent + np.asarray(residual), total, atol=1e-5)
    assert np.abs(sent - total).max() > 0.1


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="expected one of dense, topk, int8, int4"):
        codec.encoded_bytes((3,), "float32", 2.0, "zip")
    for ratio in (0.5, math.inf, math.nan):
        with pytest.raises(UserError, match="finite number of at least 1"):
            codec.encoded_bytes((3,), "float32", ratio, "topk")
