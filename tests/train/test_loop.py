"""The loop: a killed and resumed run is the uninterrupted one, and nothing broken is saved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.core.checkpoint import RunStore
from jaxsys.core.errors import UserError
from jaxsys.data import ByteTokenizer, TokenStream
from jaxsys.train import NonFiniteError, check_finite, iterate, optimizers

STEPS = 12


def _bigram():
    """A byte bigram model with dropout: parameters, optimiser state and a key all matter."""
    optimizer = optimizers.adamw(1e-2, warmup_steps=3, total_steps=STEPS, clip_norm=1.0)
    tokens = ByteTokenizer().encode("what is learned at night is known by day. " * 30)
    stream = TokenStream(tokens, batch=4, length=16, seed=5)

    def loss_fn(params, batch, key):
        hidden = params["embed"][batch[:, :-1]]
        hidden = hidden * jax.random.bernoulli(key, 0.9, hidden.shape) / 0.9
        logits = hidden @ params["out"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def step(state, batch):
        params, opt, key = state
        key, drop = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, drop)
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt, key), {"loss": loss}

    def initial(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        params = {
            "embed": 0.1 * jax.random.normal(keys[0], (256, 8)),
            "out": 0.1 * jax.random.normal(keys[1], (8, 256)),
            "bias": jnp.zeros((1, 1, 256)),
        }
        return params, optimizer.init(params), keys[2]

    return step, initial, stream.batch_at


def test_a_killed_and_resumed_run_has_bit_identical_losses(tmp_path):
    step, initial, batch_at = _bigram()
    whole = [float(info["loss"]) for _, _, info in iterate(step, initial(0), batch_at, steps=STEPS)]
    assert whole[-1] < whole[0]

    store = RunStore(tmp_path)
    seen: dict[int, float] = {}

    def killed_step(state, batch):
        if len(seen) == 8:
            raise KeyboardInterrupt
        return step(state, batch)

    def run_until_killed():
        run = iterate(
            killed_step,
            initial(0),
            batch_at,
            steps=STEPS,
            save_every=3,
            store=store,
            meta={"seed": 5},
        )
        for i, _, info in run:
            seen[i] = float(info["loss"])

    with pytest.raises(KeyboardInterrupt):
        run_until_killed()
    assert store.latest() == 5

    state, meta = store.restore(5, initial(99))
    assert meta == {"seed": 5}
    for i, _, info in iterate(
        step, state, batch_at, start=6, steps=STEPS, save_every=3, store=store
    ):
        if i in seen:
            assert seen[i] == float(info["loss"])
        seen[i] = float(info["loss"])
    assert [seen[i] for i in range(STEPS)] == whole
    assert store.latest() == STEPS - 1


def _count(state, batch):
    return {"n": state["n"] + 1}, {"loss": batch}


@pytest.mark.parametrize(
    ("save_every", "start", "steps", "saved"),
    [(0, 0, 5, [4]), (2, 0, 5, [1, 3, 4]), (2, 3, 6, [3, 5]), (1, 5, 5, [])],
)
def test_saves_when_due_and_at_the_end(tmp_path, save_every, start, steps, saved):
    store = RunStore(tmp_path, keep=9)
    numbers = []
    for i, state, _ in iterate(
        _count, {"n": start}, float, start=start, steps=steps, save_every=save_every, store=store
    ):
        numbers.append(i)
        assert state["n"] == i + 1
        if i in saved:
            assert store.latest() == i
    assert numbers == list(range(start, steps))
    assert list(store.steps()) == saved
    for i in saved:
        assert store.restore(i, {"n": 0})[0] == {"n": i + 1}


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    store = RunStore(tmp_path)
    losses = [1.0, 0.5, float("nan"), 0.1]

    def guard(i, info):
        check_finite(i, info["loss"])

    run = iterate(
        _count, {"n": 0}, losses.__getitem__, steps=4, save_every=1, store=store, guard=guard
    )
    with pytest.raises(NonFiniteError, match="step 2: loss") as caught:
        list(run)
    assert caught.value.step == 2
    assert store.latest() == 1


def test_check_finite_names_the_first_bad_layer_or_the_loss():
    names = ["embed", "h.0", "head"]
    check_finite(0, 1.0, np.ones(3), names)
    check_finite(0, jnp.ones(2), jnp.ones(3), names)
    with pytest.raises(NonFiniteError, match=r"step 4: h\.0 is not finite"):
        check_finite(4, float("nan"), np.array([1.0, np.nan, np.inf]), names)
    with pytest.raises(NonFiniteError, match="step 4: loss"):
        check_finite(4, jnp.array([1.0, jnp.inf]), np.ones(3), names)
    with pytest.raises(UserError, match="one norm for each layer"):
        check_finite(4, 1.0, np.ones(2), names)


def test_mistakes_are_raised_by_the_call():
    with pytest.raises(UserError, match="start is -1"):
        iterate(_count, {}, float, start=-1, steps=3)
    with pytest.raises(UserError, match="save_every -2"):
        iterate(_count, {}, float, steps=3, save_every=-2)
