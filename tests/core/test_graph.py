"""Cutting a loss into stages must not change its value or its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core import stages, traced, tree
from jaxsys.core.errors import UserError


def _params(key, n=3, width=8):
    keys = jax.random.split(key, n + 1)
    blocks = [{"w": jax.random.normal(k, (width, width)) / 3} for k in keys[:n]]
    return {"blocks": blocks, "embed": jax.random.normal(keys[-1], (5, width))}


def _body(x, w):
    return x + jax.nn.silu(x @ w)


def plain(params, tokens):
    x = params["embed"][tokens[:, :-1]]
    for block in params["blocks"]:
        x = _body(x, block["w"])
    logits = x @ params["embed"].T  # the embedding is tied: used first and last
    labels = jax.nn.one_hot(tokens[:, 1:], 5)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, -1))


def cast_first(params, tokens):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return plain(half, tokens) + 1e-3 * penalty


def rematerialised(params, tokens):
    x = params["embed"][tokens[:, :-1]]
    mask = jnp.tril(jnp.ones((3, 3)))
    for block in params["blocks"]:
        x = jax.checkpoint(jax.jit(_body))(x, block["w"])
        x = jnp.einsum("ts,bsd->btd", mask, x)
    return jnp.mean((x @ params["embed"].T) ** 2)


@pytest.mark.parametrize("loss_fn", [plain, cast_first, rematerialised])
def test_cut_equals_grad(loss_fn):
    params = _params(jax.random.key(0))
    tokens = jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]])
    order = traced.first_use(loss_fn, params, tokens)
    names = tree.paths(params)
    by_use = [names[i] for i in np.argsort(order, kind="stable")]
    assert by_use == ["embed", "blocks.0.w", "blocks.1.w", "blocks.2.w"]

    groups = [(names.index(n),) for n in by_use]
    staged = stages.cut(loss_fn, params, (tokens,), groups)
    tape = staged.forward(params, tokens)
    want_loss, want = jax.value_and_grad(loss_fn)(params, tokens)
    np.testing.assert_allclose(tape.loss, want_loss, rtol=1e-6)
    got = {}
    finished_at = {}
    for i, grads in staged.backward(tape):
        got.update(grads)
        finished_at.update(dict.fromkeys(grads, i))
    for j, leaf in enumerate(jax.tree.leaves(want)):
        np.testing.assert_allclose(got[j], leaf, rtol=2e-5, atol=2e-6 * np.abs(leaf).max())
    assert finished_at[names.index("embed")] == 0  # tied: complete only at the very end


def test_equal_blocks_share_programs():
    params = _params(jax.random.key(0), n=4)
    tokens = jnp.array([[0, 1, 2, 3]])
    names = tree.paths(params)
    groups = [(names.index(n),) for n in ("embed", *(f"blocks.{i}.w" for i in range(4)))]
    staged = stages.cut(plain, params, (tokens,), groups)
    middle = {id(stage.forward) for stage in staged.stages[1:4]}
    assert len(middle) == 1
    assert len({id(stage.forward) for stage in staged.stages}) == 3
    tape = staged.forward(params, tokens)
    list(staged.backward(tape))
    assert staged.stages[1].backward._cache_size() == 1


def test_two_leaves_of_one_group_and_integers_between_stages():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 2))}

    def loss_fn(p, x):
        y = x @ p["a"] + p["b"][None]
        top = jnp.argmax(y, -1)  # an integer that crosses the cut
        return jnp.sum((y @ p["c"]) ** 2 * (1 + top[:, None]))

    x = jnp.arange(6.0).reshape(2, 3)
    staged = stages.cut(loss_fn, params, (x,), [(0, 1), (2,)])
    got = {}
    for _, grads in staged.backward(staged.forward(params, x)):
        got.update(grads)
    want = jax.tree.leaves(jax.grad(loss_fn)(params, x))
    for j, leaf in enumerate(want):
        np.testing.assert_allclose(got[j], leaf, rtol=1e-6)


def test_refusals():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    x = jnp.ones((1, 2))

    def loss_fn(p, x):
        return jnp.sum(x @ p["a"] @ p["b"])

    with pytest.raises(UserError, match="order of first use"):
        stages.cut(loss_fn, params, (x,), [(1,), (0,)])
    with pytest.raises(UserError, match="one scalar"):
        stages.cut(lambda p, x: x @ p["a"], params, (x,), [(0,), (1,)])
    with pytest.raises(UserError, match="does not use"):
        stages.cut(lambda p, x: jnp.sum(x @ p["a"]), params, (x,), [(0,), (1,)])
