"""Ways to run the blocks of a model change no value."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.models import lm
from jaxsys.models.lm.attention import attend, attend_blocks

CONFIG = lm.LMConfig("llama", 97, 32, 2, 4, 2, 8, 48, 640, init_std=0.3)
STEP = jax.jit(jax.value_and_grad(lm.loss), static_argnums=1, static_argnames="execution")


@pytest.mark.parametrize("attention", ["blocks", "xla"])
@pytest.mark.parametrize(
    ("length", "windows"),
    [(2, ()), (34, ()), (100, (7, 90)), (300, (50, 0))],
)
def test_loss_and_gradient_are_those_of_plain_attention(attention, length, windows):
    config = replace(CONFIG, windows=windows)
    params = lm.init(jax.random.key(1), config)
    tokens = jax.random.randint(jax.random.key(2), (2, length), 0, 97)
    wanted, found = (
        STEP(params, config, tokens, execution=lm.Execution(kind)) for kind in ("plain", attention)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-6)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * float(jnp.abs(b).max()))


def test_four_blocks_compute_five_eighths_of_the_scores():
    q, kv = jnp.ones((1, 128, 2, 64)), jnp.ones((1, 128, 2, 64))
    keep = jnp.tril(jnp.ones((1, 128, 128), bool))

    def flops(fn):
        return jax.jit(fn).lower(q, kv, kv, keep).compile().cost_analysis()["flops"]

    def plain(q, k, v, keep):
        return attend(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), keep)

    assert flops(attend_blocks) < 0.64 * flops(plain)
