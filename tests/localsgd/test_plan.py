"""Plans against brute force over every run and every assignment, and against the channel rule."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.core.errors import UserError
from jaxsys.core.timeline import simulate
from jaxsys.localsgd import plan_search
from jaxsys.localsgd.plan import SyncPlan, plan_sync, wait_s
from jaxsys.localsgd.plan_dp import schedule, schedule_many
from jaxsys.localsgd.plan_search import dfs_search
from jaxsys.localsgd.plan_time import phase_tasks

GOLDEN = [1] * 6, [2, 1, 1, 3, 1, 1]
METHODS = "dreamddp", "dfs", "equal", "full", "best"
LAUNCHES = "gated", "eager", "after"


def channel(layers, backward_s, comm_s, launch="gated", forward_s=0.0, tail_s=0.0):
    """Step through one serial channel; an oracle apart from the package's closed form."""
    compute = forward_s + sum(backward_s)
    free = 0.0
    for i in sorted(layers):
        ready = {
            "gated": forward_s + sum(backward_s[: i + 1]),
            "eager": 0.0,
            "after": compute + tail_s,
        }[launch]
        free = max(free, ready) + comm_s[i]
    return max(0.0, free - compute - tail_s)


def brute_runs(backward_s, comm_s, period, **kwargs):
    n = len(comm_s)
    cost = {
        (s, e): channel(range(s, e), backward_s, comm_s, **kwargs)
        for s in range(n + 1)
        for e in range(s, n + 1)
    }
    best = np.inf
    for inner in itertools.combinations_with_replacement(range(n + 1), period - 1):
        cuts = [0, *inner, n]
        best = min(best, sum(cost[pair] for pair in itertools.pairwise(cuts)))
    return best


def brute_any(backward_s, comm_s, period, **kwargs):
    n = len(comm_s)
    cost = {
        mask: channel([i for i in range(n) if mask >> i & 1], backward_s, comm_s, **kwargs)
        for mask in range(2**n)
    }

    def place(i, groups):  # every partition of the layers into at most `period` sets
        if i == n:
            return sum(cost[group] for group in groups)
        joined = (
            place(i + 1, (*groups[:g], groups[g] | 1 << i, *groups[g + 1 :]))
            for g in range(len(groups))
        )
        opened = [place(i + 1, (*groups, 1 << i))] if len(groups) < period else []
        return min([*joined, *opened])

    return place(0, ())


def case(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    backward_s = rng.uniform(0, 2, n)
    comm_s = rng.lognormal(0, 1, n) * rng.choice([0.3, 1, 3])
    extra = {"forward_s": float(rng.uniform(0, 2)), "tail_s": float(rng.choice([0, 0.7]))}
    return backward_s, comm_s, int(rng.integers(1, 6)), extra


def test_golden_case():
    waits = [sum(plan_sync(*GOLDEN, period).wait_s) for period in (1, 2, 3)]
    anyhow = [sum(plan_sync(*GOLDEN, period, method="best").wait_s) for period in (1, 2, 3)]
    assert waits == [4, 3, 2]
    assert anyhow == [4, 2, 2]


@pytest.mark.parametrize("block", range(8))
def test_plans_equal_brute_force_on_200_cases(block):
    for seed in range(25 * block, 25 * block + 25):
        backward_s, comm_s, period, extra = case(seed)
        launch = LAUNCHES[seed % 2]
        found = {
            m: sum(plan_sync(backward_s, comm_s, period, method=m, launch=launch, **extra).wait_s)
            for m in ("dreamddp", "dfs", "best", "equal")
        }
        runs = brute_runs(backward_s, comm_s, period, launch=launch, **extra)
        anyhow = brute_any(backward_s, comm_s, period, launch=launch, **extra)
        assert found["dreamddp"] == pytest.approx(runs, abs=1e-12), seed
        assert found["best"] == pytest.approx(anyhow, abs=1e-12), seed
        assert found["dreamddp"] <= min(found["dfs"], found["equal"]) + 1e-12, seed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("fill", [False, True])
def test_every_plan_covers_each_layer_and_predicts_by_the_channel_rule(method, launch, fill):
    for seed in range(6):
        backward_s, comm_s, period, extra = case(seed)
        plan = plan_sync(
            backward_s, comm_s, period, method=method, launch=launch, fill=fill, **extra
        )
        flat = [i for layers in plan.phases for i in layers]
        assert plan.period == period
        assert set(flat) == set(range(len(comm_s)))
        assert fill or len(flat) == len(comm_s)
        assert plan.launch == ("after" if method == "full" else launch)
        for layers, wait, comm in zip(plan.phases, plan.wait_s, plan.comm_s, strict=True):
            oracle = channel(layers, backward_s, comm_s, plan.launch, **extra)
            assert wait == pytest.approx(oracle, abs=1e-12)
            assert comm == pytest.approx(sum(comm_s[list(layers)]))
        compute = sum(backward_s) + extra["forward_s"] + extra["tail_s"]
        assert plan.predicted_s == pytest.approx(compute + sum(plan.wait_s) / period)
        assert 0 <= plan.hidden_share <= 1
        assert SyncPlan.from_json(plan.to_json()) == plan
        assert len({plan, plan_sync(backward_s, comm_s, period)}) <= 2  # hashable


def test_full_waits_for_everything_and_equal_takes_ceil():
    full = plan_sync(*GOLDEN, 3, method="full")
    assert full.phases == ((), (), (0, 1, 2, 3, 4, 5))
    assert full.wait_s == (0, 0, 9)
    assert full.hidden_share == 0
    assert plan_sync([1] * 7, [1] * 7, 3, method="equal").phases == ((0, 1, 2), (3, 4, 5), (6,))
    assert plan_sync([1] * 4, [1] * 4, 3, method="equal").phases == ((0, 1), (2, 3), ())


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("scale", [0.01, 1, 30])
def test_no_iteration_is_empty_while_layers_suffice(launch, scale):
    comm_s = scale * np.random.default_rng(1).lognormal(0, 1, 11)
    for period in (1, 4, 11):
        assert all(plan_sync(np.ones(11), comm_s, period, launch=launch).phases)
    assert [len(layers) for layers in plan_sync([1, 1], [1, 1], 5).phases] == [1, 1, 0, 0, 0]


def test_fill_adds_syncs_and_no_wait():
    rng = np.random.default_rng(2)
    backward_s, comm_s = rng.uniform(0.5, 1.5, 40), rng.lognormal(-1, 1, 40)
    added = 0
    for launch in ("gated", "eager"):
        bare = plan_sync(backward_s, comm_s, 5, launch=launch)
        filled = plan_sync(backward_s, comm_s, 5, launch=launch, fill=True)
        assert all(set(a) <= set(b) for a, b in zip(bare.phases, filled.phases, strict=True))
        assert filled.wait_s == pytest.approx(bare.wait_s, abs=1e-12)
        added += sum(map(len, filled.phases)) - 40
        # Nothing more fits: one more layer anywhere adds wait.
        for layers, wait in zip(filled.phases, filled.wait_s, strict=True):
            for i in set(range(40)) - set(layers):
                assert channel([*layers, i], backward_s, comm_s, launch) > wait
    assert added > 0


def test_search_beyond_the_exact_size_never_loses_and_often_gains(monkeypatch):
    gains = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        backward_s, comm_s = rng.uniform(0.5, 1.5, 30), rng.lognormal(1, 1, 30)
        for launch in ("gated", "eager"):
            run = sum(plan_sync(backward_s, comm_s, 4, launch=launch).wait_s)
            any_ = sum(plan_sync(backward_s, comm_s, 4, method="best", launch=launch).wait_s)
            assert any_ <= run + 1e-12
            gains += any_ < run - 1e-9
    assert gains >= 12
    # On small cases the local search comes near the exact answer, and never below it.
    excess = []
    for seed in range(40):
        backward_s, comm_s, period, extra = case(seed)
        exact = sum(plan_sync(backward_s, comm_s, period, method="best", **extra).wait_s)
        with monkeypatch.context() as patch:
            patch.setattr(plan_search, "EXACT_LAYERS", 0)
            local = sum(plan_sync(backward_s, comm_s, period, method="best", **extra).wait_s)
        assert local >= exact - 1e-12
        excess.append(local - exact)
    assert np.mean(np.array(excess) < 1e-9) > 0.8


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_wait_laws(data):
    n = data.draw(st.integers(1, 7))
    times = st.lists(st.floats(0, 10), min_size=n, max_size=n)
    backward_s, comm_s = data.draw(times), data.draw(times)
    forward_s, tail_s = data.draw(st.floats(0, 5)), data.draw(st.floats(0, 5))
    layers = data.draw(st.sets(st.integers(0, n - 1)))
    options = {"forward_s": forward_s, "tail_s": tail_s}
    waits = {
        launch: wait_s(layers, backward_s, comm_s, launch=launch, **options) for launch in LAUNCHES
    }
    for launch, wait in waits.items():
        oracle = channel(layers, backward_s, comm_s, launch, **options)
        assert wait == pytest.approx(oracle, abs=1e-9)
        tasks = phase_tasks(layers, backward_s, comm_s, launch=launch, **options)
        assert simulate(tasks).makespan_s == pytest.approx(
            forward_s + sum(backward_s) + tail_s + wait, abs=1e-9
        )
    assert waits["eager"] <= waits["gated"] + 1e-9
    assert waits["gated"] <= waits["after"] + 1e-9
    assert waits["after"] == pytest.approx(sum(comm_s[i] for i in layers), abs=1e-9)


def recursive_dfs(backward_s, comm_s, first, left):
    """A.4's recursion with the remaining time from a clean channel, for separable cases."""
    n = len(comm_s)
    if first == n:
        return 0.0
    if left == 1:
        return channel(range(first, n), backward_s, comm_s)
    for j in range(first, n):
        wait = channel(range(first, j + 1), backward_s, comm_s)
        if wait > 0:
            take = wait + recursive_dfs(backward_s, comm_s, j + 1, left - 1)
            return take if j == first else min(take, recursive_dfs(backward_s, comm_s, j, left - 1))
    return 0.0


def test_dfs_reports_the_wait_of_its_schedule_where_no_layer_is_waited_for():
    # With communication longer than each backward the channel never idles, so the release's
    # carried-over time is harmless and its report equals the truth and the plain recursion.
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, period = int(rng.integers(2, 12)), int(rng.integers(1, 5))
        backward_s = rng.uniform(0.2, 1, n)
        comm_s = rng.uniform(1.01, 4, n)
        phases, reported = dfs_search(backward_s, comm_s, period)
        clean = sum(channel(layers, backward_s, comm_s) for layers in phases)
        assert [i for layers in phases for i in layers] == list(range(n))
        assert reported == pytest.approx(clean, abs=1e-9)
        assert reported == pytest.approx(recursive_dfs(backward_s, comm_s, 0, period), abs=1e-9)


def test_dfs_misreports_where_the_channel_idles():
    # The channel idles for layer 1, whose communication then has 4 s left. The release counts 3: it
    # goes on with the second left over from layer 1 in place of layer 2's two.
    backward_s, comm_s = [1.0, 2.0, 2.0, 2.0], [1.0, 3.5, 1.0, 1.0]
    phases, reported = dfs_search(backward_s, comm_s, 2)
    assert phases == ((0, 1), (2, 3))
    assert reported == 1.5
    assert sum(channel(layers, backward_s, comm_s) for layers in phases) == 1.0


def test_schedule_traces_period_and_batches():
    rng = np.random.default_rng(3)
    backward_s = jnp.asarray(rng.uniform(0.5, 1.5, 20), jnp.float32)
    comm_s = jnp.asarray(rng.lognormal(0, 1, (7, 20)), jnp.float32)
    periods = jnp.arange(1, 7)

    def total(comm_s, period):
        return schedule(backward_s, comm_s, period, max_period=6)[1].sum()

    grid = jax.jit(jax.vmap(jax.vmap(total, (None, 0)), (0, None)))(comm_s, periods)
    want = [
        [sum(plan_sync(backward_s, c, p).wait_s) for p in periods.tolist()]
        for c in np.asarray(comm_s)
    ]
    np.testing.assert_allclose(grid, want, rtol=1e-4, atol=1e-4)
    assert np.all(np.diff(grid, axis=1) <= 1e-4)  # a longer period never waits more in a period

    ends, waits = schedule_many(backward_s, comm_s, 4, max_period=6, chunk=3)
    assert ends.shape == waits.shape == (7, 6)
    np.testing.assert_allclose(waits.sum(axis=1), grid[:, 3], rtol=1e-5)
    for row, comm in zip(np.asarray(ends), np.asarray(comm_s), strict=True):
        cuts = [0, *row.tolist()]
        clean = sum(
            channel(range(s, e), np.asarray(backward_s), comm) for s, e in itertools.pairwise(cuts)
        )
        assert clean == pytest.approx(sum(plan_sync(backward_s, comm, 4).wait_s), rel=1e-4)
        assert row[3] == row[4] == row[5] == 20


def test_schedule_keeps_no_layer_by_layer_table():
    n = 4096

    def plan(backward_s, comm_s):
        return schedule(backward_s, comm_s, 4, max_period=4)

    compiled = jax.jit(plan).lower(jnp.ones(n), jnp.ones(n)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 100 * n * 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"period": 0}, "period is 0"),
        ({"period": -3}, "period is -3"),
        ({"comm_s": [1, -1]}, r"comm_s\[1\] is -1"),
        ({"backward_s": [1, float("nan")]}, r"backward_s\[1\] is nan"),
        ({"comm_s": [1, float("inf")]}, r"comm_s\[1\] is inf"),
        ({"comm_s": [1]}, "backward_s has 2 layers and comm_s has 1"),
        ({"comm_s": [], "backward_s": []}, "at least one layer"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"launch": "later"}, "launch is 'later'"),
        ({"forward_s": -1.0}, "forward_s is -1"),
        ({"tail_s": float("nan")}, "tail_s is nan"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, says):
    good = {"backward_s": [1, 1], "comm_s": [1, 1], "period": 2}
    given_ = {**good, **change}
    with pytest.raises(UserError, match=says):
        plan_sync(given_.pop("backward_s"), given_.pop("comm_s"), given_.pop("period"), **given_)


def test_bad_phases_and_bounds_are_refused():
    with pytest.raises(UserError, match="there are 2 layers"):
        wait_s([2], [1, 1], [1, 1])
    with pytest.raises(UserError, match="remove the repeated"):
        wait_s([1, 1], [1, 1], [1, 1])
    with pytest.raises(UserError, match="max_period"):
        schedule(jnp.ones(2), jnp.ones(2), 3, max_period=2)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("phases", [[0], [7]], "there are 2 layers"),
        ("phases", [[0], []], "synchronises 1 of 2"),
        ("phases", [["x"], [1]], "wrong kind"),
        ("wait_s", [0.0], "one finite"),
        ("wait_s", [0.0, float("nan")], "one finite"),
        ("launch", "later", "launch is 'later'"),
        ("secret", 1, "unknown field secret"),
    ],
)
def test_a_foreign_plan_is_checked(field, value, says):
    text = plan_sync([1, 1], [2, 2], 2).to_json()
    with pytest.raises(UserError, match=says):
        SyncPlan.from_json(json.dumps({**json.loads(text), field: value}))
    with pytest.raises(UserError, match="not JSON"):
        SyncPlan.from_json("{")
