"""Fine-tuning methods: the bound holds, the step is the gradient's, factors are the change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.edit.editable import encode, get_matrix, matrix_path, with_leaf
from jaxsys.edit.finetune import FT, FTL, FTM, LoRA, edit_finetune, edit_lora
from jaxsys.models import lm


def changes(model, before, after):
    """Give the change of every leaf that changed, [out, in] where it is a matrix."""
    old, new = flatten(before), flatten(after)
    moved = [p for p in old if not np.array_equal(old[p], new[p])]
    return {
        p: np.asarray(get_matrix(model.config, after, p) - get_matrix(model.config, before, p))
        for p in moved
    }


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def either(request):
    return request.getfixturevalue(request.param)


def test_clamp_holds_and_factors_are_the_change(either, facts):
    model, params = either
    done = edit_finetune(model, FTL(layers=(1,), clamp=2e-3, lr=1e-3, steps=5), params, facts)
    path = matrix_path(model.config, 1)
    moved = changes(model, params, done.params)
    assert list(moved) == [path]
    assert np.abs(moved[path]).max() == pytest.approx(2e-3, rel=1e-3)
    a, b = done.info.factors[path]
    np.testing.assert_allclose(a @ b.T, moved[path], atol=1e-6)
    assert done.info.notes["steps"] == 5
    assert done.info.notes["loss"].shape == (3,)
    more = edit_finetune(model, FTL(layers=(1,), clamp=None, lr=1e-2), params, facts)
    assert more.info.notes["loss"].mean() < 0.9 * done.info.notes["loss"].mean()


def test_first_step_has_the_sign_of_the_gradient_of_the_answers_loss(llama, facts):
    model, params = llama
    done = edit_finetune(model, FTM(layers=(1,), lr=1e-3, steps=1), params, facts[:1])
    row = encode(model, facts[0])
    mask = np.arange(len(row.ids)) >= row.split
    path = matrix_path(model.config, 1)

    def whole(matrix):
        tokens = jnp.asarray([row.ids])
        return lm.loss(with_leaf(params, path, matrix), model.config, tokens, mask[None])

    gradient = np.asarray(jax.jit(jax.grad(whole))(get_matrix(model.config, params, path)))
    moved = changes(model, params, done.params)[path]
    clear = np.abs(gradient) > 1e-5
    assert clear.mean() > 0.5
    np.testing.assert_allclose(moved[clear], -1e-3 * np.sign(gradient[clear]), rtol=2e-2)


def test_adapters_merge_and_edits_accumulate(either, facts):
    model, params = either
    modules = ("q", "v") if model.config.model_type == "llama" else ("q", "up")
    config = LoRA(layers=(1,), modules=modules, rank=2, steps=3)
    one = edit_lora(model, config, params, facts[:1])
    two = edit_lora(model, config, one.params, facts[1:2])
    moved = changes(model, params, two.params)
    assert set(moved) == set(one.info.factors)
    assert len(moved) == 2
    for path, change in moved.items():
        total = sum(a @ b.T for a, b in (one.info.factors[path], two.info.factors[path]))
        np.testing.assert_allclose(total, change, atol=1e-5)
        assert np.linalg.matrix_rank(one.info.factors[path][0]) == 2


def test_mistakes(llama, facts):
    model, params = llama
    with pytest.raises(UserError, match="layers is"):
        edit_finetune(model, FT(layers=(3,)), params, facts)
    with pytest.raises(UserError, match="clamp -1"):
        FTL(clamp=-1.0)
    with pytest.raises(UserError, match="'w' is no role"):
        edit_lora(model, LoRA(modules=("w",)), params, facts)
    with pytest.raises(UserError, match="contradict"):
        edit_lora(model, LoRA(), params, [facts[0], facts[0]._replace(target="Spain")])
    broken = with_leaf(params, matrix_path(model.config, 2), jnp.full((16, 24), jnp.nan))
    with pytest.raises(UserError, match="not finite"):
        edit_finetune(model, FT(layers=(1,), steps=5), broken, facts)
