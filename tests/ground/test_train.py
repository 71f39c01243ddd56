"""Training: one curve whatever devices, driver and seeds beside it; resumed to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.ground.da4lg import Da4lgConfig, da4lg
from jaxsys.ground.match import MatchConfig, match, zero_shot
from jaxsys.ground.program import program
from jaxsys.ground.spread import row_mesh
from jaxsys.ground.tables import Rows, Tables, gather, take_rows
from jaxsys.ground.train import TrainConfig, fit, fit_seeds
from jaxsys.models.lm.linear import linear
from jaxsys.train.loop import NonFiniteError

N, V, D, L, R, PIXELS = 12, 2, 8, 6, 40, 5
ONE = jax.devices()[:1]
CONFIG = TrainConfig(epochs=4, batch=8, patience=0, lr=3e-3, adapter_lr=3e-3)


def encode(params, pixels):
    return jnp.tanh(linear(params["q_proj"], pixels))


FROZEN = {"vision": {"q_proj": {"weight": np.random.default_rng(9).normal(size=(D, PIXELS))}}}
FROZEN = jax.tree.map(jnp.float32, FROZEN)
OPTIONS = {"rank": 2, "patterns": ("q_proj.weight",), "hidden": (8,), "shared": 4}
MATCH = match(MatchConfig(D, L, hidden=(8,)))
DA4LG = da4lg(Da4lgConfig(D, L, "lora", **OPTIONS), encode)


@pytest.fixture(scope="module")
def data():
    """Make objects whose texts point at them, so that there is something to learn."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(N, V, PIXELS)).astype(np.float32)
    views = np.array(encode(FROZEN["vision"], jnp.asarray(pixels)))
    text = (views.mean(1) @ rng.normal(size=(D, L))).astype(np.float32)
    mask = np.ones((N, V), bool)
    mask[3, 1] = False
    tables = Tables(mask, text, np.arange(N, dtype=np.int32), views, pixels)
    objects = np.stack([rng.choice(N, 2, replace=False) for _ in range(R)]).astype(np.int32)
    answer = rng.integers(2, size=R).astype(np.int32)
    rows = Rows(objects, np.take_along_axis(objects, answer[:, None], 1)[:, 0], answer)
    return tables, take_rows(rows, np.arange(24)), take_rows(rows, np.arange(24, R))


def assert_trees(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # A bias of the score itself moves no softmax: its gradient is rounding, which Adam scales.
        if a.size > 1:
            np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4)


@pytest.fixture(scope="module")
def alone(data):
    return fit(DA4LG, FROZEN, *data, CONFIG, seed=3, devices=ONE)


def test_a_run_is_the_loop_that_anybody_would_write(data):
    tables, train, _ = data
    found = fit(MATCH, {}, tables, train, None, CONFIG, seed=1, devices=ONE)
    root = jax.random.key(1)
    part = lambda use, i: jax.random.fold_in(jax.random.fold_in(root, use), i)  # noqa: E731
    params = MATCH.init(jax.random.fold_in(root, 0), {})
    optimizer, losses, steps = optax.adam(CONFIG.lr), [], 3
    memory = optimizer.init(params)
    slopes = jax.jit(jax.value_and_grad(MATCH.loss, has_aux=True))
    for epoch in range(CONFIG.epochs):
        order = np.argsort(np.asarray(jax.random.uniform(part(1, epoch), (24,))), kind="stable")
        assert sorted(order.tolist()) == list(range(24))
        for step in range(steps):
            batch = gather(tables, take_rows(train, order[step * 8 : step * 8 + 8]))
            number = epoch * steps + step
            (loss, _), slope = slopes(params, {}, batch, key=part(2, number))
            updates, memory = optimizer.update(slope, memory, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
    np.testing.assert_allclose(found.losses, np.reshape(losses, (4, 3)).mean(1), rtol=1e-5)
    assert_trees(found.params, params)
    assert found.best_epoch == CONFIG.epochs - 1
    assert np.isnan(found.accuracies).all()


@pytest.mark.slow
def test_eight_devices_train_as_one_with_negatives_of_all(data, alone):
    """VLC contrasts over the whole batch: eight devices with one row each would have none."""
    spread = fit(DA4LG, FROZEN, *data, CONFIG, seed=3, devices=jax.devices())
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-5)
    np.testing.assert_array_equal(spread.accuracies, alone.accuracies)
    assert_trees(spread.params, alone.params)


@pytest.mark.slow
def test_batches_from_the_host_train_as_tables_on_the_device(data, alone):
    host = fit(DA4LG, FROZEN, *data, CONFIG, seed=3, devices=jax.devices()[:2], resident=False)
    np.testing.assert_allclose(host.losses, alone.losses, rtol=1e-5)
    np.testing.assert_array_equal(host.accuracies, alone.accuracies)
    assert_trees(host.params, alone.params)


@pytest.mark.slow
def test_seeds_side_by_side_are_seeds_alone(data):
    tables, train, valid = data
    config = dataclasses.replace(CONFIG, patience=1, epochs=6, lr=0.02)
    together = fit_seeds(MATCH, {}, tables, train, valid, config, seeds=[0, 1, 2])
    ends = []
    for i in range(3):
        one = fit(MATCH, {}, tables, train, valid, config, seed=i, devices=ONE)
        np.testing.assert_allclose(together.losses[i], one.losses, rtol=1e-4)
        np.testing.assert_array_equal(together.accuracies[i], one.accuracies)
        assert together.best_epoch[i] == one.best_epoch
        assert_trees(jax.tree.map(lambda x, i=i: x[i], together.params), one.params)
        ends.append(int(np.isfinite(one.losses).sum()))
        assert ends[-1] == min(6, one.best_epoch + 2)  # one epoch of patience
        assert one.accuracies[one.best_epoch] == np.nanmax(one.accuracies)
    assert len(set(ends)) > 1, "a test in which all seeds end alike shows less"


@pytest.mark.slow
def test_splits_of_other_lengths_train_side_by_side(data):
    tables, train, valid = data
    short, long = take_rows(train, np.arange(17)), train
    found = fit_seeds(MATCH, {}, tables, [short, long], [valid, take_rows(valid, np.arange(5))],
                      CONFIG, seeds=[0, 0])  # fmt: skip
    ticks = np.asarray(found.accuracies) * np.array([[16], [5]])
    np.testing.assert_allclose(ticks, np.round(ticks), atol=1e-5)
    same = fit_seeds(MATCH, {}, tables, [short, short], [valid, valid], CONFIG, seeds=[0, 0])
    np.testing.assert_array_equal(same.losses[0], same.losses[1])
    with pytest.raises(UserError, match="rows for 2 seeds and 3 seeds"):
        fit_seeds(MATCH, {}, tables, [short, long], None, CONFIG, seeds=[0, 1, 2])


class _Killed(Exception):
    pass


DRIVERS = pytest.mark.parametrize(
    ("resident", "devices"),
    [(True, ONE), pytest.param(False, jax.devices()[:2], marks=pytest.mark.slow)],
    ids=["device", "host"],
)


@DRIVERS
def test_a_killed_run_goes_on_to_the_bit(data, tmp_path, resident, devices):
    options = {"seed": 3, "devices": devices, "resident": resident}
    whole = fit(DA4LG, FROZEN, *data, CONFIG, **options)
    store = RunStore(tmp_path / "run")

    def kill(done, total):
        assert total == 12
        if done >= 6 and store.latest() == 1:
            raise _Killed

    with pytest.raises(_Killed):
        fit(DA4LG, FROZEN, *data, CONFIG, store=store, progress=kill, **options)
    rest = fit(DA4LG, FROZEN, *data, CONFIG, store=store, **options)
    np.testing.assert_array_equal(rest.losses, whole.losses)
    np.testing.assert_array_equal(rest.accuracies, whole.accuracies)
    for a, b in zip(*map(jax.tree.leaves, (rest.params, whole.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match=r"holds a run with seeds \[3\] and this one has \[4\]"):
        fit(DA4LG, FROZEN, *data, CONFIG, store=store, **{**options, "seed": 4})


@pytest.mark.slow
def test_a_run_that_ended_is_given_back_without_a_step(data, tmp_path):
    tables, train, valid = data
    config, store = dataclasses.replace(CONFIG, patience=1, epochs=6, lr=0.02), RunStore(tmp_path)
    first = fit_seeds(MATCH, {}, tables, train, valid, config, seeds=[0, 1, 2], store=store)
    steps = []
    again = fit_seeds(MATCH, {}, tables, train, valid, config, seeds=[0, 1, 2], store=store,
                      progress=lambda done, total: steps.append(done))  # fmt: skip
    np.testing.assert_array_equal(again.losses, first.losses)
    assert steps == []


@DRIVERS
def test_a_loss_that_is_no_number_is_named_and_not_saved(data, tmp_path, resident, devices):
    tables, train, valid = data
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0)
    order = np.argsort(np.asarray(jax.random.uniform(key, (24,)))).reshape(3, 8)
    bad = train.objects[order[1, 0], 0]
    first = next(i for i in range(3) if bad in train.objects[order[i]])
    views, store = tables.views.copy(), RunStore(tmp_path)
    views[bad] = np.nan
    with pytest.raises(NonFiniteError, match=f"step {first}: loss") as caught:
        fit(DA4LG, FROZEN, tables._replace(views=views), train, valid, CONFIG, store=store,
            devices=devices, resident=resident)  # fmt: skip
    assert caught.value.step == first
    assert store.latest() is None


def test_a_start_replaces_parts_and_nothing_else():
    run = program(MATCH, CONFIG, row_mesh(8, ONE), 0, False)
    zeros = jax.tree.map(jnp.zeros_like, MATCH.init(jax.random.key(0), {})["head"])
    state = run.init(np.int32(0), {}, {"head": zeros})
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(state["params"]))
    assert not any(x.is_deleted() for x in jax.tree.leaves(zeros))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objects": np.array([[0, 0]] * 24)}, "row 0 has object 0 twice"),
        ({"objects": np.array([[0, N]] * 24)}, "names an object outside of 0 to 11"),
        ({"text": np.full(24, -1)}, "names a text outside of 0 to 11"),
        ({"answer": np.full(24, -1)}, "row 0 has no answer among its candidates"),
        ({"answer": np.zeros(3)}, r"24 rows have texts of shape \(24,\) and answers of \(3,\)"),
        ({"objects": np.zeros((24, 1))}, "two candidates"),
    ],
)
def test_rows_that_cannot_be_are_one_sentence(data, change, words):
    tables, train, valid = data
    with pytest.raises(UserError, match=words):
        fit(MATCH, {}, tables, train._replace(**change), valid, CONFIG, devices=ONE)


def test_mistakes_are_found_before_anything_starts(data):
    tables, train, valid = data
    blank = tables.mask.copy()
    blank[train.objects[5, 1]] = False
    for changed, words in (
        (tables._replace(mask=blank), "has a candidate with zero views"),
        (tables._replace(views=tables.views[:5]), r"views has shape \(5, 2, 8\), not \[12, 2\]"),
    ):
        with pytest.raises(UserError, match=words):
            fit(MATCH, {}, changed, train, valid, CONFIG, devices=ONE)
    with pytest.raises(UserError, match="24 training rows and a batch has 64"):
        fit(MATCH, {}, tables, train, valid, TrainConfig(), devices=ONE)
    with pytest.raises(UserError, match="9 rows and there are 8 devices"):
        fit(MATCH, {}, tables, train, valid, TrainConfig(batch=9), devices=jax.devices())
    alike = tables._replace(text=tables.views[:, 0])
    with pytest.raises(UserError, match="nothing to train"):
        fit(zero_shot(), {}, alike, train, valid, CONFIG, devices=ONE)
    for wrong in ({"lr": 0.0}, {"epochs": 0}, {"clip_norm": 0.0}, {"patience": -1}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*; expected"):
            TrainConfig(**wrong)
