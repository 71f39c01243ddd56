"""Laws of every cache policy, and each against a plain implementation of its rule."""

from collections import OrderedDict

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jaxsys.core.errors import UserError
from jaxsys.offload.cache import (
    Event,
    admit,
    count_matrices,
    frequency,
    hits,
    init_cache,
    lru,
    nearest_trace,
    observe,
    prefetch,
    score,
    static,
)
from jaxsys.offload.traces import Trace, synthetic_trace

LAYERS, EXPERTS, K = 2, 5, 2
STORED = count_matrices(synthetic_trace(24, LAYERS, EXPERTS, K, sequence_tokens=8, seed=9))
POLICIES = (lru(), frequency(), frequency(0.9), score(), nearest_trace(STORED), static())
tokens = st.lists(
    st.lists(st.permutations(range(EXPERTS)), min_size=LAYERS, max_size=LAYERS),
    min_size=1, max_size=8,
)  # fmt: skip
slots_of = st.integers(0, EXPERTS)


def trace_of(drawn) -> Trace:
    experts = np.array([[order[:K] for order in token] for token in drawn])
    # Probabilities that agree with the choice, and rank the others too.
    scores = np.zeros((len(drawn), LAYERS, EXPERTS), np.float32)
    for t, token in enumerate(drawn):
        for layer, order in enumerate(token):
            scores[t, layer, list(order)] = np.arange(EXPERTS, 0, -1) / 15
    return Trace(experts, np.zeros(len(drawn), int), EXPERTS, scores)


def frozen(state):
    """Everything in a state, so that a later change would be seen."""
    memory = state.memory if isinstance(state.memory, tuple) else (state.memory,)
    return [np.array(x) for x in (state.resident, *memory)]


@settings(max_examples=25, deadline=None)
@given(tokens, slots_of, st.sampled_from(POLICIES), st.booleans())
def test_slots_are_kept_and_states_are_left_alone(drawn, slots, policy, force):
    trace = trace_of(drawn)
    resident = np.zeros((LAYERS, EXPERTS), bool)
    resident[:, :slots] = True
    state = init_cache(policy, resident)
    for t in range(len(trace)):
        for layer in range(LAYERS):
            chosen = trace.experts[t, layer].tolist()
            before = frozen(state)
            seen = observe(policy, state, Event(layer, chosen, trace.probabilities(t, layer)))
            after = admit(policy, seen, layer, chosen, pinned=chosen, force=force)
            for old, new in zip(before, frozen(state), strict=True):
                np.testing.assert_array_equal(old, new)
            np.testing.assert_array_equal(seen.resident, state.resident)
            assert after.resident.sum(1).tolist() == [slots] * LAYERS
            # What was chosen and resident stays; other layers are not touched.
            assert after.resident[layer, chosen].sum() >= state.resident[layer, chosen].sum()
            np.testing.assert_array_equal(after.resident[1 - layer], state.resident[1 - layer])
            if force and policy.adaptive:
                assert after.resident[layer, chosen].sum() == min(K, slots)
            values = policy.values(seen.memory, layer)
            assert values.shape == (EXPERTS,)
            if not force and slots:
                assert values[after.resident[layer]].sum() >= values[state.resident[layer]].sum()
            state = after


@settings(max_examples=40, deadline=None)
@given(tokens, st.integers(1, EXPERTS))
def test_lru_is_an_ordered_dictionary(drawn, slots):
    """With one expert a token no tie is left to the choice of an implementation."""
    experts = np.array([[order[:1] for order in token] for token in drawn])
    trace = Trace(experts, np.zeros(len(drawn), int), EXPERTS)
    found = 0
    for layer in range(LAYERS):
        held = OrderedDict.fromkeys(range(slots))  # the first are there, the oldest first
        for e in experts[:, layer, 0].tolist():
            found += e in held
            held[e] = None
            held.move_to_end(e)
            if len(held) > slots:
                held.popitem(last=False)
    assert hits(lru(), trace, slots) == pytest.approx(found / experts.size)


@settings(max_examples=25, deadline=None)
@given(tokens, st.sampled_from(POLICIES))
def test_hits_lie_between_nothing_and_everything(drawn, policy):
    trace = trace_of(drawn)
    assert hits(policy, trace, 0) == 0
    assert hits(policy, trace, EXPERTS) == 1
    single = Trace(trace.experts[..., :1], trace.sequence, EXPERTS)
    if policy.name == "LRU":  # a stack algorithm: more room never hurts
        rates = [hits(policy, single, n) for n in range(EXPERTS + 1)]
        assert rates == sorted(rates)


def test_scores_and_frequencies_by_hand():
    policy = score(alpha=0.5, width=1)
    memory = policy.init(1, 3)
    memory = policy.observe(memory, Event(0, (0,), np.array([0.8, 0.2, 0.0])))
    memory = policy.observe(memory, Event(0, (1,), np.array([0.4, 0.6, 0.0])))
    np.testing.assert_allclose(policy.values(memory, 0), [0.2, 0.3, 0.0])
    fading = frequency(0.5)
    memory = fading.init(1, 2)
    for e in (0, 0, 1):
        memory = fading.observe(memory, Event(0, (e,), np.ones(2) / 2))
    np.testing.assert_allclose(fading.values(memory, 0), [0.75, 1.0])


def test_the_nearest_trace_foretells_the_layers_to_come():
    # Two sequences, told apart in layer 0; layer 1 follows.
    stored = np.zeros((2, 2, 4))
    stored[0, 0, 0] = stored[0, 1, 2] = stored[1, 0, 1] = stored[1, 1, 3] = 9
    policy = nearest_trace(stored)
    for first, then in ((0, 2), (1, 3)):
        memory = policy.observe(policy.init(2, 4), Event(0, (first,), np.ones(4) / 4, sequence=5))
        assert int(np.argmax(policy.values(memory, 1))) == then
    # A new sequence begins with nothing of its own.
    memory = policy.observe(memory, Event(0, (0,), np.ones(4) / 4, sequence=6))
    assert memory.own[0].tolist() == [1, 0, 0, 0]
    assert memory.overall[0].tolist() == [1, 1, 0, 0]
    with pytest.raises(UserError, match="record a trace first"):
        nearest_trace(np.zeros((0, 2, 4)))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(EXPERTS)), st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS),
       st.integers(1, EXPERTS), st.integers(0, 3))  # fmt: skip
def test_prefetch_takes_the_best_that_are_not_there(order, here, k, most):
    predicted = np.zeros(EXPERTS)
    predicted[list(order)] = np.arange(EXPERTS, 0, -1)
    found = prefetch(predicted, np.array(here), k, most)
    assert found == [e for e in order[:k] if not here[e]][:most]
