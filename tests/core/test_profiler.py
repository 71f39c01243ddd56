"""Profiler events: they name instructions of the compiled text, and their shares add up."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core import hlo, profiler


def test_events_name_the_instructions_that_ran():
    def f(x):
        return jnp.tanh(x @ x).sum()

    x = jnp.ones((256, 256))
    compiled = jax.jit(f).lower(x).compile()
    compiled(x)
    module = hlo.parse(compiled.as_text())
    events, seconds = profiler.capture(lambda: compiled(x))
    own = [e for e in events if e.module == module.name]
    assert own
    assert {e.op for e in own} <= set(module.instructions)
    assert 0 < sum(profiler.shared(own).values()) <= seconds


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=12))
def test_shares_add_up_to_the_time_in_which_anything_ran(spans):
    events = [
        profiler.Event(f"op{i % 3}", "", "", float(start), float(start + length))
        for i, (start, length) in enumerate(spans)
    ]
    busy = np.zeros(40, bool)
    for start, length in spans:
        busy[start : start + length] = True
    assert np.isclose(sum(profiler.shared(events).values()), busy.sum())
