"""One row by planes: the same product and the same gradients as the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.models.lm.linear import linear
from jaxsys.models.rows import planes_of, row_product


@pytest.mark.parametrize("inputs", [100, 512, 576, 1792])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
def test_products_and_gradients(inputs, dtype):
    rng = np.random.default_rng(inputs)
    weight = jnp.asarray(rng.integers(-127, 128, (5, inputs)), dtype)
    x = jnp.asarray(rng.normal(size=inputs), jnp.float32)
    n = planes_of(inputs, weight.dtype.itemsize)
    assert (n > 3 and inputs % (32 * n) == 0) or (inputs == 100 and n == 1)
    plain = np.asarray(weight, np.float64) @ np.asarray(x, np.float64)
    np.testing.assert_allclose(jax.jit(row_product)(weight, x), plain, rtol=2e-5, atol=2e-2)
    gradient = jax.grad(lambda x: row_product(weight, x).sum())(x)
    np.testing.assert_allclose(gradient, np.asarray(weight, np.float64).sum(0), atol=1e-2)
    if dtype == jnp.bfloat16:
        of_weight = jax.grad(lambda w: row_product(w, x).sum())(weight)
        assert of_weight.dtype == dtype
        wide = np.broadcast_to(x, weight.shape)
        np.testing.assert_allclose(np.asarray(of_weight, np.float32), wide, rtol=1e-2, atol=1e-6)


def test_a_linear_layer_of_two_rows_trains_in_bfloat16():
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(8, 256)), jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(2, 256)), jnp.bfloat16)
    found = jax.grad(lambda w: linear({"weight": w}, x).astype(jnp.float32).sum())(weight)
    wide = np.broadcast_to(np.asarray(x, np.float32).sum(0), weight.shape)
    np.testing.assert_allclose(np.asarray(found, np.float32), wide, rtol=2e-2, atol=2e-2)
