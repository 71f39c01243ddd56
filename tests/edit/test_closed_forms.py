"""Methods that solve for their change, run on tiny models of both orientations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.errors import UserError
from jaxsys.data import train_bpe
from jaxsys.data.tokenizer import LMTokenizer
from jaxsys.edit import alphaedit, closed, emmet, factors, memit, pmet, rome, stats
from jaxsys.edit.contract import Editable, Info, Request
from jaxsys.edit.editable import add_delta, encode, get_matrix, matrix_path
from jaxsys.edit.methods import METHODS
from jaxsys.edit.targets import TargetConfig, find_targets
from jaxsys.edit.turns import edit_all, edit_each
from jaxsys.models import lm
from jaxsys.models.lm.families import layout_of

PREFIXES = ("So it is",)
TARGET = TargetConfig(4, 0.5, 4.0, 0.1, 0.0625, prefixes=PREFIXES, batch=1)


@pytest.fixture(scope="module")
def moments(llama):
    """Second moments as they could be, of layers 0 and 1 of the Llama form."""
    k = np.random.default_rng(0).normal(size=(200, 24))
    c = (k.T @ k / 200 + 0.01 * np.eye(24)).astype(np.float32)
    return stats.Statistics({0: c, 1: c}, 200)


@pytest.fixture(scope="module")
def memit_found(llama, facts):
    """Target values of all three facts at layer 1."""
    return find_targets(*llama, facts, 1, "layer", TARGET)


def looked_at(model, params, request, point, prefix=""):
    """Read a point at the subject's last token by a plain forward pass."""
    e = encode(model, request, prefix)
    out = lm.apply(params, model.config, jnp.asarray([e.ids]), taps=(point,))
    return np.asarray(out.taps[point][0, e.lookup])


def point_of(model, layer, which="down"):
    prefix = lm.layer_prefix(model.config, layer)
    return f"{prefix}.{layout_of(model.config).down}:out" if which == "down" else f"{prefix}:out"


def oracle(model, params, request, layer, config):
    """Descend for one request with whole rows, no cache and no batch."""
    rows = [encode(model, request, p) for p in ("", *config.prefixes)]
    own = np.asarray(model.tokenizer.encode(f"{request.subject} is a"))
    at = len(model.tokenizer.encode(request.subject)) - 1
    point = point_of(model, layer)
    v0 = looked_at(model, params, request, point)

    longest = max(len(own), *(len(e.ids) for e in rows))
    ids = np.zeros((len(rows) + 1, longest), np.int32)
    for i, row in enumerate([*(e.ids for e in rows), own]):
        ids[i, : len(row)] = row
    lookups = jnp.asarray([*(e.lookup for e in rows), at])

    def run(delta):
        change = lm.Intervention(point, lookups, delta)
        return jax.nn.log_softmax(
            lm.apply(params, model.config, ids, interventions=(change,)).logits
        )

    @jax.jit
    @jax.value_and_grad
    def loss(delta):
        log_p = run(delta)
        reference = jax.lax.stop_gradient(run(0 * delta))[-1, at]
        nll = 0.0
        for n, e in enumerate(rows):
            chosen = [log_p[n, i - 1, e.ids[i]] for i in range(e.split, len(e.ids))]
            nll -= sum(chosen) / len(chosen)
        kl = jnp.sum(jnp.exp(log_p[-1, at]) * (log_p[-1, at] - reference))
        decay = jnp.sqrt(jnp.sum(delta**2) + 1e-30) / np.linalg.norm(v0) ** 2
        return nll / len(rows) + config.kl * kl + config.weight_decay * decay

    adam = optax.adam(config.lr)
    delta = jnp.zeros_like(v0)
    state = adam.init(delta)
    for _ in range(config.steps - 1):
        updates, state = adam.update(loss(delta)[1], state)
        delta = delta + updates
        most = config.clamp * np.linalg.norm(v0)
        delta = delta * jnp.minimum(1.0, most / jnp.linalg.norm(delta))
    return v0 + np.asarray(delta), float(loss(delta)[0])


@pytest.mark.slow
def test_target_values_equal_plain_descent_one_by_one(llama, facts):
    config = replace(TARGET, steps=3, batch=4)
    found = find_targets(*llama, facts, 1, "mlp", config)
    value, loss = oracle(*llama, facts[0], 1, config)
    np.testing.assert_allclose(found.value[0], value, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.loss[0], loss, rtol=1e-3)
    alone = find_targets(*llama, facts[:1], 1, "mlp", replace(config, batch=1))
    np.testing.assert_allclose(alone.value[0], found.value[0], rtol=1e-3, atol=1e-3)


def test_descent_keeps_to_its_ball_and_stops_early(llama, facts):
    small = find_targets(*llama, facts, 1, "mlp", replace(TARGET, clamp=0.1))
    moved = np.linalg.norm(small.value - small.initial, axis=1)
    assert (moved <= 0.1001 * np.linalg.norm(small.initial, axis=1)).all()
    assert (moved > 0).all()
    easy = find_targets(*llama, facts, 1, "mlp", replace(TARGET, stop=1e9))
    np.testing.assert_array_equal(easy.value, easy.initial)
    assert easy.steps.tolist() == [1, 1, 1]


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_rome_makes_the_matrix_say_the_value(form, facts, request):
    model, params = request.getfixturevalue(form)
    config = rome.RomeConfig(1, statistics=False, target=TARGET)
    found = closed.targets("rome", model, config, params, facts[:1])
    edited = rome.edit(model, config, params, facts[:1], found=found)
    said = looked_at(model, edited.params, facts[0], point_of(model, 1))
    np.testing.assert_allclose(said, found.value[0], rtol=1e-4, atol=1e-4)
    path = matrix_path(model.config, 1)
    a, b = edited.info.factors[path]
    change = get_matrix(model.config, edited.params, path) - get_matrix(model.config, params, path)
    np.testing.assert_allclose(change, a @ b.T, atol=1e-5)
    assert list(edited.info.factors) == [path]
    other = matrix_path(model.config, 0)
    untouched = Info({other: (0, 0)}, {})
    assert factors.keep(edited.params, untouched)[other] is factors.keep(params, untouched)[other]


def test_r_rome_moves_the_mean_over_prefixes(llama, facts, moments):
    model, params = llama
    config = rome.RRomeConfig(1, target=TARGET)
    found = closed.targets("rome", model, config, params, facts[:1])
    edited = rome.edit(model, config, params, facts[:1], moments, found=found)
    said = [
        looked_at(model, edited.params, facts[0], point_of(model, 1), prefix)
        for prefix in ("", *PREFIXES)
    ]
    np.testing.assert_allclose(np.mean(said, axis=0), found.value[0], rtol=1e-3, atol=1e-3)


def test_memit_with_next_to_no_weight_reaches_its_values(llama, facts, moments, memit_found):
    model, params = llama
    config = memit.MemitConfig((0, 1), 1e-6, target=replace(TARGET, prefixes=()))
    edited = memit.edit(model, config, params, facts, moments, found=memit_found)
    said = [looked_at(model, edited.params, r, point_of(model, 1, "layer")) for r in facts]
    error = np.linalg.norm(said - memit_found.value, axis=1)
    first = np.linalg.norm(memit_found.value - memit_found.initial, axis=1)
    assert (error < 2e-3 * first).all()
    heavy = memit.edit(
        model, replace(config, weight=1e6), params, facts, moments, found=memit_found
    )
    said = [looked_at(model, heavy.params, r, point_of(model, 1, "layer")) for r in facts]
    np.testing.assert_allclose(said, memit_found.initial, atol=1e-2)


def test_sequential_edits_keep_earlier_keys(llama, facts, moments, memit_found):
    model, params = llama
    part = [jax.tree.map(lambda x, i=i: x[i : i + 1], memit_found) for i in range(2)]
    target = replace(TARGET, prefixes=())
    config = memit.MemitConfig((1,), 1e-3, sequential=True, target=target)
    one = memit.edit(model, config, params, facts[:1], moments, found=part[0])
    two = memit.edit(model, config, one.params, facts[1:2], moments, one.state, found=part[1])
    alone = memit.edit(model, config, one.params, facts[1:2], moments, found=part[1])
    assert np.linalg.matrix_rank(one.state[1]) == 1
    assert np.linalg.matrix_rank(two.state[1], tol=1e-6) == 2
    first = point_of(model, 1, "layer")
    before = looked_at(model, one.params, facts[0], first)
    kept, lost = (
        np.linalg.norm(looked_at(model, e.params, facts[0], first) - before) for e in (two, alone)
    )
    assert kept < 0.1 * lost
    everything = factors.apply(model, params, factors.compose([one.info, two.info]))
    path = matrix_path(model.config, 1)
    np.testing.assert_allclose(
        *(get_matrix(model.config, p, path) for p in (everything, two.params)), atol=1e-5
    )


def test_alphaedit_adds_keys_to_its_state_and_none_begins_anew(llama, facts, moments, memit_found):
    model, params = llama
    config = alphaedit.AlphaEditConfig((1,), 0.9, False, 1e-3, target=TARGET)
    one = alphaedit.edit(model, config, params, facts, moments, found=memit_found)
    again = alphaedit.edit(model, config, params, facts, moments, found=memit_found)
    held = alphaedit.edit(model, config, params, facts, moments, one.state, found=memit_found)
    path = matrix_path(model.config, 1)
    sizes = [np.linalg.norm(e.info.factors[path][1]) for e in (one, again, held)]
    assert sizes[0] == sizes[1] > sizes[2]
    np.testing.assert_array_equal(one.state[1], again.state[1])
    u = stats.null_space(moments.moment(1), 0.9)
    b = one.info.factors[path][1]
    np.testing.assert_allclose(u @ (u.T @ b), b, atol=1e-5)


def test_emmet_and_pmet_write_what_they_say(llama, facts, moments):
    model, params = llama
    found = closed.targets("pmet", model, pmet.PmetConfig((0, 1), 1e-6, TARGET), params, facts)
    for module, config in (
        (emmet, emmet.EmmetConfig((1,), 1.0, 0.0, 0.0, replace(TARGET, prefixes=()))),
        (pmet, pmet.PmetConfig((1,), 1e-6, replace(TARGET, prefixes=()))),
    ):
        edited = module.edit(model, config, params, facts, moments, found=found)
        which = "layer" if module is emmet else "down"
        said = [looked_at(model, edited.params, r, point_of(model, 1, which)) for r in facts]
        np.testing.assert_allclose(said, found.value, rtol=2e-3, atol=2e-3)


def test_undo_is_exact_and_refuses_what_is_not_its_own(llama, facts, tmp_path):
    model, params = llama
    a, b = np.ones((16, 1), np.float32), np.full((24, 1), 1 / 3, np.float32)
    info = Info({matrix_path(model.config, i): (a, b) for i in (0, 1)}, {})
    before = factors.keep(params, info)
    edited = factors.apply(model, params, info)
    back = factors.undo(model, edited, info, before)
    jax.tree.map(np.testing.assert_array_equal, back, dict(params))
    factors.save(tmp_path, info, before=before, about={"method": "rome"})
    loaded, kept, about = factors.load(tmp_path)
    assert about == {"method": "rome"}
    jax.tree.map(np.testing.assert_array_equal, factors.undo(model, edited, loaded, kept), back)
    with pytest.raises(UserError, match="another edit came after"):
        factors.undo(model, params, info, before)
    with pytest.raises(UserError, match="not at hand"):
        factors.undo(model, edited, info, {})


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_files_are_edited_as_trees_are(form, tmp_path, request):
    model, params = request.getfixturevalue(form)
    path = matrix_path(model.config, 2)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(n, 2)).astype(np.float32) for n in (16, 24))
    lm.save(tmp_path / "old", params, model.config)
    factors.into_files(tmp_path / "old", Info({path: (a, b)}, {}), tmp_path / "new")
    loaded, _ = lm.load(tmp_path / "new")
    wanted = add_delta(model.config, params, path, a, b)
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted)


def test_each_from_the_same_parameters_and_all_in_turn(llama, facts, memit_found):
    model, params = llama
    method = METHODS["rome"]
    config = rome.RomeConfig(1, statistics=False, target=TARGET)
    each = list(edit_each(method, model, config, params, facts[:2]))
    alone = rome.edit(model, config, params, facts[1:2])
    path = matrix_path(model.config, 1)
    np.testing.assert_allclose(
        np.asarray(each[1].info.factors[path][0]), alone.info.factors[path][0], rtol=1e-3, atol=1e-4
    )
    turn = edit_all(method, model, config, params, facts[:2])
    assert turn.info.factors[path][0].shape == (16, 2)
    change = get_matrix(model.config, turn.params, path) - get_matrix(model.config, params, path)
    np.testing.assert_allclose(
        change, turn.info.factors[path][0] @ turn.info.factors[path][1].T, atol=1e-4
    )


def test_the_lookup_token_is_found_where_words_grow_together():
    text = "the cat sat on the mat. cats and mats, catsat " * 9
    model = Editable(None, LMTokenizer(train_bpe(text, 280).tokenizer))
    for prompt, subject in (("cats and mats", "cat"), ("on the mat. cats", "mat"), ("cat", "cat")):
        e = encode(model, Request(prompt, subject, "mat"))
        start = prompt.index(subject)
        before = model.tokenizer.decode(e.ids[: e.lookup])
        upto = model.tokenizer.decode(e.ids[: e.lookup + 1])
        assert len(before) < start + len(subject) <= len(upto)
        assert model.tokenizer.decode(e.ids[e.split :]) == " mat"


def test_bad_requests_are_refused_before_work(llama, facts, moments):
    model, params = llama
    config = memit.MemitConfig((0, 1), 1.0, target=TARGET)

    def refused(match, requests, method=memit, config=config, moments=moments):
        with pytest.raises(UserError, match=match):
            method.edit(model, config, params, requests, moments)

    one = facts[0]
    refused("does not name the subject", [one._replace(subject="Oslo")])
    refused("empty target", [one._replace(target=" ")])
    refused("are the same", [one, facts[1], one])
    refused("contradict each other", [one, one._replace(target="Spain")])
    refused("no request", [])
    refused("jaxsys edit stats MODEL --layers 0 1", facts, moments=None)
    refused("jaxsys edit stats MODEL --layers 2", facts, config=replace(config, layers=(1, 2)))
    refused("ascending", facts, config=replace(config, layers=(1, 0)))
    refused(
        "layers 0 to 2",
        facts,
        config=replace(config, layers=(7,)),
        moments=stats.Statistics({}, 1),
    )
    refused("one at a time", facts, rome, rome.RomeConfig(1, target=TARGET))
    refused("room for 96", [one._replace(target="x" * 99)])
    lost = replace(TARGET, lr=float("inf"))
    refused("not finite", facts[:1], config=replace(config, target=lost))


def test_mixtures_and_quantised_matrices_are_refused(llama):
    mixture = lm.LMConfig(
        "mixtral", 97, 16, 1, 2, 1, 8, 24, 64, experts=2, experts_per_token=1, expert_width=8
    )
    with pytest.raises(UserError, match="mixture of 2 experts"):
        matrix_path(mixture, 0)
    model, params = llama
    with pytest.raises(UserError, match="without quantisation"):
        get_matrix(model.config, {"w": np.zeros((2, 2), np.int8)}, "w")
    lost = np.full((16, 1), np.inf), np.ones((24, 1))
    with pytest.raises(UserError, match=r"change of .* is not finite"):
        factors.apply(model, params, Info({matrix_path(model.config, 0): lost}, {}))
    with pytest.raises(UserError, match="lacks"):
        factors.apply(model, params, Info({"nowhere": (np.ones((1, 1)), np.ones((1, 1)))}, {}))
