"""KN: attributions against finite differences, and exactly the chosen columns rewritten."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.core.errors import UserError
from jaxsys.core.tree import flatten
from jaxsys.edit.contract import Editable, Request
from jaxsys.edit.editable import get_matrix, matrix_path
from jaxsys.edit.kn import KN, Attribution, attribute, edit_kn, knowledge_neurons
from jaxsys.models import lm

IDS = tuple(b"Ada plays the")
ANSWER = 1


@partial(jax.jit, static_argnames=("config", "point"))
def probability(params, shift, *, config, point):
    """Run whole rows, without a cache, one activation vector shifted at the last token."""
    tokens = jnp.broadcast_to(jnp.asarray(IDS)[None], (shift.shape[0], len(IDS)))
    change = lm.Intervention(point, jnp.int32(len(IDS) - 1), shift)
    out = lm.apply(params, config, tokens, taps=(point,), interventions=(change,))
    return jax.nn.softmax(out.logits[:, -1])[:, ANSWER], out.taps[point][:, -1] - shift


def test_attribution_is_the_integral_of_the_slope(llama):
    model, params = llama
    point, neurons, h = "model.layers.1.mlp.down_proj:in", range(0, 24, 6), 0.02
    run = partial(probability, params, config=model.config, point=point)
    base = np.asarray(run(jnp.zeros((16, 24)))[1])[0]
    shifts = np.zeros((2, 4, 2, 24), np.float32)  # k, neuron, side
    for k in range(2):
        shifts[k] += base * ((k + 1) / 2 - 1)
        for n, i in enumerate(neurons):
            shifts[k, n, :, i] += (h, -h)
    values = np.asarray(run(jnp.asarray(shifts.reshape(16, 24)))[0], np.float64).reshape(2, 4, 2)
    slopes = (values[..., 0] - values[..., 1]) / (2 * h)
    expected = base[list(neurons)] * slopes.mean(axis=0)
    found = attribute(model, params, IDS, ANSWER, steps=2, rows_per_call=12).scores
    assert found.shape == (3, 24)
    np.testing.assert_allclose(
        found[1, list(neurons)], expected, rtol=0.02, atol=1e-3 * np.abs(expected).max()
    )
    # Complete: many steps add up to what the whole layer's activations do for the answer.
    ends = np.asarray(run(jnp.asarray(np.stack([base * 0, -base] * 8)))[0])
    many = attribute(model, params, IDS, ANSWER, steps=64, rows_per_call=12).scores
    gap = abs(many[1].sum() - (ends[0] - ends[1]))
    assert gap < 0.02 * max(abs(ends[0] - ends[1]), np.abs(many[1]).sum())


def test_neurons_are_those_above_a_part_of_the_largest():
    def with_scores(*rows):
        return Attribution(np.array(rows), 0, 0)

    one = with_scores([1.0, 0.15], [0.5, -2.0])
    assert knowledge_neurons([one], 0.2) == [(0, 0), (1, 0)]
    two = with_scores([0.1, 0.9], [0.8, 0.0])
    assert knowledge_neurons([one, two], 0.2, 0.7) == [(1, 0)]
    assert knowledge_neurons([with_scores([-1.0, -2.0])]) == []
    with pytest.raises(UserError, match="not finite"):
        knowledge_neurons([with_scores([np.nan, 1.0])])


def test_edit_adds_the_difference_of_embeddings_to_the_chosen_columns(llama, short_answers):
    model, params = Editable(llama[0].config, short_answers), llama[1]
    request = Request("Ada plays the", "Ada", "?")
    config = KN(steps=2, rows_per_call=12, paraphrases={request.prompt: ("Hear: Ada plays the",)})
    done = edit_kn(model, config, params, [request])
    prompts = [IDS, tuple(b"Hear: Ada plays the")]
    found = [attribute(model, params, ids, None, 2, 12) for ids in prompts]
    assert found[0].answer == found[0].prediction
    # The paraphrase is attributed by its own prediction only where the truth is unknown.
    chosen = knowledge_neurons(found, config.threshold, config.share)
    assert done.info.notes["neurons"].tolist() == [len(chosen)]
    table = np.asarray(params["model"]["embed_tokens"]["weight"])
    change = 2 * (table[ANSWER] - table[found[0].prediction])
    for layer in range(3):
        path = matrix_path(model.config, layer)
        moved = np.asarray(get_matrix(model.config, done.params, path)) - np.asarray(
            get_matrix(model.config, params, path)
        )
        expected = np.zeros_like(moved)
        for at, i in chosen:
            expected[:, i] += change * (at == layer)
        np.testing.assert_allclose(moved, expected, atol=1e-5)
        if path in done.info.factors:
            a, b = done.info.factors[path]
            np.testing.assert_allclose(a @ b.T, expected, atol=1e-5)
    old, new = flatten(params), flatten(done.params)
    assert {p for p in old if old[p] is not new[p]} == set(done.info.factors)
    again = edit_kn(model, config, params, [request])
    jax.tree.map(np.testing.assert_array_equal, again.params, done.params)


def test_mistakes(llama, facts):
    model, params = llama
    with pytest.raises(UserError, match="'Gaul' has 5 tokens"):
        edit_kn(model, KN(), params, facts[:1])
    with pytest.raises(UserError, match="threshold 1"):
        KN(threshold=1.0)
