"""MEND: an untrained editor is the plain gradient, a trained one what NumPy says, runs resume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.edit.contract import Record
from jaxsys.edit.editable import encode, get_matrix, with_leaf
from jaxsys.edit.mend import MEND, edit_mend
from jaxsys.edit.mend_editor import (
    Pairs,
    edited_paths,
    init_editor,
    load_editor,
    save_editor,
    transform,
)
from jaxsys.edit.mend_train import MENDTraining, prepare, train_editor
from jaxsys.models import lm


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def either(request):
    return request.getfixturevalue(request.param)


def some_editor(config, blocks=1):
    """Make an editor with numbers everywhere, as after training."""
    editor = init_editor(jax.random.key(3), config, rank=3, blocks=blocks)
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape), editor)
    moments = jax.tree.map(lambda a: jnp.asarray(abs(a) + 0.5), noise.moments)
    for moment in moments.values():
        moment["n"] = jnp.float32(7)
    return jax.tree.map(jnp.float32, noise._replace(moments=moments))


def test_untrained_editor_follows_the_gradient(either, facts):
    model, params = either
    editor = init_editor(jax.random.key(0), model.config, rank=4, blocks=1)
    done = edit_mend(model, MEND(editor), params, facts)
    rows = [encode(model, fact) for fact in facts]
    tokens = np.zeros((3, 40), np.int32)
    weight = np.zeros((3, 40), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)] = row.ids
        weight[i, row.split : len(row.ids)] = 1 / (len(row.ids) - row.split)

    def total(matrices):
        changed = params
        for path, matrix in matrices.items():
            changed = with_leaf(changed, path, matrix)
        log_p = jax.nn.log_softmax(lm.apply(changed, model.config, tokens[:, :-1]).logits)
        chosen = jnp.take_along_axis(log_p, jnp.asarray(tokens)[:, 1:, None], axis=2)[..., 0]
        return -(chosen * weight[:, 1:]).sum()

    gradients = jax.jit(jax.grad(total))({path: _leaf(params, path) for path in editor.rates})
    assert len(editor.rates) == (3 if model.config.model_type == "llama" else 2)
    # One column for each token up to the last that is read to predict; padding has none.
    read = sum(len(row.ids) - 1 for row in rows)
    for path, gradient in gradients.items():
        assert 0 < done.info.factors[path][0].shape[1] <= read
        dense = gradient.T if model.config.model_type == "gpt2" else gradient
        a, b = done.info.factors[path]
        np.testing.assert_allclose(a @ b.T, -1e-4 * dense, rtol=2e-3, atol=1e-9)
        moved = get_matrix(model.config, done.params, path) - get_matrix(model.config, params, path)
        np.testing.assert_allclose(moved, a @ b.T, atol=2e-7)


def _leaf(tree, path):
    for part in path.split("."):
        tree = tree[part]
    return tree


def test_transform_is_the_formula_in_float64(llama):
    config = llama[0].config
    editor, rng = some_editor(config), np.random.default_rng(1)
    path, name = "model.layers.2.mlp.up_proj.weight", "16x24"
    x, delta = rng.standard_normal((5, 16)), rng.standard_normal((5, 24))
    delta[2] = 0
    pairs = Pairs(jnp.float32(x), jnp.float32(delta))
    found = jax.jit(transform, static_argnums=(1, 2))(editor, path, name, pairs)

    def wide(tree):
        return {k: np.asarray(v, np.float64) for k, v in tree.items()}

    net, modes, moment = (
        wide(editor.nets[name]),
        wide(editor.modes[path]),
        wide(editor.moments[name]),
    )
    spread = np.sqrt(moment["m2"] / 6) + 1e-7
    z = (np.concatenate([x, delta], axis=1) - moment["mean"]) / spread
    for i in range(2):
        inner = z @ net["v"][i].T @ net["u"][i].T + net["b"][i]
        z = z + np.maximum(0, modes["scale"][i] * inner + modes["shift"][i])
    z[2] = 0
    np.testing.assert_allclose(found.x, z[:, :16], rtol=1e-5, atol=1e-5)
    rate = float(editor.rates[path])
    np.testing.assert_allclose(found.delta, -rate * z[:, 16:], rtol=1e-5, atol=1e-5)


def test_released_forgets_and_corrected_accumulates(llama, facts):
    model, params = llama
    editor = init_editor(jax.random.key(0), model.config, rank=4, blocks=1)
    path = next(iter(editor.rates))

    def twice(sequence):
        config = MEND(editor, sequence)
        one = edit_mend(model, config, params, facts[:1])
        return edit_mend(model, config, one.params, facts[1:2], state=one.state)

    alone = edit_mend(model, MEND(editor), params, facts[1:2])
    released, corrected = twice("released"), twice("accumulate")
    np.testing.assert_array_equal(_leaf(released.params, path), _leaf(alone.params, path))
    gap = np.abs(_leaf(corrected.params, path) - _leaf(alone.params, path)).max()
    assert gap > 1e-7


def test_editors_are_kept_and_checked(llama, gpt2, facts, tmp_path):
    model, params = llama
    editor = some_editor(model.config)
    save_editor(tmp_path, editor)
    again = load_editor(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, editor)
    with pytest.raises(UserError, match="MEND has no editor"):
        edit_mend(model, MEND(), params, facts)
    with pytest.raises(UserError, match="this model has not"):
        edit_mend(gpt2[0], MEND(str(tmp_path)), gpt2[1], facts)
    with pytest.raises(UserError, match="blocks is 4"):
        edited_paths(model.config, 4)


def test_training_learns_and_resumes(llama, facts, tmp_path):
    model, params = llama
    records = [
        Record(facts[0], ("Where is Rome? In",), (("The city of Oslo lies in", "Norway"),)),
        Record(facts[1]),
    ]
    ready = prepare(model, params, records, 1, tokens=40, rows_per_call=6)
    assert ready.has.tolist() == [[1, 1], [1, 0], [1, 0]]
    settings = {"batch": 2, "lr": 3e-3, "lr_rates": 1e-3, "rank": 4, "blocks": 1, "save_every": 30}
    whole = train_editor(model, params, ready, MENDTraining(steps=60, **settings))
    assert whole.rows[-1]["loss"] < whole.rows[0]["loss"]
    store = RunStore(tmp_path)
    first = train_editor(model, params, ready, MENDTraining(steps=30, **settings), store=store)
    rest = train_editor(model, params, ready, MENDTraining(steps=60, **settings), store=store)
    assert [r["loss"] for r in (*first.rows, *rest.rows)] == [r["loss"] for r in whole.rows]
    jax.tree.map(np.testing.assert_array_equal, rest.editor, whole.editor)
    with pytest.raises(UserError, match="another editor"):
        train_editor(
            model, params, ready, MENDTraining(steps=60, **settings), store=store, meta={"a": 1}
        )
