"""The laws of the token stream: disjoint, complete, resumable, independent of the process count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.data import TokenStream, train_valid_split

sizes = st.tuples(
    st.integers(1, 5),  # batch
    st.integers(1, 7),  # length
    st.integers(1, 4),  # processes
    st.integers(0, 60),  # extra tokens
    st.integers(0, 2**31),  # seed
)


def _streams(batch, length, processes, extra, seed):
    tokens = np.arange(batch * length * processes + 1 + extra)
    return [
        TokenStream(
            tokens, batch=batch, length=length, process_id=p, num_processes=processes, seed=seed
        )
        for p in range(processes)
    ]


def _dealt(streams, steps):
    return np.concatenate([s.indices_at(i) for i in range(steps) for s in streams])


@given(sizes)
def test_every_epoch_deals_every_window_exactly_once(case):
    streams = _streams(*case)
    windows = streams[0].windows
    steps = -(-3 * windows // (case[0] * case[2]))
    dealt = _dealt(streams, steps)
    for epoch in range(3):
        assert sorted(dealt[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


@given(sizes)
def test_processes_never_share_a_window_within_a_step_inside_an_epoch(case):
    streams = _streams(*case)
    for step in range(streams[0].windows // (case[0] * case[2])):
        dealt = _dealt(streams, step + 1)
        assert len(set(dealt)) == dealt.size


@given(st.integers(1, 3), st.sampled_from([(1, 6), (2, 3), (3, 2), (6, 1)]), st.integers(0, 9))
def test_the_union_does_not_depend_on_the_number_of_processes(batch, split, seed):
    tokens = np.arange(500)
    processes, share = split

    def union(num, each):
        return [
            TokenStream(tokens, batch=each, length=4, process_id=p, num_processes=num, seed=seed)
            for p in range(num)
        ]

    np.testing.assert_array_equal(
        _dealt(union(processes, share * batch), 20), _dealt(union(1, 6 * batch), 20)
    )


@given(sizes, st.integers(0, 10**6))
def test_a_fresh_stream_resumes_anywhere(case, step):
    for first, second in zip(_streams(*case), _streams(*case), strict=True):
        first.batch_at(0)
        np.testing.assert_array_equal(first.batch_at(step), second.batch_at(step))


@given(sizes)
def test_rows_are_windows_of_the_text_with_one_token_of_overlap(case):
    stream = _streams(*case)[0]
    rows = stream.batch_at(1)
    assert rows.shape == (case[0], case[1] + 1)
    assert rows.dtype == np.int32
    # The tokens count upwards, so a window does too, and starts at a multiple of the length.
    assert (np.diff(rows, axis=1) == 1).all()
    assert (rows[:, 0] == stream.indices_at(1) * case[1]).all()


def test_epochs_and_seeds_are_shuffled_differently():
    def epoch(seed, number):
        stream = TokenStream(np.arange(401), batch=100, length=4, seed=seed)
        return tuple(stream.indices_at(number))

    orders = {epoch(0, 0), epoch(0, 1), epoch(1, 0), tuple(range(100))}
    assert len(orders) == 4


def test_the_order_is_the_one_that_runs_of_today_were_started_with():
    stream = TokenStream(np.arange(33), batch=8, length=4, seed=0)
    assert stream.indices_at(0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


def test_split_keeps_order_and_loses_nothing():
    tokens = np.arange(1000, dtype=np.uint16)
    train, valid = train_valid_split(tokens, 0.1)
    np.testing.assert_array_equal(np.concatenate([train, valid]), tokens)
    assert valid.size == 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": np.arange(8)}, "8 tokens, which is 1 windows"),
        ({"tokens": np.arange(0)}, "0 tokens"),
        ({"batch": 0}, "batch is 0"),
        ({"length": 0}, "length 0"),
        ({"process_id": 2, "num_processes": 2}, "process 2 of 2"),
        ({"num_processes": 9, "batch": 9}, "one step needs 81"),
    ],
)
def test_mistakes_are_user_errors(change, words):
    with pytest.raises(UserError, match=words):
        TokenStream(**{"tokens": np.arange(100), "batch": 2, "length": 4, **change})


def test_split_mistakes_are_user_errors():
    with pytest.raises(UserError, match=r"fraction is 1\.5"):
        train_valid_split(np.arange(10), 1.5)
    with pytest.raises(UserError, match="empty part"):
        train_valid_split(np.arange(4), 0.05)
