"""Recorded routing: what is written is read, what is spoilt is refused, what is drawn has laws."""

import contextlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jaxsys.core.errors import UserError
from jaxsys.offload.cache import count_matrices
from jaxsys.offload.traces import Recorder, Trace, synthetic_trace


def test_what_is_written_is_read(tmp_path):
    trace = synthetic_trace(40, 3, 6, 2, sequence_tokens=16, seed=1)
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    np.testing.assert_array_equal(again.experts, trace.experts)
    np.testing.assert_array_equal(again.sequence, trace.sequence)
    np.testing.assert_allclose(again.scores, trace.scores, atol=1e-3)
    np.testing.assert_allclose(again.early, trace.early, atol=1e-3)
    bare = Trace(trace.experts, trace.sequence, 6)
    bare.save(tmp_path / "bare.npz")
    assert Trace.load(tmp_path / "bare.npz").scores is None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "trace.npz"
    synthetic_trace(12, 2, 4, 1).save(path)
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_spoilt_file_is_refused_or_read_as_a_trace(written, tmp_path_factory, data):
    spoilt = bytearray(written)
    if data.draw(st.booleans()):
        del spoilt[data.draw(st.integers(0, len(spoilt) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if spoilt:
            spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "spoilt.npz"
    path.write_bytes(bytes(spoilt))
    with contextlib.suppress(UserError):  # nothing else may be raised
        found = Trace.load(path)
        assert found.experts.max(initial=0) < found.n_experts


@pytest.mark.parametrize(
    "change",
    [
        {"experts": np.zeros((3, 2), np.int16)},
        {"experts": np.zeros((3, 2, 1), np.float32)},
        {"experts": np.full((3, 2, 1), 9, np.int16)},
        {"sequence": np.array([1, 0, 0], np.int32)},
        {"sequence": np.zeros((3, 1), np.int32)},
        {"n_experts": np.zeros(2, np.int32)},
        {"n_experts": np.float32(np.nan)},
        {"scores": np.zeros((3, 2, 5), np.float16)},
        {"surplus": np.zeros(1)},
        {"sequence": np.array([None, None, None])},
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, change):
    good = {"experts": np.zeros((3, 2, 1), np.int16), "sequence": np.zeros(3, np.int32),
            "n_experts": np.int32(4)}  # fmt: skip
    np.savez(tmp_path / "odd.npz", **(good | change))
    with pytest.raises(UserError):
        Trace.load(tmp_path / "odd.npz")
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(UserError, match="record it again"):
        Trace.load(tmp_path / "plain.npy")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0.0, 1.0), st.integers(1, 20))
def test_a_cut_keeps_sequences_whole(n, share, length):
    trace = synthetic_trace(n, 1, 3, 1, sequence_tokens=length, seed=3)
    first, rest = trace.split(share)
    assert len(first) + len(rest) == n
    assert not set(first.sequence) & set(rest.sequence)
    assert len(first) >= share * n - 1e-6
    np.testing.assert_array_equal(np.concatenate([first.experts, rest.experts]), trace.experts)
    assert count_matrices(trace).sum() == trace.experts.size


def test_drawn_routing_has_the_laws_that_were_asked_for():
    shape = (3000, 1, 8, 2)
    for options, check in (
        ({"zipf": 0.0, "topic": 0.0, "locality": 0.0}, lambda f: f.max() < 0.32),
        ({"zipf": 2.0, "topic": 0.0, "locality": 0.0}, lambda f: f.max() > 0.6),
    ):
        found = synthetic_trace(*shape, **options)
        assert check(found.frequency())
        assert found.frequency().sum() == pytest.approx(2)
        assert all(len(set(row)) == 2 for row in found.experts[:, 0].tolist())
    still = synthetic_trace(*shape, locality=1.0, sequence_tokens=100)
    for sequence in np.unique(still.sequence):
        assert np.unique(still.experts[still.sequence == sequence], axis=0).shape[0] == 1
    sure = synthetic_trace(*shape, early_accuracy=1.0)
    np.testing.assert_array_equal(sure.early, sure.scores)
    guess = synthetic_trace(*shape, early_accuracy=0.85)
    early = np.sort(np.argsort(-guess.early, axis=-1)[..., :2])
    agree = (early == np.sort(guess.experts)).all(-1).mean()
    assert 0.8 < agree < 0.95


def test_a_recorder_joins_steps_by_sequence():
    recorder = Recorder(3)
    for step in range(2):
        for layer in range(2):
            experts = np.array([[step], [2]])
            odds = np.full((2, 3), 0.1 * step)
            recorder.add(layer, experts, sequence=np.array([7, 4]), scores=odds)
    trace = recorder.trace()
    assert trace.sequence.tolist() == [4, 4, 7, 7]
    assert trace.experts[:, 0, 0].tolist() == [2, 2, 0, 1]
    assert trace.scores[:, 0, 0].round(1).tolist() == [0.0, 0.1, 0.0, 0.1]
    with pytest.raises(UserError, match="record whole steps"):
        Recorder(3).trace()
    recorder.add(0, np.array([[1]]))
    with pytest.raises(UserError, match="record whole steps"):
        recorder.trace()
